"""Open-Sora's pipeline on tiny random components, against its sampling loop written out."""

import math
import shutil
import string
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLCogVideoX
from PIL import Image
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from xfuser_adacorr.models import (
    OpenSoraPipeline,
    RectifiedFlowScheduler,
    STDiT3Transformer3DModel,
)
from xfuser_adacorr.models.opensora.latents import decode_latents, encode_video, latent_frames

TEXT_CHANNELS = 16
TEXT_TOKENS = 24
SIZES = {"height": 32, "width": 48, "num_frames": 17}
LATENTS = (4, 5, 4, 6)
STEPS = 4
PROMPT = "a red ball"
RUN = {**SIZES, "num_inference_steps": STEPS, "output_type": "latent"}


def make_transformer(**options):
    return STDiT3Transformer3DModel(
        **{
            "hidden_size": 32,
            "depth": 1,
            "num_heads": 2,
            "caption_channels": TEXT_CHANNELS,
            "model_max_length": TEXT_TOKENS,
            **options,
        }
    ).eval()


def make_tokenizer():
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocabulary += [(c, -3.0) for c in string.ascii_letters + string.digits + string.punctuation]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def make_text_encoder():
    config = T5Config(
        vocab_size=128, d_model=TEXT_CHANNELS, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    return T5EncoderModel(config).eval()


def make_pipeline(vae=None, transformer=None, **options):
    torch.manual_seed(0)
    pipe = OpenSoraPipeline(
        transformer=transformer or make_transformer(),
        scheduler=RectifiedFlowScheduler(),
        tokenizer=make_tokenizer(),
        text_encoder=make_text_encoder(),
        vae=vae,
        **{"prompt_suffix": "", **options},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_image_vae(**options):
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        latent_channels=4,
        **options,
    ).eval()


def make_video_vae():
    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        latent_channels=4,
        layers_per_block=1,
        scaling_factor=0.5,
    ).eval()


@pytest.fixture
def pipe():
    return make_pipeline()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise_of(seed, shape=(1, *LATENTS)):
    return torch.randn(shape, generator=seeded(seed))


def record_calls(transformer):
    """Keyword arguments of every call of the transformer."""
    calls = []
    transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    return calls


def encode(pipe, prompt):
    tokens = pipe.tokenizer(
        [prompt], padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt"
    )
    states = pipe.text_encoder(**tokens).last_hidden_state
    return states, tokens.attention_mask


