"""One static schedule from the traces of several runs."""

import math
from collections.abc import Sequence

from xfuser_adacorr.core.refreshes import majority_steps, ranked_steps

from .context import Trace

RULES = ("budget", "majority")


def schedule_from_traces(
    traces: Sequence[Trace], *, rule: str = "budget", computed_steps: int | None = None
) -> tuple[int, ...]:
    """Steps for ``schedule=``, by how often the runs refreshed them.

    Args:
        traces: of runs with the same steps, one or more; a step with several branches counts by the
            share of them that was refreshed.
        rule: ``budget`` takes the steps refreshed most often, as many as the runs refreshed on
            average; ``majority`` those refreshed in more than half of the runs.
        computed_steps: another number for ``budget``.

    Raises `ValueError` for traces of different lengths and what is not accepted.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if rule == "majority" and computed_steps is not None:
        raise ValueError("computed_steps is for the rule 'budget'")
    if not traces:
        raise ValueError("traces must not be empty")
    if not all(trace.calls for trace in traces):
        raise ValueError("every trace must have calls")
    lengths = sorted({1 + max(call.step_index for call in trace.calls) for trace in traces})
    if len(lengths) > 1:
        raise ValueError(
            f"traces must be of runs with the same number of steps; these have "
            f"{', '.join(map(str, lengths))} steps"
        )
    num_steps = lengths[0]
    shares = [sum(_share(trace, i) for trace in traces) / len(traces) for i in range(num_steps)]
    if rule == "majority":
        return majority_steps(shares)
    if computed_steps is None:
        computed_steps = max(1, math.floor(sum(shares) + 0.5))
    if not 1 <= computed_steps <= num_steps:
        raise ValueError(f"computed_steps must be from 1 to {num_steps}, got {computed_steps}")
    return ranked_steps(shares, computed_steps)


def _share(trace: Trace, step: int) -> float:
    """Refreshed calls over all calls of a step."""
    calls = [call.refreshed for call in trace.calls if call.step_index == step]
    return sum(calls) / len(calls) if calls else 0.0
