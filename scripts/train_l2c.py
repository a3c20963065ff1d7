"""Train Learning-to-Cache's router (l2c.safetensors) for a model of the benchmark's families."""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmark.models.loading import call_arguments, entry_text
from scripts.calibrate import load, make_parser, output_type, read_arguments
from xfuser_adacorr.model_executor.cache.calibration.l2c import train_l2c

FITTED = (("iterations", int), ("learning_rate", float), ("penalty", float), ("seed", int))


def main(train: Callable[..., Path], description: str, file_name: str) -> None:
    """Train on development prompts, in calls of ``--batch_size``; an interrupted training goes on
    from ``--work``."""
    parser = make_parser(description, file_name)
    parser.add_argument("--batch_size", type=int, default=2, help="prompts of a call (2)")
    parser.add_argument("--work", type=Path, help="file that an interrupted training goes on from")
    for name, kind in FITTED:
        parser.add_argument(f"--{name}", type=kind, help="default: the function's")
    arguments = read_arguments(parser)
    settings, given, size = arguments.settings, vars(arguments), arguments.batch_size
    pipe, entries = load(settings)
    prompts = []
    for start in range(0, len(entries), size):
        group = entries[start : start + size]
        texts = [entry_text(entry) for entry in group]
        prompts.append({**call_arguments(settings, pipe, texts), "seed": group[0]["seed"]})
    try:
        path = train(
            pipe,
            prompts,
            num_inference_steps=arguments.num_inference_steps,
            output=arguments.output,
            output_type=output_type(settings),
            work=arguments.work,
            **{name: given[name] for name, _ in FITTED if given[name] is not None},
        )
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {path}")


if __name__ == "__main__":
    main(train_l2c, __doc__, "l2c.safetensors")
