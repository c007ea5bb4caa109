"""The router process: a request's life from gRPC in to joules out. Start at `streams.py`."""
