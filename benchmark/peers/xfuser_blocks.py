"""The two caches in xfuser itself, in one process.

They ask xfuser's parallel state for the number of ranks, which is 1 here, and have no reset: a
picture would begin with the last one's residual. So they are applied anew for every picture.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

from benchmark.peers import Run
from benchmark.peers.restoring import before_every_picture
from xfuser_adacorr.model_executor.cache.xfuser_adapters.platform import load_xfuser


def _enable(name: str) -> Callable[..., Callable[[], None]]:
    def enable(pipe: Any, options: dict[str, Any], run: Run) -> Callable[[], None]:
        load_xfuser()  # also where there is no accelerator, which a plain import does not survive
        from xfuser.model_executor.cache import utils
        from xfuser.model_executor.cache.adapters import flux

        apply, transformer = getattr(flux, f"apply_{name}"), pipe.transformer
        blocks = transformer.transformer_blocks
        single_blocks = transformer.single_transformer_blocks
        alone = mock.patch.object(utils, "get_sequence_parallel_world_size", lambda: 1)
        alone.start()

        def begin() -> None:
            transformer.transformer_blocks = blocks
            transformer.single_transformer_blocks = single_blocks
            apply(
                transformer,
                num_steps=run.num_inference_steps,
                return_hidden_states_first=False,
                **options,
            )

        begin()
        before_every_picture(pipe, begin)
        return alone.stop  # the blocks are restored with the other attributes

    return enable


ENABLE = {name: _enable(name) for name in ("fbcache", "teacache")}
"""By method: (pipeline, options, run) -> what ends it."""
