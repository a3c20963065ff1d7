"""Checks of what `OpenSoraPipeline` is called with; each raises `ValueError` with the argument."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .latents import Generators, spatial_ratio

OUTPUT_TYPES = ("np", "pt", "pil", "latent")


def check_sizes(pipeline: Any, **sizes: int) -> None:
    """Positive integers; height and width are whole latents."""
    for name, value in sizes.items():
        unit = spatial_ratio(pipeline.vae) if name in ("height", "width") else 1
        if not isinstance(value, int) or value < 1 or value % unit:
            kind = "a positive integer" if unit == 1 else f"a positive multiple of {unit}"
            raise ValueError(f"{name} must be {kind}, got {value!r}")


def check_output(pipeline: Any, output_type: str, callback_tensors: Iterable[str]) -> None:
    if output_type not in OUTPUT_TYPES:
        accepted = ", ".join(OUTPUT_TYPES)
        raise ValueError(f"output_type must be one of {accepted}, got {output_type!r}")
    if output_type != "latent" and pipeline.vae is None:
        raise ValueError(
            f"output_type must be 'latent' for a pipeline without vae, got {output_type!r}"
        )
    accepted = pipeline._callback_tensor_inputs
    if not set(callback_tensors) <= set(accepted):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs must be among {', '.join(accepted)}, "
            f"got {', '.join(callback_tensors)}"
        )


def check_text(
    pipeline: Any,
    prompt: Any,
    prompt_embeds: Tensor | None,
    prompt_attention_mask: Tensor | None,
    max_sequence_length: int | None,
) -> int:
    """Return the number of prompts."""
    config = pipeline.transformer.config
    longest, channels = config.model_max_length, config.caption_channels
    if max_sequence_length is not None and not 0 < max_sequence_length <= longest:
        raise ValueError(
            f"max_sequence_length must be from 1 to {longest}, got {max_sequence_length}"
        )
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("either prompt or prompt_embeds must be given, not both")
    if (prompt_embeds is None) != (prompt_attention_mask is None):
        raise ValueError("prompt_embeds and prompt_attention_mask must be given together")
    if prompt_embeds is not None:
        shape = prompt_embeds.shape
        if len(shape) != 3 or not 0 < shape[1] <= longest or shape[2] != channels:
            raise ValueError(
                f"prompt_embeds must have shape [n, L, {channels}] with L up to {longest}, "
                f"got {list(shape)}"
            )
        if prompt_attention_mask.shape != shape[:2]:
            raise ValueError(
                f"prompt_attention_mask must have shape {list(shape[:2])}, "
                f"got {list(prompt_attention_mask.shape)}"
            )
        return shape[0]
    if pipeline.tokenizer is None or pipeline.text_encoder is None:
        raise ValueError(
            "prompt needs a pipeline with tokenizer and text_encoder; give prompt_embeds instead"
        )
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise ValueError(f"prompt must be a string or a list of strings, got {prompt!r}")
    return len(prompts)


def check_noise(generator: Generators, latents: Tensor | None, shape: tuple[int, ...]) -> None:
    """``shape`` is that of the latents, ``[B, C, T, h, w]``."""
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ValueError(f"generator must be one or a list of {shape[0]}, got {len(generator)}")
    if latents is not None and latents.shape != shape:
        raise ValueError(f"latents must have shape {list(shape)}, got {list(latents.shape)}")


def check_conditioning(pipeline: Any, frames: Any, latents: Tensor | None, mask: Any) -> None:
    """What is given goes together; the shapes are checked by `FrameConditioning`."""
    if frames is not None and latents is not None:
        raise ValueError("conditioning_frames and conditioning_latents exclude each other")
    if frames is None and latents is None:
        if mask is not None:
            raise ValueError("conditioning_mask needs conditioning_frames or conditioning_latents")
        return
    if frames is not None and pipeline.vae is None:
        raise ValueError(
            "conditioning_frames needs a pipeline with vae; give conditioning_latents instead"
        )
    patch = pipeline.transformer.config.patch_size[0]
    if patch != 1:
        raise ValueError(
            f"conditioning_frames and conditioning_latents need a transformer whose patch_size is "
            f"1 in time, got {patch}"
        )
