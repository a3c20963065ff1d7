"""The caches that diffusers has as hooks.

``enable_cache`` is a method of some transformers only (FLUX). The others get the same hooks by
their ``apply_...`` functions, a context for the one call a step that their pipelines make, and a
reset before every picture, all of which their pipelines leave out.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import hooks
from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context
from diffusers.models.cache_utils import CacheMixin
from diffusers.utils import logging

from benchmark.peers import Run
from benchmark.peers.restoring import before_every_picture
from benchmark.peers.sampler_step import noise_levels

Disable = Callable[[], None]

_APPLY = {
    hooks.FirstBlockCacheConfig: hooks.apply_first_block_cache,
    hooks.TaylorSeerCacheConfig: hooks.apply_taylorseer_cache,
    hooks.MagCacheConfig: hooks.apply_mag_cache,
    hooks.FasterCacheConfig: hooks.apply_faster_cache,
    hooks.SeaCacheConfig: hooks.apply_sea_cache,
    hooks.PyramidAttentionBroadcastConfig: hooks.apply_pyramid_attention_broadcast,
}


def _enable(pipe: Any, config: Any) -> Disable:
    transformer = pipe.transformer
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        if isinstance(transformer, CacheMixin):
            transformer.enable_cache(config)
        else:
            _APPLY[type(config)](transformer, config)
    finally:
        logging.set_verbosity(level)
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    if isinstance(transformer, CacheMixin):
        before_every_picture(pipe, registry.reset_stateful_hooks)
        return transformer.disable_cache

    def reset() -> None:
        registry.reset_stateful_hooks()
        _set_cache_context(transformer, CacheContext("cond_uncond"))

    before_every_picture(pipe, reset)
    return lambda: None  # the hooks are attributes of the modules, which are restored


def _first_block_cache(pipe: Any, options: dict[str, Any], run: Run) -> Disable:
    return _enable(pipe, hooks.FirstBlockCacheConfig(**options))


# What the method's paper caches: the attentions and the feed-forward layers, and of FLUX's single
# blocks the sum of both. Without a list diffusers hooks the attentions alone, which saves less.
_TAYLORSEER_CACHED = {
    "FluxTransformer2DModel": (
        r"transformer_blocks\.\d+\.(attn|ff|ff_context)",
        r"single_transformer_blocks\.\d+\.proj_out",
    ),
    "PixArtTransformer2DModel": (r"transformer_blocks\.\d+\.(attn1|attn2|ff)",),
    "DiTTransformer2DModel": (r"transformer_blocks\.\d+\.(attn1|ff)",),
    "SD3Transformer2DModel": (r"transformer_blocks\.\d+\.(attn|ff|ff_context)",),
    "WanTransformer3DModel": (r"blocks\.\d+\.(attn1|attn2|ffn)",),
    "STDiT3Transformer3DModel": (r"(spatial|temporal)_blocks\.\d+\.(attn|cross_attn|mlp)",),
}
_TAYLORSEER_SKIPPED = {
    "FluxTransformer2DModel": (r"single_transformer_blocks\.\d+\.(attn|proj_mlp)",)
}
_LAST_LAYER = {"DiTTransformer2DModel": r"proj_out_2"}


def _taylorseer(order: int, *, lite: bool) -> Callable[..., Disable]:
    def enable(pipe: Any, options: dict[str, Any], run: Run) -> Disable:
        name = type(pipe.transformer).__name__
        if lite:  # `use_lite_mode`, which knows the name proj_out alone
            cached = (_LAST_LAYER.get(name, r"proj_out"),)
            skipped = (r"[^.]*block[^.]*\.\d+",)
        else:
            cached, skipped = _TAYLORSEER_CACHED[name], _TAYLORSEER_SKIPPED.get(name, ())
        defaults = {
            "max_order": order,
            "taylor_factors_dtype": torch.float32,
            "cache_identifiers": list(cached),
            "skip_predict_identifiers": list(skipped),
        }
        return _enable(pipe, hooks.TaylorSeerCacheConfig(**{**defaults, **options}))

    return enable


def _mag_cache(pipe: Any, options: dict[str, Any], run: Run) -> Disable:
    """Without ``mag_ratios`` everything is computed, and the ratios are printed (calibration)."""
    ratios = options.pop("mag_ratios", None)
    config = hooks.MagCacheConfig(
        num_inference_steps=run.num_inference_steps,
        mag_ratios=None if ratios is None else list(ratios),
        calibrate=ratios is None,
        **options,
    )
    return _enable(pipe, config)


def _timestep_of(pipe: Any) -> Callable[[], Any]:
    """The timestep (0 to 1000) of the running call: the pipeline's, or the transformer's."""
    if hasattr(type(pipe), "current_timestep"):
        return lambda: pipe.current_timestep
    seen: list[Any] = []

    def look(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen[:] = [kwargs["timestep"].flatten()[0]]

    pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    return lambda: seen[0]


def _by_name(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    (hidden_states,) = args
    return (), {"hidden_states": hidden_states, **kwargs}


def _faster_cache(pipe: Any, options: dict[str, Any], run: Run) -> Disable:
    doubled = not hasattr(type(pipe), "current_timestep")  # FLUX is distilled: nothing to split
    config = hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=options["skip_range"],
        spatial_attention_timestep_skip_range=options["timestep_range"],
        attention_weight_callback=lambda module: 0.5,  # its default, said aloud
        tensor_format="BCHW",
        is_guidance_distilled=not doubled,
        current_timestep_callback=_timestep_of(pipe),
    )
    disable = _enable(pipe, config)
    if doubled:  # it splits named arguments only
        pipe.transformer.register_forward_pre_hook(_by_name, with_kwargs=True)
    return disable


def _pyramid_attention_broadcast(pipe: Any, options: dict[str, Any], run: Run) -> Disable:
    skip_range, timesteps = options["skip_range"], options["timestep_range"]
    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=skip_range,
        cross_attention_block_skip_range=skip_range,
        spatial_attention_timestep_skip_range=timesteps,
        cross_attention_timestep_skip_range=timesteps,
        current_timestep_callback=_timestep_of(pipe),
    )
    return _enable(pipe, config)


def _noise_in_flow_coordinates(scheduler: Any) -> list[float]:
    """Of each step, from 1 (noise) to 0: what `SeaCacheConfig`'s filter takes."""
    return [s / (a + s) for a, s in noise_levels(scheduler)[:-1]]


