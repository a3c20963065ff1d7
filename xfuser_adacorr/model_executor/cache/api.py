"""The verbs: enable, disable, reset and summarise a cache on a pipeline or a model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from xfuser_adacorr.config import from_flat, method_named

from .diffusers_adapters.family import find_family, innermost, is_compiled, wrappers_of
from .diffusers_adapters.others import other_cache_on
from .intercept import is_intercepted, owner_of
from .methods.modular import ModuleOptions
from .methods.options import Method
from .ranks import DecisionScope
from .schedulers import check_scheduler
from .sites.model import ModelSite
from .sites.modules import Modules
from .sites.sampler import SamplerSite
from .sites.stack import Stack, StackSite
from .trace import CacheSummary
from .xfuser_adapters.scope import check_method, find_scope, find_stage
from .xfuser_adapters.staged import StagedSite

DENOISERS = (
    "transformer",
    "transformer_2",
    "transformer_3",
    "unconditional_transformer",
    "unet",
    "unet_2",
    "image_unet",
    "text_unet",
    "super_res_first",
    "super_res_last",
    "prior",
    "prior_prior",
    "decoder",
    "controlnet",
    "controlnet_2",
    "adapter",
    "model",
    "multi_controlnet",
)
"""Pipeline components that are called in sampling loops, by the names that diffusers uses."""
WITH_BLOCKS = ("transformer", "transformer_2", "transformer_3", "unconditional_transformer")
"""Those of them that methods inside the model act on."""


def enable_cache(
    x: Any,
    method: Method | str = "Auto",
    *,
    scheduler: Any = None,
    denoisers: Sequence[str] | None = None,
    scope: DecisionScope | None = None,
    check_ranks: bool = False,
    **options: Any,
) -> Any:
    """Enable a cache on a pipeline or a model, in place.

    On several devices every rank has to enable it, with the same arguments.

    Args:
        x: a pipeline of diffusers or xfuser whose loop calls ``scheduler.step``, or a model.
        method: options such as ``Auto(target_compute=0.35)``, or a method's name such as ``"Fb"``
            or ``"Fast+AdaCorrection"``.
        scheduler: for a bare model, the scheduler that samples with it. Without it the place in the
            schedule is inferred from the timesteps, and AdaCorrection assumes Euler steps
            ``x <- x + dsigma * output``. While the cache is enabled its ``step`` is taken over.
        denoisers: names of the pipeline's components that its loop calls; None: those among them
            that have the names diffusers uses (`DENOISERS`).
        scope: ranks that have to decide alike, where another engine than xfuser splits the samples;
            None: those of xfuser's parallel state that share a sample.
        check_ranks: compare the decisions of these ranks in every call and raise
            `RankMismatchError` on all of them where one differs, instead of hanging.
        options: flat options, with a method's name only (``rel_l1_thresh=0.1``).

    Returns ``x``. Raises `ValueError` for unknown methods, options that cannot act on the method,
    models whose blocks are not known where the method needs them, pipelines without a denoiser or
    a scheduler, calibrations of another model or traces that cannot be replayed, and if a cache is
    already enabled; `TypeError` for wrong types; `FileNotFoundError` for files that are not there.
    """
    if isinstance(method, str):
        method = method_named(method, **options)
    elif not isinstance(method, Method):
        raise TypeError(f"method must be a method's options or its name, got {method!r}")
    elif options:
        raise TypeError(f"options {sorted(options)} belong into the {method.name} options given")
    models = denoisers_of(x, denoisers)
    for name, model in models.items():
        _check_free(name, model)
    main = next(iter(models.values()))
    inner = {name: innermost(model) for name, model in models.items()}
    method = method.bound_to(innermost(main)).bound_to_pipeline(x, inner)
    stage, find_schedulers = find_stage(main), schedulers_of(x, scheduler)
    at_sampler = stage is None and find_schedulers is not None
    decision_scope = _scope_for(main, scope, at_sampler, check_ranks)
    check_method(method, decision_scope, stage)
    if stage is not None:
        if find_schedulers is None:
            raise ValueError("scheduler must be given under PipeFusion, or enable it on a pipeline")
        family = find_family(main)
        site = StagedSite(method, main, family, find_schedulers, decision_scope, stage)
    elif find_schedulers is None:
        site = _model_site(method, main, decision_scope)
    else:
        if isinstance(method, ModuleOptions):
            method.check_models({n: m for n, m in models.items() if n in WITH_BLOCKS} or models)
        kind = SamplerSite if method.answers_steps else StackSite
        stacks = _stacks(method, models, decision_scope)
        site = kind(method, models, find_schedulers, decision_scope, stacks)
        if getattr(method, "learn", None) is not None and method.bound is None:
            site = _learning_site(x, method, models, find_schedulers, decision_scope)
    site.install()
    return x


def denoisers_of(x: Any, names: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The models that a pipeline's loop calls, by component; a model is itself the only one."""
    if isinstance(x, nn.Module):
        if names is not None:
            raise ValueError("denoisers are names of a pipeline's components, got a model")
        return {"transformer": x}
    if names is not None:
        missing = [name for name in names if not isinstance(getattr(x, name, None), nn.Module)]
        if missing or not names:
            raise ValueError(
                f"denoisers must name models of the pipeline, got {list(names)}; "
                f"{type(x).__name__} has {', '.join(_models_in(x)) or 'none'}"
            )
        return {name: getattr(x, name) for name in names}
    found = {name: getattr(x, name, None) for name in DENOISERS}
    found = {name: model for name, model in found.items() if isinstance(model, nn.Module)}
    if not found:
        raise TypeError(
            f"expected a model, or a pipeline with one of {', '.join(DENOISERS[:5])}, ...; "
            f"{type(x).__name__} has {', '.join(_models_in(x)) or 'no model'}: name those that its "
            "loop calls as denoisers=(...)"
        )
    return found


