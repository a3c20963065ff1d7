"""Small models with the structure of Open-Sora's own: signatures, order of blocks, outputs."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

HEADS = 2


def attend(query, key, value):
    """Attention of ``[B, N, C]`` to ``[B, M, C]``."""
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def plain_norm(width):
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def feed_forward(width):
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


# -- Open-Sora 1.2 -------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        return self.proj(attend(*self.qkv(x).chunk(3, dim=-1)))


class CrossAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, y, lengths):
        """The texts of all samples are packed in one row ``y [1, sum of lengths, C]``."""
        kv = [part[None].chunk(2, dim=-1) for part in self.kv_linear(y)[0].split(lengths)]
        rows = [attend(q[None], k, v) for q, (k, v) in zip(self.q_linear(x), kv, strict=True)]
        return self.proj(torch.cat(rows))


class PairedBlock(nn.Module):
    def __init__(self, width, temporal):
        super().__init__()
        self.temporal = temporal
        self.norm1, self.norm2 = plain_norm(width), plain_norm(width)
        self.attn, self.cross_attn = SelfAttention(width), CrossAttention(width)
        self.mlp = feed_forward(width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, x, y, t, mask=None, x_mask=None, t0=None, T=None, S=None):
        def table(time):
            """Modulation of every token ``[B, T, 1, C]``, six times."""
            return (self.scale_shift_table + time.reshape(len(x), 6, -1))[:, None, None].unbind(3)

        rows = table(t)
        if x_mask is not None:
            chosen = x_mask[:, :, None, None]
            rows = [torch.where(chosen, a, b) for a, b in zip(rows, table(t0), strict=True)]
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = rows

        h = self.norm1(x).unflatten(1, (T, S)) * (1 + scale) + shift
        h = h.transpose(1, 2) if self.temporal else h
        h = self.attn(h.flatten(0, 1)).unflatten(0, h.shape[:2])
        h = h.transpose(1, 2) if self.temporal else h
        x = x + (gate * h).flatten(1, 2)
        x = x + self.cross_attn(x, y, mask)
        h = self.norm2(x).unflatten(1, (T, S)) * (1 + scale_mlp) + shift_mlp
        return x + (gate_mlp * self.mlp(h)).flatten(1, 2)


class PairedTransformer(nn.Module):
    """As STDiT3 of Open-Sora 1.2: latents ``[B, 4, T, H, W]`` -> ``[B, 8, T, H, W]``, a tensor."""

    def __init__(self, width=24, depth=2, text_width=12):
        super().__init__()
        self.config = SimpleNamespace(depth=depth, hidden_size=width, num_heads=HEADS)
        self.x_embedder = nn.Conv3d(4, width, (1, 2, 2), stride=(1, 2, 2))
        self.t_embedder = nn.Linear(8, width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = nn.Linear(text_width, width)
        self.spatial_blocks = nn.ModuleList(PairedBlock(width, False) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(PairedBlock(width, True) for _ in range(depth))
        self.final_layer = nn.Linear(width, 4 * 8)

    def embed_time(self, timestep):
        angles = timestep[:, None] / 1000 * 2.0 ** torch.arange(4)
        return self.t_embedder(torch.cat([angles.cos(), angles.sin()], dim=1))

    def forward(
        self, x, timestep, y, mask=None, x_mask=None, fps=None, height=None, width=None, **kwargs
    ):
        size = x.shape
        h = self.x_embedder(x)
        grid = h.shape[2:]
        T, S = grid[0], grid[1] * grid[2]
        t, t0 = self.embed_time(timestep), self.embed_time(torch.zeros_like(timestep))
        text = self.y_embedder(y[:, 0])
        lengths = [text.shape[1]] * len(text)
        shared = (
            text.flatten(0, 1)[None],
            self.t_block(t),
            lengths,
            x_mask,
            None if x_mask is None else self.t_block(t0),
            T,
            S,
        )
        h = h.flatten(2).transpose(1, 2)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            h = spatial(h, *shared)
            h = temporal(h, *shared)
        patches = self.final_layer(h + t[:, None]).unflatten(2, (2, 2, 8)).unflatten(1, grid)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).reshape(size[0], 8, *size[2:]).float()


# -- Open-Sora 2.0 -------------------------------------------------------------------------------


@dataclass
class ModulationOut:
    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor


class Modulation(nn.Module):
    def __init__(self, width, double):
        super().__init__()
        self.count = 6 if double else 3
        self.lin = nn.Linear(width, self.count * width)

    def forward(self, vec):
        rows = self.lin(F.silu(vec))[:, None].chunk(self.count, dim=-1)
        return ModulationOut(*rows[:3]), ModulationOut(*rows[3:]) if self.count == 6 else None


def modulate(x, modulation):
    return (1 + modulation.scale) * x + modulation.shift


class DoubleBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        for name in ("img", "txt"):
            self.add_module(f"{name}_mod", Modulation(width, double=True))
            self.add_module(f"{name}_norm1", plain_norm(width))
            self.add_module(f"{name}_attn", SelfAttention(width))
            self.add_module(f"{name}_norm2", plain_norm(width))
            self.add_module(f"{name}_mlp", feed_forward(width))

    def forward(self, img, txt, vec, pe, **kwargs):
        (img1, img2), (txt1, txt2) = self.img_mod(vec), self.txt_mod(vec)
        img_qkv = self.img_attn.qkv(modulate(self.img_norm1(img), img1))
        txt_qkv = self.txt_attn.qkv(modulate(self.txt_norm1(txt), txt1))
        q, k, v = torch.cat([txt_qkv, img_qkv], dim=1).chunk(3, dim=-1)
        out = attend(q + pe, k + pe, v)
        txt_out, img_out = out[:, : txt.shape[1]], out[:, txt.shape[1] :]
        img = img + img1.gate * self.img_attn.proj(img_out)
        img = img + img2.gate * self.img_mlp(modulate(self.img_norm2(img), img2))
        txt = txt + txt1.gate * self.txt_attn.proj(txt_out)
        txt = txt + txt2.gate * self.txt_mlp(modulate(self.txt_norm2(txt), txt2))
        return img, txt


class SingleBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.modulation = Modulation(width, double=False)
        self.pre_norm = plain_norm(width)
        self.linear1 = nn.Linear(width, 3 * width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, x, vec, pe, **kwargs):
        modulation, _ = self.modulation(vec)
        q, k, v = self.linear1(modulate(self.pre_norm(x), modulation)).chunk(3, dim=-1)
        return x + modulation.gate * self.linear2(attend(q + pe, k + pe, v))


class JointTransformer(nn.Module):
    """As MMDiT of Open-Sora 2.0: tokens ``[B, N, C]`` -> the same; forward set per instance."""

    def __init__(self, width=24, channels=8, text_width=12):
        super().__init__()
        self.config = SimpleNamespace(depth=2, depth_single_blocks=3, hidden_size=width)
        self.img_in = nn.Linear(channels, width)
        self.txt_in = nn.Linear(text_width, width)
        self.time_in = nn.Linear(8, width)
        self.vector_in = nn.Linear(6, width)
        self.double_blocks = nn.ModuleList(DoubleBlock(width) for _ in range(2))
        self.single_blocks = nn.ModuleList(SingleBlock(width) for _ in range(3))
        self.final_layer = nn.Linear(width, channels)
        self.forward = self.forward_ckpt

    def forward_ckpt(
        self, img, img_ids, txt, txt_ids, timesteps, y_vec, cond=None, guidance=None, **kwargs
    ):
        angles = timesteps[:, None] * 2.0 ** torch.arange(4)
        time = self.time_in(torch.cat([angles.cos(), angles.sin()], dim=1))
        vec = time + self.vector_in(y_vec)
        pe = torch.cat([txt_ids, img_ids], dim=1).sum(-1, keepdim=True).sin()
        img, txt = self.img_in(img), self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe)
        img = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            img = block(img, vec, pe)
        img = img[:, txt.shape[1] :, ...]
        return self.final_layer(img * (1 + vec[:, None]))
