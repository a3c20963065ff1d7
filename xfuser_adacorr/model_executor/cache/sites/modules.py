"""Modules inside blocks: attention and feed-forward layers, taken over one by one.

Norms, modulation, gates and residual additions stay outside, and are computed in every call.
"""

import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from xfuser_adacorr.model_executor.cache.diffusers_adapters.family import bind_arguments
from xfuser_adacorr.model_executor.cache.intercept import intercept, release
from xfuser_adacorr.model_executor.cache.methods.base import Decision, StackRule, Streams
from xfuser_adacorr.model_executor.cache.ranks import DecisionScope
from xfuser_adacorr.model_executor.cache.step import Step

if TYPE_CHECKING:
    from xfuser_adacorr.model_executor.cache.methods.modular import ModuleMethod

ATTENTION, FEED_FORWARD = "attention", "feed-forward"
CLASSES = (
    (ATTENTION, re.compile(r"Attention\d*$|Attn$")),
    (FEED_FORWARD, re.compile(r"FeedForward|^Mlp$|MLP$|^GLUMBConv$")),
)
"""What the classes of these modules are called in diffusers, and in `models.opensora`."""
CONTEXT = ("encoder_hidden_states", "text", "context")
"""Arguments of attention that other tokens come in."""
CONTEXT_LAYERS = re.compile(r"^(to_k|to_v|kv_linear|add_\w+|to_add_out)$")
"""Linear layers of attention that act on these tokens."""


@dataclass(frozen=True, slots=True)
class Place:
    """A module of a model."""

    index: int
    name: str
    """Dotted, within the model."""
    kind: str
    """``attention`` or ``feed-forward``."""
    block: str
    """Name of the block that it is in."""
    module: nn.Module


def find_modules(model: nn.Module) -> list[Place]:
    """The attention and feed-forward modules inside the repeated blocks, in the model's order.

    A module within another one of them is a part of it. Raises `ValueError` if there are none.
    """
    found: list[Place] = []
    for name, module in model.named_modules():
        kind = next((k for k, names in CLASSES if names.search(type(module).__name__)), None)
        block = re.match(r"(.*?\.\d+)\.", f"{name}.")
        inside = any(name.startswith(f"{place.name}.") for place in found)
        if kind is not None and block and block[1] != name and not inside:
            found.append(Place(len(found), name, kind, block[1], module))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no attention or feed-forward modules inside repeated "
            "blocks (classes ...Attention, ...FeedForward, Mlp in a ModuleList); use Auto, which "
            "needs nothing of the model"
        )
    return found


@dataclass(slots=True)
class ModuleCall:
    """One module's turn within a call of the model."""

    place: Place
    key: tuple[int, int]
    """The module, and how many calls of it came before in this call of the model."""
    original: Callable[..., Any]
    arguments: dict[str, Any]
    """Bound by name; the first tensor is what the module is applied to."""
    hidden_name: str
    flops: float = 0.0
    """Of what was executed, so far."""

    @property
    def hidden(self) -> Tensor:
        """The (normalised and modulated) tokens that the module is applied to ``[B, N, D]``."""
        return self.arguments[self.hidden_name]

    @property
    def context(self) -> Tensor | None:
        """Other tokens that an attention attends to."""
        return next((self.arguments[n] for n in CONTEXT if self.arguments.get(n) is not None), None)

    @property
    def streams(self) -> Streams:
        return {self.hidden_name: self.hidden}

    def run(self, **changed: Any) -> Any:
        """Execute the module, on other arguments if some are ``changed``."""
        arguments = self.arguments | changed
        self.flops += module_flops(self.place, arguments, self.hidden_name)
        return self.original(**arguments)


