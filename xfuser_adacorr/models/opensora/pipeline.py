"""Text to video with Open-Sora 1.2's transformer, as a diffusers pipeline."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import T5EncoderModel, T5Tokenizer

from .inputs import (
    check_conditioning,
    check_noise,
    check_output,
    check_sizes,
    check_text,
)
from .latents import (
    FrameConditioning,
    Generators,
    decode_latents,
    encode_video,
    latent_frames,
    over_frames,
    spatial_ratio,
)
from .rectified_flow import RectifiedFlowScheduler
from .transformer import IMAGE_FPS, STDiT3Transformer3DModel

DOWNLOAD_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


@dataclass
class OpenSoraPipelineOutput(BaseOutput):
    """``frames``: videos ``[B, F, 3, H, W]`` ("pt") or ``[B, F, H, W, 3]`` ("np") in [0, 1], lists
    of PIL images ("pil"), or latents ``[B, C, T, h, w]`` ("latent")."""

    frames: Any


class OpenSoraPipeline(DiffusionPipeline):
    """Generates videos from text with `STDiT3Transformer3DModel`.

    Args:
        transformer: Predicts the velocity of the latents.
        scheduler: Open-Sora's sampler.
        tokenizer, text_encoder: T5; without them prompts are given as ``prompt_embeds``.
        vae: A diffusers image autoencoder (each frame is one latent frame) or video autoencoder of
            the transformer's latents; without it the output is latents.
        prompt_suffix: Appended to every prompt; the default is what Open-Sora's published sampling
            configurations append, since its captions were scored so. "" appends nothing.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["tokenizer", "text_encoder", "vae"]  # noqa: RUF012
    _callback_tensor_inputs = ["latents", "prompt_embeds"]  # noqa: RUF012

    def __init__(
        self,
        transformer: STDiT3Transformer3DModel,
        scheduler: RectifiedFlowScheduler,
        tokenizer: T5Tokenizer | None = None,
        text_encoder: T5EncoderModel | None = None,
        vae: ModelMixin | None = None,
        prompt_suffix: str = "aesthetic score: 6.5.",
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
        )
        self.register_to_config(prompt_suffix=prompt_suffix)
        self.video_processor = VideoProcessor(vae_scale_factor=spatial_ratio(vae))
        self._guidance_scale, self._interrupt = 1.0, False

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Fetch a pipeline from the hub; returns its folder in the local cache.

        All files are taken: diffusers' own selection rejects repositories with components of other
        libraries, such as this transformer and scheduler.
        """
        options = {name: kwargs[name] for name in DOWNLOAD_OPTIONS if name in kwargs}
        return snapshot_download(pretrained_model_name, **options)

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1.0

    @property
    def interrupt(self) -> bool:
        """Set ``_interrupt`` from a callback to leave the remaining steps out."""
        return self._interrupt

    def encode_prompt(
        self,
        prompt: str | list[str],
        *,
        prompt_suffix: str | None = None,
        max_sequence_length: int | None = None,
        device: torch.device | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the text states ``[B, L, E]`` and their mask ``[B, L]`` of prompts.

        All is put in lower case, as the training captions were. The suffix (None: the pipeline's)
        is not appended where the prompt already has the words before its colon.
        """
        suffix = (self.config.prompt_suffix if prompt_suffix is None else prompt_suffix).lower()
        label = suffix.partition(":")[0]
        prompts = [prompt] if isinstance(prompt, str) else prompt
        prompts = [text.strip().lower() for text in prompts]
        tokens = self.tokenizer(
            [text if label in text else f"{text} {suffix}" for text in prompts],
            max_length=max_sequence_length or self.transformer.config.model_max_length,
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(device or self._execution_device)
        states = self.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
        return states.last_hidden_state, tokens.attention_mask

    def latent_shape(
        self, batch_size: int, height: int, width: int, num_frames: int
    ) -> tuple[int, int, int, int, int]:
        """``(B, C, T, h, w)`` of the latents of B videos of a size in pixels and frames."""
        ratio = spatial_ratio(self.vae)
        size = (latent_frames(num_frames, self.vae), height // ratio, width // ratio)
        return (batch_size, self.transformer.config.in_channels, *size)

    def null_text(self, batch_size: int, length: int) -> Tensor:
        """The learned text of guidance, ``[B, L, E]``; it is attended with the prompt's mask."""
        return self.transformer.y_embedder.y_embedding[:length].expand(batch_size, -1, -1)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        height: int = 360,
        width: int = 640,
        num_frames: int = 51,
        num_inference_steps: int = 30,
        guidance_scale: float = 7.0,
        fps: float = 24.0,
        num_videos_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        conditioning_frames: Any = None,
        conditioning_latents: Tensor | None = None,
        conditioning_mask: Tensor | None = None,
        prompt_suffix: str | None = None,
        max_sequence_length: int | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: tuple[str, ...] = ("latents",),
    ) -> OpenSoraPipelineOutput | tuple[Any]:
        """Generate videos; B is the number of prompts times ``num_videos_per_prompt``.

        Args:
            prompt: What to show.
            height, width: Size in pixels, multiples of the autoencoder's ratio (8 without one).
            num_frames: Frames of the video; 1 is an image. The scheduler's timestep transform
                accepts 1 or at least 17.
            num_inference_steps: Transformer calls.
            guidance_scale: Strength of classifier-free guidance, whose two halves are one call of
                twice the batch; above 1, else there is no guidance.
            fps: Frame rate the video is meant for; images have 120 whatever is given.
            num_videos_per_prompt: Videos of each prompt.
            generator: One for the batch, or one for each of the B videos.
            latents: Initial noise ``[B, C, T, h, w]``.
            prompt_embeds, prompt_attention_mask: Instead of ``prompt``, text states ``[n, L, E]``
                and their mask ``[n, L]`` for n prompts.
            conditioning_frames: Known first frames, a video or videos in any form of
                `VideoProcessor` (one image: ``[image]``); they are encoded by the autoencoder.
            conditioning_latents: The same as K latent frames ``[c, C, K, h, w]``, K <= T; c divides
                B, and each is for as many videos in a row.
            conditioning_mask: ``[T]`` or ``[c, T]`` in [0, 1] for the latent frames: 0 keeps a
                known frame, 1 samples it from pure noise, m between samples it from timestep 1000 m
                on. Default: 0 for the K known frames, 1 for the others.
            prompt_suffix: Replaces the pipeline's.
            max_sequence_length: Text tokens; default and largest: the transformer's.
            output_type: "np", "pt", "pil" or "latent".
            return_dict: Whether to return an `OpenSoraPipelineOutput` or a tuple.
            callback_on_step_end: ``f(pipeline, step, timestep, tensors)`` after each step; the
                tensors it returns replace those of the loop.
            callback_on_step_end_tensor_inputs: Of "latents" and "prompt_embeds" (as given to the
                transformer: with guidance the null text is its second half), those it is shown.

        Raises:
            ValueError: If an argument does not fit; it is named.
        """
        sizes = {"height": height, "width": width, "num_frames": num_frames}
        check_sizes(self, **sizes, num_videos_per_prompt=num_videos_per_prompt)
        check_output(self, output_type, callback_on_step_end_tensor_inputs)
        check_conditioning(self, conditioning_frames, conditioning_latents, conditioning_mask)
        batch_size = num_videos_per_prompt * check_text(
            self, prompt, prompt_embeds, prompt_attention_mask, max_sequence_length
        )
        shape = self.latent_shape(batch_size, **sizes)
        check_noise(generator, latents, shape)
        self._guidance_scale, self._interrupt = guidance_scale, False
        device = self._execution_device

        if prompt_embeds is None:
            prompt_embeds, prompt_attention_mask = self.encode_prompt(
                prompt, prompt_suffix=prompt_suffix, max_sequence_length=max_sequence_length
            )
        text = prompt_embeds.to(device, self.transformer.dtype)
        text = text.repeat_interleave(num_videos_per_prompt, 0)
        mask = prompt_attention_mask.to(device).repeat_interleave(num_videos_per_prompt, 0)
        if self.do_classifier_free_guidance:
            text = torch.cat([text, self.null_text(*text.shape[:2]).to(text)])

        self.scheduler.set_timesteps(num_inference_steps, device, **sizes)
        self.scheduler.set_begin_index(0)
        if latents is None:
            latents = randn_tensor(shape, generator, device, torch.float32)
        latents = latents.to(device, torch.float32) * self.scheduler.init_noise_sigma
        conditioning = active = None
        if conditioning_frames is not None:
            video = self.video_processor.preprocess_video(conditioning_frames, height, width)
            conditioning_latents = encode_video(self.vae, video.to(device))
        if conditioning_latents is not None:
            conditioning, latents = FrameConditioning.start(
                latents, conditioning_latents, conditioning_mask
            )

        inputs = {"height": height, "width": width, "encoder_attention_mask": mask}
        inputs["fps"] = IMAGE_FPS if num_frames == 1 else fps
        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(self.scheduler.timesteps):
                if self.interrupt:
                    continue
                if conditioning is not None:
                    latents, active = conditioning.add_noise(latents, t, self.scheduler, generator)
                velocity = self._velocity(latents, t, text, active, inputs)
                stepped = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
                if active is not None:
                    stepped = torch.where(over_frames(active), stepped, latents)
                latents = stepped
                if callback_on_step_end is not None:
                    tensors = {"latents": latents, "prompt_embeds": text}
                    shown = {name: tensors[name] for name in callback_on_step_end_tensor_inputs}
                    tensors |= callback_on_step_end(self, i, t, shown) or {}
                    latents, text = tensors["latents"], tensors["prompt_embeds"]
                progress_bar.update()

        video = latents
        if output_type != "latent":
            video = decode_latents(self.vae, latents)
            video = self.video_processor.postprocess_video(video, output_type)
        self.maybe_free_model_hooks()
        return OpenSoraPipelineOutput(frames=video) if return_dict else (video,)

    def _velocity(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        active: Tensor | None,
        inputs: dict[str, Any],
    ) -> Tensor:
        """Velocity ``[B, C, T, h, w]``, guided if ``text`` holds the null text as second half."""
        halves = len(text) // len(latents)
        with self.transformer.cache_context("cond_uncond"):
            output = self.transformer(
                hidden_states=torch.cat([latents] * halves),
                timestep=timestep.expand(len(text)),
                encoder_hidden_states=text,
                x_mask=None if active is None else torch.cat([active] * halves),
                **inputs,
                return_dict=False,
            )[0]
        velocity = output[:, : latents.shape[1]]  # the rest, if any, is the unused sigma half
        if halves == 1:
            return velocity
        cond, uncond = velocity.chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)
