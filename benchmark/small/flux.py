"""The small FLUX pipeline: its components, their saved form, and what training needs of them."""

import json
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from benchmark.small.scenes import labels_scene
from benchmark.small.tokenizers import MAX_LENGTH, build_clip_tokenizer, build_t5_tokenizer

POOLED_WIDTH = 64
TEXT_WIDTH = 64


def build_transformer(latent_channels: int = 8) -> FluxTransformer2DModel:
    """An untrained FLUX transformer with 4 dual and 10 single blocks, 4.8 M parameters.

    The modulations and the output start at zero, so that every block starts as the identity.
    """
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * latent_channels,
        num_layers=4,
        num_single_layers=10,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    modulations = [transformer.norm_out.linear]
    for block in transformer.transformer_blocks:
        modulations += [block.norm1.linear, block.norm1_context.linear]
    modulations += [block.norm.linear for block in transformer.single_transformer_blocks]
    for linear in (*modulations, transformer.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def build_pipeline(vae: AutoencoderKL) -> FluxPipeline:
    """A pipeline around `vae` with untrained text encoders and transformer."""
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(), build_t5_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=POOLED_WIDTH,
            intermediate_size=4 * POOLED_WIDTH,
            projection_dim=POOLED_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=4 * TEXT_WIDTH,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=t5_tokenizer.pad_token_id,
            eos_token_id=t5_tokenizer.eos_token_id,
        )
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=t5_tokenizer,
        transformer=build_transformer(vae.config.latent_channels),
    )


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """Latents [N, C, H, W] as the transformer's tokens [N, H W / 4, 4 C]."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def image_ids(height: int, width: int) -> torch.Tensor:
    """Position ids [height width / 4, 3] of the packed tokens of latents [.., height, width]."""
    return FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)


def tokenise(pipeline: FluxPipeline, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP and T5 token ids, each [N, 24], padded as the pipeline pads them."""
    options = {"padding": "max_length", "max_length": MAX_LENGTH, "truncation": True}
    clip = pipeline.tokenizer(prompts, return_tensors="pt", **options).input_ids
    t5 = pipeline.tokenizer_2(prompts, return_tensors="pt", **options).input_ids
    return clip, t5


def tokenise_labels(
    pipeline: FluxPipeline, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`tokenise` of the prompts of label rows [N, 7]."""
    return tokenise(pipeline, [labels_scene(row).prompt for row in labels])


@torch.no_grad()
def generate(
    pipeline: FluxPipeline,
    prompts: list[str],
    seeds: list[int],
    steps: int,
    batch_size: int = 32,
) -> torch.Tensor:
    """Pictures [N, 3, 64, 64] in [0, 1] for prompts, each with noise from its own seed."""
    pictures = []
    pipeline.set_progress_bar_config(disable=True)
    for first in range(0, len(prompts), batch_size):
        chosen = seeds[first : first + batch_size]
        pictures.append(
            pipeline(
                prompts[first : first + batch_size],
                height=64,
                width=64,
                num_inference_steps=steps,
                max_sequence_length=MAX_LENGTH,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in chosen],
                output_type="pt",
            ).images.cpu()
        )
    return torch.cat(pictures).float()


def save_pipeline(pipeline: FluxPipeline, path: Path) -> None:
    """Saves the pipeline in float16; the given pipeline stays as it is.

    The text encoders' configs say float32, so that plain `from_pretrained` gives float32
    modules, as it does for the autoencoder and the transformer.
    """
    half = {
        name: deepcopy(part).half() if isinstance(part, nn.Module) else part
        for name, part in pipeline.components.items()
    }
    FluxPipeline(**half).save_pretrained(path)
    for name in ("text_encoder", "text_encoder_2"):
        file = path / name / "config.json"
        config = json.loads(file.read_text())
        config["dtype"] = "float32"
        file.write_text(json.dumps(config, indent=2) + "\n")
