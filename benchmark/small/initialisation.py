"""Starting values of transformers that have to learn in few steps."""

from collections.abc import Iterable

import torch
from torch import nn

GAIN = 0.5
"""Length of an embedded patch over that of the patch: small beside the constant part of tokens."""


def zero_(linears: Iterable[nn.Linear]) -> None:
    """Sets weights and biases to zero."""
    for linear in linears:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


@torch.no_grad()
def isometric_(embedding: nn.Conv2d | nn.Conv3d, positions: torch.Tensor) -> None:
    """Makes the patch embedding a multiple of an isometry, free of what positions occupy.

    Its bias is a further free direction, as long as D channels of size 1.

    Args:
        embedding: the convolution from latents to tokens of width D.
        positions: [S, D], what is added to the tokens.

    Raises:
        ValueError: D is too small for a patch beside the positions.
    """
    weight = embedding.weight
    occupied = torch.cat([positions, torch.ones_like(positions[:1])]).double()
    _, values, directions = torch.linalg.svd(occupied)
    free = directions[int((values > 1e-6 * values[0]).sum()) :].float()
    if len(free) <= weight[0].numel():
        raise ValueError(
            f"a patch of {weight[0].numel()} numbers does not fit into the {len(free)} directions "
            f"that positions leave free of width {positions.shape[1]}"
        )
    mixed = free.T @ nn.init.orthogonal_(torch.empty(len(free), weight[0].numel() + 1))
    weight.copy_(GAIN * mixed[:, 1:].reshape(weight.shape))
    embedding.bias.copy_(len(weight) ** 0.5 * mixed[:, 0])


@torch.no_grad()
def copy_input_(embedding: nn.Conv2d, output: nn.Linear, positions: torch.Tensor) -> None:
    """Lets an untrained transformer return its latents, as blocks start as the identity.

    At high noise the noise is almost all of the latents, so that a noise predictor has to copy
    them precisely before it can learn anything else. Between both layers is a normalisation over
    the channels; it divides by almost the same for all tokens, because what is constant in a token
    is much longer than the patch.

    Args:
        embedding: the patch embedding, which becomes isometric.
        output: the projection to patches, in the order (row, column, channel), of at least as
            many channels as there are in the latents; further channels start at zero.
        positions: [S, D], what is added to the tokens.
    """
    isometric_(embedding, positions)
    weight = embedding.weight  # [D, C, p, p]
    constant = positions + embedding.bias
    variance = constant.var(dim=1, correction=0).mean() + weight.square().sum() / len(weight)
    back = (variance.sqrt() / GAIN**2 * weight).permute(2, 3, 1, 0)  # [p, p, C, D]
    zero_([output])
    output.weight.unflatten(0, (*back.shape[:2], -1))[:, :, : back.shape[2]] = back