def timesteps_of(num_steps, height=32, width=48, num_frames=17):
    ratio = math.sqrt(height * width / 512**2)
    if num_frames > 1:
        ratio *= math.sqrt(num_frames // 17 * 5)
    uniform = [1 - i / num_steps for i in range(num_steps)]
    return [1000 * ratio * u / (1 + (ratio - 1) * u) for u in uniform]


def velocity_by_hand(pipe, x, t, prompt, guidance, x_mask=None, fps=24.0):
    """Two separate calls, the null text with the prompt's mask."""
    text, mask = encode(pipe, prompt)
    null = pipe.transformer.y_embedder.y_embedding[None]

    def velocity(states):
        sample = pipe.transformer(
            hidden_states=x,
            timestep=torch.tensor([t]),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            x_mask=x_mask,
            fps=fps,
            height=8 * x.shape[3],
            width=8 * x.shape[4],
        ).sample
        return sample[:, :4]

    return velocity(null) + guidance * (velocity(text) - velocity(null))


def sample_by_hand(pipe, x, prompt=PROMPT, guidance=7.0, num_frames=17, fps=24.0):
    times = [*timesteps_of(STEPS, num_frames=num_frames), 0.0]
    for t, t_next in pairwise(times):
        x = x + velocity_by_hand(pipe, x, t, prompt, guidance, fps=fps) * (t - t_next) / 1000
    return x


# -- sampling ------------------------------------------------------------------------------------


def test_latents_equal_the_loop_written_out(pipe):
    latents = pipe(PROMPT, **RUN, generator=seeded(3)).frames
    assert latents.shape == (1, *LATENTS) and latents.dtype == torch.float32
    expected = sample_by_hand(pipe, noise_of(3))
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_an_image_is_sampled_at_120_frames_a_second(pipe):
    latents = pipe(PROMPT, **RUN | {"num_frames": 1}, generator=seeded(3), fps=24).frames
    expected = sample_by_hand(pipe, noise_of(3, (1, 4, 1, 4, 6)), num_frames=1, fps=120.0)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_guidance_is_one_call_of_two_halves(pipe):
    calls = record_calls(pipe.transformer)
    pipe([PROMPT, "blue"], **RUN, generator=seeded(0))
    assert [len(call["hidden_states"]) for call in calls] == [4] * STEPS


def test_without_guidance_calls_are_not_doubled(pipe):
    calls = record_calls(pipe.transformer)
    latents = pipe(PROMPT, **RUN, guidance_scale=1.0, generator=seeded(3)).frames
    assert [len(call["hidden_states"]) for call in calls] == [1] * STEPS
    expected = sample_by_hand(pipe, noise_of(3), guidance=1.0)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_null_text_is_attended_with_the_prompts_mask(pipe):
    _, mask = encode(pipe, PROMPT)
    attended = mask.sum().item()
    assert attended < TEXT_TOKENS
    null = pipe.transformer.y_embedder.y_embedding
    latents = pipe(PROMPT, **RUN, generator=seeded(0)).frames
    null[attended:] = 50.0
    assert torch.equal(pipe(PROMPT, **RUN, generator=seeded(0)).frames, latents)
    null[attended - 1] = 50.0
    assert not torch.allclose(pipe(PROMPT, **RUN, generator=seeded(0)).frames, latents)


def test_a_transformer_without_sigma_half_is_sampled(pipe):
    torch.manual_seed(0)
    pipe = make_pipeline(transformer=make_transformer(pred_sigma=False))
    latents = pipe(PROMPT, **RUN, generator=seeded(3)).frames
    torch.testing.assert_close(latents, sample_by_hand(pipe, noise_of(3)), rtol=1e-4, atol=1e-4)


def test_a_batch_equals_single_runs(pipe):
    prompts = [PROMPT, "blue"]
    batch = pipe(
        prompts, **RUN, num_videos_per_prompt=2, generator=[seeded(i) for i in range(4)]
    ).frames
    for i in range(4):
        single = pipe(prompts[i // 2], **RUN, generator=seeded(i)).frames
        torch.testing.assert_close(batch[i : i + 1], single, rtol=1e-4, atol=1e-4)


def test_given_latents_and_text_stand_in_for_noise_and_prompt(pipe):
    expected = pipe(PROMPT, **RUN, generator=seeded(3)).frames
    text, mask = encode(pipe, PROMPT)
    pipe.tokenizer = pipe.text_encoder = None
    given = {"prompt_embeds": text, "prompt_attention_mask": mask, "latents": noise_of(3)}
    (latents,) = pipe(**RUN, **given, return_dict=False)
    assert torch.equal(latents, expected)


def test_shorter_text_that_holds_the_prompt_is_the_same(pipe):
    expected = pipe(PROMPT, **RUN, generator=seeded(3)).frames
    latents = pipe(PROMPT, **RUN, generator=seeded(3), max_sequence_length=12).frames
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_prompts_are_put_in_lower_case_and_get_the_suffix_once():
    pipe = make_pipeline(prompt_suffix="Score: 6.5.")
    expected, _ = encode(pipe, "a ball score: 6.5.")
    for prompt in ("a ball", " A Ball ", "a ball Score: 6.5."):
        assert torch.equal(pipe.encode_prompt(prompt)[0], expected)
    bare, _ = encode(pipe, "a ball")
    assert torch.equal(pipe.encode_prompt("a ball", prompt_suffix="")[0], bare)
    default = OpenSoraPipeline(pipe.transformer, pipe.scheduler)
    assert default.config.prompt_suffix == "aesthetic score: 6.5."


def test_calls_are_made_in_one_context_and_caches_are_reset_at_the_end(pipe, monkeypatch):
    seen = []
    context = pipe.transformer.cache_context
    monkeypatch.setattr(
        pipe.transformer, "cache_context", lambda name: (seen.append(name), context(name))[1]
    )
    monkeypatch.setattr(
        pipe.transformer, "_reset_stateful_cache", lambda *args: seen.append("reset")
    )
    pipe(PROMPT, **RUN, generator=seeded(0))
    assert seen == ["cond_uncond"] * STEPS + ["reset"]


def test_bfloat16_transformer_samples_float32_latents():
    pipe = make_pipeline()
    pipe.transformer.to(torch.bfloat16)
    latents = pipe(PROMPT, **RUN, generator=seeded(0)).frames
    assert latents.dtype == torch.float32 and latents.isfinite().all()


# -- callbacks -----------------------------------------------------------------------------------


def test_a_callback_can_change_latents_and_text(pipe):
    text, _ = encode(pipe, "blue")
    null = pipe.transformer.y_embedder.y_embedding[None]
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, timestep.item(), sorted(tensors)))
        if step == STEPS - 2:
            return {"latents": torch.zeros(1, *LATENTS), "prompt_embeds": torch.cat([text, null])}
        return {}

    names = ("latents", "prompt_embeds")
    latents = pipe(
        PROMPT,
        **RUN,
        generator=seeded(0),
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=names,
    ).frames
    times = timesteps_of(STEPS)
    assert [(step, names) for step, _, names in seen] == [(i, sorted(names)) for i in range(STEPS)]
    assert [t for _, t, _ in seen] == pytest.approx(times, rel=1e-5)
    prompt_mask = encode(pipe, PROMPT)[1]
    inputs = {"encoder_attention_mask": prompt_mask, "fps": 24.0, "height": 32, "width": 48}
    cond, uncond = (
        pipe.transformer(
            torch.zeros(1, *LATENTS), torch.tensor([times[-1]]), states, **inputs
        ).sample[:, :4]
        for states in (text, null)
    )
    expected = (uncond + 7.0 * (cond - uncond)) * times[-1] / 1000
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_a_callback_can_stop_the_run(pipe):
    calls = record_calls(pipe.transformer)

    def callback(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 1

    pipe(PROMPT, **RUN, callback_on_step_end=callback)
    assert len(calls) == 2
    pipe(PROMPT, **RUN)
    assert len(calls) == 2 + STEPS


# -- known frames --------------------------------------------------------------------------------


def test_conditioned_frames_follow_the_rule(pipe):
    known = noise_of(9)
    mask = [0.0, 1.0, 0.15, 0.4, 1.0]
    latents = pipe(
        PROMPT, **RUN, generator=seeded(3), conditioning_latents=known, conditioning_mask=mask
    ).frames

    generator = seeded(3)
    x = torch.randn(1, *LATENTS, generator=generator)
    times = [*timesteps_of(STEPS), 0.0]
    noisy = [m == 1 for m in mask]
    started = {}
    for frame in range(5):
        x[:, :, frame] = x[:, :, frame] if noisy[frame] else known[:, :, frame]
    for i, t in enumerate(times[:-1]):
        noise = torch.randn(1, *LATENTS, generator=generator)
        active = [m * 1000 >= t for m in mask]
        for frame in range(5):
            if active[frame] and not noisy[frame]:
                started[frame] = i
                sigma = t / 1000
                x[:, :, frame] = (1 - sigma) * x[:, :, frame] + sigma * noise[:, :, frame]
                noisy[frame] = True
        v = velocity_by_hand(pipe, x, t, PROMPT, 7.0, x_mask=torch.tensor([active]))
        stepped = x + v * (t - times[i + 1]) / 1000
        for frame in range(5):
            x[:, :, frame] = (stepped if active[frame] else x)[:, :, frame]
    assert started.keys() == {2, 3} and started[2] > started[3] > 0
    torch.testing.assert_close(latents, x, rtol=1e-4, atol=1e-4)
    assert torch.equal(latents[:, :, 0], known[:, :, 0])


def test_first_frames_are_kept_by_default(pipe):
    known = noise_of(9, (1, 4, 2, 4, 6))
    latents = pipe(PROMPT, **RUN, generator=seeded(3), conditioning_latents=known).frames
    assert torch.equal(latents[:, :, :2], known)
    explicit = pipe(
        PROMPT,
        **RUN,
        generator=seeded(3),
        conditioning_latents=known,
        conditioning_mask=torch.tensor([0, 0, 1, 1, 1]),
    ).frames
    assert torch.equal(explicit, latents)


def test_a_mask_of_ones_conditions_on_nothing(pipe):
    known, ones = noise_of(9), torch.ones(5)
    expected = pipe(PROMPT, **RUN, latents=noise_of(3)).frames
    latents = pipe(
        PROMPT, **RUN, latents=noise_of(3), conditioning_latents=known, conditioning_mask=ones
    ).frames
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_a_conditioned_batch_equals_single_runs(pipe):
    known = noise_of(9, (2, *LATENTS))
    mask = torch.tensor([[0.0, 1.0, 1.0, 0.4, 1.0], [1.0, 1.0, 0.2, 1.0, 0.0]])

    def run(rows, generators):
        given = {"conditioning_latents": known[rows], "conditioning_mask": mask[rows]}
        return pipe([PROMPT] * len(rows), **RUN, generator=generators, **given).frames

    batch = run([0, 1], [seeded(0), seeded(1)])
    for i in range(2):
        single = run([i], [seeded(i)])
        torch.testing.assert_close(batch[i : i + 1], single, rtol=1e-4, atol=1e-4)


def test_a_picture_is_encoded_as_first_frame():
    pipe = make_pipeline(make_video_vae())
    picture = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    latents = pipe(PROMPT, **RUN, conditioning_frames=[Image.fromarray(picture)]).frames
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    encoded = pipe.vae.encode(pixels).latent_dist.mode() * 0.5
    assert latents.shape == (1, *LATENTS)
    torch.testing.assert_close(latents[:, :, :1], encoded, rtol=1e-4, atol=1e-4)


# -- autoencoders --------------------------------------------------------------------------------


def test_an_image_autoencoder_decodes_every_frame():
    pipe = make_pipeline(make_image_vae(scaling_factor=0.25, shift_factor=0.1))
    latents = pipe([PROMPT, "blue"], **RUN, generator=seeded(0)).frames
    assert latents.shape == (2, 4, 17, 4, 6)
    video = pipe([PROMPT, "blue"], **RUN | {"output_type": "pt"}, generator=seeded(0)).frames
    assert video.shape == (2, 17, 3, 32, 48)
    for sample, frame in ((0, 0), (1, 16)):
        z = latents[sample, :, frame][None] / 0.25 + 0.1
        expected = (pipe.vae.decode(z).sample[0] / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(video[sample, frame], expected, rtol=1e-3, atol=1e-4)


def test_a_video_autoencoder_decodes_the_whole_video():
    pipe = make_pipeline(make_video_vae())
    latents = pipe(PROMPT, **RUN, generator=seeded(0)).frames
    assert latents.shape == (1, *LATENTS)
    expected = (pipe.vae.decode(latents / 0.5).sample / 2 + 0.5).clamp(0, 1)
    run = RUN | {"output_type": "np"}
    video = pipe(PROMPT, **run, generator=seeded(0)).frames
    assert video.shape == (1, 17, 32, 48, 3)
    expected = expected[0].permute(1, 2, 3, 0).numpy()
    np.testing.assert_allclose(video[0], expected, rtol=1e-3, atol=1e-4)
    pictures = pipe(PROMPT, **run | {"output_type": "pil"}, generator=seeded(0)).frames
    assert len(pictures[0]) == 17 and pictures[0][0].size == (48, 32)
    assert np.abs(np.asarray(pictures[0][3]) / 255 - video[0, 3]).max() < 0.51 / 255


def test_latents_are_scaled_per_channel_where_the_autoencoder_says_so():
    mean, std = (-0.10, 0.34, 0.27, 0.98), (3.85, 2.32, 2.33, 3.06)
    vae = make_image_vae(scaling_factor=0.5, latents_mean=mean, latents_std=std)
    frames = noise_of(0, (1, 3, 2, 16, 16)).clamp(-1, 1)
    own = vae.encode(frames[:, :, 1]).latent_dist.mode()
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    latents = encode_video(vae, frames)
    torch.testing.assert_close(latents[:, :, 1], (own - mean) * 0.5 / std, rtol=1e-4, atol=1e-5)
    decoded = decode_latents(vae, latents)[:, :, 1]
    torch.testing.assert_close(decoded, vae.decode(own).sample, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("num_frames", "expected"), [(1, 1), (4, 1), (16, 4), (17, 5), (34, 10), (51, 15), (58, 17)]
)
def test_latent_frames_without_autoencoder_are_open_soras(num_frames, expected):
    assert latent_frames(num_frames, None) == expected


# -- files ---------------------------------------------------------------------------------------

LOAD = """
import sys, torch
from xfuser_adacorr.models import OpenSoraPipeline
folder, cache, out = sys.argv[1:]
pipes = [OpenSoraPipeline.from_pretrained(folder),
         OpenSoraPipeline.from_pretrained("owner/name", cache_dir=cache, local_files_only=True)]
torch.save([{
    "latents": pipe("a red ball", height=32, width=48, num_frames=17, num_inference_steps=4,
                    output_type="latent", generator=torch.Generator().manual_seed(3)).frames,
    "suffix": pipe.config.prompt_suffix,
    "classes": {name: type(part).__name__ for name, part in pipe.components.items()},
} for pipe in pipes], out)
"""


def test_a_saved_pipeline_loads_in_a_fresh_process(tmp_path):
    """From its folder, and from the hub by way of its local cache."""
    pipe = make_pipeline(make_video_vae(), prompt_suffix="good")
    folder, cache = tmp_path / "saved", tmp_path / "cache"
    pipe.save_pretrained(folder)
    repository = cache / "models--owner--name"
    shutil.copytree(folder, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    out = tmp_path / "out.pt"
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), str(cache), str(out)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    expected = pipe(PROMPT, **RUN, generator=seeded(3)).frames
    results = torch.load(out)
    assert len(results) == 2
    for loaded in results:
        torch.testing.assert_close(loaded["latents"], expected, rtol=1e-5, atol=1e-5)
        assert loaded["suffix"] == "good"
        assert loaded["classes"] == {k: type(v).__name__ for k, v in pipe.components.items()}


def test_optional_components_stay_out_and_can_be_given_when_loading(tmp_path):
    pipe = OpenSoraPipeline(
        make_transformer(), RectifiedFlowScheduler(use_timestep_transform=False)
    )
    pipe.save_pretrained(tmp_path)
    assert not (tmp_path / "vae").exists() and not (tmp_path / "tokenizer").exists()
    loaded = OpenSoraPipeline.from_pretrained(tmp_path, vae=make_image_vae())
    assert loaded.tokenizer is None and loaded.text_encoder is None
    assert isinstance(loaded.vae, AutoencoderKL)
    assert loaded.scheduler.config.use_timestep_transform is False
    for key, value in pipe.transformer.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[key], value), key


# -- bad input -----------------------------------------------------------------------------------

TEXT = {"prompt_embeds": torch.zeros(1, 8, TEXT_CHANNELS)}
MASK = {"prompt_attention_mask": torch.ones(1, 8)}
KNOWN = {"conditioning_latents": torch.zeros(1, *LATENTS)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 30}, "height"),
        ({"width": 0}, "width"),
        ({"num_frames": 0}, "num_frames"),
        ({"num_frames": 16}, "num_frames"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt"),
        ({"output_type": "gif"}, "output_type"),
        ({"output_type": "np"}, "output_type must be 'latent'"),
        ({"prompt": None}, "prompt or prompt_embeds"),
        ({"prompt": 3}, "prompt must be a string"),
        ({"prompt": []}, "prompt must be a string"),
        ({**TEXT, **MASK}, "prompt or prompt_embeds"),
        ({"prompt": None, **TEXT}, "prompt_attention_mask"),
        (MASK, "prompt_attention_mask"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 25, 16), **MASK}, "prompt_embeds"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 8, 15), **MASK}, "prompt_embeds"),
        (
            {"prompt": None, **TEXT, "prompt_attention_mask": torch.ones(1, 7)},
            "prompt_attention_mask",
        ),
        ({"max_sequence_length": TEXT_TOKENS + 1}, "max_sequence_length"),
        ({"latents": torch.zeros(1, 4, 4, 4, 6)}, "latents"),
        ({"generator": [seeded(0), seeded(1)]}, "generator"),
        ({"callback_on_step_end_tensor_inputs": ("noise",)}, "callback_on_step_end_tensor_inputs"),
        ({"conditioning_mask": torch.ones(5)}, "conditioning_mask needs"),
        ({**KNOWN, "conditioning_frames": []}, "exclude"),
        ({"conditioning_frames": []}, "needs a pipeline with vae"),
        ({"conditioning_latents": torch.zeros(1, 4, 6, 4, 6)}, "conditioning_latents"),
        ({"conditioning_latents": torch.zeros(1, 4, 2, 4, 4)}, "conditioning_latents"),
        ({"conditioning_latents": torch.zeros(2, *LATENTS)}, "conditioning_latents"),
        ({"conditioning_latents": torch.zeros(LATENTS)}, "conditioning_latents"),
        ({**KNOWN, "conditioning_mask": torch.ones(4)}, "conditioning_mask"),
        ({**KNOWN, "conditioning_mask": 2 * torch.ones(5)}, "conditioning_mask"),
    ],
)
def test_bad_input_is_named(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": PROMPT, **RUN, **options})


def test_a_prompt_without_text_encoder_is_refused():
    pipe = OpenSoraPipeline(make_transformer(), RectifiedFlowScheduler())
    with pytest.raises(ValueError, match="text_encoder"):
        pipe(PROMPT, **RUN)


def test_frames_that_a_video_autoencoder_cannot_make_are_refused():
    with pytest.raises(ValueError, match="num_frames must be a multiple of 4 plus 1"):
        make_pipeline(make_video_vae())(PROMPT, **RUN | {"num_frames": 20})


def test_conditioning_needs_single_frame_patches():
    pipe = make_pipeline(transformer=make_transformer(patch_size=(2, 2, 2)))
    with pytest.raises(ValueError, match="patch_size"):
        pipe(PROMPT, **RUN, **KNOWN)
