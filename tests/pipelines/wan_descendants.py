"""Pipelines built on Wan's: ChronoEdit, which drops frames amid the loop, and Lucy Edit."""

from functools import partial
from typing import Any

from diffusers import ChronoEditPipeline, ChronoEditTransformer3DModel, LucyEditPipeline

from tests.pipelines import wan
from tests.pipelines.case import Case
from tests.pipelines.stand_ins import quiet, tiny
from tests.pipelines.video_stand_ins import clip, clip_image_encoder, clip_image_processor


def build_chronoedit():
    """A ChronoEdit pipeline around tiny components, without a text encoder."""
    model = wan.MODEL | wan.WITH_EMBEDDED_PICTURE | {"rope_temporal_skip_len": 8}
    return quiet(
        ChronoEditPipeline(
            tokenizer=None,
            text_encoder=None,
            image_encoder=clip_image_encoder(),
            image_processor=clip_image_processor(),
            transformer=tiny(ChronoEditTransformer3DModel, **model),
            vae=wan.autoencoder(),
            scheduler=wan.unipc(),
        )
    )


def reasoning(larger: bool) -> dict[str, Any]:
    """After two steps the first and the last frame alone are left, in the scheduler too."""
    more = {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 2}
    return wan.with_picture(larger) | more


def with_clip(larger: bool) -> dict[str, Any]:
    arguments = wan.text(larger)
    frames = clip(6, arguments["num_frames"], **wan.size(larger))
    return arguments | {"video": frames}


CASES = [
    Case(name="chronoedit", build=build_chronoedit, arguments=wan.with_picture, calls_a_step=2),
    Case(
        name="chronoedit-reasoning",
        irregular=True,
        build=build_chronoedit,
        arguments=reasoning,
        calls_a_step=2,
    ),
    Case(
        name="lucy-edit",
        build=partial(wan.build, LucyEditPipeline, {"in_channels": 2 * wan.CHANNELS}),
        arguments=with_clip,
        calls_a_step=2,
    ),
]
