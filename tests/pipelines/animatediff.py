"""AnimateDiff: a UNet with motion modules; DDIM, multistep, FreeInit's loops, a ControlNet."""

from functools import partial
from typing import Any

from diffusers import (
    AnimateDiffControlNetPipeline,
    AnimateDiffPipeline,
    AnimateDiffVideoToVideoPipeline,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    UNetMotionModel,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import TEXT, WIDTH, autoencoder, drawn, quiet, tiny
from tests.pipelines.video_stand_ins import clip

CHANNELS = 4
"""Of the latents."""
MODEL = {
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": WIDTH,
}
UNET = MODEL | {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
    "num_attention_heads": 2,
    "motion_num_attention_heads": 2,
    "motion_max_seq_length": 8,
}


def ddim() -> DDIMScheduler:
    return DDIMScheduler(beta_schedule="linear", clip_sample=False)


def dpmsolver() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(beta_schedule="linear")


def build(cls=AnimateDiffPipeline, scheduler=ddim, **more: Any):
    """An AnimateDiff pipeline of that class; ``more`` are further components, made anew."""
    return quiet(
        cls(
            vae=autoencoder(CHANNELS),
            text_encoder=None,
            tokenizer=None,
            unet=tiny(UNetMotionModel, **UNET),
            motion_adapter=None,
            scheduler=scheduler(),
            **{name: make() for name, make in more.items()},
        )
    )


def build_with_free_init():
    """FreeInit mixes what was sampled with new noise at low frequencies, and samples again."""
    pipe = build()
    pipe.enable_free_init(num_iters=2)
    return pipe


def controlnet() -> ControlNetModel:
    return tiny(
        ControlNetModel,
        1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        attention_head_dim=4,
        conditioning_embedding_out_channels=(8, 8),
        **MODEL,
    )


def size(larger: bool) -> dict[str, int]:
    return {"height": 16, "width": 24 if larger else 16}


def text(larger: bool, **more: Any) -> dict[str, Any]:
    return {
        "prompt_embeds": drawn(1, 1, TEXT, WIDTH),
        "negative_prompt_embeds": drawn(2, 1, TEXT, WIDTH),
        "guidance_scale": 4.0,
        "num_frames": 3,
        **size(larger),
        **more,
    }


def with_clip(larger: bool, strength: float) -> dict[str, Any]:
    arguments = text(larger, strength=strength)
    frames = clip(6, arguments.pop("num_frames"), **size(larger))
    return arguments | {"video": frames}


def controlled(larger: bool) -> dict[str, Any]:
    frames = clip(6, 3, **size(larger))[0]
    return text(larger, conditioning_frames=list(frames))


CASES = [
    Case(name="animatediff", build=build, arguments=text, denoisers=("unet",)),
    Case(
        name="animatediff-dpmsolver",
        build=partial(build, scheduler=dpmsolver),
        arguments=text,
        denoisers=("unet",),
    ),
    Case(
        name="animatediff-ddim-noise",
        build=build,
        arguments=partial(text, eta=1.0),
        denoisers=("unet",),
        stochastic=True,
    ),
    Case(
        name="animatediff-free-init",
        irregular=True,
        build=build_with_free_init,
        arguments=text,
        denoisers=("unet",),
        calls_a_step=None,
    ),
    Case(
        name="animatediff-v2v",
        build=partial(build, AnimateDiffVideoToVideoPipeline),
        arguments=partial(with_clip, strength=0.5),
        denoisers=("unet",),
        strength=0.5,
    ),
    Case(
        name="animatediff-controlnet",
        build=partial(build, AnimateDiffControlNetPipeline, controlnet=controlnet),
        arguments=controlled,
        denoisers=("unet", "controlnet"),
        calls_a_step=2,
    ),
]
