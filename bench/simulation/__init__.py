"""The router's own code over simulated replicas, in virtual time: seeded and exact."""
