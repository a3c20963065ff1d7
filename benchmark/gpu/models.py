"""Models of published sizes with random weights, in the pipelines that call them.

Speed and memory do not depend on the weights, so nothing is downloaded: a transformer is made
directly on its device in its dtype. Text encoders and VAE are left out; text states are noise.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from xfuser_adacorr.models import OpenSoraPipeline, RectifiedFlowScheduler, STDiT3Transformer3DModel

FLUX_DEV = {"guidance_embeds": True}
"""FLUX.1-dev: 19 + 38 blocks, 24 heads of 128 channels; these are the class's defaults."""
TINY_FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
}
STDIT3_XL_2: dict[str, Any] = {}
"""Open-Sora 1.2: 28 block pairs, width 1152, 16 heads; these are the class's defaults."""
TINY_STDIT3 = {
    "hidden_size": 32,
    "depth": 3,
    "num_heads": 2,
    "caption_channels": 12,
    "model_max_length": 8,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SizedModel:
    """A transformer of a given size, and one generation with it."""

    name: str
    transformer: Callable[..., nn.Module]
    config: dict[str, Any]
    make_pipeline: Callable[[nn.Module], Any]
    call: dict[str, Any]
    """Arguments of the pipeline's call that set sizes and guidance."""
    text_tokens: int
    text_inputs: Callable[[nn.Module, Tensor], dict[str, Tensor]]
    """(transformer, noise [1, text tokens, channels]) -> the call's text arguments."""
    text_channels: str
    """Name of the transformer's option with the channels of the text states."""

    def make(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The pipeline, its weights drawn on ``device`` in ``dtype``."""
        torch.manual_seed(0)
        with _made_as(device, dtype):
            transformer = self.transformer(**self.config)
        pipe = self.make_pipeline(transformer.eval().requires_grad_(False))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @torch.no_grad()
    def generate(self, pipe: Any, steps: int) -> None:
        """One generation of always the same noise, up to the final latents."""
        transformer = pipe.transformer
        generator = torch.Generator().manual_seed(1)
        channels = transformer.config[self.text_channels]
        text = torch.randn(1, self.text_tokens, channels, generator=generator)
        pipe(
            **self.call,
            **self.text_inputs(transformer, text.to(transformer.device, transformer.dtype)),
            num_inference_steps=steps,
            generator=generator,
            output_type="latent",
        )


@contextmanager
def _made_as(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _flux_pipeline(transformer: nn.Module) -> FluxPipeline:
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )


def _flux_text(transformer: nn.Module, text: Tensor) -> dict[str, Tensor]:
    channels = transformer.config.pooled_projection_dim
    pooled = text.flatten(1).repeat(1, -(-channels // text[0].numel()))[:, :channels]
    return {"prompt_embeds": text, "pooled_prompt_embeds": pooled}


def _open_sora_pipeline(transformer: nn.Module) -> OpenSoraPipeline:
    return OpenSoraPipeline(transformer, RectifiedFlowScheduler())


def _open_sora_text(transformer: nn.Module, text: Tensor) -> dict[str, Tensor]:
    mask = torch.ones(text.shape[:2], dtype=torch.long, device=text.device)
    return {"prompt_embeds": text, "prompt_attention_mask": mask}


def _flux(config: dict[str, Any], side: int, text_tokens: int) -> SizedModel:
    return SizedModel(
        name="flux",
        transformer=FluxTransformer2DModel,
        config=config,
        make_pipeline=_flux_pipeline,
        call={"height": side, "width": side, "guidance_scale": 3.5},
        text_tokens=text_tokens,
        text_inputs=_flux_text,
        text_channels="joint_attention_dim",
    )


def _open_sora(
    config: dict[str, Any], frames: int, height: int, width: int, text_tokens: int
) -> SizedModel:
    return SizedModel(
        name="opensora",
        transformer=STDiT3Transformer3DModel,
        config=config,
        make_pipeline=_open_sora_pipeline,
        call={"num_frames": frames, "height": height, "width": width, "guidance_scale": 7.0},
        text_tokens=text_tokens,
        text_inputs=_open_sora_text,
        text_channels="caption_channels",
    )


SIZED = {"flux": _flux(FLUX_DEV, 1024, 512), "opensora": _open_sora(STDIT3_XL_2, 51, 480, 848, 300)}
"""FLUX.1-dev at 1024x1024: 4096 + 512 tokens. Open-Sora 1.2, 51 frames of 480x848: 15 x 1590
tokens, both halves of the guided pair in one call."""
TINY = {"flux": _flux(TINY_FLUX, 64, 6), "opensora": _open_sora(TINY_STDIT3, 17, 32, 32, 8)}
"""The same calls on models that a CPU runs in milliseconds."""
