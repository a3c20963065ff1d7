"""Tiny random pipelines of the benchmark's families, and commands run on them."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    WanTransformer3DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from benchmark import cli
from benchmark.settings import Settings
from benchmark.small import dit, opensora, pixart, wan
from benchmark.small.text import TEXT_WIDTH
from benchmark.small.tokenizers import build_clip_tokenizer, build_t5_tokenizer
from benchmark.studies.catalogue import STUDIES
from xfuser_adacorr.models import STDiT3Transformer3DModel


def read_settings(arguments: Sequence[str]) -> Settings:
    """The settings of a comparison with these arguments."""
    (settings,) = cli.read(STUDIES["compare"], arguments)
    return settings


def run_study(name: str, *arguments: Any) -> int:
    """The exit code of ``python -m benchmark NAME ...``."""
    return cli.run_study(name, [str(argument) for argument in arguments])


def tiny_pipeline() -> FluxPipeline:
    torch.manual_seed(0)
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(), build_t5_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
    )
    t5 = T5Config(
        vocab_size=len(t5_tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
            shift_factor=0.0,
            mid_block_add_attention=False,
        ),
        text_encoder=CLIPTextModel(clip),
        tokenizer=clip_tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=False,
            axes_dims_rope=(4, 6, 6),
        ),
    )


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        shift_factor=0.0,
        mid_block_add_attention=False,
    )


def tiny_pixart():
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=3,
        cross_attention_dim=24,
        sample_size=16,
        caption_channels=TEXT_WIDTH,
        use_additional_conditions=False,
    )
    return pixart.build_pipeline(tiny_vae()), transformer


def tiny_dit():
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        sample_size=16,
        num_embeds_ada_norm=1000,
    )
    return dit.build_pipeline(tiny_vae()), transformer


def tiny_opensora():
    transformer = STDiT3Transformer3DModel(
        hidden_size=24,
        depth=2,
        num_heads=2,
        input_sq_size=64,
        caption_channels=TEXT_WIDTH,
        model_max_length=opensora.TEXT_TOKENS,
    )
    return opensora.build_pipeline(tiny_vae()), transformer


def tiny_wan():
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1] * 4,
        latents_std=[2.0] * 4,
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=24,
        num_layers=3,
        rope_max_seq_len=16,
    )
    return wan.build_pipeline(vae), transformer


TINY = {"pixart": tiny_pixart, "dit": tiny_dit, "opensora": tiny_opensora, "wan": tiny_wan}
