"""Meters, the attribution ledger, and the agent that reads a host's meters."""