def _visible_latents(module: Any, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Latents [C, F, H, W] of a call's first clip, of pictures with one frame."""
    latents = args[0] if args else kwargs["hidden_states"]
    if latents.ndim == 3:  # FLUX packs 2x2 latents into a token
        side = math.isqrt(latents.shape[1])
        latents = latents.unflatten(1, (side, side)).unflatten(3, (-1, 2, 2))
        latents = latents.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return [latents[0] if latents.ndim == 5 else latents[0].unsqueeze(1)]


def _sea_cache(pipe: Any, options: dict[str, Any], run: Run) -> Disable:
    """Its hook asks for the step and the noise level, which the pipelines do not tell it."""
    transformer, calls_a_step = pipe.transformer, 2 if run.true_cfg else 1
    config = hooks.SeaCacheConfig(raw_vision_callback=_visible_latents, **options)
    disable = _enable(pipe, config)
    calls = 0

    def begin() -> None:
        nonlocal calls
        calls = 0

    def tell(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal calls
        step, branch = divmod(calls, calls_a_step)
        calls += 1
        context = CacheContext(
            ("cond", "uncond")[branch],
            step_index=step,
            sigma=_noise_in_flow_coordinates(pipe.scheduler)[step],
            num_inference_steps=run.num_inference_steps,
        )
        _set_cache_context(transformer, context)

    transformer.register_forward_pre_hook(tell, with_kwargs=True)
    before_every_picture(pipe, begin)
    return disable


ENABLE = {
    "SeaCache": _sea_cache,
    "FirstBlockCache": _first_block_cache,
    "TaylorSeer": _taylorseer(1, lite=False),
    "TaylorSeer2": _taylorseer(2, lite=False),
    "TaylorSeerLite": _taylorseer(1, lite=True),
    "TaylorSeerLite2": _taylorseer(2, lite=True),
    "MagCache": _mag_cache,
    "FasterCache": _faster_cache,
    "PyramidAttentionBroadcast": _pyramid_attention_broadcast,
}
"""By method: (pipeline, options, run) -> what ends it."""
