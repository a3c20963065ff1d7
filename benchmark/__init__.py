"""The benchmark: `python -m benchmark --help`."""
