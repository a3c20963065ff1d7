"""The solvers of the "same compute by fewer steps" rows."""

from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin

EULER = "Euler"
DPM_SOLVER = "DPM-Solver++"
SOLVERS = (EULER, DPM_SOLVER)


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


def make_scheduler(solver: str, own: SchedulerMixin) -> SchedulerMixin:
    """The pipeline's own scheduler (Euler), or DPM-Solver++ with the same time shift.

    Raises:
        ValueError: `solver` is not one of `SOLVERS`.
    """
    if solver == EULER:
        return own
    if solver != DPM_SOLVER:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
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
