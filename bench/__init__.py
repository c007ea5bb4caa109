"""The benchmark harness: `python -m bench --help`. Results are JSON files in `bench/results/`."""
