"""Model families the benchmark can run: one entry says all that is particular to a family."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from benchmark.score import judging
from benchmark.score.judging import Judging

EULER = "Euler"
DPM_SOLVER = "DPM-Solver++"
DDIM = "DDIM"
UNIPC = "UniPC"


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a pipeline is asked for."""

    text: str | list[str]
    """A prompt or class name, or a batch of them."""
    height: int
    width: int
    num_frames: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ode:
    """How the converged solution of the sampling ODE is had, without a cache."""

    solver: str
    steps: int
    per_step_count: bool = False
    """Whether the ODE's start moves with the number of steps that the pipeline is asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkFamily:
    """How to load, call and judge the pipelines of one family."""

    pipeline_class: str
    """Module and name of the class."""
    steps: int
    """The usual number of sampling steps."""
    text: str = "prompt"
    """What an entry of the prompts file calls its text."""
    call: Callable[[Any, Request], dict[str, Any]]
    """(pipeline, request) -> arguments of the pipeline; `ValueError` for a bad text."""
    output: Callable[[Any], Any] = lambda output: output.images[0]
    """What the pipeline returned -> picture [3, H, W] or clip [F, 3, H, W] in [0, 1]."""
    gives_latents: bool = True
    """Whether the pipeline returns its latents if asked for them."""
    picture_size: Callable[[Any], int]
    """Pipeline -> the side of its pictures in pixels, if no other is asked for."""
    fixed_size: bool = False
    """Whether the pipeline makes pictures of its own size alone."""
    num_frames: int | None = None
    """Frames of a clip, if no other number is asked for; None where pictures are made."""
    guidance_scale: float | None = None
    """Default scale of classifier-free guidance by the empty text; None: there is no such."""
    guided_in_two_calls: bool = False
    """Whether the unguided branch is a call of its own in every step."""
    solvers: tuple[str, str]
    """Of the fewer-steps rows: the one whose scheduler the pipeline brings along, and another."""
    solvers_note: str
    """What a report says of the other solver."""
    ode: Ode
    judge: str = "judge"
    """Folder of the small classifier, below ``benchmark/pipelines``."""
    judging: Callable[[], Judging]
    """What the classifier understands, and what its distance is to."""

    def load_class(self) -> type:
        module, _, name = self.pipeline_class.rpartition(".")
        return getattr(import_module(module), name)

    @property
    def class_name(self) -> str:
        return self.pipeline_class.rpartition(".")[2]


def _side(pipe: Any) -> int:
    """Pixels a side of the latents that the denoiser is made for."""
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    return denoiser.config.sample_size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)


def _call_flux(pipe: Any, asked: Request) -> dict[str, Any]:
    guidance = {"negative_prompt": "", "true_cfg_scale": asked.true_cfg_scale}
    return {
        "prompt": asked.text,
        "height": asked.height,
        "width": asked.width,
        "max_sequence_length": min(512, pipe.tokenizer_2.model_max_length),
        **(guidance if asked.true_cfg_scale > 1 else {}),
    }


def _call_pixart(pipe: Any, asked: Request) -> dict[str, Any]:
    return {
        "prompt": asked.text,
        "negative_prompt": "",
        "guidance_scale": asked.guidance_scale,
        "height": asked.height,
        "width": asked.width,
        "max_sequence_length": min(300, pipe.tokenizer.model_max_length),
        "clean_caption": False,
        "use_resolution_binning": False,
    }


def _call_dit(pipe: Any, asked: Request) -> dict[str, Any]:
    names = [asked.text] if isinstance(asked.text, str) else asked.text
    for name in names:
        if name not in pipe.labels:
            raise ValueError(f"unknown class_label {name!r}; accepted: {', '.join(pipe.labels)}")
    return {"class_labels": pipe.get_label_ids(names), "guidance_scale": asked.guidance_scale}


def _call_opensora(pipe: Any, asked: Request) -> dict[str, Any]:
    return {
        "prompt": asked.text,
        "guidance_scale": asked.guidance_scale,
        "height": asked.height,
        "width": asked.width,
        "num_frames": asked.num_frames,
    }


def _call_sd(pipe: Any, asked: Request) -> dict[str, Any]:
    return {
        "prompt": asked.text,
        "negative_prompt": "" if isinstance(asked.text, str) else [""] * len(asked.text),
        "guidance_scale": asked.guidance_scale,
        "height": asked.height,
        "width": asked.width,
    }


def _call_sd3(pipe: Any, asked: Request) -> dict[str, Any]:
    tokens = 1 if pipe.text_encoder_3 is None else min(256, pipe.tokenizer_3.model_max_length)
    return {**_call_sd(pipe, asked), "max_sequence_length": tokens}


def _call_wan(pipe: Any, asked: Request) -> dict[str, Any]:
    return {
        **_call_opensora(pipe, asked),
        "max_sequence_length": min(512, pipe.tokenizer.model_max_length),
    }


FAMILIES = {
    "flux": BenchmarkFamily(
        pipeline_class="diffusers.FluxPipeline",
        steps=28,
        call=_call_flux,
        picture_size=lambda pipe: pipe.vae.config.sample_size,
        solvers=(EULER, DPM_SOLVER),
        solvers_note="second order, flow prediction, same time shift",
        ode=Ode(solver=DPM_SOLVER, steps=100),
        judging=judging.scenes,
    ),
    "pixart": BenchmarkFamily(
        pipeline_class="diffusers.PixArtSigmaPipeline",
        steps=20,
        call=_call_pixart,
        picture_size=_side,
        guidance_scale=3.0,
        solvers=(DPM_SOLVER, UNIPC),
        solvers_note="second order, same timesteps",
        ode=Ode(solver=DPM_SOLVER, steps=200),
        judging=judging.single_objects,
    ),
    "dit": BenchmarkFamily(
        pipeline_class="diffusers.DiTPipeline",
        steps=50,
        text="class_label",
        call=_call_dit,
        gives_latents=False,
        picture_size=_side,
        fixed_size=True,
        guidance_scale=3.0,
        solvers=(DDIM, DPM_SOLVER),
        solvers_note="second order, from the timestep at which the uncached run starts, which for "
        "DDIM depends on the number of steps",
        ode=Ode(solver=DPM_SOLVER, steps=200, per_step_count=True),
        judging=judging.classes,
    ),
    "opensora": BenchmarkFamily(
        pipeline_class="xfuser_adacorr.models.OpenSoraPipeline",
        steps=30,
        call=_call_opensora,
        output=lambda output: output.frames[0],
        picture_size=lambda pipe: pipe.transformer.config.input_sq_size,
        num_frames=16,
        guidance_scale=3.0,
        solvers=(EULER, DPM_SOLVER),
        solvers_note="second order, flow prediction, same noise levels",
        ode=Ode(solver=DPM_SOLVER, steps=100),
        judge="clip_judge",
        judging=judging.clips,
    ),
    "sd": BenchmarkFamily(
        pipeline_class="diffusers.StableDiffusionPipeline",
        steps=30,
        call=_call_sd,
        picture_size=_side,
        guidance_scale=3.0,
        solvers=(DDIM, DPM_SOLVER),
        solvers_note="second order, from the timestep at which the uncached run starts, which for "
        "DDIM depends on the number of steps",
        ode=Ode(solver=DPM_SOLVER, steps=200, per_step_count=True),
        judging=judging.single_objects,
    ),
    "sd3": BenchmarkFamily(
        pipeline_class="diffusers.StableDiffusion3Pipeline",
        steps=28,
        call=_call_sd3,
        picture_size=_side,
        guidance_scale=3.0,
        solvers=(EULER, DPM_SOLVER),
        solvers_note="second order, flow prediction, same time shift",
        ode=Ode(solver=DPM_SOLVER, steps=100),
        judging=judging.single_objects,
    ),
    "wan": BenchmarkFamily(
        pipeline_class="diffusers.WanPipeline",
        steps=30,
        call=_call_wan,
        output=lambda output: output.frames[0],
        picture_size=lambda pipe: 64,  # no part of the pipeline is made for a size
        num_frames=17,
        guidance_scale=5.0,
        guided_in_two_calls=True,
        solvers=(UNIPC, DPM_SOLVER),
        solvers_note="second order, flow prediction, same noise levels",
        ode=Ode(solver=DPM_SOLVER, steps=200),
        judge="clip_judge",
        judging=partial(judging.clips, 17),
    ),
}
