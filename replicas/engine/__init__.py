"""The control side of a replica: schedule, run, commit. Everything but `engine.py` is pure."""
