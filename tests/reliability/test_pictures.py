"""Two calls a step without names keep the pictures of the trained pipeline: no branch is mixed."""

import math

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from PIL import Image

from benchmark.settings import PIPELINES
from xfuser_adacorr import Auto, cache_summary, disable_cache, enable_cache

STEPS = 20
SIZE = 32


@pytest.fixture(scope="module")
def parts():
    return FluxPipeline.from_pretrained(PIPELINES / "flux").components


def sampled(pipe, **more):
    pipe.set_progress_bar_config(disable=True)
    return torch.as_tensor(
        pipe(
            prompt="a red circle on a green striped background",
            negative_prompt="",
            true_cfg_scale=3.0,
            num_inference_steps=STEPS,
            height=SIZE,
            width=SIZE,
            max_sequence_length=24,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            **more,
        ).images
    )


def psnr(ours, theirs):
    return -10 * math.log10(float((ours - theirs).square().mean()) + 1e-12)


@pytest.mark.parametrize(
    ("cls", "more"),
    [
        (FluxPipeline, {}),
        (FluxImg2ImgPipeline, {"image": Image.new("RGB", (SIZE, SIZE), "gray"), "strength": 0.9}),
    ],
    ids=["text", "picture"],
)
def test_pictures_with_true_guidance_are_kept(parts, cls, more):
    pipe = cls(**parts)
    plain = sampled(pipe, **more)
    enable_cache(pipe, Auto(tolerance=0.004))
    kept = sampled(pipe, **more)
    summary = cache_summary(pipe)
    disable_cache(pipe)
    assert summary.calls == 2 * summary.num_steps and summary.compute_fraction < 0.9
    assert summary.computed_calls == 2 * summary.computed_steps
    assert psnr(kept, plain) > 50.0