def _models_in(x: Any) -> list[str]:
    attributes = getattr(x, "__dict__", {})
    return sorted(name for name, value in attributes.items() if isinstance(value, nn.Module))


def schedulers_of(x: Any, scheduler: Any = None) -> Any:
    """A function that gives the schedulers that are stepped now; None for a model without one."""
    if scheduler is not None:
        check_scheduler(scheduler)
        return lambda: (scheduler,)
    if isinstance(x, nn.Module):
        return None

    def find() -> Iterable[Any]:
        names = ("scheduler", *(n for n in vars(x) if n.endswith("scheduler") and n != "scheduler"))
        found = (getattr(x, name, None) for name in names)
        return [each for each in found if hasattr(each, "step") and hasattr(each, "timesteps")]

    if not find():
        raise ValueError(
            f"{type(x).__name__} has no scheduler with step() and timesteps: a cache cannot follow "
            "its loop; give scheduler=..., or enable the cache on its model"
        )
    return find


def _stacks(
    method: Method, models: Mapping[str, nn.Module], scope: DecisionScope
) -> dict[str, Stack]:
    """The blocks of the models that the method acts inside of."""
    if not method.needs_blocks:
        return {}
    chosen = {name: model for name, model in models.items() if name in WITH_BLOCKS}
    return {name: _stack(method, model, scope) for name, model in (chosen or models).items()}


def _stack(method: Method, model: nn.Module, scope: DecisionScope) -> Stack | Modules:
    compiled = [is_compiled(each) or each._compiled_call_impl for each in wrappers_of(model)]
    if any(compiled):
        raise ValueError(
            f"{method.name} acts on the blocks, and the model is compiled as a whole: compile its "
            "blocks (compile_repeated_blocks), or use Auto"
        )
    model = innermost(model)
    if isinstance(method, ModuleOptions):
        return Modules(model, method.make_stack(model), scope)
    family = find_family(model)
    inside = method.make_stack(model, family)
    if scope.is_parallel:
        from .ranks import MAX_REDUCED_SUMS

        inside.max_sums = MAX_REDUCED_SUMS
    return Stack(model, family, inside)


def _model_site(method: Method, model: nn.Module, scope: DecisionScope) -> ModelSite:
    if method.needs_steps and getattr(method, "num_steps", None) is None:
        raise ValueError(
            f"num_steps must be given for {method.name} on a model without its scheduler, as "
            "configured (or give the scheduler)"
        )
    if isinstance(method, ModuleOptions) and method.needs_blocks and method.answers_steps:
        raise ValueError(f"scheduler must be given for {method.name} on a bare model")
    family = find_family(model)
    stack = _stack(method, model, scope) if method.needs_blocks else None
    names = (family.latents, family.timestep, family.full_noise_timestep)
    return ModelSite(method, model, names, scope, stack)


def _learning_site(x: Any, method: Method, models, find_schedulers, scope: DecisionScope) -> Any:
    from .sites.learning import LearningSite

    if isinstance(x, nn.Module):
        raise ValueError("learn needs a pipeline: its generations are made again")
    return LearningSite(method, models, find_schedulers, scope, {}, x)


