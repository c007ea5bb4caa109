"""A request from its ask to its answer: plain values, their bounds and what can go wrong."""
