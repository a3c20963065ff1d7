"""Runs one case on this rank, and the same case in this process alone."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
)
from torch import Tensor

from tests.parallel.cases import STEPS, Case
from tests.tiny import TEXT_TOKENS, FluxSampler, make_tiny_flux
from tests.tiny_families import BY_NAME, CHANNELS, TEXT, FamilySampler, seeded
from xfuser_adacorr import (
    CacheConfig,
    DecisionScope,
    cache_summary,
    calibrate_learned,
    disable_cache,
    enable_cache,
    is_cache_enabled,
)
from xfuser_adacorr.model_executor.cache import ranks
from xfuser_adacorr.model_executor.cache.xfuser_adapters.launch import parallelise

ENGINE_CONFIG: Any = None
"""xfuser's, of the degrees that the processes have joined for."""

RIVAL = {"use_cache": "Auto", "adacorr_tolerance": 0.025}
TRAINED = Path(__file__).resolve().parents[2] / "benchmark" / "pipelines" / "flux"
INTERRUPTED_AFTER = 5


class Traffic:
    """Counts what decisions send, by standing in for the reduction they use."""

    def __init__(self) -> None:
        self.messages: list[int] = []
        """Bytes of each."""

    def __enter__(self) -> "Traffic":
        self._reduce = ranks.all_reduce

        def counted(tensor: Tensor, **kwargs: Any) -> Any:
            self.messages.append(tensor.nbytes)
            return self._reduce(tensor, **kwargs)

        ranks.all_reduce = counted
        return self

    def __exit__(self, *error: Any) -> None:
        ranks.all_reduce = self._reduce


def decisions(model: Any) -> list[list[Any]]:
    return [
        [call.context, call.step_index, call.refreshed, call.reason]
        for call in cache_summary(model).trace.calls
    ]


def difference(x: Tensor, expected: Tensor) -> float:
    return float((x - expected).norm() / expected.norm())


def compared(
    case: Case,
    parallel: Any,
    alone: Any,
    run: Callable[[Any, Any], Tensor],
    *,
    scheduler: Callable[[Any], Any],
    enabled: Callable[[Any], Any] = lambda model: model,
    **verb_options: Any,
) -> dict[str, Any]:
    """Run ``parallel`` and ``alone``, with and without the cache."""
    config = CacheConfig(**case.cache)
    plain = run(parallel, None)
    uncached_difference = difference(plain, run(alone, None))
    enable_cache(
        enabled(parallel),
        config,
        scheduler=scheduler(parallel),
        check_ranks=True,
        **verb_options,
    )
    with Traffic() as traffic:
        x = run(parallel, "cached")
    model = enabled(parallel)
    result = {
        "decisions": decisions(model),
        "compute_fraction": cache_summary(model).compute_fraction,
        "messages": traffic.messages,
    }
    disable_cache(model)
    enable_cache(enabled(alone), config, scheduler=scheduler(alone))
    expected = run(alone, "cached")
    result["decisions_alone"] = decisions(enabled(alone))
    disable_cache(enabled(alone))
    return result | {
        "uncached_difference": uncached_difference,
        "difference": difference(x, expected),
        "changed": difference(x, plain),
        "restored": torch.equal(run(parallel, None), plain),
        "output": x.flatten()[:8].tolist(),
    }


def with_plan(case: Case, alone: Any, arguments: Mapping[str, Any], **options: Any) -> Case:
    """The case, with a plan fitted in this process alone if it follows one."""
    if case.cache["use_cache"] != "Learned":
        return case
    call = dict(arguments)
    steps, output_type = call.pop("num_inference_steps"), call.pop("output_type")
    path = calibrate_learned(
        alone,
        [{**call, "seed": 0}],
        num_inference_steps=steps,
        budgets=(case.cache["target_compute"],),
        search_evaluations=1,
        held_out=0,
        output=tempfile.mkdtemp(),
        progress=False,
        output_type=output_type,
        **options,
    )
    return replace(case, cache={**case.cache, "plan": str(path)})


