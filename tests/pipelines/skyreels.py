"""SkyReels-V2: all frames at one noise level, or each at its own with a scheduler of its own."""

from functools import partial
from typing import Any

from diffusers import (
    SkyReelsV2DiffusionForcingImageToVideoPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2DiffusionForcingVideoToVideoPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
)

from tests.pipelines import wan
from tests.pipelines.case import Case
from tests.pipelines.stand_ins import quiet, tiny
from tests.pipelines.video_stand_ins import clip, clip_image_encoder, clip_image_processor


def build(cls=SkyReelsV2Pipeline, model=None, **more: Any):
    """A SkyReels pipeline of that class; ``more`` are further components, made anew."""
    return quiet(
        cls(
            tokenizer=None,
            text_encoder=None,
            vae=wan.autoencoder(),
            transformer=tiny(SkyReelsV2Transformer3DModel, **(wan.MODEL | (model or {}))),
            scheduler=wan.unipc(),
            **{name: make() for name, make in more.items()},
        )
    )


def forcing(text, larger: bool, **more: Any) -> dict[str, Any]:
    """A frame and the next one: 3 steps apart, so more calls than steps."""
    return text(larger) | {"prompt": None, "causal_block_size": 1, "ar_step": 3} | more


def long(larger: bool, **more: Any) -> dict[str, Any]:
    """Frames in loops over 3 latent frames each, that share 2."""
    more = {"num_frames": 13, "base_num_frames": 9, "overlap_history": 5, "ar_step": 0} | more
    return forcing(wan.text, larger, **more)


def with_clip(larger: bool) -> dict[str, Any]:
    """5 frames are given and go on."""
    return long(larger, video=clip(6, 5, **wan.size(larger)))


CASES = [
    Case(name="skyreels2-t2v", build=build, arguments=wan.text, calls_a_step=2),
    Case(
        name="skyreels2-i2v",
        build=partial(
            build,
            SkyReelsV2ImageToVideoPipeline,
            wan.WITH_EMBEDDED_PICTURE,
            image_encoder=clip_image_encoder,
            image_processor=clip_image_processor,
        ),
        arguments=wan.with_picture,
        calls_a_step=2,
    ),
    Case(
        name="skyreels2-forcing",
        build=partial(build, SkyReelsV2DiffusionForcingPipeline),
        arguments=partial(forcing, wan.text, ar_step=0),
        calls_a_step=2,
    ),
    Case(
        name="skyreels2-forcing-staggered",
        irregular=True,
        build=partial(build, SkyReelsV2DiffusionForcingPipeline),
        arguments=partial(forcing, wan.text),
        calls_a_step=None,
    ),
    Case(
        name="skyreels2-forcing-long",
        irregular=True,
        build=partial(build, SkyReelsV2DiffusionForcingPipeline),
        arguments=long,
        calls_a_step=None,
    ),
    Case(
        name="skyreels2-forcing-i2v",
        irregular=True,
        build=partial(build, SkyReelsV2DiffusionForcingImageToVideoPipeline),
        arguments=partial(forcing, wan.with_picture),
        calls_a_step=None,
    ),
    Case(
        name="skyreels2-forcing-v2v",
        irregular=True,
        build=partial(build, SkyReelsV2DiffusionForcingVideoToVideoPipeline),
        arguments=with_clip,
        calls_a_step=None,
    ),
]
