"""Tiny diffusers transformers, a line or two each, with inputs for calls along a sampling run.

Every model is built from a seed, and nothing is loaded. Its inputs are a function of the noise
level: the latents go from noise to a picture, the timestep goes with them, the rest stays.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

MODELS: dict[str, "TinyModel"] = {}
"""By class name."""


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """How to build a tiny model of a class of diffusers, and what to call it with."""

    name: str
    config: Mapping[str, Any]
    shape: tuple[int, ...]
    """Of the latents."""
    latents: str = "hidden_states"
    timestep: str = "timestep"
    full_noise: float = 1000.0
    """Timestep at pure noise."""
    others: Callable[[], dict[str, Any]] = dict
    """The arguments that stay the same during a run."""
    along: Callable[[Tensor, float], dict[str, Any]] = field(default=lambda x, level: {})
    """(latents, noise level) -> further arguments that change."""

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        model = getattr(diffusers, self.name)(**self.config).eval()
        for parameter in model.parameters():  # gates and heads that start at zero would hide blocks
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
        return model

    def inputs(self, level: float) -> dict[str, Any]:
        """Arguments of a call at noise level 1 (noise) to 0 (picture)."""
        x = level * seeded(1, *self.shape) + (1 - level) * seeded(2, *self.shape)
        timestep = torch.full((self.shape[0],), level * self.full_noise)
        return {
            self.latents: x,
            self.timestep: timestep,
            **self.others(),
            **self.along(x, level),
        }


def seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(name: str, shape: tuple[int, ...], config: Mapping[str, Any], **options: Any) -> None:
    MODELS[name] = TinyModel(name=name, shape=shape, config=config, **options)


def text(*shape: int, name: str = "encoder_hidden_states") -> dict[str, Tensor]:
    return {name: seeded(3, *shape)}


def ids(tokens: int, axes: int = 3) -> Tensor:
    """Positions of a square of ``tokens``."""
    side = int(tokens**0.5)
    positions = torch.zeros(tokens, axes)
    positions[:, -2], positions[:, -1] = torch.arange(tokens) // side, torch.arange(tokens) % side
    return positions


def flux_like(**others: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {
        **text(1, 6, 16),
        "img_ids": ids(16),
        "txt_ids": torch.zeros(6, 3),
        **{name: value() for name, value in others.items()},
    }


def pooled() -> Tensor:
    return seeded(4, 1, 16)


JOINT = {
    "num_layers": 3,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
}
FLUX = {**JOINT, "in_channels": 8, "axes_dims_rope": (4, 6, 6)}
TOKENS = (1, 16, 8)

# -- images ---------------------------------------------------------------------------------------

tiny(
    "FluxTransformer2DModel",
    TOKENS,
    {**FLUX, "pooled_projection_dim": 16},
    full_noise=1.0,
    others=flux_like(pooled_projections=pooled),
)
tiny(
    "ChromaTransformer2DModel",
    TOKENS,
    {**FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16},
    full_noise=1.0,
    others=flux_like(),
)
tiny(
    "BriaTransformer2DModel",
    TOKENS,
    {**FLUX, "axes_dims_rope": [4, 6, 6]},
    others=flux_like(),
)
tiny(
    "BriaFiboTransformer2DModel",
    TOKENS,
    {**FLUX, "axes_dims_rope": [4, 6, 6], "text_encoder_dim": 16},
    others=flux_like(text_encoder_layers=lambda: [seeded(i, 1, 6, 16) for i in range(5)]),
)
tiny(
    "LongCatImageTransformer2DModel",
    TOKENS,
    {**FLUX, "axes_dims_rope": [4, 6, 6], "pooled_projection_dim": 16},
    full_noise=1.0,
    others=flux_like(),
)
tiny(
    "OvisImageTransformer2DModel",
    TOKENS,
    {**FLUX, "out_channels": 8},
    full_noise=1.0,
    others=flux_like(),
)
tiny(
    "Flux2Transformer2DModel",
    TOKENS,
    {**FLUX, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 16},
    full_noise=1.0,
    others=lambda: {
        **text(1, 6, 16),
        "img_ids": ids(16, 4),
        "txt_ids": torch.zeros(6, 4),
        "guidance": torch.ones(1),
    },
)
tiny(
    "Flux3Transformer2DModel",
    TOKENS,
    {
        **FLUX,
        "cond_in_channels": 8,
        "axes_dims_rope": (4, 4, 4, 4),
        "timestep_channels": 16,
    },
    full_noise=1.0,
    others=lambda: {**text(1, 6, 16), "img_ids": ids(16, 4), "txt_ids": torch.zeros(6, 4)},
)
tiny(
    "SD3Transformer2DModel",
    (1, 4, 8, 8),
    {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 16,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 8,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    },
    others=lambda: {**text(1, 6, 16), "pooled_projections": pooled()},
)
tiny(
    "AuraFlowTransformer2DModel",
    (1, 4, 8, 8),
    {
        "sample_size": 8,
        "in_channels": 4,
        "num_mmdit_layers": 2,
        "num_single_dit_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 16,
        "caption_projection_dim": 32,
        "pos_embed_max_size": 16,
    },
    full_noise=1.0,
    others=lambda: text(1, 6, 16),
)
BASIC = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 4, "sample_size": 8}
tiny(
    "PixArtTransformer2DModel",
    (1, 4, 8, 8),
    {**BASIC, "cross_attention_dim": 24, "caption_channels": 16},
    others=lambda: {
        **text(1, 6, 16),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    },
)
tiny(
    "DiTTransformer2DModel",
    (1, 4, 8, 8),
    {**BASIC, "out_channels": 8},
    others=lambda: {"class_labels": torch.tensor([3])},
)
tiny(
    "HunyuanDiT2DModel",
    (1, 4, 8, 8),
    {
        **BASIC,
        "attention_head_dim": 16,
        "in_channels": 4,
        "patch_size": 2,
        "hidden_size": 32,
        "cross_attention_dim": 16,
        "cross_attention_dim_t5": 16,
        "pooled_projection_dim": 8,
        "text_len": 6,
        "text_len_t5": 6,
        "use_style_cond_and_image_meta_size": False,
    },
    others=lambda: {
        **text(1, 6, 16),
        "text_embedding_mask": torch.ones(1, 6),
        "encoder_hidden_states_t5": seeded(5, 1, 6, 16),
        "text_embedding_mask_t5": torch.ones(1, 6),
        "image_rotary_emb": (torch.ones(16, 16), torch.zeros(16, 16)),
    },
)
tiny(
    "LuminaNextDiT2DModel",
    (1, 4, 8, 8),
    {
        "sample_size": 8,
        "hidden_size": 24,
        "num_layers": 3,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 8,
        "cross_attention_dim": 16,
    },
    full_noise=1.0,
    others=lambda: {
        **text(1, 6, 16),
        "encoder_mask": torch.ones(1, 6),
        "image_rotary_emb": torch.polar(torch.ones(8, 8, 4), seeded(5, 8, 8, 4)),
        "cross_attention_kwargs": {},
    },
)
tiny(
    "Lumina2Transformer2DModel",
    (1, 4, 8, 8),
    {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 3,
        "num_refiner_layers": 1,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 2,
        "axes_dim_rope": (4, 2, 2),
        "axes_lens": (32, 16, 16),
        "cap_feat_dim": 16,
    },
    full_noise=1.0,
    others=lambda: {**text(1, 6, 16), "encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool)},
)
tiny(
    "SanaTransformer2DModel",
    (1, 4, 8, 8),
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 16,
        "sample_size": 8,
    },
    others=lambda: text(1, 6, 16),
)
tiny(
    "ZImageTransformer2DModel",
    (1, 4, 1, 8, 8),
    {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 3,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": [8, 4, 4],
        "axes_lens": [128, 32, 32],
    },
    latents="x",
    timestep="t",
    full_noise=1.0,
    others=lambda: {"cap_feats": [seeded(3, 6, 16)]},
    along=lambda x, level: {"x": list(x)},
)
tiny(
    "HiDreamImageTransformer2DModel",
    (1, 4, 8, 8),
    {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "caption_channels": [16, 12],
        "text_emb_dim": 16,
        "num_routed_experts": 2,
        "num_activated_experts": 1,
        "axes_dims_rope": (4, 2, 2),
        "max_resolution": (8, 8),
        "llama_layers": (0, 1, 1, 0),
        "force_inference_output": True,
    },
    timestep="timesteps",
    others=lambda: {
        "encoder_hidden_states_t5": seeded(3, 1, 6, 16),
        "encoder_hidden_states_llama3": seeded(5, 2, 1, 6, 12),
        "pooled_embeds": pooled(),
    },
)
QWEN = {**JOINT, "axes_dims_rope": (4, 6, 6), "in_channels": 8}
del QWEN["num_single_layers"]
tiny(
    "QwenImageTransformer2DModel",
    TOKENS,
    {**QWEN, "patch_size": 2, "out_channels": 2},
    full_noise=1.0,
    others=lambda: {
        **text(1, 6, 16),
        "encoder_hidden_states_mask": torch.ones(1, 6, dtype=torch.long),
        "img_shapes": [(1, 4, 4)],
    },
)
COGVIEW = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "text_embed_dim": 16,
    "time_embed_dim": 8,
    "condition_dim": 4,
}


def sizes() -> dict[str, Tensor]:
    return {
        "original_size": torch.tensor([[64.0, 64.0]]),
        "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.tensor([[0.0, 0.0]]),
    }


tiny(
    "CogView3PlusTransformer2DModel",
    (1, 4, 8, 8),
    {**COGVIEW, "pos_embed_max_size": 8, "sample_size": 8},
    others=lambda: {**text(1, 6, 16), **sizes()},
)
tiny(
    "CogView4Transformer2DModel",
    (1, 4, 8, 8),
    {**COGVIEW, "sample_size": 8, "rope_axes_dim": (8, 8)},
    others=lambda: {**text(1, 6, 16), **sizes()},
)
tiny(
    "GlmImageTransformer2DModel",
    (1, 4, 8, 8),
    {**COGVIEW, "prior_vq_quantizer_codebook_size": 32},
    others=lambda: {
        **text(1, 6, 16),
        "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.tensor([[0.0, 0.0]]),
        "prior_token_id": torch.arange(16)[None],
        "prior_token_drop": torch.zeros(1, 16, dtype=torch.bool),
    },
)
tiny(
    "OmniGenTransformer2DModel",
    (1, 4, 8, 8),
    {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 32,
        "num_layers": 3,
        "pad_token_id": 0,
        "vocab_size": 100,
        "pos_embed_max_size": 8,
        "time_step_dim": 8,
        "rope_scaling": {"long_factor": [1.0, 1.0, 1.0, 1.0], "short_factor": [1.0] * 4},
    },
    full_noise=1.0,
    others=lambda: {
        "input_ids": torch.arange(6)[None],
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": torch.ones(1, 23, 23),
        "position_ids": torch.arange(23)[None],
    },
)
tiny(
    "PRXTransformer2DModel",
    (1, 4, 8, 8),
    {
        "in_channels": 4,
        "context_in_dim": 16,
        "hidden_size": 16,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 3,
        "axes_dim": [4, 4],
    },
    full_noise=1.0,
    others=lambda: text(1, 6, 16),
)
tiny(
    "BriaFibo2Transformer2DModel",
    (1, 4, 8, 8),
    {
        "in_channels": 4,
        "dim": 32,
        "n_layers": 3,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "cap_feat_dim": 16,
        "injection_layer_ids": (1,),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": 2,
        "max_num_gist_tokens": 4,
        "gist_step": 2,
        "gist_min_text_len": 2,
        "gist_max_text_len": 8,
        "axes_dims": (8, 4, 4),
        "axes_lens": (32, 16, 16),
    },
    full_noise=1.0,
    others=lambda: text(1, 2, 6, 16),
)
tiny(
    "ErnieImageTransformer2DModel",
    (1, 4, 4, 4),
    {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 3,
        "ffn_hidden_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "text_in_dim": 16,
        "rope_axes_dim": (4, 6, 6),
    },
    others=lambda: {"text_bth": seeded(3, 1, 6, 16), "text_lens": torch.tensor([6])},
)
tiny(
    "Ideogram4Transformer2DModel",
    (1, 22, 4),
    {
        "in_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "adaln_dim": 16,
        "llm_features_dim": 16,
        "mrope_section": (4, 2, 2),
    },
    full_noise=1.0,
    others=lambda: {
        **text(1, 22, 16),
        "position_ids": torch.arange(22)[None, :, None].expand(1, 22, 3),
        "segment_ids": torch.ones(1, 22, dtype=torch.long),
        "indicator": torch.tensor([[3] * 6 + [2] * 16]),
    },
)
JOY = {
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 16,
    "num_layers": 3,
    "rope_dim_list": [4, 6, 6],
}
tiny("JoyImageEditTransformer3DModel", (1, 4, 1, 8, 8), JOY, others=lambda: text(1, 6, 16))
tiny(
    "JoyImageEditPlusTransformer3DModel",
    (1, 16, 4, 1, 2, 2),
    JOY,
    others=lambda: {**text(1, 6, 16), "shape_list": [[(1, 4, 4)]]},
)
tiny(
    "Krea2Transformer2DModel",
    TOKENS,
    {
        "in_channels": 8,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "timestep_embed_dim": 16,
        "text_hidden_dim": 16,
        "num_text_layers": 2,
        "text_num_attention_heads": 1,
        "text_num_key_value_heads": 1,
        "text_intermediate_size": 16,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 6, 6),
    },
    full_noise=1.0,
    others=lambda: {**text(1, 6, 2, 16), "position_ids": torch.cat([torch.zeros(6, 3), ids(16)])},
)
tiny(
    "NucleusMoEImageTransformer2DModel",
    TOKENS,
    {
        "in_channels": 8,
        "out_channels": 2,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "axes_dims_rope": (4, 6, 6),
        "moe_enabled": False,
        "capacity_factors": [8.0] * 3,
    },
    full_noise=1.0,
    others=lambda: {
        **text(1, 6, 16),
        "encoder_hidden_states_mask": torch.ones(1, 6, dtype=torch.bool),
        "img_shapes": [(1, 4, 4)],
    },
)
tiny(
    "QwenImage21Transformer2DModel",
    TOKENS,
    {
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "context_in_dim": 16,
        "axes_dims_rope": (4, 6, 6),
    },
    full_noise=1.0,
    others=lambda: {
        **text(1, 6, 16),
        "img_shapes": [[(1, 4, 4)]],
        "img_mask": torch.tensor([[False] * 6 + [True] * 4]),
    },
)
tiny(
    "PriorTransformer",
    (1, 16),
    {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 3,
        "embedding_dim": 16,
        "num_embeddings": 6,
        "additional_embeddings": 4,
    },
    others=lambda: {"proj_embedding": pooled(), **text(1, 6, 16)},
)

# -- video and audio ------------------------------------------------------------------------------

WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 4,
    "rope_max_seq_len": 32,
}
VIDEO = (1, 4, 3, 8, 8)
tiny("WanTransformer3DModel", VIDEO, WAN, others=lambda: text(1, 6, 16))
tiny("SkyReelsV2Transformer3DModel", VIDEO, WAN, others=lambda: text(1, 6, 16))
tiny("ChronoEditTransformer3DModel", VIDEO, WAN, others=lambda: text(1, 6, 16))
tiny(
    "WanVACETransformer3DModel",
    VIDEO,
    {**WAN, "vace_layers": [0, 2], "vace_in_channels": 8},
    others=lambda: {
        **text(1, 6, 16),
        "control_hidden_states": seeded(5, 1, 8, 3, 8, 8),
        "control_hidden_states_scale": torch.ones(2),
    },
)
COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": 16,
    "num_layers": 3,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 6,
}
tiny("CogVideoXTransformer3DModel", (1, 3, 4, 8, 8), COGVIDEOX, others=lambda: text(1, 6, 16))
tiny("ConsisIDTransformer3DModel", (1, 3, 4, 8, 8), COGVIDEOX, others=lambda: text(1, 6, 16))
HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 10,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 16,
    "rope_axes_dim": (2, 4, 4),
}


def masked_text() -> dict[str, Tensor]:
    mask = torch.ones(1, 6, dtype=torch.bool)
    mask[:, -2:] = False
    return {**text(1, 6, 16), "encoder_attention_mask": mask}


tiny(
    "HunyuanVideoTransformer3DModel",
    (1, 4, 2, 4, 4),
    HUNYUAN,
    others=lambda: {**masked_text(), "pooled_projections": pooled(), "guidance": torch.ones(1)},
)
tiny(
    "HunyuanVideoFramepackTransformer3DModel",
    (1, 4, 2, 8, 8),
    {
        **HUNYUAN,
        "patch_size": 2,
        "has_image_proj": True,
        "image_proj_dim": 8,
        "has_clean_x_embedder": True,
    },
    others=lambda: {
        **masked_text(),
        "pooled_projections": pooled(),
        "guidance": torch.ones(1),
        "image_embeds": seeded(6, 1, 3, 8),
        "indices_latents": torch.arange(2),
        "latents_clean": seeded(7, 1, 4, 1, 8, 8),
        "indices_latents_clean": torch.arange(1),
        "latents_history_2x": seeded(8, 1, 4, 2, 8, 8),
        "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": seeded(9, 1, 4, 4, 8, 8),
        "indices_latents_history_4x": torch.arange(4),
    },
)
HUNYUAN15 = {
    k: v for k, v in HUNYUAN.items() if k not in ("num_single_layers", "pooled_projection_dim")
}
tiny(
    "HunyuanVideo15Transformer3DModel",
    (1, 4, 2, 4, 4),
    {**HUNYUAN15, "text_embed_2_dim": 12, "image_embed_dim": 8, "target_size": 16},
    others=lambda: {
        **masked_text(),
        "encoder_hidden_states_2": seeded(5, 1, 4, 12),
        "encoder_attention_mask_2": torch.ones(1, 4),
        "image_embeds": torch.zeros(1, 3, 8),
    },
)
tiny(
    "HunyuanImageTransformer2DModel",
    (1, 4, 4, 4),
    {
        **{k: v for k, v in HUNYUAN.items() if k != "pooled_projection_dim"},
        "attention_head_dim": 8,
        "patch_size": (1, 1),
        "rope_axes_dim": (4, 4),
    },
    others=masked_text,
)
tiny(
    "LTXVideoTransformer3DModel",
    (1, 32, 4),
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "cross_attention_dim": 32,
        "num_layers": 3,
        "caption_channels": 16,
    },
    others=lambda: {
        **text(1, 6, 16),
        "encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool),
        "num_frames": 2,
        "height": 4,
        "width": 4,
    },
)
LTX2 = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "audio_in_channels": 4,
    "audio_out_channels": 4,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 4,
    "audio_cross_attention_dim": 8,
    "num_layers": 3,
    "caption_channels": 16,
    "rope_double_precision": False,
}
tiny(
    "LTX2VideoTransformer3DModel",
    (1, 32, 4),
    LTX2,
    others=lambda: {
        **text(1, 6, 16),
        "audio_encoder_hidden_states": seeded(5, 1, 6, 16),
        "num_frames": 2,
        "height": 4,
        "width": 4,
        "audio_num_frames": 9,
    },
    along=lambda x, level: {"audio_hidden_states": level * seeded(6, 1, 9, 4)},
)
tiny(
    "MochiTransformer3DModel",
    (1, 4, 2, 8, 8),
    {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 3,
        "pooled_projection_dim": 16,
        "in_channels": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 4,
        "max_sequence_length": 6,
    },
    others=masked_text,
)
tiny(
    "LatteTransformer3DModel",
    (1, 4, 3, 8, 8),
    {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 2,
        "cross_attention_dim": 16,
        "attention_bias": True,
        "sample_size": 8,
        "patch_size": 2,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "caption_channels": 16,
        "video_length": 3,
    },
    others=lambda: text(1, 6, 16),
)
tiny(
    "AllegroTransformer3DModel",
    (1, 4, 2, 8, 8),
    {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 3,
        "cross_attention_dim": 24,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 2,
        "caption_channels": 16,
    },
    others=lambda: {
        **text(1, 6, 16),
        "encoder_attention_mask": torch.ones(1, 6),
        "attention_mask": torch.ones(1, 2, 8, 8),
        "image_rotary_emb": None,
    },
)
tiny(
    "CosmosTransformer3DModel",
    (1, 4, 1, 8, 8),
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 3,
        "mlp_ratio": 2,
        "text_embed_dim": 16,
        "adaln_lora_dim": 4,
        "max_size": (4, 16, 16),
        "concat_padding_mask": False,  # it needs torchvision
    },
    others=lambda: text(1, 6, 16),
)
tiny(
    "EasyAnimateTransformer3DModel",
    (1, 4, 2, 8, 8),
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 2,
        "text_embed_dim": 16,
        "num_layers": 3,
        "sample_width": 8,
        "sample_height": 8,
        "patch_size": 2,
    },
    others=lambda: text(1, 6, 16),
)
tiny(
    "Kandinsky5Transformer3DModel",
    (1, 2, 8, 8, 4),
    {
        "in_text_dim": 16,
        "in_text_dim2": 16,
        "time_dim": 16,
        "model_dim": 32,
        "ff_dim": 32,
        "num_text_blocks": 1,
        "num_visual_blocks": 3,
        "axes_dims": (4, 6, 6),
    },
    others=lambda: {
        **text(1, 6, 16),
        "pooled_projections": pooled(),
        "visual_rope_pos": (torch.arange(2), torch.arange(4), torch.arange(4)),
        "text_rope_pos": torch.arange(6),
    },
)
tiny(
    "StableAudioDiTModel",
    (1, 3, 8),
    {
        "sample_size": 4,
        "in_channels": 3,
        "num_layers": 3,
        "attention_head_dim": 4,
        "num_attention_heads": 2,
        "num_key_value_attention_heads": 2,
        "out_channels": 3,
        "cross_attention_dim": 4,
        "time_proj_dim": 8,
        "global_states_input_dim": 8,
        "cross_attention_input_dim": 4,
    },
    full_noise=1.0,
    others=lambda: {
        **text(1, 6, 4),
        "global_hidden_states": seeded(4, 1, 1, 8),
        "rotary_embedding": (torch.ones(9, 2), torch.zeros(9, 2)),
    },
)
tiny(
    "AnyFlowTransformer3DModel",
    (1, 3, 4, 8, 8),
    {k: v for k, v in WAN.items()},
    others=lambda: text(1, 6, 16),
    along=lambda x, level: {
        "timestep": torch.full((1, 3), 1000.0 * level),
        "r_timestep": torch.full((1, 3), 1000.0 * level - 100),
    },
)
tiny(
    "HeliosTransformer3DModel",
    (1, 4, 2, 8, 8),
    {
        **{k: v for k, v in WAN.items() if k != "rope_max_seq_len"},
        "rope_dim": (4, 4, 4),
        "has_multi_term_memory_patch": False,
        "zero_history_timestep": False,
        "guidance_cross_attn": False,
    },
    others=lambda: text(1, 6, 16),
)
tiny(
    "WanAnimateTransformer3DModel",
    (1, 12, 3, 16, 16),
    {
        **WAN,
        "in_channels": 12,
        "latent_channels": 4,
        "image_dim": 4,
        "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
        "motion_encoder_size": 16,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 16,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    },
    others=lambda: {
        **text(1, 6, 16),
        "encoder_hidden_states_image": seeded(5, 1, 4, 4),
        "pose_hidden_states": seeded(6, 1, 4, 2, 16, 16),
        "face_pixel_values": seeded(7, 1, 3, 5, 16, 16),
    },
)
tiny(
    "MotifVideoTransformer3DModel",
    (1, 4, 2, 4, 4),
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 10,
        "num_layers": 2,
        "num_single_layers": 2,
        "patch_size": 1,
        "text_embed_dim": 16,
        "rope_axes_dim": (2, 4, 4),
    },
    others=masked_text,
)
tiny(
    "SanaVideoTransformer3DModel",
    (1, 4, 2, 8, 8),
    {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 12,
        "cross_attention_dim": 24,
        "caption_channels": 16,
        "rope_max_seq_len": 32,
    },
    others=lambda: text(1, 6, 16),
)
KANDINSKY6 = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 16,
    "time_dim": 16,
    "model_dim": 32,
    "ff_dim": 32,
    "num_text_blocks": 1,
    "num_visual_blocks": 3,
    "axes_dims": (4, 6, 6),
    "visual_cond": False,
    "in_audio_dim": 4,
    "out_audio_dim": 4,
}
tiny(
    "Kandinsky6Transformer3DModel",
    (1, 2, 8, 8, 4),
    KANDINSKY6,
    others=lambda: {**text(1, 6, 16), "pooled_projections": pooled()},
    along=lambda x, level: {"audio_hidden_states": level * seeded(6, 1, 5, 4)},
)
tiny(
    "Kandinsky6SRTransformer3DModel",
    (1, 1, 16, 16, 9),
    {
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "time_dim": 16,
        "model_dim": 32,
        "ff_dim": 32,
        "num_visual_blocks": 3,
        "axes_dims": (4, 6, 6),
    },
)
tiny(
    "MiniMaxH3Transformer3DModel",
    (1, 16, 16),
    {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "hidden_size": 32,
        "num_layers": 3,
        "num_refiner_layers": 1,
        "ffn_dim": 32,
        "in_channels": 4,
        "audio_in_channels": 4,
        "text_dim": 16,
        "freq_dim": 16,
        "time_embed_hidden_dim": 16,
        "time_embed_dim": 16,
        "rope_freq_dim": 2,
    },
    others=lambda: {
        **text(1, 6, 16),
        "timestep_indices": torch.zeros(26, dtype=torch.long),
        "token_tags": torch.tensor([0] * 6 + [1] * 16 + [2] * 4),
        "position_ids": torch.arange(26)[:, None].expand(26, 3),
        "text_indices": torch.arange(6),
        "video_indices": torch.arange(6, 22),
        "audio_indices": torch.arange(22, 26),
    },
    along=lambda x, level: {"audio_hidden_states": level * seeded(6, 1, 4, 4)},
)
tiny(
    "AceStepTransformer1DModel",
    (1, 8, 4),
    {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "in_channels": 12,
        "audio_acoustic_hidden_dim": 4,
        "encoder_hidden_size": 16,
    },
    full_noise=1.0,
    others=lambda: {**text(1, 6, 16), "context_latents": seeded(5, 1, 8, 8)},
    along=lambda x, level: {"timestep_r": torch.full((1,), level)},
)
tiny(
    "MiniMaxMusic3Transformer1DModel",
    (1, 4, 8),
    {
        "in_channels": 4,
        "condition_dim": 16,
        "num_layers": 3,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "ff_inner_dim": 32,
        "rotary_dim": 4,
        "fourier_embedding_dim": 16,
    },
    full_noise=1.0,
    others=lambda: text(1, 8, 16),
)
tiny(
    "StableAudio3DiTModel",
    (1, 4, 8),
    {
        "io_channels": 4,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 2,
        "cond_token_dim": 16,
        "global_cond_dim": 8,
        "local_add_cond_dim": 5,
        "timestep_features_dim": 16,
        "num_memory_tokens": 4,
    },
    full_noise=1.0,
    others=lambda: {**text(1, 6, 16), "global_hidden_states": seeded(4, 1, 8)},
)
tiny(
    "LongCatAudioDiTTransformer",
    (1, 8, 4),
    {"dit_dim": 32, "dit_depth": 3, "dit_heads": 2, "dit_text_dim": 16, "latent_dim": 4},
    full_noise=1.0,
    others=lambda: {
        **text(1, 6, 16),
        "encoder_attention_mask": torch.ones(1, 6, dtype=torch.bool),
        "attention_mask": torch.ones(1, 8, dtype=torch.bool),
        "latent_cond": seeded(5, 1, 8, 4),
    },
)
tiny(
    "SanaWMLTX2RefinerTransformer3DModel",
    (1, 32, 4),
    LTX2,
    others=lambda: {
        **text(1, 6, 16),
        "video_rotary_emb": (torch.ones(1, 32, 16), torch.zeros(1, 32, 16)),
    },
)
tiny(
    "SanaWMTransformer3DModel",
    (1, 4, 3, 4, 4),
    {
        "in_channels": 4,
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "softmax_every_n": 2,
        "linear_head_dim": 16,
        "use_chunk_plucker_post_attn": False,
        "caption_channels": 16,
        "image_size": 32,
        "mlp_ratio": 2.0,
        "mixed_precision": "no",
        "fp32_attention": False,
    },
    others=lambda: {**text(1, 1, 6, 16), "encoder_attention_mask": torch.ones(1, 6)},
    along=lambda x, level: {"timestep": torch.full((1, 1, 3), 1000.0 * level)},
)
tiny(
    "AnyFlowFARTransformer3DModel",
    (1, 3, 4, 8, 8),
    {**WAN, "chunk_partition": (1, 2)},
    others=lambda: {**text(1, 6, 16), "chunk_partition": [1, 2]},
    along=lambda x, level: {
        "timestep": torch.full((1, 3), 1000.0 * level),
        "r_timestep": torch.full((1, 3), 1000.0 * level - 100),
    },
)

# -- what tells too little ------------------------------------------------------------------------

UNTOLD: dict[str, Mapping[str, Any]] = {
    "Cosmos3OmniTransformer": {
        "head_dim": 16,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "patch_latent_dim": 16,
        "latent_channel": 4,
        "vocab_size": 50,
        "rope_axes_dim": (4, 2, 2),
    },
    "RFD4ProteinaTransformer": {
        "nlayers": 2,
        "token_dim": 32,
        "nheads": 2,
        "dim_cond": 16,
        "pair_repr_dim": 16,
    },
}
"""Options of models of which no family can be inferred, by class name."""
