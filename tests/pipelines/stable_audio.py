"""Stable Audio: waveforms, and a multistep solver of noise levels of its own."""

from typing import Any

from diffusers import (
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)

from tests.pipelines.case import Case
from tests.pipelines.stand_ins import WIDTH, quiet, t5_encoder, t5_tokenizer, tiny


def build():
    return quiet(
        StableAudioPipeline(
            vae=tiny(
                AutoencoderOobleck,
                10,
                encoder_hidden_size=4,
                downsampling_ratios=[2, 4],
                channel_multiples=[1, 2],
                decoder_channels=4,
                decoder_input_channels=4,
                sampling_rate=16,
            ),
            text_encoder=t5_encoder(),
            projection_model=tiny(
                StableAudioProjectionModel,
                13,
                text_encoder_dim=WIDTH,
                conditioning_dim=WIDTH,
                min_value=0,
                max_value=32,
            ),
            tokenizer=t5_tokenizer(),
            transformer=tiny(
                StableAudioDiTModel,
                sample_size=16,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                num_key_value_attention_heads=2,
                cross_attention_dim=WIDTH,
                cross_attention_input_dim=WIDTH,
                global_states_input_dim=2 * WIDTH,
                time_proj_dim=8,
            ),
            scheduler=EDMDPMSolverMultistepScheduler(
                sigma_min=0.3,
                sigma_max=500,
                sigma_data=1.0,
                sigma_schedule="exponential",
                prediction_type="v_prediction",
            ),
        )
    )


def sound(larger: bool) -> dict[str, Any]:
    return {
        "prompt": "a b c",
        "negative_prompt": "d",
        "guidance_scale": 3.0,
        "audio_end_in_s": 4.0,
        "num_waveforms_per_prompt": 2 if larger else 1,
    }


CASES = [Case(name="stable-audio", build=build, arguments=sound)]
