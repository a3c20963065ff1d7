"""The small Stable Diffusion pipeline: a UNet with cross-attention, DDIM and guidance."""

from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn

from benchmark.small.autoencoder import absorb_shift, encode_pictures
from benchmark.small.family import SmallFamily, TrainingConfig
from benchmark.small.judge import Judge
from benchmark.small.latents import load_encoded
from benchmark.small.noise import BETAS, NoiseBatch, NoiseExamples, noise_loss
from benchmark.small.pixart import draw_pictures
from benchmark.small.scenes import labels_scene, sample_labels
from benchmark.small.splits import held_back_labels
from benchmark.small.text import (
    TEXT_WIDTH,
    build_clip_encoder,
    tokenise_clip,
    warm_up_text_encoders,
)
from benchmark.small.tokenizers import build_clip_tokenizer

ANCHOR = 8.0
"""Of `copy_through_`, in standard deviations of the noise."""


def build_unet(latent_channels: int = 8) -> UNet2DConditionModel:
    """An untrained UNet of widths 32 and 96 with cross-attention at 8x8, 2.1 M parameters.

    It starts as a copy of its latents (`copy_through_`).
    """
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 96),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    copy_through_(unet)
    return unet


@torch.no_grad()
def copy_through_(unet: UNet2DConditionModel) -> None:
    """Lets an untrained UNet return its latents, as the last skip connection carries them.

    At high noise a noise predictor has to copy before it can learn anything else, and to within a
    share of sqrt(a_t), 1.7 % at timestep 900. The last group normalisation takes the mean and the
    scale of every group from what passes, which is more than that in groups of 1,024 values: so
    that pictures stay noisy. Therefore each of its groups holds a channel x of the latents, -x, and
    two constants of `ANCHOR` and -`ANCHOR`: their mean is zero whatever x is, and x has hardly any
    part in their scale. After it ``silu(x) - silu(-x) = x``.
    """
    channels, last = unet.config.in_channels, unet.up_blocks[-1].resnets[-1]
    if unet.conv_in.out_channels != 4 * channels or unet.conv_norm_out.num_groups != channels:
        raise ValueError("a group of the last normalisation must be 4 features of one channel")
    group = 4 * torch.arange(channels)
    unet.conv_in.weight[:channels] = 0
    unet.conv_in.bias[:channels] = 0
    unet.conv_in.weight[:channels, :, 1, 1] = torch.eye(channels)
    nn.init.zeros_(last.conv2.weight)
    nn.init.zeros_(last.conv2.bias)
    nn.init.zeros_(last.conv_shortcut.weight)
    copied = last.conv_shortcut.in_channels - unet.conv_in.out_channels + torch.arange(channels)
    last.conv_shortcut.weight[group, copied] = 1
    last.conv_shortcut.weight[group + 1, copied] = -1
    last.conv_shortcut.bias.copy_(torch.tensor([0, 0, ANCHOR, -ANCHOR]).repeat(channels))
    unet.conv_norm_out.weight[:] = ((1 + ANCHOR**2) / 2) ** 0.5
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    unet.conv_out.weight[torch.arange(channels), group, 1, 1] = 1
    unet.conv_out.weight[torch.arange(channels), group + 1, 1, 1] = -1


def build_pipeline(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """A pipeline around a copy of `vae` with untrained text encoder and UNet."""
    tokenizer = build_clip_tokenizer()
    return StableDiffusionPipeline(
        vae=absorb_shift(vae),
        text_encoder=build_clip_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=build_unet(vae.config.latent_channels),
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tokenise_labels(pipeline: StableDiffusionPipeline, labels: torch.Tensor) -> torch.Tensor:
    """CLIP token ids [N, 24] of the prompts of label rows [N, 7]."""
    return tokenise_clip(pipeline.tokenizer, [labels_scene(row).prompt for row in labels])


def load_examples(
    pipeline: StableDiffusionPipeline, number: int, seed: int, path: Path
) -> NoiseExamples:
    """Pictures of one object."""
    latents, labels = load_encoded(
        path,
        number,
        seed,
        partial(draw_pictures, family="sd"),
        lambda pictures: encode_pictures(pipeline.vae, pictures),
    )
    return NoiseExamples(
        latents=latents,
        conditions=tokenise_labels(pipeline, labels),
        empty=tokenise_clip(pipeline.tokenizer, [""])[0],
    )


def loss(model: nn.ModuleDict, batch: NoiseBatch) -> torch.Tensor:
    """`noise_loss` with the pipeline's own arguments."""
    states = model["text_encoder"](batch.conditions)[0]
    prediction = model["unet"](batch.noisy, batch.timesteps, states, return_dict=False)[0]
    return noise_loss(prediction, batch)


def warm_up(pipeline: StableDiffusionPipeline) -> float:
    """Teaches the text encoder to name the scene, `warm_up_text_encoders`."""
    generator, held_back = torch.Generator().manual_seed(1), held_back_labels("sd")
    labels = sample_labels(8192, generator, exclude=held_back, single_share=1.0)
    return warm_up_text_encoders(
        nn.ModuleList([pipeline.text_encoder]),
        lambda ids: [pipeline.text_encoder(ids).pooler_output],
        [tokenise_labels(pipeline, labels)],
        labels,
    )


FAMILY = SmallFamily(
    name="sd",
    trained=("unet", "text_encoder"),
    config=TrainingConfig(minutes=28.0, examples=12_000, learning_rate=1e-3),
    latents="sd_latents.pt",
    build_pipeline=build_pipeline,
    load_examples=load_examples,
    loss=loss,
    accuracy=Judge.prompt_accuracy,
    warm_up=warm_up,
)
