"""Half precision: what is kept and computed in float32, and what the results are then worth."""

import logging
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from tests.cached import run_cached
from tests.samplers import SCHEDULERS, linear_loop, relative_error
from tests.tiny import FluxSampler, LinearInSigma, make_tiny_flux
from xfuser_adacorr import CacheConfig, cache_summary, disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache.api import site_of

PIPELINES = Path(__file__).parents[2] / "benchmark" / "pipelines"
STEPS = 20
HALF = [torch.bfloat16, torch.float16]


def config_of(use_cache, **options):
    if use_cache != "Auto":
        options = {"rel_l1_thresh": 0.3, **options}
    return CacheConfig(use_cache=use_cache, enable_adacorrection=True, **options)


def in_type(sampler, dtype, scale=1.0):
    """The sampler with noise, and so with latents and inputs, of another type."""
    noise = sampler.noise
    sampler.noise = lambda *args, **kwargs: (scale * noise(*args, **kwargs)).to(dtype)
    return sampler


def rounding(dtype, x, roundings=STEPS):
    """Deviation of a sum of values as large as x after so many roundings to nearest, in two runs.

    A rounding's error is spread evenly over at most ``eps * max|x|``, so it deviates by that over
    ``sqrt(12)``; independent ones add up in squares.
    """
    each = torch.finfo(dtype).eps * x.abs().max().item() / 12**0.5
    return each * (2 * roundings) ** 0.5


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("tolerance", [0.003, 0.03, 0.3, 10.0])
def test_linear_output_is_repaired_to_rounding_of_the_type(transformer, dtype, tolerance):
    transformer.forward = LinearInSigma().forward
    sampler = in_type(FluxSampler(transformer), dtype)
    plain = sampler.run(STEPS)
    x, summary = run_cached(sampler, config_of("Auto", adacorr_tolerance=tolerance))
    assert x.dtype == dtype and summary.compute_fraction < 0.7
    difference = (x.float() - plain.float()).square().mean().sqrt().item()
    assert difference < rounding(dtype, plain.float())


class InTypeOf:
    """A transformer's forward whose output has the type of the latents."""

    def __init__(self, forward):
        self.inner = forward

    def forward(self, hidden_states, timestep, return_dict=True, **kwargs):
        (out,) = self.inner(hidden_states, timestep, return_dict=False, **kwargs)
        return (out.to(hidden_states.dtype),)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("ddim-v", 2), ("dpm-2-flow", 2), ("unipc-3-flow", 2), ("deis", 3), ("dpm-2", 3)],
)
def test_a_repair_loses_no_more_than_the_uncached_run_does_by_rounding(name, factor):
    """The velocity is linear, so that all there is to be lost is lost by rounding.

    A noise predicted at pure noise is off by 157 roundings as a velocity (DDPM's betas), which
    lines repeat over the calls that they stand in for: hence the larger factor.
    """

    def run(dtype, config=None):
        loop = linear_loop(name)
        loop.transformer.forward = InTypeOf(loop.transformer.forward).forward
        in_type(loop.flux, dtype)
        if config is not None:
            enable_cache(loop.transformer, config, scheduler=loop.scheduler)
        x = loop.run()
        if config is not None:
            assert cache_summary(loop.transformer).compute_fraction < 0.8
            assert x.dtype == dtype
        return x.float()

    exact, plain = run(torch.float32), run(torch.bfloat16)
    cached = run(torch.bfloat16, CacheConfig(use_cache="Auto", adacorr_tolerance=0.05))
    assert relative_error(cached, exact) < factor * relative_error(plain, exact)


@pytest.mark.parametrize("bare", [False, True])
def test_what_is_kept_for_forecasts_and_drift_is_float32(bare):
    sampler = in_type(FluxSampler(make_tiny_flux().bfloat16()), torch.bfloat16)
    config = config_of("Auto", adacorr_tolerance=0.1)
    enable_cache(sampler.transformer, config, scheduler=None if bare else sampler.scheduler)
    sampler.run(STEPS, finish=False, stop_after=STEPS - 2)
    site = site_of(sampler.transformer)
    kept = site.run.branches.values() if bare else site.tracker.run.tracks.values()
    (lane,) = (each.lane for each in kept)
    tensors = [lane.forecast.v0, lane.forecast.v1, *lane.rule.tensors()]
    assert len(tensors) >= 4 and {x.dtype for x in tensors} == {torch.float32}


def test_a_repair_keeps_outputs_in_float32_and_latents_in_their_type():
    loop = linear_loop("dpm-2-flow")
    loop.transformer.forward = InTypeOf(loop.transformer.forward).forward
    in_type(loop.flux, torch.bfloat16)
    config = CacheConfig(use_cache="Auto", adacorr_gamma=0.0)
    enable_cache(loop.transformer, config, scheduler=loop.scheduler)
    loop.run(stop_after=6)
    (track,) = site_of(loop.transformer).tracker.run.tracks.values()
    assert track.lane.forecast.v0.dtype == torch.float32
    assert {x.dtype for x in track.lane.repair.tensors() if x.shape == (1, 16, 8)} == {
        torch.bfloat16
    }


