"""PixArt and DiT through their pipelines, which have no cache contexts and guide in one batch."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
)

from tests.tiny_families import BY_NAME, TEXT, loose, never, seeded
from xfuser_adacorr import cache_summary, disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache.api import site_of

STEPS = 5
NAMES = ["Fb", "Tea", "Fast", "Auto", "Tea+AdaCorrection"]


def flow_scheduler():
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


def pixart_pipeline(cls):
    return cls(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=BY_NAME["pixart"].make(),
        scheduler=flow_scheduler(),
    )


def run_pixart(pipe, seed=0, steps=STEPS, size=64):
    mask = torch.ones(1, TEXT)
    return pipe(
        negative_prompt=None,
        prompt_embeds=seeded(1, 1, TEXT, 12),
        prompt_attention_mask=mask,
        negative_prompt_embeds=seeded(2, 1, TEXT, 12),
        negative_prompt_attention_mask=mask,
        height=size,
        width=size,
        use_resolution_binning=False,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images


def dit_pipeline():
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(32,))
    return DiTPipeline(
        transformer=BY_NAME["dit"].make(), vae=vae.eval(), scheduler=flow_scheduler()
    )


def run_dit(pipe, seed=0, steps=STEPS):
    return pipe(
        class_labels=[3],
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images


PIPELINES = {
    "alpha": (lambda: pixart_pipeline(PixArtAlphaPipeline), run_pixart),
    "sigma": (lambda: pixart_pipeline(PixArtSigmaPipeline), run_pixart),
    "dit": (dit_pipeline, run_dit),
}


@pytest.fixture(params=PIPELINES)
def pipeline(request):
    make, run = PIPELINES[request.param]
    torch.manual_seed(0)
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    return pipe, run


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_never_hits_is_bit_equal(pipeline, name):
    pipe, run = pipeline
    plain = run(pipe)
    enable_cache(pipe, never(name))
    assert torch.equal(run(pipe), plain)
    disable_cache(pipe)
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("name", NAMES)
def test_every_run_is_a_generation_of_its_own(pipeline, name):
    """The second run repeats the first exactly, and one of another length counts anew."""
    pipe, run = pipeline
    plain = run(pipe)
    enable_cache(pipe, loose(name))
    first = run(pipe)
    summary = cache_summary(pipe)
    assert summary.num_steps == STEPS and summary.reused_steps > 0
    assert len(summary.trace.calls) == STEPS, "a guided pair is one call with one decision"
    assert not torch.equal(first, plain)
    assert site_of(pipe).tracker.run is None, "the end of the run was not seen"
    run(pipe, seed=1)
    assert torch.equal(run(pipe), first)
    run(pipe, steps=3)
    assert cache_summary(pipe).num_steps == 3


def test_an_aborted_run_leaves_nothing_behind(pipeline):
    pipe, run = pipeline
    enable_cache(pipe, loose("Tea"))
    first = run(pipe)
    handle = pipe.transformer.transformer_blocks[1].register_forward_hook(
        lambda *args: (_ for _ in ()).throw(OSError)
    )
    with pytest.raises(OSError):
        run(pipe, seed=1)
    handle.remove()
    assert torch.equal(run(pipe), first)


def test_pixart_takes_pictures_of_another_size():
    pipe = pixart_pipeline(PixArtSigmaPipeline)
    pipe.set_progress_bar_config(disable=True)
    enable_cache(pipe, loose("Fb"))
    assert run_pixart(pipe).shape[-2:] == (8, 8)
    assert run_pixart(pipe, size=96).shape[-2:] == (12, 12)
    assert cache_summary(pipe).trace.calls[0].reason == "first"