# -- the wrapper that subclasses the diffusers model ---------------------------------------------


class Sampler(FluxSampler):
    """Branches of a batch share the pooled text, which xfuser 0.7 does not split by branch."""

    def inputs(self, x: Tensor, t: Any, branch: str = "cond") -> dict[str, Any]:
        return super().inputs(x, t, branch) | {"pooled_projections": self.pooled.to(x.dtype)}


def make_flux1() -> Any:
    """xfuser's FLUX with the tiny model's weights, and the runtime state it asks for."""
    from xfuser.core.distributed import get_runtime_state, initialize_runtime_state
    from xfuser.model_executor.models.transformers.transformer_flux import (
        xFuserFlux1Transformer2DWrapper,
    )

    tiny = make_tiny_flux()
    sizes = {key: value for key, value in tiny.config.items() if not key.startswith("_")}
    model = xFuserFlux1Transformer2DWrapper(**sizes).eval()
    model.load_state_dict(tiny.state_dict())
    initialize_runtime_state(make_pipeline(model), ENGINE_CONFIG)
    get_runtime_state().set_input_parameters(
        height=8, width=8, batch_size=1, max_condition_sequence_length=TEXT_TOKENS
    )
    return model


class PaddedFlux(type(make_tiny_flux())):
    """Computes what xfuser's wrapper does on 2 ranks: tokens padded to an even number."""

    def forward(self, hidden_states: Tensor, img_ids: Tensor, **kwargs: Any) -> Any:
        tokens = hidden_states.shape[1]
        if tokens % 2:
            hidden_states = torch.nn.functional.pad(hidden_states, (0, 0, 0, 1))
            img_ids = torch.nn.functional.pad(img_ids, (0, 0, 0, 1))
        out = super().forward(hidden_states=hidden_states, img_ids=img_ids, **kwargs)
        return (out[0][:, :tokens],)


def alone_flux() -> Any:
    model = make_tiny_flux()
    model.__class__ = PaddedFlux
    return model


def run_flux1(case: Case) -> dict[str, Any]:
    parallel, alone = Sampler(make_flux1()), Sampler(alone_flux())
    return SCENARIOS[case.scenario](case, parallel, alone)


def scenario_run(case: Case, parallel: Sampler, alone: Sampler, seed: int = 0) -> dict[str, Any]:
    return compared(
        case,
        parallel,
        alone,
        lambda sampler, _: sampler.run(STEPS, seed=seed, **case.options),
        scheduler=lambda sampler: sampler.scheduler,
        enabled=lambda sampler: sampler.transformer,
    )


def scenario_replicas(case: Case, parallel: Sampler, alone: Sampler) -> dict[str, Any]:
    """Each replica samples from a noise of its own."""
    from xfuser.core.distributed import get_data_parallel_rank

    return scenario_run(case, parallel, alone, seed=3 * get_data_parallel_rank())


def scenario_interrupted(case: Case, parallel: Sampler, alone: Sampler) -> dict[str, Any]:
    """A run that stops halfway, without an end signal, comes before the cached one."""

    def run(sampler: Sampler, cached: Any) -> Tensor:
        if cached:
            sampler.run(STEPS, seed=7, stop_after=INTERRUPTED_AFTER)
        return sampler.run(STEPS)

    return compared(
        case,
        parallel,
        alone,
        run,
        scheduler=lambda sampler: sampler.scheduler,
        enabled=lambda sampler: sampler.transformer,
    )


def scenario_shapes(case: Case, parallel: Sampler, alone: Sampler) -> dict[str, Any]:
    """Two generations with different shapes; the second one is reported."""

    def run(sampler: Sampler, cached: Any) -> Tensor:
        if cached:
            sampler.run(STEPS, grid=6, finish=False)
        return sampler.run(STEPS)

    return compared(
        case,
        parallel,
        alone,
        run,
        scheduler=lambda sampler: sampler.scheduler,
        enabled=lambda sampler: sampler.transformer,
    )


