"""What the benchmark's further commands share: exit codes, and arguments that are passed on."""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence

from rich.console import Console

from benchmark.errors import BenchmarkError


def exit_code(run: Callable[[], None]) -> int:
    """Run a command: 0, 2 for a mistake of the user's, told in one line, 130 if interrupted."""
    errors = Console(stderr=True)
    try:
        run()
    except BenchmarkError as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print("interrupted; the same command with --resume goes on", markup=False)
        return 130
    return 0


def run_command(
    run: Callable[[Sequence[str], Console], None],
    argv: Sequence[str] | None,
    least_width: int = 130,
) -> int:
    """`exit_code` of ``run(argv, console)``; ``argv`` is the process's own if None.

    The console is at least so many columns wide, so that tables are not cut off.
    """
    console = Console()
    console.width = max(console.width, least_width)
    return exit_code(lambda: run(sys.argv[1:] if argv is None else argv, console))


def passed_on(given: Namespace, names: Sequence[str]) -> list[str]:
    """The arguments of these names as `settings.read_settings`, which checks them, takes them."""
    arguments = []
    for name in names:
        value = getattr(given, name)
        if isinstance(value, list):
            arguments += [f"--{name}", *value]
        elif value is not None:
            arguments.append(f"--{name}={value}")
    return arguments
