"""One rank process: its main loop, its runner, and how logits become tokens."""