def scenario_perturbed(case: Case, parallel: Sampler, alone: Sampler) -> dict[str, Any]:
    """One rank's latents drift away from the others', with the first output on."""

    class Perturbed(Sampler):
        def call(self, x: Tensor, t: Any, branch: str = "cond", **extra: Any) -> Tensor:
            out = super().call(x, t, branch, **extra)
            if not self.scheduler.step_index and torch.distributed.get_rank() == 1:
                out = out + 0.05 * self.noise(seed=9)
            return out

    return raised(case, Perturbed(parallel.transformer), CacheConfig(**case.cache))


def scenario_misconfigured(case: Case, parallel: Sampler, alone: Sampler) -> dict[str, Any]:
    """One rank has another threshold."""
    other = {"rel_l1_thresh": 0.0} if torch.distributed.get_rank() == 1 else {}
    return raised(case, parallel, CacheConfig(**case.cache | other))


def raised(case: Case, sampler: Sampler, config: CacheConfig) -> dict[str, Any]:
    """The error that the run ends in; afterwards the model works as before."""
    model = sampler.transformer
    enable_cache(model, config, scheduler=sampler.scheduler, check_ranks=True)
    message = None
    try:
        sampler.run(STEPS)
    except ranks.RankMismatchError as error:
        message = str(error)
    disable_cache(model)
    after = Sampler(model).run(STEPS)
    return {
        "raised": message,
        "difference": difference(after, Sampler(make_tiny_flux()).run(STEPS)),
        "enabled": is_cache_enabled(model),
    }


SCENARIOS = {
    "run": scenario_run,
    "replicas": scenario_replicas,
    "interrupted": scenario_interrupted,
    "shapes": scenario_shapes,
    "perturbed": scenario_perturbed,
    "misconfigured": scenario_misconfigured,
}


# -- a branch on each rank, with a group that the user gives -------------------------------------


class BranchSampler(Sampler):
    """Rank 0 computes ``cond``, rank 1 ``uncond``; both follow the guided sum."""

    def call(self, x: Tensor, t: Any, branch: str = "cond", **extra: Any) -> Tensor:
        branch = ("cond", "uncond")[torch.distributed.get_rank()]
        outs = [torch.empty_like(x) for _ in range(2)]
        torch.distributed.all_gather(outs, super().call(x, t, branch, **extra))
        return outs[1] + 2.0 * (outs[0] - outs[1])


class BatchSampler(Sampler):
    """The same guidance as one batch of both branches."""

    def inputs(self, x: Tensor, t: Any, branch: str = "cond") -> dict[str, Any]:
        texts = torch.cat([self.text["cond"], self.text["uncond"]])
        return super().inputs(x, t) | {"encoder_hidden_states": texts}

    def call(self, x: Tensor, t: Any, branch: str = "cond", **extra: Any) -> Tensor:
        cond, uncond = super().call(torch.cat([x, x]), t, branch, **extra).chunk(2)
        return uncond + 2.0 * (cond - uncond)


def run_branches(case: Case) -> dict[str, Any]:
    from xfuser.core.distributed import get_cfg_group

    scope = DecisionScope(get_cfg_group().device_group, latents_are_split=True)
    parallel, alone = BranchSampler(make_tiny_flux()), BatchSampler(make_tiny_flux())
    config = CacheConfig(**case.cache)
    plain = parallel.run(STEPS)
    uncached_difference = difference(plain, alone.run(STEPS))
    enable_cache(
        parallel.transformer, config, scheduler=parallel.scheduler, scope=scope, check_ranks=True
    )
    with Traffic() as traffic:
        x = parallel.run(STEPS)
    enable_cache(alone.transformer, config, scheduler=alone.scheduler)
    expected = alone.run(STEPS)
    return {
        "decisions": [["cond", *call[1:]] for call in decisions(parallel.transformer)],
        "decisions_alone": decisions(alone.transformer),
        "compute_fraction": cache_summary(parallel.transformer).compute_fraction,
        "messages": traffic.messages,
        "uncached_difference": uncached_difference,
        "difference": difference(x, expected),
        "changed": difference(x, plain),
        "restored": True,
        "output": x.flatten()[:8].tolist(),
    }


