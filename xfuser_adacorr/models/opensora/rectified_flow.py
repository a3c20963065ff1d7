"""The sampler of Open-Sora 1.2: Euler steps along a rectified flow."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

BASE_SIZE = 512
"""Side in pixels of the square that the timestep transform leaves as it is."""
CHUNK_FRAMES, CHUNK_LATENTS = 17, 5
"""Open-Sora's temporal autoencoder makes 5 latent frames of each 17 frames."""


@dataclass
class RectifiedFlowSchedulerOutput(BaseOutput):
    """``prev_sample``: the latents at the next, lower noise level."""

    prev_sample: Tensor


class RectifiedFlowScheduler(SchedulerMixin, ConfigMixin):
    """Euler steps ``x <- x + v (t - t_next) / 1000`` for a predicted velocity ``v ~ x0 - noise``.

    In terms of ``sigma = t / 1000`` it is the step of `FlowMatchEulerDiscreteScheduler` for the
    opposite output: ``x <- x - dsigma * v``, ``dsigma = sigma_next - sigma < 0``. AdaCorrection
    takes either sign: what skipped calls owe, ``sum dsigma_j (h^_j - h~_j)``, is linear in the
    outputs and is paid by ``(C - D) / dsigma`` in the output, so that the sign cancels.

    Args:
        num_train_timesteps: The timestep of pure noise.
        use_timestep_transform: Whether `set_timesteps` spends more steps on high noise for large
            videos, fewer for small ones (`timestep_ratio`).
    """

    _compatibles = []  # noqa: RUF012
    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, use_timestep_transform: bool = True
    ) -> None:
        self._set_schedule(uniform_times(num_train_timesteps), None)

    @property
    def step_index(self) -> int | None:
        """Index of the next step; None before the first one."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, if `set_begin_index` has told it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Tell the index of the first step, which is otherwise found by its timestep."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Begin a run: ``timesteps`` [N] on ``device``, ``sigmas`` [N + 1] on the CPU.

        Args:
            num_inference_steps: N; t_i = 1000 (1 - i/N), then transformed.
            device: Device of ``timesteps``.
            height, width: Size in pixels, for the timestep transform.
            num_frames: Frames of the video (not latent ones), for the timestep transform.
            timesteps: Instead of N, the timesteps themselves, used as they are.

        Raises:
            ValueError: If both or none of N and ``timesteps`` are given, if they are out of range,
                or if the transform lacks a size.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("either num_inference_steps or timesteps must be given, not both")
        if timesteps is not None:
            times = self._checked(timesteps) / self.config.num_train_timesteps
        elif not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(
                f"num_inference_steps must be a positive integer, got {num_inference_steps!r}"
            )
        else:
            times = uniform_times(num_inference_steps)
            if self.config.use_timestep_transform:
                ratio = timestep_ratio(height, width, num_frames)
                times = ratio * times / (1 + (ratio - 1) * times)
        self._set_schedule(times, device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> RectifiedFlowSchedulerOutput | tuple[Tensor]:
        """Step ``sample`` at ``timestep`` to the next noise level.

        Args:
            model_output: Velocity ``v ~ x0 - noise``, in the shape of ``sample``.
            timestep: One of ``timesteps``; only the first step of a run reads it, and only if
                `set_begin_index` was not called.
            sample: Noisy latents; half precision is stepped in float32.
            return_dict: Whether to return a `RectifiedFlowSchedulerOutput` or a tuple.

        Returns:
            The latents at the next noise level, in the dtype of ``model_output``.
        """
        if self._step_index is None:
            begin = self._begin_index
            self._step_index = self.index_for_timestep(timestep) if begin is None else begin
        sigma, sigma_next = self.sigmas[self._step_index : self._step_index + 2]
        sample = sample.to(torch.promote_types(sample.dtype, torch.float32))
        prev_sample = (sample + (sigma - sigma_next) * model_output).to(model_output.dtype)
        self._step_index += 1
        if not return_dict:
            return (prev_sample,)
        return RectifiedFlowSchedulerOutput(prev_sample=prev_sample)

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """Return ``(1 - sigma) * sample + sigma * noise``, sigma = ``timestep`` / 1000.

        ``sample`` and ``noise`` are ``[B, ...]``, ``timestep`` is a number or ``[B]``.
        """
        sigma = torch.as_tensor(timestep, device=sample.device) / self.config.num_train_timesteps
        sigma = sigma.to(sample.dtype)
        sigma = sigma.reshape(*sigma.shape, *[1] * (sample.ndim - sigma.ndim))
        return (1 - sigma) * sample + sigma * noise

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Index of one of ``timesteps``; `ValueError` if it is none of them."""
        matches = (self.timesteps == torch.as_tensor(timestep).to(self.timesteps)).nonzero()
        if len(matches) == 0:
            raise ValueError(f"timestep must be one of scheduler.timesteps, got {timestep}")
        return matches[0].item()

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _set_schedule(self, times: Tensor, device: str | torch.device | None) -> None:
        """New tensors for every run: caches know a new run by them."""
        timesteps = (times * self.config.num_train_timesteps).float()
        sigmas = timesteps / self.config.num_train_timesteps
        self.num_inference_steps = len(timesteps)
        self.timesteps = timesteps.to(device)
        self.sigmas = torch.cat([sigmas, sigmas.new_zeros(1)])
        self._step_index = self._begin_index = None

    def _checked(self, timesteps: Sequence[float] | Tensor) -> Tensor:
        values = torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
        top = self.config.num_train_timesteps
        in_range = values.ndim == 1 and len(values) > 0 and values.min() > 0 and values.max() <= top
        if not in_range or (values.diff() >= 0).any():
            raise ValueError(f"timesteps must fall and lie in (0, {top}], got {values.tolist()}")
        return values


def uniform_times(num_steps: int) -> Tensor:
    """``1 - i/N``, ``[N]`` float64."""
    return 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps


def timestep_ratio(height: int | None, width: int | None, num_frames: int | None) -> float:
    """R of the timestep transform ``u -> R u / (1 + (R - 1) u)``.

    R = sqrt(height * width / 512^2) * sqrt(F); F = 1 for a single frame, else the latent frames of
    the whole chunks of 17 frames, (num_frames // 17) * 5.

    Raises:
        ValueError: If a size is missing or not positive, or if F would be 0.
    """
    sizes = {"height": height, "width": width, "num_frames": num_frames}
    for name, size in sizes.items():
        if size is None or size < 1:
            raise ValueError(f"the timestep transform needs a positive {name}, got {size!r}")
    latent_frames = 1 if num_frames == 1 else num_frames // CHUNK_FRAMES * CHUNK_LATENTS
    if latent_frames == 0:
        raise ValueError(
            f"num_frames must be 1 or at least {CHUNK_FRAMES} for the timestep transform, got "
            f"{num_frames}; a scheduler with use_timestep_transform=False takes any"
        )
    return (height * width / BASE_SIZE**2 * latent_frames) ** 0.5
