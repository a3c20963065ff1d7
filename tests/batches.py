"""Batches of samples that differ strongly, sampled together or one by one, in every family."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from tests.samplers import FLOW, SCHEDULERS
from tests.tiny import GRID, TEXT_TOKENS, FluxSampler, make_tiny_flux
from tests.tiny_families import BY_NAME, TEXT, seeded
from xfuser_adacorr import CacheConfig, cache_summary, disable_cache, enable_cache

SCALES = torch.tensor([0.2, 1.0, 6.0])
"""Of the samples' prompts."""


def scaled(x):
    """Prompts of all samples, each on another scale."""
    return x * SCALES.view(-1, *[1] * (x.ndim - 1))


def rows(conditions, indices):
    return {name: x[indices] for name, x in conditions.items()}


@dataclass(frozen=True)
class BatchCase:
    """A tiny model with the conditions of three samples, and how it is sampled."""

    name: str
    make_model: Callable[[], torch.nn.Module]
    make_scheduler: Callable[[], Any]
    shape: tuple[int, ...]
    arguments: tuple[str, str]
    """Names of the latents and the timestep."""
    conditions: dict[str, torch.Tensor]
    """Arguments with a row for each sample; ``unconditional`` those of the other branch."""
    unconditional: dict[str, torch.Tensor]
    shared: dict[str, torch.Tensor]
    guidance: str = "none"
    """``batched``, or ``calls`` of its own."""
    steps_whole_batch: bool = False
    """The scheduler is given both halves of a guided batch, as by DiTPipeline."""
    full_timestep: float = 1000.0
    tolerance: float = 0.02

    def config(self, **options):
        target = any(name.startswith("target") for name in options)
        tolerance = {} if target else {"adacorr_tolerance": self.tolerance}
        return CacheConfig(use_cache="Auto", **(tolerance | options))


class BatchLoop:
    """Samples some of a case's samples as diffusers' pipelines do."""

    def __init__(self, case):
        self.case = case
        torch.manual_seed(0)
        self.model = case.make_model().eval()
        self.scheduler = case.make_scheduler()
        self.noise = seeded(3, len(SCALES), *case.shape)

    def call(self, x, t, conditions):
        latents, timestep = self.case.arguments
        t = torch.as_tensor(t, dtype=torch.float32).expand(len(x)) * self.case.full_timestep / 1000
        out = self.model(**{latents: x, timestep: t}, **conditions, **self.case.shared)
        return (out if isinstance(out, torch.Tensor) else out[0])[:, : x.shape[1]]

    def guided(self, x, t, indices):
        """What the scheduler is given, for these samples."""
        case, own = self.case, rows(self.case.conditions, indices)
        other = rows(case.unconditional, indices)
        if case.guidance == "batched":
            both = {name: torch.cat([other[name], own[name]]) for name in own}
            uncond, cond = self.call(torch.cat([x, x]), t, both).chunk(2)
        elif case.guidance == "calls":
            with self.model.cache_context("cond"):
                cond = self.call(x, t, own)
            with self.model.cache_context("uncond"):
                uncond = self.call(x, t, other)
        else:
            return self.call(x, t, own)
        return uncond + 3.0 * (cond - uncond)

    def run(self, indices, steps=14, callback=lambda i, x, indices: x, stop_after=None):
        scheduler, indices = self.scheduler, list(indices)
        scheduler.set_timesteps(steps)
        x = self.noise[indices] * float(getattr(scheduler, "init_noise_sigma", 1.0))
        for i, t in enumerate(scheduler.timesteps):
            if i == stop_after:
                return x
            out, latents = self.guided(x, t, indices), x
            if self.case.steps_whole_batch:
                out, latents = torch.cat([out, out]), torch.cat([x, x])
            stepped = scheduler.step(out, t, latents, return_dict=False)[0]
            x = callback(i, stepped[: len(x)], indices)
        return x

    def cached(self, indices, config, **options):
        """(latents, summary) of a run under ``config``."""
        enable_cache(self.model, config, scheduler=self.scheduler)
        x = self.run(indices, **options)
        summary = cache_summary(self.model)
        disable_cache(self.model)
        return x, summary


