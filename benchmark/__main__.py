"""``python -m benchmark``."""

import sys

from benchmark.cli import start

if __name__ == "__main__":
    start(sys.argv[1:])
