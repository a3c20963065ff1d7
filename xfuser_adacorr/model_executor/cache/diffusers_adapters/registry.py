"""What a model family looks like to a cache: a description, no behaviour of caching."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import Tensor, nn

Streams = dict[str, Tensor]
"""Token streams that flow from block to block, by argument name, each ``[B, N, D]``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockList:
    """One list of transformer blocks that run after each other."""

    attribute: str
    """Name of the ``ModuleList`` on the transformer."""
    streams: tuple[str, ...]
    """Block arguments that are streams."""
    returns: tuple[str, ...]
    """The streams a block returns, in its order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeaPolynomial:
    """TeaCache's fit of output change on signal change, highest power first."""

    coefficients: tuple[float, ...]
    domain: tuple[float, float] = (0.0, float("inf"))
    """Range of relative input changes it was fitted on; inputs are clamped to it."""

    def __call__(self, x: float) -> float:
        x = min(max(x, self.domain[0]), self.domain[1])
        value = 0.0
        for coefficient in self.coefficients:
            value = value * x + coefficient
        return max(value, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFamily:
    """A family of transformers: where its blocks, streams, signals and defaults are."""

    name: str
    transformer_class: str
    """Class name; subclasses (xfuser's wrappers) match too."""
    block_lists: tuple[BlockList, ...]
    latents: str
    """Forward argument with the noisy latents ``[B, ...]``."""
    timestep: str
    """Forward argument with the timestep."""
    output_stream: str
    """Stream that the model's head reads after the last block."""
    modulated_input: Callable[[nn.Module, Mapping[str, Any]], Tensor]
    """(first block, its bound arguments) -> the modulated input of its attention ``[B, N, D]``."""
    select_tokens: Callable[[Mapping[str, Any], Tensor], dict[str, Any]]
    """(bound block arguments, kept token indices ``[K]``) -> arguments for those tokens alone."""
    make_output: Callable[[Tensor, bool], Any]
    """(sample, return_dict) -> what the transformer's forward returns."""
    published_polynomial: Callable[[Mapping[str, Any]], TeaPolynomial | None]
    """(model config) -> TeaCache's published polynomial, if this is a checkpoint it is for."""
    read_output: Callable[[Any], Tensor] = lambda output: (
        output[0] if isinstance(output, tuple) else output.sample
    )
    """What the transformer's forward returned -> the sample in it."""
    latent_tokens: Callable[[Tensor], Tensor] = lambda latents: latents
    """Latents as they are given to the transformer -> the same values as tokens ``[B, N, C]``."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Default ``rel_l1_thresh`` of each base method."""
    tolerance: float = 0.008
    """Default ``adacorr_tolerance`` of ``Auto``."""
    safety_tolerance: float = 0.05
    """Default ``adacorr_tolerance`` of a corrected base method, which has a trigger of its own."""


_FAMILY_MODULES = ("flux", "xfuser_wrappers")
_FAMILIES: dict[str, ModelFamily] = {}


def _families() -> dict[str, ModelFamily]:
    """All families by transformer class; a family's module registers it when imported."""
    for module in _FAMILY_MODULES:
        import_module(f"{__package__}.{module}")
    return _FAMILIES


def register_family(family: ModelFamily) -> ModelFamily:
    """Make a family known; a family of the same transformer class is replaced."""
    _FAMILIES[family.transformer_class] = family
    return family


def known_transformers() -> tuple[str, ...]:
    return tuple(sorted(_families()))


def find_family(transformer: nn.Module) -> ModelFamily:
    """Return the family of a transformer; raise `ValueError` if its class is not known."""
    families = _families()
    for cls in type(transformer).__mro__:
        if cls.__name__ in families:
            return families[cls.__name__]
    raise ValueError(
        f"no cache adapter for transformer {type(transformer).__name__}; "
        f"accepted: {', '.join(known_transformers())}"
    )


def family_named(name: str) -> ModelFamily:
    """Return a family by its name; raise `ValueError` naming the known ones."""
    by_name = {family.name: family for family in _families().values()}
    if name not in by_name:
        raise ValueError(f"unknown model family {name!r}; accepted: {', '.join(sorted(by_name))}")
    return by_name[name]