# -- xfuser's pipeline, with the legacy wrapper --------------------------------------------------


def make_pipeline(transformer: Any) -> FluxPipeline:
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(latent_channels=2, block_out_channels=(32,)),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_pipeline(pipe: Any, size: int = 8) -> Tensor:
    """Latents on every rank, wherever the pipeline has left them."""
    out = sample_pipeline(pipe, size)
    last = torch.distributed.get_world_size() - 1
    latents = torch.empty(1, 2 * size, 8) if out is None else out.images.contiguous()
    torch.distributed.broadcast(latents, src=last)
    return latents


def sample_pipeline(pipe: Any, size: int = 8) -> Any:
    return pipe(**flux_arguments(size), generator=torch.Generator().manual_seed(0))


def flux_arguments(size: int = 8) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "prompt_embeds": torch.randn(1, TEXT_TOKENS, 16, generator=generator),
        "pooled_prompt_embeds": torch.randn(1, 16, generator=generator),
        "height": size,
        "width": 8,
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "max_sequence_length": TEXT_TOKENS,
    }


def run_flux_pipeline(case: Case) -> dict[str, Any]:
    from xfuser import xFuserFluxPipeline

    patches = case.options.get("patches")
    ENGINE_CONFIG.runtime_config.warmup_steps = 2 if patches else STEPS
    ENGINE_CONFIG.parallel_config.pp_config.num_pipeline_patch = patches or 1
    parallel = xFuserFluxPipeline(make_pipeline(make_tiny_flux()), ENGINE_CONFIG)
    if case.scenario == "misconfigured":
        return raised_in_stages(case, parallel)
    runs_before = {"interrupted": interrupt, "shapes": lambda pipe: call_pipeline(pipe, size=16)}

    def run(pipe: Any, cached: Any) -> Tensor:
        if cached and case.scenario in runs_before:
            runs_before[case.scenario](pipe)
        return call_pipeline(pipe)

    alone = make_pipeline(make_tiny_flux())
    case = with_plan(case, alone, flux_arguments())
    return compared(case, parallel, alone, run, scheduler=lambda pipe: None)


