"""STDiT3, the video transformer of Open-Sora 1.2, in diffusers style.

Shapes are named as in `blocks`. Parameters and buffers are named as in the public
checkpoint, whose files `load_open_sora_checkpoint` reads.
"""

from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .blocks import (
    FinalLayer,
    PatchEmbedder,
    ScalarEmbedder,
    STDiT3Block,
    TemporalRotary,
    TextEmbedder,
)
from .sequence_parallel import SequenceParallel, check_heads

__all__ = ["STDiT3Block", "STDiT3Transformer3DModel"]

VAE_SCALE_FACTOR = 8
"""Pixels per latent, for the default of ``height`` and ``width``."""
VIDEO_FPS, IMAGE_FPS = 24.0, 120.0
"""Frame rate where none is given; images are marked by a very high one."""

Numbers = float | Tensor
"""A number, or a tensor of n of them; n divides the batch size and is repeated to it."""


class STDiT3Transformer3DModel(ModelMixin, ConfigMixin, CacheMixin):
    """Predicts the velocity of video latents, conditioned on text.

    The blocks run in pairs: ``spatial_blocks[i]``, then ``temporal_blocks[i]``.

    Args:
        in_channels: Channels of the latents.
        hidden_size: C, divisible by 4 and by ``num_heads``.
        depth: Number of block pairs.
        num_heads: H; ``hidden_size / num_heads`` must be even.
        mlp_ratio: Width of the feed-forward layers over C.
        patch_size: Latents per token along (T, H, W).
        input_sq_size: Side in pixels of the square at which position coordinates have unit scale.
        pred_sigma: Whether the output has a second half of channels (not used in sampling).
        caption_channels: Channels of the text states.
        model_max_length: Text tokens of the learned null text.
        qk_norm: Whether queries and keys of the self-attention are normalised.

    Raises:
        ValueError: If a size does not fit.
    """

    _no_split_modules = ["STDiT3Block"]  # noqa: RUF012
    _repeated_blocks = ["STDiT3Block"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ["x_embedder", "norm", "rope"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        input_sq_size: int = 512,
        pred_sigma: bool = True,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        if hidden_size % 4 or hidden_size % (2 * num_heads):
            raise ValueError(
                f"hidden_size must be divisible by 4 and by 2 * num_heads, "
                f"got hidden_size={hidden_size}, num_heads={num_heads}"
            )
        self.patch_size = tuple(patch_size)
        if len(self.patch_size) != 3:
            raise ValueError(f"patch_size must have 3 entries (T, H, W), got {patch_size!r}")
        self.out_channels = 2 * in_channels if pred_sigma else in_channels

        self.rope = TemporalRotary(hidden_size // num_heads)
        self.x_embedder = PatchEmbedder(in_channels, hidden_size, self.patch_size)
        self.t_embedder = ScalarEmbedder(hidden_size)
        self.fps_embedder = ScalarEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = TextEmbedder(caption_channels, hidden_size, model_max_length)
        self.spatial_blocks, self.temporal_blocks = (
            nn.ModuleList(
                STDiT3Block(hidden_size, num_heads, mlp_ratio, temporal, qk_norm)
                for _ in range(depth)
            )
            for temporal in (False, True)
        )
        patch_volume = self.patch_size[0] * self.patch_size[1] * self.patch_size[2]
        self.final_layer = FinalLayer(hidden_size, patch_volume * self.out_channels)
        self.sequence_parallel: SequenceParallel | None = None

    def enable_sequence_parallel(self, group: ProcessGroup) -> None:
        """Spread each frame's tokens over the ranks of ``group`` (DeepSpeed-Ulysses).

        All of them call the model with the same inputs, and get the whole output. Tokens are split
        after the position embedding; only the self-attention of spatial blocks exchanges them.

        Raises:
            ValueError: If the number of ranks does not divide ``num_heads``.
            TypeError: If ``group`` is no process group.
        """
        check_heads(self.config.num_heads, group)
        self.sequence_parallel = SequenceParallel(group)

    def disable_sequence_parallel(self) -> None:
        """Compute all tokens on this rank again."""
        self.sequence_parallel = None

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Numbers,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        fps: Numbers | None = None,
        height: Numbers | None = None,
        width: Numbers | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return the velocity (and, with ``pred_sigma``, a second half of channels).

        Inputs are cast to the model's dtype; timestep and positions are embedded in float32.

        Args:
            hidden_states: Noisy latents ``[B, C_in, T, H, W]``; sizes that are no multiple of the
                patch are padded with zeros, and the output is cropped.
            timestep: ``[B]``, 0 (clean) to 1000 (noise).
            encoder_hidden_states: Text states ``[B, L, E]`` or ``[B, 1, L, E]``.
            encoder_attention_mask: ``[n, L]``, nonzero where text is attended; n divides B (the
                halves of a guided batch share one mask). None: all text is attended.
            x_mask: Bool ``[B, T]`` (token frames): False marks known frames, which are treated as
                being at timestep 0. None: all frames are noisy.
            fps: Frame rate of the video; default 24, and 120 for a single frame.
            height, width: Size in pixels, equal for all samples; default 8 times the latents'.
            return_dict: Whether to return a ``Transformer2DModelOutput`` or a tuple.

        Returns:
            The sample ``[B, C_out, T, H, W]``, float32.

        Raises:
            ValueError: If an argument has the wrong shape.
        """
        self._check_inputs(hidden_states, encoder_hidden_states)
        batch_size, _, *size = hidden_states.shape
        x = self.x_embedder(hidden_states.to(self.dtype))
        grid = x.shape[2:]
        if x_mask is not None and x_mask.shape != (batch_size, grid[0]):
            raise ValueError(
                f"x_mask must have shape [B, T] = [{batch_size}, {grid[0]}], "
                f"got {list(x_mask.shape)}"
            )
        height = VAE_SCALE_FACTOR * size[1] if height is None else height
        width = VAE_SCALE_FACTOR * size[2] if width is None else width
        positions = self.embed_positions(grid[1:], height, width, x.device)
        x = x.flatten(3).permute(0, 2, 3, 1) + positions  # [B, T, S, C]
        share = self.sequence_parallel and self.sequence_parallel.share(x.shape[2])
        x = (share.split(x) if share else x).flatten(1, 2)

        if fps is None:
            fps = IMAGE_FPS if size[0] == 1 else VIDEO_FPS
        fps_emb = self._embed(self.fps_embedder, "fps", fps, x)
        temb = self._embed(self.t_embedder, "timestep", timestep, x) + fps_emb
        block_temb = self.t_block(temb).unflatten(1, (1, 6, -1))
        temb_zero = None
        if x_mask is not None:
            x_mask = x_mask.bool()
            temb_zero = self._embed(self.t_embedder, "timestep", 0.0, x) + fps_emb
            block_temb_zero = self.t_block(temb_zero).unflatten(1, (1, 6, -1))
            block_temb = torch.where(x_mask[:, :, None, None], block_temb, block_temb_zero)

        shared: dict[str, Any] = {
            "encoder_hidden_states": self.embed_text(encoder_hidden_states),
            "temb": block_temb,
            "num_frames": grid[0],
            "encoder_attention_mask": self._key_mask(encoder_attention_mask, encoder_hidden_states),
        }
        rotary_emb = self.rope(grid[0], x.device)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            x = spatial(hidden_states=x, **shared, share=share)
            x = temporal(hidden_states=x, **shared, rotary_emb=rotary_emb)

        patches = self.final_layer(x, temb, temb_zero, x_mask)
        if share:  # after the final layer, since its output is narrower
            patches = share.gather(patches.unflatten(1, (grid[0], -1))).flatten(1, 2)
        sample = self.unpatchify(patches, grid, size).float()
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def embed_text(self, encoder_hidden_states: Tensor) -> Tensor:
        """Text states ``[B, L, E]`` or ``[B, 1, L, E]`` -> keys of the blocks ``[B, L, C]``."""
        if encoder_hidden_states.ndim == 4:
            encoder_hidden_states = encoder_hidden_states.squeeze(1)
        return self.y_embedder(encoder_hidden_states.to(self.dtype))

    def embed_positions(
        self, grid: tuple[int, int], height: Numbers, width: Numbers, device: torch.device
    ) -> Tensor:
        """Sinusoidal positions ``[S, C]`` of the tokens of a frame of (H', W') tokens.

        Coordinates are relative to the frame's size, at the scale of its pixels.
        """
        height, width = (vector(value, device)[0] for value in (height, width))
        positions = get_2d_sincos_pos_embed(
            self.config.hidden_size,
            tuple(grid),
            interpolation_scale=(height * width).sqrt() / self.config.input_sq_size,
            base_size=round((grid[0] * grid[1]) ** 0.5),
            device=device,
        )
        return positions.to(self.dtype)

    def unpatchify(self, patches: Tensor, grid: torch.Size, size: list[int]) -> Tensor:
        """Patches ``[B, T'*H'*W', P*C_out]`` -> ``[B, C_out, T, H, W]``, cropped to ``size``."""
        x = patches.unflatten(2, (*self.patch_size, self.out_channels)).unflatten(1, grid)
        x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, C_out, T', p_t, H', p_h, W', p_w]
        x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return x[:, :, : size[0], : size[1], : size[2]]

    def _embed(self, embedder: ScalarEmbedder, name: str, value: Numbers, x: Tensor) -> Tensor:
        """Embed the argument ``name``, one number or n numbers, as ``[B, C]`` for tokens ``x``."""
        embedded = embedder(vector(value, x.device), x.dtype)
        return embedded.repeat(repeats(name, embedded.shape[0], x.shape[0]), 1)

    def _key_mask(self, mask: Tensor | None, text: Tensor) -> Tensor | None:
        """Text mask ``[n, L]`` -> bool ``[B, 1, 1, L]``."""
        if mask is None:
            return None
        if mask.ndim != 2 or mask.shape[1] != text.shape[-2]:
            raise ValueError(
                f"encoder_attention_mask must have shape [n, L] with L = {text.shape[-2]} text "
                f"tokens, got {list(mask.shape)}"
            )
        count = repeats("encoder_attention_mask", mask.shape[0], text.shape[0])
        return (mask != 0).repeat(count, 1)[:, None, None]

    def _check_inputs(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> None:
        channels, caption_channels = self.config.in_channels, self.config.caption_channels
        if hidden_states.ndim != 5 or hidden_states.shape[1] != channels:
            raise ValueError(
                f"hidden_states must have shape [B, {channels}, T, H, W], "
                f"got {list(hidden_states.shape)}"
            )
        batch_size, text = hidden_states.shape[0], encoder_hidden_states.shape
        is_text = len(text) == 3 or (len(text) == 4 and text[1] == 1)
        if not is_text or text[0] != batch_size or text[-1] != caption_channels:
            raise ValueError(
                f"encoder_hidden_states must have shape [{batch_size}, L, {caption_channels}] or "
                f"[{batch_size}, 1, L, {caption_channels}], got {list(text)}"
            )


def repeats(name: str, count: int, batch_size: int) -> int:
    """How often ``count`` entries of the argument ``name`` are repeated to a batch."""
    if count == 0 or batch_size % count:
        raise ValueError(
            f"{name} must have a number of entries that divides the batch size {batch_size}, "
            f"got {count}"
        )
    return batch_size // count


def vector(value: Numbers, device: torch.device) -> Tensor:
    """A number or a tensor of n -> ``[n]`` float32."""
    return torch.as_tensor(value, dtype=torch.float32, device=device).reshape(-1)
