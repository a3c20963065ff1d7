"""Flow matching's velocity, noise - picture, from what a model predicts, and back."""

import torch
from torch import Tensor

from xfuser_adacorr.model_executor.cache.step import RAW_OUTPUT, Step


def as_velocity(output: Tensor, latents: Tensor, step: Step) -> Tensor:
    """``p * output + q * scale * latents`` as float32, a tensor of its own (`Step.velocity`)."""
    velocity = output.detach().to(torch.float32, copy=True)
    p, q = step.velocity
    if step.velocity != RAW_OUTPUT and output.shape == latents.shape:
        velocity.mul_(p).add_(latents.detach().float(), alpha=q * step.scale)
    return velocity


def as_output(velocity: Tensor, latents: Tensor, step: Step) -> Tensor:
    """The output that is this velocity at these latents: the inverse, float32."""
    p, q = step.velocity
    if step.velocity == RAW_OUTPUT or velocity.shape != latents.shape:
        return velocity
    return (velocity - (q * step.scale) * latents.float()) / p
