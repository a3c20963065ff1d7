"""How much is drawn: few examples, always the same; ``FUZZ_EXAMPLES=5000`` draws that many anew."""

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))


def fuzzed(examples: int, **strategies: Any) -> Callable[[Callable], Callable]:
    """Run a test on drawn arguments: on ``examples`` of them, or on `EXAMPLES` new ones."""
    kept = settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        deadline=None,
        database=None,
        print_blob=bool(EXAMPLES),
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if EXAMPLES else [])],
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: kept(given(**strategies)(test))
