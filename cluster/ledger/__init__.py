"""The ledger store: what every request cost, kept over restarts, and what tenants may still spend today."""
