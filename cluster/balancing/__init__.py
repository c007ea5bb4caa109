"""Which replica takes a request: pure functions of load, of what is cached where, and of joules."""
