"""Full runs of a pipeline, module by module: what routers, probes and priors are fitted on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from xfuser_adacorr.model_executor.cache.api import schedulers_of
from xfuser_adacorr.model_executor.cache.intercept import intercept, release
from xfuser_adacorr.model_executor.cache.methods.base import Decision
from xfuser_adacorr.model_executor.cache.methods.lazy import token_sums
from xfuser_adacorr.model_executor.cache.methods.modular import ModuleMethod
from xfuser_adacorr.model_executor.cache.ranks import DecisionScope
from xfuser_adacorr.model_executor.cache.schedulers import Places, read_places
from xfuser_adacorr.model_executor.cache.sites.modules import ModuleCall, Modules
from xfuser_adacorr.model_executor.cache.sites.outputs import sample_of

from .runs import FullRuns

KEPT_EVERY = 20
"""Iterations of a training between two writings of its work file."""


@dataclass(slots=True)
class Recorded:
    """One call of the model in a full run."""

    step: int
    branch: int
    """Which of the calls of this step."""
    args: tuple
    kwargs: dict[str, Any]
    output: Tensor
    outputs: list[Any]
    """Of every module."""
    sums: list[Tensor]
    """Of every module's input, over the tokens ``[rows, D]``, float32."""


@contextmanager
def watched(model: nn.Module) -> Iterator[Modules]:
    """The modules of ``model``, taken over for `through`."""
    modules = Modules(model, ModuleMethod(), DecisionScope())
    modules.install()
    try:
        yield modules
    finally:
        modules.uninstall()


def through(modules: Modules, model: Callable[[], Any], answer: Callable[[ModuleCall], Any]) -> Any:
    """What ``model()`` returns where every module returns ``answer(call)``."""
    return modules.run(model, lambda call: Decision(True, "base"), lambda call, _: answer(call))[0]


