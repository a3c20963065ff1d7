"""A decision for each sample of a batch: those to be refreshed are computed in one smaller batch.

Every sample is a generation of its own, with the correction, histories and budget that it would
have alone. What all of their decisions need is read at once; the samples that are refreshed go
through the transformer together, the others get their forecasts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xfuser_adacorr.core.batch import chosen_rows, joined_rows, repeats, sample_rows

from .context import Branch, layout_of
from .correction import make_sample_compensations
from .decision import ActiveCall
from .diffusers_adapters.registry import ModelFamily
from .engine import CacheEngine


class PerSampleEngine(CacheEngine):
    """Decides for each sample, before the transformer is entered.

    Which rows of a batch are one sample's is found at a generation's first call: in families that
    batch guidance, rows with equal latents, in as many copies as the family has, are the branches
    of one sample, and are decided as one.

    Raises `ValueError` for families that do not describe their ``batch_arguments``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.family.batch_arguments:
            raise ValueError(
                f"per_sample must be False for family {self.family.name!r}: it does not describe "
                "its batch_arguments, the arguments that have a row for each sample"
            )

    def _new_corrections(self) -> list[Any]:
        return []  # the number of samples is not known yet

    def _answer(
        self, whole: Callable[[], Any], original: Callable[..., Any], arguments: dict[str, Any]
    ) -> Any:
        given = arguments[self.family.latents]
        calls = self._decide_each(given, torch.as_tensor(arguments[self.family.timestep]))
        if len(calls) > 1:
            check_arguments(self.family, arguments)
        refreshed = [i for i, call in enumerate(calls) if call.record.refreshed]
        output = None
        if len(refreshed) == len(calls):
            output = whole()
        elif refreshed:
            output = original(**chosen_arguments(self.family, arguments, len(calls), refreshed))
        return self._finish_each(calls, refreshed, output, arguments.get("return_dict", True))

    def _decide_each(self, given: Tensor, timestep: Tensor) -> list[ActiveCall]:
        """Read what all decisions need at once, then refresh or reuse each sample."""
        branches = self._branches(given)
        calls = self._calls(given, timestep, branches)
        measured = {
            (name, i): scalars
            for i, call in enumerate(calls)
            for name, scalars in self._measured(call).items()
        }
        guided = [repeats(given, self._copies)] if self._may_be_guided(given) else []
        read = self.scope.read_groups(
            {**measured, "time": self._timestep(timestep), "guided": guided}, reduced=()
        )
        time = next(iter(read["time"]), None)
        for i, branch in enumerate(branches):
            self._learn(branch, read["found", i])
        done, last = (branches[0].calls, branches[0].last_step) if branches else (0, None)
        step = self.clock.locate(done, time, last)
        if last is not None and not self.clock.continues(last, step):
            self._begin_unannounced(last, step)
            step, calls = self.clock.locate(0, time, None), []
        if not calls:
            copies = self._copies if any(read["guided"]) else 1
            calls = self._calls(given, timestep, self._new_branches(given, len(given) // copies))
        for i, call in enumerate(calls):
            call.step = step
            self._judge(call, read.get(("drift", i), []), [], [])
        return calls

    @property
    def _copies(self) -> int:
        return self.family.guided_copies

    def _may_be_guided(self, given: Tensor) -> bool:
        return self._copies > 1 and len(given) % self._copies == 0

    def _new_branches(self, given: Tensor, samples: int) -> list[Branch]:
        if not self.corrections:
            compensations = make_sample_compensations(self.clock, samples)
            self.corrections = [self._new_correction(each) for each in compensations]
        elif len(self.corrections) != samples:
            raise ValueError(
                f"per_sample: every branch must hold the same samples; {self.context_name!r} has "
                f"{samples}, another one {len(self.corrections)}"
            )
        return [self._new_branch(layout_of(given), sample) for sample in range(samples)]

    def _calls(
        self, given: Tensor, timestep: Tensor, branches: Sequence[Branch]
    ) -> list[ActiveCall]:
        return [
            self._new_call(sample_rows(given, len(branches), i), timestep, branch)
            for i, branch in enumerate(branches)
        ]

    def _finish_each(
        self, calls: list[ActiveCall], refreshed: list[int], output: Any, return_dict: bool
    ) -> Any:
        """Correct every sample's output, and put them back in order."""
        computed = None if output is None else self._sample_in(output)
        corrected, is_plain = [], len(refreshed) == len(calls)
        for i, call in enumerate(calls):
            fresh, record = None, call.record
            if record.refreshed:
                fresh = sample_rows(computed, len(refreshed), refreshed.index(i))
            record.compute_fraction = float(record.refreshed)
            corrected.append(self._correct(call, fresh))
            is_plain = is_plain and corrected[-1] is fresh
        self._account(calls)
        if is_plain:
            return output
        return self.family.make_output(joined_rows(corrected), return_dict)


def check_arguments(family: ModelFamily, arguments: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a tensor of which the family does not say whose it is."""
    for name, value in arguments.items():
        described = name in family.batch_arguments or name in family.shared_arguments
        if not described and _has_tensors(value):
            raise ValueError(
                f"per_sample: whether {name} has a row for each sample is not known of family "
                f"{family.name!r}; known are {', '.join(family.batch_arguments)} (they have) and "
                f"{', '.join(family.shared_arguments) or 'no others'} (they have not)"
            )


def chosen_arguments(
    family: ModelFamily, arguments: Mapping[str, Any], samples: int, indices: Sequence[int]
) -> dict[str, Any]:
    """The arguments of a call with these samples alone.

    What has one row, or none, holds for all samples; rows for the samples alone are those of all
    their copies. Raises `ValueError` for another number of rows.
    """
    rows = len(arguments[family.latents])

    def chosen(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: chosen(f"{name}[{key!r}]", item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(chosen(f"{name}[{i}]", item) for i, item in enumerate(value))
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) == 1:
            return value
        if len(value) not in (samples, rows):
            raise ValueError(
                f"per_sample: {name} must have 1, {samples} or {rows} rows for {samples} samples "
                f"in a batch of {rows}, got {len(value)}"
            )
        return chosen_rows(value, samples, indices)

    return {
        name: chosen(name, value) if name in family.batch_arguments else value
        for name, value in arguments.items()
    }


def _has_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_has_tensors(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_has_tensors(item) for item in value)
    return isinstance(value, Tensor)
