"""PRX: its sampler's step is asked for a dataclass."""

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PRXPipeline
from diffusers.models import PRXTransformer2DModel

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, drawn, quiet, tiny


def build():
    return quiet(
        PRXPipeline(
            transformer=tiny(
                PRXTransformer2DModel,
                in_channels=4,
                context_in_dim=WIDTH,
                hidden_size=16,
                mlp_ratio=2.0,
                num_heads=2,
                depth=2,
                axes_dim=[4, 4],
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=None,
            tokenizer=None,
        )
    )


def text(larger: bool) -> dict[str, Any]:
    mask = torch.ones(1, TEXT, dtype=torch.bool)
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": drawn(3, 1, TEXT, WIDTH),
        "negative_prompt_attention_mask": mask,
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
        "height": 64,
        "width": 96 if larger else 64,
    }


CASES = [Case(name="prx", build=build, arguments=text)]
