"""One replica: engine, models, parallelism, checkpoints, energy. Never imports Ray or `cluster`."""