def run_trained(case: Case) -> dict[str, Any]:
    """Stale patches of the small trained pipeline, where forecasts are worth something."""
    runtime = ENGINE_CONFIG.runtime_config
    runtime.warmup_steps = 1
    ENGINE_CONFIG.parallel_config.pp_config.num_pipeline_patch = 2
    pipe = parallelise(FluxPipeline.from_pretrained(TRAINED), ENGINE_CONFIG)
    pipe.set_progress_bar_config(disable=True)

    def run() -> Tensor:
        out = pipe(
            prompt="a red circle and a blue square on a green background",
            num_inference_steps=28,
            height=64,
            width=64,
            max_sequence_length=pipe.tokenizer_2.model_max_length,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
        latents = torch.empty(1, 64, 32) if out is None else out.images.contiguous()
        torch.distributed.broadcast(latents, src=torch.distributed.get_world_size() - 1)
        return latents

    plain, found = run(), {}
    looser = {"rel_l1_thresh": 0.4, "adacorr_tolerance": 0.03}
    corrected = {**case.cache, **looser, "enable_adacorrection": True}
    for options in (case.cache, corrected, RIVAL):
        config = CacheConfig(**options)
        enable_cache(pipe, config, check_ranks=True)
        error, fraction = difference(run(), plain), cache_summary(pipe).compute_fraction
        found[config.name] = {"error": error, "compute": fraction, "decisions": decisions(pipe)}
        disable_cache(pipe)
    return {"methods": found}


def interrupt(pipe: Any) -> None:
    """A run that all ranks leave after the same step; what is under way then is taken in."""
    from xfuser.core.distributed import get_pp_group

    if type(pipe) is FluxPipeline:
        return
    forward, calls = pipe._backbone_forward, count(1)

    def counted(*args: Any, **kwargs: Any) -> Any:
        pipe._interrupt = next(calls) == INTERRUPTED_AFTER
        return forward(*args, **kwargs)

    pipe._backbone_forward = counted
    sample_pipeline(pipe)
    assert next(calls) == INTERRUPTED_AFTER + 1
    del pipe._backbone_forward
    if get_pp_group().world_size > 1 and get_pp_group().is_first_rank:
        get_pp_group().pipeline_recv()


def raised_in_stages(case: Case, pipe: Any) -> dict[str, Any]:
    """The error that the run ends in on every rank; afterwards the pipeline works as before."""
    other = {"adacorr_tolerance": 1e-9} if torch.distributed.get_rank() == 1 else {}
    plain = call_pipeline(pipe)
    enable_cache(pipe, CacheConfig(**case.cache | other), check_ranks=True)
    message = None
    try:
        call_pipeline(pipe)
    except ranks.RankMismatchError as error:
        message = str(error)
    disable_cache(pipe)
    return {
        "raised": message,
        "difference": difference(call_pipeline(pipe), plain),
        "enabled": is_cache_enabled(pipe),
    }


def make_pixart(pipeline_class: Any = PixArtAlphaPipeline) -> Any:
    pipe = pipeline_class(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=BY_NAME["pixart"].make(),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_pixart(pipe: Any) -> Tensor:
    """Guided latents on every rank; both branches are in one batch, or each on its own rank."""
    out = pipe(**pixart_arguments(), generator=torch.Generator().manual_seed(0))
    latents = torch.empty(1, 4, 8, 8) if out is None else out.images.contiguous()
    torch.distributed.broadcast(latents, src=torch.distributed.get_world_size() - 1)
    return latents


def pixart_arguments() -> dict[str, Any]:
    mask = torch.ones(1, TEXT)
    return {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": seeded(1, 1, TEXT, 12),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": seeded(2, 1, TEXT, 12),
        "negative_prompt_attention_mask": mask,
        "height": 64,
        "width": 64,
        "use_resolution_binning": False,
        "num_inference_steps": STEPS,
        "output_type": "latent",
    }


def run_pixart(case: Case) -> dict[str, Any]:
    from xfuser import xFuserPixArtAlphaPipeline

    patches = case.options.get("patches")
    ENGINE_CONFIG.runtime_config.warmup_steps = 2 if patches else STEPS
    ENGINE_CONFIG.parallel_config.pp_config.num_pipeline_patch = patches or 1
    alone = make_pixart()
    return compared(
        with_plan(case, alone, pixart_arguments()),
        xFuserPixArtAlphaPipeline(make_pixart(), ENGINE_CONFIG),
        alone,
        lambda pipe, _: call_pixart(pipe),
        scheduler=lambda pipe: None,
    )


# -- this package's own model --------------------------------------------------------------------


def run_opensora(case: Case) -> dict[str, Any]:
    from xfuser.core.distributed import get_sp_group

    tiny = BY_NAME["opensora"]
    parallel, alone = FamilySampler(tiny), FamilySampler(tiny)
    parallel.model.enable_sequence_parallel(get_sp_group().device_group)
    shape = (CHANNELS, 3, 6, 2 * case.options["width"]) if case.options else tiny.shape
    return compared(
        case,
        parallel,
        alone,
        lambda sampler, _: sampler.run(STEPS, shape=shape),
        scheduler=lambda sampler: sampler.scheduler,
        enabled=lambda sampler: sampler.model,
    )


FAMILIES: dict[str, Callable[[Case], dict[str, Any]]] = {
    "flux1": run_flux1,
    "branches": run_branches,
    "flux-pipeline": run_flux_pipeline,
    "trained": run_trained,
    "pixart-pipeline": run_pixart,
    "opensora": run_opensora,
}