def test_large_float16_latents_overflow_nothing(transformer):
    """Their squared norm alone is far above float16's largest number, 65504."""
    scale, linear = 1000.0, LinearInSigma()
    linear.a, linear.b = scale * linear.a, scale * linear.b
    transformer.forward = linear.forward
    sampler = in_type(FluxSampler(transformer), torch.float16, scale)
    plain = sampler.run(STEPS)
    assert plain.float().square().sum() > 100 * torch.finfo(torch.float16).max
    x, summary = run_cached(sampler, config_of("Auto", adacorr_tolerance=0.03))
    assert x.dtype == torch.float16 and x.isfinite().all()
    assert summary.compute_fraction < 0.7
    scored = [call for call in summary.trace.calls if call.weight is not None]
    assert len(scored) == STEPS - 1
    assert all(0.0 < call.temporal < 2.0 for call in scored)
    difference = (x.float() - plain.float()).square().mean().sqrt().item()
    assert difference < rounding(torch.float16, plain.float())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("use_cache", ["Fb", "Tea", "Fast", "Auto"])
def test_every_answer_has_the_models_type(dtype, use_cache):
    sampler = in_type(FluxSampler(make_tiny_flux().to(dtype)), dtype)
    model, seen = sampler.transformer, []
    enable_cache(model, config_of(use_cache, adacorr_tolerance=0.1), scheduler=sampler.scheduler)
    call = sampler.call
    sampler.call = lambda *args, **kwargs: seen.append(call(*args, **kwargs)) or seen[-1]
    sampler.run(STEPS)
    refreshed = {record.refreshed for record in cache_summary(model).trace.calls}
    disable_cache(model)
    assert refreshed == {True, False}
    assert {x.dtype for x in seen} == {dtype} and all(x.isfinite().all() for x in seen)


def bare_bfloat16_run(steps, shift):
    sampler = in_type(FluxSampler(make_tiny_flux().bfloat16()), torch.bfloat16)
    sampler.scheduler = SCHEDULERS["flow-euler"]()
    sampler.scheduler.set_shift(shift)
    inputs = sampler.inputs

    def rounded(x, t, branch="cond"):
        """As diffusers' pipelines do: the timestep in the latents' type, over 1000."""
        given = inputs(x, t, branch)
        timestep = torch.as_tensor(t).expand(x.shape[0]).to(x.dtype) / 1000
        return {**given, "timestep": timestep}

    sampler.inputs = rounded
    enable_cache(sampler.transformer, "Auto", adacorr_tolerance=0.1, num_steps=steps)
    sampler.run(steps)
    return cache_summary(sampler.transformer)


def test_rounded_timesteps_of_a_bare_transformer_are_one_run(caplog):
    with caplog.at_level(logging.WARNING):
        summary = bare_bfloat16_run(50, shift=3.0)
    assert summary.num_steps == 50 and summary.compute_fraction < 0.7
    assert not caplog.records


def test_timesteps_that_rounding_makes_equal_are_told(caplog):
    """Steps of 1/300 at the top, where bfloat16 has steps of 1/256."""
    with caplog.at_level(logging.WARNING):
        bare_bfloat16_run(100, shift=3.0)
    assert caplog.records
    assert all("give the scheduler" in record.getMessage() for record in caplog.records)


def test_caching_costs_bfloat16_pictures_less_than_the_type_itself_does():
    """The shipped FLUX pipeline; distances are to the uncached float32 picture."""
    pipe = FluxPipeline.from_pretrained(PIPELINES / "flux", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)

    def draw(use_cache=None, **options):
        if use_cache is not None:
            enable_cache(pipe, use_cache, **options)
        picture = pipe(
            "a white cross and a white square on a blue plain background",
            height=64,
            width=64,
            max_sequence_length=pipe.tokenizer_2.model_max_length,
            num_inference_steps=28,
            generator=torch.Generator().manual_seed(1000),
            output_type="pt",
        ).images.float()
        if use_cache is not None:
            assert 0.3 < cache_summary(pipe).compute_fraction < 0.45
            disable_cache(pipe)
        return picture

    exact = draw()
    pipe.to(torch.bfloat16)
    error = {
        name: (picture - exact).square().mean().item()
        for name, picture in {
            "type": draw(),
            "corrected": draw("Auto", adacorr_tolerance=0.008),
            "reuse": draw("Fb", rel_l1_thresh=0.2),
        }.items()
    }
    assert error["corrected"] < 2 * error["type"]
    assert error["reuse"] > 4 * error["type"]