def module_flops(place: Place, arguments: Mapping[str, Any], hidden_name: str) -> float:
    """Of the linear layers and products of attention, two a multiplication with addition."""
    hidden = arguments[hidden_name]
    others = next((arguments[n] for n in CONTEXT if arguments.get(n) is not None), None)
    tokens = hidden.shape[:-1].numel()
    other_tokens = tokens if others is None else others.shape[:-1].numel()
    flops, width, joint = 0.0, 0, False
    for name, layer in place.module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            on_context = bool(CONTEXT_LAYERS.match(name))
            joint |= name.startswith("add_")
            flops += 2.0 * layer.weight.numel() * (other_tokens if on_context else tokens)
            if re.search(r"to_q$|q_linear$", name):
                width = layer.weight.shape[0]
            elif name == "qkv":
                width = layer.weight.shape[0] // 3
    if place.kind == ATTENTION:
        queries = tokens + (other_tokens if joint else 0)
        keys = queries if joint else other_tokens
        flops += 4.0 * queries * (keys / hidden.shape[0]) * width
    return flops


@dataclass(slots=True)
class ActiveCall:
    """One call of the model while it runs."""

    decide: Callable[[ModuleCall], Decision]
    answer: Callable[[ModuleCall, Decision], Any]
    decision: Decision | None = None
    seen: Counter = field(default_factory=Counter)
    modules_run: int = 0
    flops: float = 0.0
    all_flops: float = 0.0


class Modules:
    """The modules of one model, taken over for a method that acts on them."""

    measures_inside = False
    """Whether a decision about a whole step is taken while the model runs."""

    def __init__(self, model: nn.Module, method: "ModuleMethod", scope: DecisionScope) -> None:
        self.model, self.method, self.places = model, method, find_modules(model)
        if scope.is_parallel and not method.works_on_ranks:
            raise ValueError(
                f"{type(method).__name__} chooses among the tokens, or sums over them, and cannot "
                "act where ranks share a sample; use FORA or L2C there"
            )
        method.bind(model, self.places)
        self._local = threading.local()

    def install(self) -> None:
        for place in self.places:
            intercept(place.module, partial(self._run_module, place))

    def uninstall(self) -> None:
        for place in self.places:
            release(place.module)

    def run(
        self,
        model: Callable[[], Any],
        decide: Callable[[ModuleCall], Decision],
        answer: Callable[[ModuleCall, Decision], Any],
    ) -> tuple[Any, float]:
        """What ``model()`` returns, and the share of the modules' FLOPs that was executed.

        ``decide(call)`` is asked at the first module; each returns ``answer(call, decision)``.
        Raises `RuntimeError` if the modules do not run.
        """
        active = self._local.active = ActiveCall(decide, answer)
        try:
            output = model()
        finally:
            self._local.active, self._local.last = None, active
        if active.decision is None:
            raise RuntimeError(
                "the modules inside the blocks did not run through the cache; do not compile the "
                "model or its blocks with methods that cache modules, or use Auto"
            )
        return output, active.flops / active.all_flops if active.all_flops else 1.0

    def run_as_it_is(
        self, rule: StackRule, step: Step, model: Callable[[], Any]
    ) -> tuple[Any, float]:
        """The same for a call in a ``step`` that was decided to be computed."""
        rule.state.step = step
        return self.run(
            model,
            lambda call: Decision(True, "base"),
            lambda call, decision: self.method.run_block(rule.state, call, decision),
        )

    def note(self, record: Any) -> None:
        """Say in the record how many modules the last call ran."""
        last = self._local.last
        record.modules, record.modules_run = sum(last.seen.values()), last.modules_run
        record.module_flops = last.flops

    def _run_module(
        self, place: Place, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        active = getattr(self._local, "active", None)
        if active is None:
            return original(*args, **kwargs)
        arguments = bind_arguments(place.module, args, kwargs)
        hidden = next(name for name, value in arguments.items() if isinstance(value, Tensor))
        key = (place.index, active.seen[place.index])
        call = ModuleCall(place, key, original, arguments, hidden)
        active.seen[place.index] += 1
        if active.decision is None:
            active.decision = active.decide(call)
        result = active.answer(call, active.decision)
        active.modules_run += call.flops > 0.0
        active.flops += call.flops
        active.all_flops += module_flops(place, arguments, hidden)
        return result
