"""The error that every command of the benchmark tells in one line."""


class BenchmarkError(Exception):
    """Something the user can put right; its message is one line that says how."""
