"""Train LazyDiT's probes (lazy.safetensors) for a model of the benchmark's families."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.train_l2c import main
from xfuser_adacorr.model_executor.cache.calibration.lazy import train_lazy

if __name__ == "__main__":
    main(train_lazy, __doc__, "lazy.safetensors")
