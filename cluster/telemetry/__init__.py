"""Traces and metrics of the router, and the names they go by."""
