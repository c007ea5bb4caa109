"""The benchmark harness: `python -m bench engine|line|edge`. Results are JSON files in `bench/results/`."""
