"""Tiny models of every family, sampled alike, and one plain call of them written out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
)

from tests.open_sora_stand_ins import JointTransformer, PairedTransformer
from xfuser_adacorr import CacheConfig, enable_cache
from xfuser_adacorr.models import STDiT3Transformer3DModel

CHANNELS = 4
TEXT = 6
BASES = ("Fb", "Tea", "Fast", "Ada")
NAMES = [*BASES, "Auto", *(f"{name}+AdaCorrection" for name in BASES)]


def seeded(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class TinyFamily:
    """How to make, call and read a tiny model."""

    name: str
    make_model: Callable[[], torch.nn.Module]
    shape: tuple[int, ...]
    """Of one sample's latents."""
    other_shape: tuple[int, ...]
    """Another one; of as many values where the model takes oblong pictures."""
    inputs: Callable[..., dict[str, Any]]
    """(latents, timestep 0..1000) -> arguments of the model."""
    blocks: Callable[[Any], list]
    """All blocks in the order the model's forward runs them."""
    signal_module: Callable[[Any], torch.nn.Module]
    """The module of the first block whose input is the modulated input."""
    followed: Callable[[torch.Tensor], torch.Tensor] = lambda out: out[:, :CHANNELS]
    """The part of the output that is the velocity."""

    def make(self, seed=0):
        torch.manual_seed(seed)
        return self.make_model().eval()


def per_sample(t, x):
    return torch.as_tensor(t, dtype=torch.float32).expand(len(x))


def texts(x, *shape):
    """Another text for each sample."""
    return seeded(7, 4, *shape)[: len(x)].to(x.dtype)


def pixart_inputs(x, t):
    mask = torch.ones(len(x), TEXT)
    mask[:, -2:] = 0
    return {
        "hidden_states": x,
        "encoder_hidden_states": texts(x, TEXT, 12),
        "encoder_attention_mask": mask,
        "timestep": per_sample(t, x),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def dit_inputs(x, t):
    labels = torch.tensor([3, 1000, 5, 1000])[: len(x)]
    return {"hidden_states": x, "timestep": per_sample(t, x), "class_labels": labels}


def known_frame(x):
    mask = torch.ones(len(x), x.shape[2], dtype=torch.bool)
    mask[:, 0] = False
    return mask


def stdit3_inputs(x, t, masked=False):
    return {
        "hidden_states": x,
        "timestep": per_sample(t, x),
        "encoder_hidden_states": texts(x, 1, TEXT, 12),
        "x_mask": known_frame(x) if masked else None,
    }


def paired_inputs(x, t, masked=False):
    return {
        "x": x,
        "timestep": per_sample(t, x),
        "y": texts(x, 1, TEXT, 12),
        "x_mask": known_frame(x) if masked else None,
    }


def joint_inputs(x, t):
    return {
        "img": x,
        "img_ids": seeded(8, 1, x.shape[1], 3).expand(len(x), -1, -1),
        "txt": texts(x, TEXT, 12),
        "txt_ids": torch.zeros(len(x), TEXT, 3),
        "timesteps": per_sample(t, x) / 1000,
        "y_vec": texts(x, 6),
    }


def make_pixart():
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=4,
        cross_attention_dim=24,
        sample_size=8,
        caption_channels=12,
    )


def make_dit():
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=4,
        sample_size=8,
        num_embeds_ada_norm=1000,
    )


def make_stdit3():
    return STDiT3Transformer3DModel(
        hidden_size=24, depth=2, num_heads=2, caption_channels=12, model_max_length=TEXT
    )


def pairs(model):
    rows = zip(model.spatial_blocks, model.temporal_blocks, strict=True)
    return [block for pair in rows for block in pair]


