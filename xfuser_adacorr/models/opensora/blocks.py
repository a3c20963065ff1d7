"""The layers and blocks of STDiT3 (Open-Sora 1.2), with the public checkpoint's parameter names.

Shapes: B samples, T token frames, S tokens a frame, C ``hidden_size``, H heads, D channels a head,
L text tokens. Tokens are ordered (T, S). A modulation by timestep is ``[B, F, 1, C]``: F is T
where frames differ in it, else 1.
"""

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import (
    apply_rotary_emb,
    get_1d_rotary_pos_embed,
    get_timestep_embedding,
)
from torch import Tensor, nn

from .sequence_parallel import TokenShare

ROPE_THETA = 10000.0
FREQUENCY_CHANNELS = 256
"""Channels of the sinusoidal embedding of timestep and frame rate."""

RotaryEmb = tuple[Tensor, Tensor]
"""Cosines and sines, each ``[T, D]`` float32."""


def to_sequences(hidden_states: Tensor, num_frames: int, temporal: bool) -> Tensor:
    """Tokens ``[B, T*S, C]`` -> frames ``[B*T, S, C]``, or places through time ``[B*S, T, C]``."""
    x = hidden_states.unflatten(1, (num_frames, -1))
    return (x.transpose(1, 2) if temporal else x).flatten(0, 1)


def from_sequences(sequences: Tensor, batch_size: int, temporal: bool) -> Tensor:
    """Inverse of `to_sequences`: -> tokens ``[B, T*S, C]``."""
    x = sequences.unflatten(0, (batch_size, -1))
    return (x.transpose(1, 2) if temporal else x).flatten(1, 2)


def per_frame(hidden_states: Tensor, modulation: Tensor) -> Tensor:
    """Tokens ``[B, T*S, C]`` -> ``[B, F, -1, C]``, to broadcast with a modulation."""
    return hidden_states.unflatten(1, (modulation.shape[1], -1))


