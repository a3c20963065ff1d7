"""Compare cache methods on a diffusion transformer; `--help` lists the arguments.

    python benchmark/cache_execute.py --cache_methods None Fast Fast+AdaCorrection

is ``python -m benchmark compare ...``, from any directory and under torchrun.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # in place of this file's folder

    from benchmark.cli import start

    start(["compare", *sys.argv[1:]])