IMAGE, VIDEO = (CHANNELS, 8, 8), (CHANNELS, 3, 8, 4)
STDIT3 = {
    "make_model": make_stdit3,
    "shape": VIDEO,
    "other_shape": (CHANNELS, 3, 4, 8),
    "blocks": pairs,
    "signal_module": lambda model: model.spatial_blocks[0].attn,
}
PAIRED = {**STDIT3, "make_model": PairedTransformer}
FAMILIES = [
    TinyFamily(
        name="pixart",
        make_model=make_pixart,
        shape=IMAGE,
        other_shape=(CHANNELS, 4, 16),
        inputs=pixart_inputs,
        blocks=lambda model: list(model.transformer_blocks),
        signal_module=lambda model: model.transformer_blocks[0].attn1,
    ),
    TinyFamily(
        name="dit",
        make_model=make_dit,
        shape=IMAGE,
        other_shape=(CHANNELS, 4, 4),
        inputs=dit_inputs,
        blocks=lambda model: list(model.transformer_blocks),
        signal_module=lambda model: model.transformer_blocks[0].attn1,
    ),
    TinyFamily(name="opensora", inputs=stdit3_inputs, **STDIT3),
    TinyFamily(name="opensora-masked", inputs=partial(stdit3_inputs, masked=True), **STDIT3),
    TinyFamily(name="opensora-original", inputs=paired_inputs, **PAIRED),
    TinyFamily(
        name="opensora-original-masked", inputs=partial(paired_inputs, masked=True), **PAIRED
    ),
    TinyFamily(
        name="opensora2",
        make_model=JointTransformer,
        shape=(12, 8),
        other_shape=(16, 8),
        inputs=joint_inputs,
        blocks=lambda model: [*model.double_blocks, *model.single_blocks],
        signal_module=lambda model: model.double_blocks[0].img_attn.qkv,
        followed=lambda out: out,
    ),
]
BY_NAME = {tiny.name: tiny for tiny in FAMILIES}


def sample_in(output):
    if isinstance(output, torch.Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


class FamilySampler:
    """Samples with Euler steps from seeded noise, guided pairs in one batch if ``batch`` is 2."""

    def __init__(self, tiny, model=None):
        self.tiny = tiny
        self.model = tiny.make() if model is None else model
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    def noise(self, seed=0, batch=2, shape=None):
        return seeded(seed, 1, *(shape or self.tiny.shape)).repeat(
            batch, *[1] * len(self.tiny.shape)
        )

    def run(self, steps=10, *, velocity=None, stop_after=None, **noise):
        """Sample with the model, or with ``velocity(inputs, index, last)`` in its place."""
        x = self.noise(**noise)
        self.scheduler.set_timesteps(steps)
        self.scheduler.set_begin_index(0)
        for i, t in enumerate(self.scheduler.timesteps):
            if i == stop_after:
                break
            inputs = self.tiny.inputs(x, t)
            if velocity is None:
                out = sample_in(self.model(**inputs))
            else:
                out = velocity(inputs, i, i == steps - 1)
            x = self.scheduler.step(self.tiny.followed(out), t, x, return_dict=False)[0]
        return x


def never(name):
    """A configuration that never reuses."""
    return steered(name, threshold=0.0, gamma=1e9)


def loose(name):
    """A configuration that reuses whatever is not forced."""
    return steered(name, threshold=100.0, gamma=0.0)


def steered(name, threshold, gamma):
    """A method's options: a threshold if it has one, a gamma if it corrects."""
    options = {} if name == "Auto" else {"rel_l1_thresh": threshold}
    if name == "Auto" or name.endswith("+AdaCorrection"):
        options["adacorr_gamma"] = gamma
    return CacheConfig.from_name(name, **options)


def cached(tiny, config, **options):
    sampler = FamilySampler(tiny)
    enable_cache(sampler.model, config, **{"scheduler": sampler.scheduler, **options})
    return sampler


class PlainCall:
    """One call of a plain model, read at its blocks without the package.

    The stream of interest is the single stream, or the video's share of a joint one: the first of
    a tuple, or what follows the ``TEXT`` tokens of text.
    """

    def __init__(self, tiny, model, inputs):
        self.tiny, self.model, self.inputs = tiny, model, inputs
        first, last = tiny.blocks(model)[0], tiny.blocks(model)[-1]
        handles = [
            first.register_forward_pre_hook(self._before_first, with_kwargs=True),
            first.register_forward_hook(self._after_first),
            last.register_forward_hook(self._after_last),
            tiny.signal_module(model).register_forward_pre_hook(self._signal, with_kwargs=True),
        ]
        self.output = sample_in(model(**inputs))
        for handle in handles:
            handle.remove()

    def _before_first(self, block, args, kwargs):
        self.stack_input = args[0] if args else kwargs["hidden_states"]

    def _after_first(self, block, args, out):
        self.after_first = out[0] if isinstance(out, tuple) else out

    def _after_last(self, block, args, out):
        self.joint = out.shape[1] != self.after_first.shape[1]
        self.stack_output = out[:, TEXT:] if self.joint else out

    def _signal(self, module, args, kwargs):
        self.signal = args[0] if args else kwargs["hidden_states"]

    def output_with(self, stack_output):
        """The model's output if the stack had returned ``stack_output``."""

        def replace(block, args, out):
            return torch.cat([out[:, :TEXT], stack_output], 1) if self.joint else stack_output

        handle = self.tiny.blocks(self.model)[-1].register_forward_hook(replace)
        output = sample_in(self.model(**self.inputs))
        handle.remove()
        return output
