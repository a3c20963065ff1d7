"""Time of a reused transformer call as a share of a full one, for every method, in one run.

Uncached and cached generations take turns; each call is timed alone, with the accelerator drained,
and told apart by the trace. Writes a JSON file and prints a table.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

import torch  # noqa: E402
from diffusers import FluxPipeline  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402

from xfuser_adacorr import (  # noqa: E402
    CacheConfig,
    cache_summary,
    disable_cache,
    enable_cache,
    load_family_config,
)


class TimedTransformer:
    """Times every call of a pipeline's transformer, the cache included."""

    def __init__(self, pipe: Any) -> None:
        self._pipe, self._transformer = pipe, pipe.transformer
        self.seconds: list[float] = []

    def __enter__(self) -> "TimedTransformer":
        cls = type(self._transformer)
        call, seconds = cls.__call__, self.seconds

        def timed(module: Any, *args: Any, **kwargs: Any) -> Any:
            _drain()
            start = time.perf_counter()
            output = call(module, *args, **kwargs)
            _drain()
            seconds.append(time.perf_counter() - start)
            return output

        self._transformer.__class__ = type(cls.__name__, (cls,), {"__call__": timed})
        self._original = cls
        return self

    def __exit__(self, *error: Any) -> None:
        self._transformer.__class__ = self._original


def _drain() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_calls(pipe: Any, config: CacheConfig | None, steps: int, size: int) -> dict[str, list]:
    """Seconds of the full and of the reused calls of one generation."""
    if config is not None:
        enable_cache(pipe, config)
    try:
        with TimedTransformer(pipe) as timed:
            pipe(
                "a red circle on a blue plain background",
                num_inference_steps=steps,
                height=size,
                width=size,
                max_sequence_length=min(512, pipe.tokenizer_2.model_max_length),
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            )
        if config is None:
            return {"full": timed.seconds, "reused": []}
        fractions = [call.compute_fraction for call in cache_summary(pipe).trace.calls]
    finally:
        if config is not None:
            disable_cache(pipe)
    shares = list(zip(fractions, timed.seconds, strict=True))
    return {
        "full": [s for fraction, s in shares if fraction == 1.0],
        # Fb runs its first block on every call: its reused calls are those that ran least
        "reused": [s for fraction, s in shares if fraction == min(fractions) < 1.0],
    }


def measure(pipe: Any, steps: int, size: int, repetitions: int) -> dict[str, Any]:
    """Median and quartiles of a reused call over the median uncached call, per method."""
    methods = {"None": None, **load_family_config(ROOT / "configs" / "flux.yaml")}
    seconds = {name: {"full": [], "reused": []} for name in methods}
    for turn in tqdm(range(repetitions + 1), desc="rounds"):
        for name, config in methods.items():
            timed = time_calls(pipe, config, steps, size)
            if turn > 0:  # the first round warms up
                for kind in timed:
                    seconds[name][kind] += timed[kind]
    full = statistics.median(seconds["None"]["full"])
    result = {"full_call_s": full, "steps": steps, "repetitions": repetitions, "methods": {}}
    for name, timed in seconds.items():
        if timed["reused"]:
            low, middle, high = statistics.quantiles(timed["reused"], n=4)
            result["methods"][name] = {
                "calls": len(timed["reused"]),
                "share_of_full_call": {
                    q: s / full for q, s in {"q1": low, "median": middle, "q3": high}.items()
                },
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "benchmark" / "pipelines" / "flux"))
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--size", type=int, default=64, help="side of the picture in pixels")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipe = FluxPipeline.from_pretrained(arguments.model)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    result = measure(pipe, arguments.num_inference_steps, arguments.size, arguments.repetitions)
    result["environment"] = {
        "torch": torch.__version__,
        "device": str(pipe.device),
        "threads": torch.get_num_threads(),
    }
    table = Table(title=f"full call: {1e3 * result['full_call_s']:.2f} ms")
    for column in ("method", "reused call / full call", "quartiles", "calls"):
        table.add_column(column)
    for name, entry in result["methods"].items():
        share = entry["share_of_full_call"]
        table.add_row(
            name,
            f"{100 * share['median']:.2f} %",
            f"{100 * share['q1']:.2f} to {100 * share['q3']:.2f} %",
            str(entry["calls"]),
        )
    Console().print(table)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
