"""What a model family looks like to a cache: a description, no behaviour of caching."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from .attention_input import attention_input

Streams = dict[str, Tensor]
"""Token streams that flow from block to block, by argument name, each ``[B, N, D]``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockList:
    """One list of transformer blocks, in the order they run."""

    attribute: str
    """Name of the ``ModuleList`` on the transformer."""
    streams: tuple[str, ...]
    """Block arguments that are streams; while ``returns`` is None, the output stream alone."""
    returns: tuple[str | None, ...] | None
    """The streams a block returns, in its order, with None where it returns a None. None: not known
    before the first computed call, at which `generic.resolve_returns` finds them."""
    attention_residual: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None
    """(block, its bound arguments) -> the gated residual of its self-attention ``[B, N, D]`` of the
    output stream. Ada's signal is that of the middle block of the lists that have one; if none has,
    the whole residual of the middle block of the stack."""
    joint: str | None = None
    """Block argument that holds all ``streams`` as one sequence, in their order; the block then
    returns one sequence too, of ``returns``. None: every stream is an argument of its own."""
    interleaved: bool = False
    """The blocks run in turns with those of the list before: ``a[0], b[0], a[1], b[1], ...``"""
    packed: tuple[str, ...] = ()
    """Block arguments, returned too, with further latents (a clip's sound): they are read as a part
    of the output stream, which is then ``[B, 1, M]`` with all their values."""
    transposed: bool = False
    """The blocks take frames as tokens: the output stream is ``[B*S, T, D]`` where the lists that
    are not transposed have ``[B*T, S, D]``."""


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


CORRECTED_THRESHOLDS = {
    "Fb+AdaCorrection": 0.35,
    "Tea+AdaCorrection": 0.3,
    "Fast+AdaCorrection": 0.32,
}
"""Triggers of corrected methods, chosen on FLUX; where nothing is measured yet, a start."""

STARTING_THRESHOLDS = {"Fb": 0.12, "Tea": 0.15, "Fast": 0.05, "Ada": 1.0, **CORRECTED_THRESHOLDS}
"""Triggers of a model of which nothing is measured yet."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFamily:
    """A family of transformers: where its blocks, streams, signals and defaults are.

    Raises `ValueError` if the block lists contradict each other or the output stream.
    """

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
    modulated_input: Callable[[nn.Module, Mapping[str, Any]], Tensor] = attention_input
    """(first block, its bound arguments) -> the modulated input of its attention ``[B, N, D]``."""
    select_tokens: Callable[[Mapping[str, Any], Tensor], dict[str, Any]] | None = None
    """(bound block arguments, kept token indices ``[K]``) -> arguments for those tokens alone.
    None: the blocks need all tokens, so that Fast refuses ``static_tokens``."""
    published_polynomial: Callable[[Mapping[str, Any]], TeaPolynomial | None] = lambda config: None
    """(model config) -> TeaCache's published polynomial, if this is a checkpoint it is for."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Default ``rel_l1_thresh`` by display name. A corrected method that is not listed takes its
    base method's, which computes more than it needs: the tolerance is a trigger of its own."""
    num_frames: Callable[[Mapping[str, Any]], int] | None = None
    """(bound block arguments) -> frames T of the output stream, whose tokens are ordered (T, S).
    None: tokens have no frames."""
    full_noise_timestep: float = 1.0
    """Timestep that the transformer is given at pure noise: 1, or 1000."""
    recognises: Callable[[nn.Module], bool] | None = None
    """Whether a transformer has this family's structure, for models of packages that may not be
    imported; it is asked in place of the class name."""

    def __post_init__(self) -> None:
        if not self.block_lists:
            raise ValueError(f"block_lists of family {self.name!r} must not be empty")
        first = self.block_lists[0]
        if first.interleaved or first.joint is not None:
            raise ValueError(
                f"block_lists of family {self.name!r}: the first list must be neither interleaved "
                f"nor joint, got {first}"
            )
        for block_list in self.block_lists:
            for name, streams in (("streams", block_list.streams), ("returns", block_list.returns)):
                if streams is not None and self.output_stream not in streams:
                    raise ValueError(
                        f"{name} of {block_list.attribute} in family {self.name!r} must contain "
                        f"the output_stream {self.output_stream!r}, got {streams}"
                    )

    @property
    def hidden_states_first(self) -> bool | None:
        """Whether the first blocks return the output stream first; None: not known before a call.

        It is what xfuser's callers state as ``return_hidden_states_first``.
        """
        returns = self.block_lists[0].returns
        return None if returns is None else returns[0] == self.output_stream