def flux_case(name, make_scheduler, **options):
    text = seeded(4, 3, TEXT_TOKENS, 16)
    pooled = seeded(5, 3, 16)
    ids = FluxSampler(None).inputs(torch.zeros(1, GRID * GRID, 8), 0.0)
    return BatchCase(
        name=name,
        make_model=make_tiny_flux,
        make_scheduler=make_scheduler,
        shape=(GRID * GRID, 8),
        arguments=("hidden_states", "timestep"),
        conditions={"encoder_hidden_states": scaled(text), "pooled_projections": scaled(pooled)},
        unconditional={"encoder_hidden_states": -text, "pooled_projections": pooled},
        shared={"img_ids": ids["img_ids"], "txt_ids": ids["txt_ids"], "return_dict": False},
        full_timestep=1.0,
        **options,
    )


def family_case(name, family, make_scheduler, conditions, unconditional, **options):
    tiny = BY_NAME[family]
    return BatchCase(
        name=name,
        make_model=tiny.make_model,
        make_scheduler=make_scheduler,
        shape=tiny.shape,
        conditions=conditions,
        unconditional=unconditional,
        **{"arguments": ("hidden_states", "timestep"), "shared": {}, **options},
    )


def text_mask():
    mask = torch.ones(3, TEXT)
    mask[1:, -2:] = 0
    return mask


def known_frames(*samples):
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[list(samples), 0] = False
    return mask


def pixart_case(name, make_scheduler, **options):
    text = seeded(6, 3, TEXT, 12)
    mask = {"encoder_attention_mask": text_mask()}
    return family_case(
        name,
        "pixart",
        make_scheduler,
        {"encoder_hidden_states": scaled(text), **mask},
        {"encoder_hidden_states": -text, **mask},
        shared={"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        **options,
    )


dpm = partial(DPMSolverMultistepScheduler, final_sigmas_type="sigma_min")
ddim = partial(DDIMScheduler, clip_sample=False)
video_text = seeded(6, 3, 1, TEXT, 12)
CASES = [
    flux_case("flux", SCHEDULERS["flow-euler"]),
    flux_case("flux-true-cfg", SCHEDULERS["flow-euler"], guidance="calls"),
    flux_case("flux-dpm", partial(DPMSolverMultistepScheduler, **FLOW)),
    flux_case("flux-true-cfg-unipc", SCHEDULERS["unipc-3-flow"], guidance="calls"),
    pixart_case("pixart-dpm", dpm, guidance="batched", tolerance=0.08),
    pixart_case("pixart-alone-dpm", dpm),
    family_case(
        "dit-ddim",
        "dit",
        ddim,
        {"class_labels": torch.tensor([3, 500, 7])},
        {"class_labels": torch.tensor([1000, 1000, 1000])},
        guidance="batched",
        steps_whole_batch=True,
    ),
    family_case(
        "opensora",
        "opensora",
        SCHEDULERS["flow-euler"],
        {"encoder_hidden_states": scaled(video_text), "x_mask": known_frames(1)},
        {"encoder_hidden_states": -video_text, "x_mask": known_frames(1)},
        guidance="batched",
    ),
    family_case(
        "opensora-original",
        "opensora-original",
        SCHEDULERS["flow-euler"],
        {"y": scaled(video_text)},
        {"y": -video_text},
        guidance="batched",
        arguments=("x", "timestep"),
    ),
    family_case(
        "opensora2",
        "opensora2",
        SCHEDULERS["flow-euler"],
        {
            "txt": scaled(seeded(6, 3, TEXT, 12)),
            "y_vec": scaled(seeded(7, 3, 6)),
            "img_ids": seeded(8, 1, 12, 3).expand(3, -1, -1),
            "txt_ids": torch.zeros(3, TEXT, 3),
        },
        {},
        arguments=("img", "timesteps"),
        full_timestep=1.0,
    ),
]
BY_CASE = {case.name: case for case in CASES}