def modulate(hidden_states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift tokens ``[B, T*S, C]``; returns the same shape."""
    return (per_frame(hidden_states, scale) * (1 + scale) + shift).flatten(1, 2)


def gated(residual: Tensor, gate: Tensor) -> Tensor:
    """Gate a residual ``[B, T*S, C]``; returns the same shape."""
    return (per_frame(residual, gate) * gate).flatten(1, 2)


class Mlp(nn.Module):
    """Two linear layers with tanh-GELU between them."""

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_channels, hidden_channels)
        self.fc2 = nn.Linear(hidden_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class ScalarEmbedder(nn.Module):
    """Embeds one number a sample: sinusoids (cosines first, period 1e4), then an MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_CHANNELS, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        """``[n]`` -> ``[n, C]``."""
        sinusoids = get_timestep_embedding(
            value, FREQUENCY_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return self.mlp(sinusoids.to(dtype))


class TextEmbedder(nn.Module):
    """Projects text states; ``y_embedding`` ``[L, E]`` is the learned null text of guidance."""

    def __init__(self, caption_channels: int, hidden_size: int, max_length: int) -> None:
        super().__init__()
        null_text = torch.randn(max_length, caption_channels) / caption_channels**0.5
        self.register_buffer("y_embedding", null_text)
        self.y_proj = Mlp(caption_channels, hidden_size, hidden_size)

    def forward(self, encoder_hidden_states: Tensor) -> Tensor:
        return self.y_proj(encoder_hidden_states)


class PatchEmbedder(nn.Module):
    """Zero-pads latents up to whole patches and projects each patch to a token."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: tuple[int, ...]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv3d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        """``[B, C_in, T, H, W]`` -> ``[B, C, T', H', W']``."""
        padding = []
        for size, patch in zip(latents.shape[:1:-1], self.patch_size[::-1], strict=True):
            padding += [0, -size % patch]
        return self.proj(F.pad(latents, padding))


def rotary_frequencies(head_dim: int) -> Tensor:
    """Angle per frame of each pair of channels, ``[D/2]``."""
    return ROPE_THETA ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


class TemporalRotary(nn.Module):
    """Rotary positions of frames.

    ``freqs`` are the constant frequencies of the checkpoint. The angles are computed from their
    float32 values instead: a model cast to bfloat16 would round them (0.4 rad at frame 120).
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.register_buffer("freqs", rotary_frequencies(head_dim))

    def forward(self, num_frames: int, device: torch.device) -> RotaryEmb:
        positions = torch.arange(num_frames, dtype=torch.float32, device=device)
        return get_1d_rotary_pos_embed(self.head_dim, positions, ROPE_THETA, use_real=True)


class SelfAttention(nn.Module):
    """Attention within sequences, with RMS-normalised queries and keys, then rotary positions."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        head_dim = hidden_size // num_heads
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        sequences: Tensor,
        rotary_emb: RotaryEmb | None = None,
        share: TokenShare | None = None,
    ) -> Tensor:
        """``[N, length, C]`` -> the same shape; ``rotary_emb`` has one row a token.

        With ``share`` the tokens of a sequence are spread over ranks.
        """
        qkv = self.qkv(sequences).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [N, H, length, D]
        query, key = self.q_norm(query), self.k_norm(key)
        if rotary_emb is not None:
            query, key = apply_rotary_emb(query, rotary_emb), apply_rotary_emb(key, rotary_emb)
        if share is not None:
            query, key, value = share.tokens_to_heads(torch.cat([query, key, value])).chunk(3)
        out = F.scaled_dot_product_attention(query, key, value)
        if share is not None:
            out = share.heads_to_tokens(out)
        return self.proj(out.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of all tokens of a sample to its text."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: Tensor, text: Tensor, key_mask: Tensor | None) -> Tensor:
        """``[B, N, C]``, ``[B, L, C]``, bool ``[B, 1, 1, L]`` (True: attended) -> ``[B, N, C]``."""
        query = self.q_linear(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        kv = self.kv_linear(text).unflatten(-1, (2, self.num_heads, -1))
        key, value = kv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask)
        return self.proj(out.transpose(1, 2).flatten(2))


class STDiT3Block(nn.Module):
    """Self-attention (in frames, or through time), cross-attention, feed-forward.

    Each branch is a method that returns what `forward` adds to the tokens, so that a cache can
    reuse single branches. A block sees the tokens it is given: with sequence parallelism these are
    a share of every frame, and S is the local number.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, temporal: bool, qk_norm: bool
    ) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = SelfAttention(hidden_size, num_heads, qk_norm)
        self.cross_attn = CrossAttention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), hidden_size)
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        num_frames: int,
        encoder_attention_mask: Tensor | None = None,
        rotary_emb: RotaryEmb | None = None,
        share: TokenShare | None = None,
    ) -> Tensor:
        """Return the tokens ``[B, T*S, C]`` after this block.

        Args:
            hidden_states: Tokens ``[B, T*S, C]``.
            encoder_hidden_states: Projected text ``[B, L, C]``.
            temb: Modulation by timestep ``[B, F, 6, C]``; F is T where frames differ, else 1.
            num_frames: T.
            encoder_attention_mask: Bool ``[B, 1, 1, L]``, True where text is attended.
            rotary_emb: Positions of the T frames; for temporal blocks.
            share: How the tokens of a frame are spread over ranks; for spatial blocks.
        """
        x = hidden_states
        x = x + self.attention_branch(x, temb, num_frames, rotary_emb, share)
        x = x + self.cross_attention_branch(x, encoder_hidden_states, encoder_attention_mask)
        return x + self.feed_forward_branch(x, temb)

    def modulated_input(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """The normalised and modulated input of the self-attention, ``[B, T*S, C]``."""
        shift, scale, _ = self._modulation(temb)[:3]
        return modulate(self.norm1(hidden_states), shift, scale)

    def attention_branch(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        num_frames: int,
        rotary_emb: RotaryEmb | None = None,
        share: TokenShare | None = None,
    ) -> Tensor:
        """Gated residual of the self-attention, ``[B, T*S, C]``."""
        x = to_sequences(self.modulated_input(hidden_states, temb), num_frames, self.temporal)
        x = from_sequences(self.attn(x, rotary_emb, share), hidden_states.shape[0], self.temporal)
        return gated(x, self._modulation(temb)[2])

    def cross_attention_branch(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Residual of the cross-attention ``[B, T*S, C]``; it is neither normalised nor gated."""
        return self.cross_attn(hidden_states, encoder_hidden_states, encoder_attention_mask)

    def feed_forward_branch(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """Gated residual of the feed-forward layers, ``[B, T*S, C]``."""
        shift, scale, gate = self._modulation(temb)[3:]
        return gated(self.mlp(modulate(self.norm2(hidden_states), shift, scale)), gate)

    def _modulation(self, temb: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale, gate of attention, then of feed-forward, each ``[B, F, 1, C]``."""
        return (self.scale_shift_table + temb).unsqueeze(3).unbind(2)


class FinalLayer(nn.Module):
    """Modulates the tokens by the plain timestep embedding and projects them to patches."""

    def __init__(self, hidden_size: int, patch_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(hidden_size, patch_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor,
        temb_zero: Tensor | None = None,
        x_mask: Tensor | None = None,
    ) -> Tensor:
        """``[B, T*S, C]``, embeddings ``[B, C]``, bool ``[B, T]`` -> ``[B, T*S, patch_channels]``.

        Frames where ``x_mask`` is False are modulated by ``temb`` and then, normalised once more,
        by ``temb_zero``: the published weights were trained so.
        """
        x = self._modulate(hidden_states, temb)
        if x_mask is not None:
            keep = x_mask[:, :, None, None]
            known = self._modulate(x, temb_zero)
            x = torch.where(keep, per_frame(x, keep), per_frame(known, keep)).flatten(1, 2)
        return self.linear(x)

    def _modulate(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + temb[:, None])[:, :, None, None].unbind(1)
        return modulate(self.norm_final(hidden_states), shift, scale)