def entry_point(module: str) -> Callable[[str], Any]:
    """A ``__getattr__`` for a family's ``module``: it offers `apply_cache_on_transformer`, as
    xfuser's callers expect. The api is imported when that is asked for, not before."""

    def find(name: str) -> Any:
        if name == "apply_cache_on_transformer":
            return import_module(
                "xfuser_adacorr.model_executor.cache.api"
            ).apply_cache_on_transformer
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find


_FAMILY_MODULES = ("flux", "pixart", "dit", "opensora", "opensora2", "xfuser_wrappers")
_FAMILIES: dict[str, ModelFamily] = {}


def _families() -> dict[str, ModelFamily]:
    """All families by transformer class; a family's module registers it when imported."""
    earlier = dict(_FAMILIES)
    for module in _FAMILY_MODULES:
        import_module(f"{__package__}.{module}")
    _FAMILIES.update(earlier)  # what was registered by hand replaces what comes with the package
    return _FAMILIES


def register_family(family: ModelFamily) -> ModelFamily:
    """Make a family known; a family of the same transformer class is replaced."""
    _FAMILIES[family.transformer_class] = family
    return family


def known_transformers() -> tuple[str, ...]:
    return tuple(sorted(_families()))


_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def is_compiled(module: nn.Module) -> bool:
    """Whether this is what ``torch.compile(model)`` returned."""
    return isinstance(module.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module)


def wrappers_of(module: nn.Module) -> list[nn.Module]:
    """The module, and the one inside of it, as often as one is wrapped (compiled, in parallel)."""
    found = [module]
    while True:
        if is_compiled(module):
            module = module._orig_mod
        elif any(cls.__name__ in _WRAPPERS for cls in type(module).__mro__):
            module = module.module
        else:
            return found
        found.append(module)


def innermost(module: nn.Module) -> nn.Module:
    """The model inside of all such wrappers."""
    return wrappers_of(module)[-1]


def find_family(transformer: nn.Module) -> ModelFamily:
    """Return the family of a transformer; one that is not known is inferred.

    The class name decides, and for families that say how to recognise them the structure. Raises
    `ValueError` if the class is not known and nothing can be inferred of it, and for a family that
    names arguments which the model's ``forward`` does not have.
    """
    transformer = innermost(transformer)
    family = _find(transformer)
    _check_arguments(family, transformer)
    return family


def _check_arguments(family: ModelFamily, transformer: nn.Module) -> None:
    parameters = forward_signature(transformer).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return
    for meaning in ("latents", "timestep"):
        name = getattr(family, meaning)
        if name not in parameters:
            raise ValueError(
                f"{meaning} of family {family.name!r} must be an argument of the forward of "
                f"{type(transformer).__name__}, got {name!r}; accepted: {', '.join(parameters)}"
            )


def _find(transformer: nn.Module) -> ModelFamily:
    families = _families()
    for cls in type(transformer).__mro__:
        family = families.get(cls.__name__)
        if family is not None and family.recognises is None:
            return family
    for family in families.values():
        if family.recognises is not None and family.recognises(transformer):
            return family
    try:
        return import_module(f"{__package__}.generic").infer_family(transformer)
    except ValueError as error:
        raise ValueError(
            f"no cache adapter for transformer {type(transformer).__name__}, and none can be "
            f"inferred: {error}; described by hand: {', '.join(known_transformers())}"
        ) from error


def family_named(name: str) -> ModelFamily:
    """Return a family by its name; raise `ValueError` naming the known ones."""
    by_name = {family.name: family for family in _families().values()}
    if name not in by_name:
        raise ValueError(f"unknown model family {name!r}; accepted: {', '.join(sorted(by_name))}")
    return by_name[name]


def config_of(transformer: nn.Module) -> Mapping[str, Any]:
    """Options a model was made with: diffusers' mapping, or the attributes of a config object."""
    config = getattr(transformer, "config", None)
    if config is None or isinstance(config, Mapping):
        return config or {}
    return vars(config)


@cache
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def forward_signature(module: nn.Module) -> inspect.Signature:
    """Signature of ``module.forward`` as it was written, without ``self``.

    Some models choose their forward per instance; offloading hooks put wrappers in its place.
    """
    module = innermost(module)
    forward = module.__dict__.get("forward")
    while forward is not None and not inspect.ismethod(forward):
        forward = getattr(forward, "__wrapped__", None)
    if forward is not None and forward.__self__ is module:
        return _signature(forward.__func__)
    return _signature(type(module).forward)


def bind_arguments(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``module.forward`` by name, however they were passed."""
    signature = forward_signature(module)
    arguments = dict(signature.bind(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    return arguments
