"""Schedulers to test under, a sampling loop for all of them, and a model linear in time."""

import numpy as np
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from tests.tiny import FluxSampler, make_tiny_flux

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0}
V = {"prediction_type": "v_prediction"}
SCHEDULERS = {
    "flow-euler": lambda: FlowMatchEulerDiscreteScheduler(shift=1.5),
    "ddim": lambda: DDIMScheduler(),
    "ddim-v": lambda: DDIMScheduler(clip_sample=False, **V),
    "ddim-v-zero-snr": lambda: DDIMScheduler(
        clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing", **V
    ),
    "cogvideox-ddim": lambda: CogVideoXDDIMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", **V
    ),
    "dpm-1": lambda: DPMSolverMultistepScheduler(solver_order=1),
    "dpm-2": lambda: DPMSolverMultistepScheduler(solver_order=2, final_sigmas_type="sigma_min"),
    "dpm-3": lambda: DPMSolverMultistepScheduler(solver_order=3, use_lu_lambdas=True),
    "dpm-2-noise": lambda: DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver", final_sigmas_type="sigma_min"
    ),
    "dpm-2-karras": lambda: DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "dpm-2-flow": lambda: DPMSolverMultistepScheduler(**FLOW),
    "dpm-3-flow": lambda: DPMSolverMultistepScheduler(solver_order=3, **FLOW),
    "dpm-single": lambda: DPMSolverSinglestepScheduler(),
    "unipc": lambda: UniPCMultistepScheduler(),
    "unipc-3-flow": lambda: UniPCMultistepScheduler(solver_order=3, **FLOW),
    "deis": lambda: DEISMultistepScheduler(solver_order=3),
    "euler": lambda: EulerDiscreteScheduler(),
    "lms-karras": lambda: LMSDiscreteScheduler(use_karras_sigmas=True),
    "pndm": lambda: PNDMScheduler(skip_prk_steps=True),
}
REPLAYED = {name: make for name, make in SCHEDULERS.items() if name != "flow-euler"}


def damped_further(damping, fresh, node0, node1):
    """The forecast's damping after a refresh; nodes are (sigma, output), ``node0`` the later."""
    (sigma, output), (sigma0, v0), (sigma1, v1) = fresh, node0, node1
    predicted = (sigma - sigma0) / (sigma0 - sigma1) * (v0 - v1)
    share = float(((output - v0) * predicted).sum() / predicted.square().sum())
    return 0.5 * damping + 0.5 * min(max(2.0 * share, 0.0), 1.0)


class Loop:
    """Samples as diffusers' pipelines do, under any scheduler."""

    def __init__(self, scheduler, transformer=None):
        self.transformer = make_tiny_flux() if transformer is None else transformer
        self.scheduler = scheduler
        self.flux = FluxSampler(self.transformer, scheduler)

    def run(
        self,
        steps=14,
        *,
        begin=0,
        callback=None,
        guidance=None,
        stop_after=None,
        schedule=None,
        step_options=None,
    ):
        """``callback(index, x)`` may replace the latents; ``schedule``: for ``set_timesteps``."""
        scheduler = self.scheduler
        scheduler.set_timesteps(**(schedule or {"num_inference_steps": steps}))
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        x = self.flux.noise() * float(getattr(scheduler, "init_noise_sigma", 1.0))
        for i, t in enumerate(scheduler.timesteps[begin:], begin):
            if i == stop_after:
                return x
            scale = getattr(scheduler, "scale_model_input", None)
            scaled = x if scale is None else scale(x, t)
            v = self.flux.call(scaled, t)
            if guidance is not None:
                uncond = self.flux.call(scaled, t, "uncond")
                v = uncond + guidance * (v - uncond)
            x = scheduler.step(v, t, x, return_dict=False, **(step_options or {}))[0]
            if callback is not None:
                x = callback(i, x)
        self.transformer._reset_stateful_cache()
        return x


class LinearInTime:
    """Stands in for the transformer's forward: its velocity, noise - picture, is linear in time.

    Whatever the latents are; what the scheduler expects is computed from both. Time is the axis
    that the forecast is linear in: sigma for flow matching, otherwise the training timestep, here
    found by interpolating in the logarithm of the noise level.
    """

    def __init__(self, scheduler):
        self.scheduler = scheduler
        generator = torch.Generator().manual_seed(5)
        self.a = FluxSampler(None).noise()
        self.b = 0.1 * torch.randn(1, 16, 8, generator=generator)

    def expected(self, velocity, latents, timestep):
        """What predicts this velocity at these (variance-preserving) latents."""
        scheduler = self.scheduler
        if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("use_flow_sigmas"):
            return velocity
        if hasattr(scheduler, "step_index"):
            index = scheduler.begin_index if scheduler.step_index is None else scheduler.step_index
            sin = float(np.sin(np.arctan(float(scheduler.sigmas[index]))))
        else:
            place = round(float(timestep[0]) * len(scheduler.alphas_cumprod))
            sin = float(1 - scheduler.alphas_cumprod[place].double()) ** 0.5
        cos = (1 - sin**2) ** 0.5
        x0 = (latents - sin * velocity) / (cos + sin)
        noise = (latents + cos * velocity) / (cos + sin)
        return {
            "epsilon": noise,
            "sample": x0,
            "v_prediction": cos * noise - sin * x0,
        }[scheduler.config.prediction_type]

    def time(self, timestep):
        scheduler = self.scheduler
        if not hasattr(scheduler, "step_index"):
            return float(timestep[0])
        index = scheduler.step_index
        if index is None:
            index = scheduler.begin_index
        sigma = float(scheduler.sigmas[index])
        if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("use_flow_sigmas"):
            return sigma
        alphas = scheduler.alphas_cumprod.double().numpy()
        levels = np.log((1 - alphas) / alphas) / 2
        return float(np.interp(np.log(sigma), levels, np.arange(len(alphas)))) / len(alphas)

    def forward(self, hidden_states, timestep, return_dict=True, encoder_hidden_states=None, **kw):
        shift = 0.1 * encoder_hidden_states.mean()  # the branches differ
        velocity = self.a + (self.b + shift) * self.time(timestep)
        return (self.expected(velocity, hidden_states, timestep),)


def linear_loop(name):
    loop = Loop(SCHEDULERS[name]())
    loop.transformer.forward = LinearInTime(loop.scheduler).forward
    return loop


def relative_error(x, reference):
    return float((x - reference).norm() / reference.norm())
