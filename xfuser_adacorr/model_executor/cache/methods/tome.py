"""ToMe: similar tokens are merged before each module and put back after it, in every step."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Decision
from .modular import ModuleMethod, ModuleOptions, ModuleState
from .options import CORRECTED_TOLERANCE, check_number, error_rule, within_budget
from .tokens import CELL, check_plain, checked_grid, grid_of, is_self_attention, projected


@dataclass(frozen=True, kw_only=True, slots=True)
class ToMe(ModuleOptions):
    """Merge ``ratio`` of the tokens around self-attention and feed-forward (arXiv 2210.09461,
    2303.17604); nothing is reused from step to step."""

    label: ClassVar[str] = "ToMe"
    inside_corrected: ClassVar[bool] = True

    ratio: float = 0.5
    """Share of the tokens merged away, in [0, 0.75]."""
    grid: tuple[int, int] | None = None
    """Height and width in tokens; None: a square."""

    def __post_init__(self) -> None:
        ModuleOptions.__post_init__(self)
        check_number("ratio", self.ratio, least=0, most=0.75)
        object.__setattr__(self, "grid", checked_grid(self.grid))

    @property
    def needs_steps(self) -> bool:
        return False

    def make_modules(self) -> "Merging":
        return Merging(self)

    def make_rule(self, places, inside):
        own = error_rule(self.correction, CORRECTED_TOLERANCE, places)
        return within_budget(own, own)


def matched(keys: Tensor, grid: tuple[int, int], ratio: float) -> Tensor:
    """For every token its place in the merged sequence ``[B, N]``, of keys ``[B, N, d]``.

    The upper left token of every 2x2 cell stays. Each other one is linked to the most similar of
    those (cosine), and the ``ratio * N`` best links are merged. The merged sequence has the tokens
    that were not linked first, then those that stay.
    """
    batch, tokens, _ = keys.shape
    height, width = grid
    stays = [y * width + x for y in range(0, height, CELL) for x in range(0, width, CELL)]
    columns = torch.tensor(stays, device=keys.device)
    others = torch.tensor(sorted({*range(tokens)} - {*stays}), device=keys.device)
    keys = torch.nn.functional.normalize(keys.float(), dim=-1)
    best, link = (keys[:, others] @ keys[:, columns].transpose(1, 2)).max(-1)
    merged = min(round(ratio * tokens), len(others))
    order = best.argsort(dim=-1, descending=True, stable=True)
    kept = len(others) - merged
    place = torch.empty_like(order)
    place.scatter_(1, order[:, merged:], torch.arange(kept, device=keys.device).expand(batch, -1))
    linked = order[:, :merged]
    place.scatter_(1, linked, kept + link.gather(1, linked))
    out = torch.empty(batch, tokens, dtype=torch.long, device=keys.device)
    out[:, others] = place
    out[:, columns] = kept + torch.arange(len(columns), device=keys.device)
    return out


def merge(x: Tensor, places: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Means of the tokens at each place ``[B, length, D]``, and their numbers ``[B, length]``."""
    size = x.new_zeros(x.shape[0], length).scatter_add_(1, places, torch.ones_like(x[..., 0]))
    index = places.unsqueeze(-1).expand_as(x)
    total = x.new_zeros(x.shape[0], length, x.shape[-1]).scatter_add_(1, index, x)
    return total / size.unsqueeze(-1), size


def unmerge(x: Tensor, places: Tensor) -> Tensor:
    """Every token's own place of ``[B, length, D]``: ``[B, N, D]``."""
    return x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


class Merging(ModuleMethod):
    """Matches by the keys of a block's self-attention; its feed-forward takes the same matching."""

    works_on_ranks = False

    def __init__(self, options: ToMe) -> None:
        self.options = options

    def bind(self, model, places) -> None:
        check_plain(model, places, "ToMe")
        ModuleMethod.bind(self, model, places)

    def decide(self, state, step, read) -> Decision:
        return Decision(True, "merged")

    def run_block(self, state: ModuleState, call: Any, decision: Decision) -> Any:
        hidden, block = call.hidden, call.place.block
        changed: dict[str, Tensor] = {}
        if is_self_attention(call):
            if call.arguments.get("attention_mask") is not None:
                raise ValueError(f"ToMe: {call.place.name} is called with an attention_mask")
            grid = grid_of(hidden.shape[1], self.options.grid)
            keys = projected(call.place.module, "to_k", hidden)
            places = matched(keys.mean(1), grid, self.options.ratio)
            call.flops += 2.0 * hidden.numel() * keys.shape[1] * keys.shape[3]
            state.notes[block] = places
        elif call.place.kind == "feed-forward" and block in state.notes:
            places = state.notes[block]
        else:
            return call.run()
        length = hidden.shape[1] - min(
            round(self.options.ratio * hidden.shape[1]), hidden.shape[1] * 3 // 4
        )
        changed[call.hidden_name], size = merge(hidden, places, length)
        if is_self_attention(call):
            changed["attention_mask"] = size.log()
        return unmerge(call.run(**changed), places)
