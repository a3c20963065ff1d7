"""ToCa: between full steps the tokens that matter most are computed anew, module by module."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .modular import ModuleMethod, ModuleOptions, ModuleState
from .options import check_count, check_number
from .tokens import (
    check_plain,
    checked_grid,
    grid_of,
    in_cells,
    is_self_attention,
    out_of_cells,
    projected,
    taken_tokens,
)

LOCAL_BONUS = 0.6
SENSITIVE = (0.2, 0.4)
"""Share of the steps left between which every second step is full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToCa(ModuleOptions):
    """Token-wise caching (arXiv 2410.05317), with the published ratios of DiT under DDIM."""

    label: ClassVar[str] = "ToCa"

    interval: int = 3
    """N >= 1: steps from one full step to the next, about (`full_interval`)."""
    fresh_ratio: float = 0.07
    """Share of the tokens computed in the other steps, in [0, 1], before the factors of
    `fresh_share`."""
    stale_weight: float = 0.25
    """Weight >= 0 of the steps that a token was not computed in."""
    step_weight: float = 2.0
    layer_weight: float = 0.2
    module_weight: float = 2.5
    """How uneven the share is over steps (late ones more), layers (late ones more) and modules
    (feed-forward more; at 2.5 no token of attention), >= 0."""
    grid: tuple[int, int] | None = None
    """Height and width in tokens; None: a square."""

    def __post_init__(self) -> None:
        ModuleOptions.__post_init__(self)
        check_count("interval", self.interval, least=1)
        check_number("fresh_ratio", self.fresh_ratio, least=0, most=1)
        for name in ("stale_weight", "step_weight", "layer_weight", "module_weight"):
            check_number(name, getattr(self, name), least=0)
        object.__setattr__(self, "grid", checked_grid(self.grid))

    def make_modules(self) -> "TokenWise":
        return TokenWise(self)


def full_interval(interval: int, left: int, steps: int) -> int:
    """Steps between full ones where ``left`` steps of ``steps`` come after this one.

    ``round(N / (1.4 - 0.8 s / T))``: longer at first; 2 for s in 0.2 T to 0.4 T.
    """
    if SENSITIVE[0] * steps <= left <= SENSITIVE[1] * steps:
        return 2
    return max(round(interval / (1.4 - 0.8 * left / steps)), 1)


def fresh_share(
    options: ToCa, left: int, steps: int, layer: int, layers: int, feed_forward: bool
) -> float:
    """Share of the tokens to compute, in [0, 1]: ratio * step * layer * module."""
    step = 1.0 + options.step_weight * (1.0 - 2.0 * left / steps)
    depth = 1.0 + options.layer_weight * (2.0 * layer / max(layers - 1, 1) - 1.0)
    module = 1.0 + options.module_weight * (0.6 if feed_forward else -0.4)
    return min(options.fresh_ratio * max(step, 0.0) * max(depth, 0.0) * max(module, 0.0), 1.0)


def column_sums(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """How much all tokens attend to each ``[B, N]``: softmax, mean over heads, sum over queries."""
    return torch.softmax(query @ key.transpose(-1, -2) * scale, -1).mean(1).sum(1)


def token_scores(
    attended: Tensor, age: Tensor, interval: int, weight: float, grid: tuple[int, int]
) -> Tensor:
    """s1 + weight * s3 ``[B, N]``, the best token of every 2x2 cell raised by `LOCAL_BONUS`."""
    score = attended / attended.norm(dim=-1, keepdim=True) + weight * age / interval
    cells = in_cells(score, grid)
    best = torch.zeros_like(cells).scatter_(-1, cells.argmax(-1, keepdim=True), LOCAL_BONUS)
    return out_of_cells(cells * (1.0 + best), grid)


class TokenWise(ModuleMethod):
    """Full steps by `full_interval`; in the others the tokens with the highest scores."""

    works_on_ranks = False

    def __init__(self, options: ToCa) -> None:
        self.options = options

    def bind(self, model, places) -> None:
        check_plain(model, places, "ToCa")
        ModuleMethod.bind(self, model, places)
        blocks = list(dict.fromkeys(place.block for place in places))
        self.layers, self.count = {name: i for i, name in enumerate(blocks)}, len(blocks)

    def gates(self, state, step, read) -> list[bool]:
        left = step.remaining - 1
        full = left % full_interval(self.options.interval, left, step.index + step.remaining) == 0
        return [full] * max(len(self.places), 1)

    def computed(self, state: ModuleState, call: Any) -> Any:
        if is_self_attention(call):
            module, x = call.place.module, call.hidden
            query, key = projected(module, "to_q", x), projected(module, "to_k", x)
            state.notes["map", call.place.block] = column_sums(query, key, module.scale)
            call.flops += 2.0 * x.numel() * (2 * query.shape[1] * query.shape[3] + x.shape[1])
        state.notes["age", call.key] = call.hidden.new_zeros(call.hidden.shape[:2])
        return ModuleMethod.computed(self, state, call)

    def reused(self, state: ModuleState, call: Any) -> Any:
        step, place, hidden = state.step, call.place, call.hidden
        age = state.notes["age", call.key]
        age += 1.0
        tokens = hidden.shape[1]
        share = fresh_share(
            self.options,
            step.remaining - 1,
            step.index + step.remaining,
            self.layers[place.block],
            self.count,
            place.kind == "feed-forward",
        )
        count = round(share * tokens)
        if count == 0:
            return state.outputs[call.key]
        attended = state.notes["map", place.block]
        grid = grid_of(tokens, self.options.grid)
        score = token_scores(attended, age, self.options.interval, self.options.stale_weight, grid)
        chosen = score.topk(count, dim=-1).indices
        changed = {call.hidden_name: taken_tokens(hidden, chosen)}
        if is_self_attention(call):
            changed["encoder_hidden_states"] = hidden  # queries are cut, keys stay whole
        fresh = call.run(**changed)
        index = chosen.unsqueeze(-1).expand_as(fresh)
        out = state.outputs[call.key].scatter(1, index, fresh)
        age.scatter_(1, chosen, 0.0)
        state.outputs[call.key] = out
        return out