def _check_free(name: str, model: nn.Module) -> None:
    if any(is_intercepted(each) for each in wrappers_of(model)):
        raise ValueError(f"a cache is already enabled on the {name}; call disable_cache first")
    other = other_cache_on(innermost(model))
    if other is not None:
        raise ValueError(
            f"a cache of diffusers ({other}) is already enabled on the {name}; disable it first"
        )


def _scope_for(
    model: nn.Module, scope: DecisionScope | None, at_sampler: bool, check_ranks: bool
) -> DecisionScope:
    if not isinstance(check_ranks, bool):
        raise TypeError(f"check_ranks must be True or False, got {check_ranks!r}")
    if scope is None:
        return find_scope(model, at_sampler=at_sampler, check_ranks=check_ranks)
    if not isinstance(scope, DecisionScope):
        raise TypeError(f"scope must be a DecisionScope or None, got {scope!r}")
    return replace(scope, check_ranks=scope.check_ranks or check_ranks)


def site_of(x: Any) -> Any:
    """The site that answers for a pipeline or a model; `ValueError` if no cache is enabled."""
    for model in _models_of(x):
        for each in wrappers_of(model):
            if (site := owner_of(each)) is not None:
                return site
    raise ValueError("no cache is enabled on this; call enable_cache first")


def _models_of(x: Any) -> list[nn.Module]:
    if isinstance(x, nn.Module):
        return [x]
    if not hasattr(x, "__dict__"):
        raise TypeError(f"expected a pipeline or a model, got {type(x).__name__}")
    return [value for value in vars(x).values() if isinstance(value, nn.Module)] or list(
        denoisers_of(x).values()
    )


def disable_cache(x: Any) -> None:
    """Give the models back exactly as they were; `ValueError` if no cache is enabled."""
    site_of(x).uninstall()


def reset_cache(x: Any) -> None:
    """Forget the running generation; the next call begins a new one."""
    site_of(x).reset()


def is_cache_enabled(x: Any) -> bool:
    """Whether this or one of diffusers' own caches is enabled."""
    return any(
        any(is_intercepted(each) for each in wrappers_of(model))
        or other_cache_on(innermost(model)) is not None
        for model in _models_of(x)
    )


def check_uncached(pipe: Any) -> None:
    """`ValueError` where a cache is enabled: calibrations run a pipeline as it is."""
    if is_cache_enabled(pipe):
        raise ValueError("a cache is enabled on the pipeline; call disable_cache first")


def cache_summary(x: Any) -> CacheSummary:
    """What the running generation, or the last one, cost and decided."""
    return site_of(x).summary()


def apply_cache_on_transformer(
    transformer: nn.Module,
    *,
    use_cache: str | None = "Fb",
    rel_l1_thresh: float | None = None,
    motion_threshold: float | None = None,
    num_steps: int | None = None,
    return_hidden_states_first: bool | None = None,
    enable_adacorrection: bool = False,
    adacorr_gamma: float | None = None,
    adacorr_lambda: float | None = None,
    scheduler: Any = None,
    scope: DecisionScope | None = None,
    check_ranks: bool = False,
    **options: Any,
) -> nn.Module:
    """Enable a cache on a transformer, with the arguments that xfuser's callers know.

    ``use_cache=None`` is AdaCorrection alone if it is enabled, and otherwise leaves the transformer
    as it is. ``return_hidden_states_first`` is checked against the family's blocks. gamma and
    lambda are 1 where they are not given; 1 may be given without AdaCorrection, which it does not
    change. The other arguments are flat options (`xfuser_adacorr.config`) and those of
    `enable_cache`. Returns the same transformer.
    """
    if return_hidden_states_first is not None:
        _check_returns(transformer, return_hidden_states_first)
    if use_cache is None and not enable_adacorrection:
        return transformer
    flat = {
        "use_cache": use_cache or "Auto",
        "enable_adacorrection": enable_adacorrection,
        "rel_l1_thresh": rel_l1_thresh,
        "motion_threshold": motion_threshold,
        "num_steps": num_steps,
        "adacorr_gamma": None if adacorr_gamma == 1 else adacorr_gamma,
        "adacorr_lambda": None if adacorr_lambda == 1 else adacorr_lambda,
        **options,
    }
    method = from_flat({name: value for name, value in flat.items() if value is not None})
    return enable_cache(
        transformer, method, scheduler=scheduler, scope=scope, check_ranks=check_ranks
    )


def _check_returns(transformer: nn.Module, given: bool) -> None:
    family = find_family(transformer)
    first = family.hidden_states_first
    if first is not None and given != first:
        raise ValueError(
            f"return_hidden_states_first must be None or {first} for {family.transformer_class}, "
            f"got {given!r}"
        )
