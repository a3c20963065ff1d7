"""The solvers of the "same compute by fewer steps" rows and of the ODE's solution."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from torch import Tensor

from benchmark.models.families import DDIM, DPM_SOLVER, EULER, UNIPC


class FlowDPMSolver(DPMSolverMultistepScheduler):
    """DPM-Solver++ (second order) for flow matching, on the pipeline's own shifted sigmas.

    Unlike its base it keeps the timesteps' fractions, so that the model is told the very sigma that
    the solver uses, and takes ``mu`` from any pipeline, which matters under dynamic shifting alone.
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        mu = mu if self.config.use_dynamic_shifting else None
        super().set_timesteps(num_inference_steps, device=device, mu=mu, timesteps=timesteps)
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)


class GridDPMSolver(DPMSolverMultistepScheduler):
    """DPM-Solver++ (second order) for flow matching, on the very noise levels of another scheduler.

    The first sigma is 1 or almost, where lambda is minus infinity or far below all others: the
    first two steps come out as first order, as they should.
    """

    grid: SchedulerMixin
    """The pipeline's own scheduler, or a copy."""

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None, **sizes: Any
    ) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.grid.set_timesteps(num_inference_steps, device=device, **sizes)
        self.sigmas = self.grid.sigmas
        # with their fractions, which UniPC cuts off: the model is told the very sigma
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)


class RectifiedFlowDPMSolver(GridDPMSolver):
    """The same in the place of a `RectifiedFlowScheduler`: the velocity has the opposite sign."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        return super().step(-model_output, timestep, sample, **options)


class NoiseDPMSolver(DPMSolverMultistepScheduler):
    """DPM-Solver++ (second order) on evenly spaced timesteps from a given one down to 0."""

    start: int
    """The first timestep."""

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        timesteps = np.linspace(self.start, 0, num_inference_steps + 1)[:-1].round()
        super().set_timesteps(device=device, timesteps=timesteps)


def _flow_dpm_solver(own: SchedulerMixin, reference_steps: int) -> SchedulerMixin:
    shared: dict[str, Any] = {
        name: own.config[name]
        for name in ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
        if name in own.config
    }
    dynamic = bool(own.config.get("use_dynamic_shifting", False))
    scheduler = FlowDPMSolver(
        num_train_timesteps=own.config.num_train_timesteps,
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        use_dynamic_shifting=dynamic,
        flow_shift=1.0 if dynamic else float(np.asarray(own.config.get("shift", 1.0))),
    )
    # The pipeline computes mu from these, and reads them from whatever scheduler it has.
    scheduler.register_to_config(**shared)
    return scheduler


def _grid_dpm_solver(
    own: SchedulerMixin, reference_steps: int, solver: type[GridDPMSolver] = GridDPMSolver
) -> SchedulerMixin:
    scheduler = solver(
        num_train_timesteps=own.config.num_train_timesteps,
        algorithm_type="dpmsolver++",
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
    )
    scheduler.grid = copy.deepcopy(own)
    return scheduler


_NOISE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


def _noise_dpm_solver(own: SchedulerMixin, reference_steps: int) -> SchedulerMixin:
    scheduler = NoiseDPMSolver(
        **{name: own.config[name] for name in _NOISE},
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero" if own.config.set_alpha_to_one else "sigma_min",
    )
    grid = copy.deepcopy(own)
    grid.set_timesteps(reference_steps)
    scheduler.start = int(grid.timesteps[0])
    return scheduler


def _unipc(own: SchedulerMixin, reference_steps: int) -> SchedulerMixin:
    shared = (*_NOISE, "timestep_spacing", "steps_offset", "final_sigmas_type")
    return UniPCMultistepScheduler(**{name: own.config[name] for name in shared}, solver_order=2)


@dataclass(frozen=True, slots=True)
class _Sampler:
    """What a pipeline's own scheduler is called, and what can stand in its place."""

    own: str
    others: dict[str, Callable[[SchedulerMixin, int], SchedulerMixin]]


_rectified_flow_dpm_solver = partial(_grid_dpm_solver, solver=RectifiedFlowDPMSolver)
_SAMPLERS = {
    "FlowMatchEulerDiscreteScheduler": _Sampler(EULER, {DPM_SOLVER: _flow_dpm_solver}),
    "RectifiedFlowScheduler": _Sampler(EULER, {DPM_SOLVER: _rectified_flow_dpm_solver}),
    "UniPCMultistepScheduler": _Sampler(UNIPC, {DPM_SOLVER: _grid_dpm_solver}),
    "DDIMScheduler": _Sampler(DDIM, {DPM_SOLVER: _noise_dpm_solver}),
    "DPMSolverMultistepScheduler": _Sampler(DPM_SOLVER, {UNIPC: _unipc}),
}
"""By the class of the pipeline's scheduler."""


def own_solver(scheduler: SchedulerMixin) -> str | None:
    """The solver's name, or None for a scheduler that the benchmark does not know."""
    sampler = _SAMPLERS.get(type(scheduler).__name__)
    return sampler and sampler.own


def schedulers_of(solver: str) -> list[str]:
    """Names of the pipelines' schedulers that are this solver."""
    return [name for name, sampler in _SAMPLERS.items() if sampler.own == solver]


def make_scheduler(solver: str, own: SchedulerMixin, reference_steps: int) -> SchedulerMixin:
    """The pipeline's own scheduler, or another solver of the same ODE.

    Args:
        solver: name of the solver.
        own: the pipeline's own scheduler.
        reference_steps: steps of the uncached run that the row is compared with. Where the first
            timestep depends on the number of steps (DDIM's "leading" spacing), another solver
            starts where this run does.

    Raises:
        ValueError: the solver cannot stand in for this scheduler.
    """
    sampler = _SAMPLERS[type(own).__name__]
    if solver == sampler.own:
        return own
    if solver not in sampler.others:
        raise ValueError(
            f"solver must be one of {', '.join((sampler.own, *sampler.others))}, got {solver!r}"
        )
    return sampler.others[solver](own, reference_steps)
