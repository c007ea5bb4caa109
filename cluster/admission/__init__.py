"""Who comes in, who waits and in which order, who is refused: pure, but for the gate outside this folder."""