def record_runs(
    runs: FullRuns, modules: Modules, keep: Callable[[Recorded], None], progress: bool
) -> Places:
    """Make the runs, hand every call to ``keep``, and return the steps that they took.

    Raises `ValueError` for a loop that calls the model unevenly.
    """
    pipe, model, made = runs.pipe, runs.model, []
    find = schedulers_of(pipe)

    @torch.no_grad()
    def handler(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outputs: dict[int, Any] = {}
        sums: dict[int, Tensor] = {}

        def answer(call: ModuleCall) -> Any:
            out = outputs[call.place.index] = call.run()
            sums[call.place.index] = token_sums(call.hidden)
            return out

        output = through(modules, lambda: original(*args, **kwargs), answer)
        order = range(len(modules.places))
        missing = [p.name for p in modules.places if p.index not in outputs]
        if missing:
            raise ValueError(f"modules {missing[:3]} do not run in every call of the model")
        made.append(
            Recorded(
                -1,
                -1,
                args,
                kwargs,
                sample_of(output),
                [outputs[i] for i in order],
                [sums[i] for i in order],
            )
        )
        return output

    places = None
    intercept(model, handler)
    try:
        pairs = list(zip(runs.calls, runs.seeds, strict=True))
        for call, seed in tqdm(pairs, desc="full runs", unit="call", disable=not progress):
            made.clear()
            pipe(generator=torch.Generator().manual_seed(seed), **call)
            places = read_places(next(iter(find())))
            branches, rest = divmod(len(made), len(places.steps))
            if rest:
                raise ValueError(
                    f"{len(made)} calls of the model in {len(places.steps)} steps: the loop does "
                    "not call it equally often in every step"
                )
            for place, each in enumerate(made):
                each.step, each.branch = divmod(place, branches)
                keep(each)
    finally:
        release(model)
    return places


@dataclass(slots=True)
class Pair:
    """A step in which modules may be reused, and what the step before left of them."""

    step: int
    args: tuple
    kwargs: dict[str, Any]
    target: Tensor
    """The model's own output."""
    cached: list[Any]
    """Module outputs of the step before."""
    sums: list[Tensor]
    """`token_sums` of the inputs of the step before."""


def record_pairs(runs: FullRuns, modules: Modules, progress: bool) -> tuple[list[Pair], Places]:
    """A pair for every second step of the runs, which may reuse the one before it."""
    pairs: list[Pair] = []
    before: dict[int, Recorded] = {}

    def keep(made: Recorded) -> None:
        if made.step % 2 == 0:
            before[made.branch] = made
        else:
            old = before.pop(made.branch)
            cached = pytree.tree_map(lambda x: x.half(), old.outputs)  # there are many
            pairs.append(Pair(made.step, made.args, made.kwargs, made.output, cached, old.sums))

    return pairs, record_runs(runs, modules, keep, progress)


def check_even(steps: int) -> None:
    """Raise `ValueError` where steps cannot be taken in pairs."""
    if steps % 2:
        raise ValueError(
            f"num_inference_steps must be even: steps are taken in pairs, of which the second "
            f"reuses the first; got {steps}"
        )


def mixed(share: Tensor | float, fresh: Any, cached: Any) -> Any:
    """``share * cached + (1 - share) * fresh`` of every tensor; ``share`` a scalar or one a row."""

    def mix(f: Tensor, c: Tensor) -> Tensor:
        s = share
        if isinstance(s, Tensor) and s.ndim:
            s = s.repeat_interleave(f.shape[0] // s.shape[0]).view(-1, *[1] * (f.ndim - 1))
        return s * c.to(f.dtype) + (1.0 - s) * f

    return pytree.tree_map(mix, fresh, cached)


def train(
    model: nn.Module,
    modules: Modules,
    pairs: list[Pair],
    parameters: nn.ParameterList,
    shares: Callable[[Pair], list[Tensor]],
    penalty: Callable[[list[Tensor]], Tensor],
    *,
    iterations: int,
    learning_rate: float,
    limit: float | None,
    seed: int,
    work: Path | None,
    progress: bool,
) -> list[float]:
    """Fit ``parameters`` (one for each step) so that mixed runs give the model's own outputs.

    In each iteration one pair is run with every module's output mixed with its cached one by
    ``shares(pair)``; the loss is the mean squared error of the model's output plus
    ``penalty(shares)``. AdamW without weight decay, parameters kept within ``limit``. ``work`` is a
    file that an interrupted training goes on from. Returns the losses.
    """
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randint(len(pairs), (iterations,), generator=generator).tolist()
    losses: list[float] = []
    if work is not None and work.is_file():
        kept = torch.load(work, weights_only=True)
        parameters.load_state_dict(kept["parameters"])
        optimizer.load_state_dict(kept["optimizer"])
        losses = kept["losses"][:iterations]
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        bar = tqdm(order[len(losses) :], desc="training", disable=not progress)
        for index in bar:
            loss = _loss(model, modules, pairs[index], shares, penalty)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if limit is not None:
                with torch.no_grad():
                    for p in parameters:
                        p.clamp_(-limit, limit)
            losses.append(float(loss.detach()))
            if work is not None and len(losses) % KEPT_EVERY == 0:
                kept = {"parameters": parameters.state_dict(), "losses": losses}
                torch.save({**kept, "optimizer": optimizer.state_dict()}, work)
    finally:
        for p in trained:
            p.requires_grad_(True)
    return losses


@torch.enable_grad()
def _loss(
    model: nn.Module,
    modules: Modules,
    pair: Pair,
    shares: Callable[[Pair], list[Tensor]],
    penalty: Callable[[list[Tensor]], Tensor],
) -> Tensor:
    """Of one pair, as `train` has it."""
    share = shares(pair)

    def answer(call: ModuleCall) -> Any:
        index = call.place.index
        return mixed(share[index], call.run(), pair.cached[index])

    output = through(modules, lambda: model(*pair.args, **pair.kwargs), answer)
    return (sample_of(output) - pair.target).square().mean() + penalty(share)
