"""Learned plans on several processes: followed, calibrated, and learned from generations."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parallel import runs
from tests.parallel.cases import Case
from tests.tiny import make_tiny_flux
from xfuser_adacorr import (
    Auto,
    Learned,
    cache_summary,
    calibrate_learned,
    disable_cache,
    enable_cache,
    measure_plan,
    save_plans,
)
from xfuser_adacorr.model_executor.cache.calibration.plan_file import PlanFile
from xfuser_adacorr.model_executor.cache.xfuser_adapters.launch import parallelise

FITTED_STEPS = 8


class Collectives(TorchDispatchMode):
    """Counts whatever is sent or reduced, by whomever."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "c10d" in func.namespace
        return func(*args, **(kwargs or {}))


def run_plans(case: Case) -> dict[str, Any]:
    make, arguments = PIPELINES[case.family]
    alone, parallel = make(False), make(True)
    return SCENARIOS[case.scenario](case, parallel, alone, arguments)


def scenario_run(case: Case, parallel: Any, alone: Any, arguments: Callable) -> dict[str, Any]:
    found = runs.compared(
        runs.with_plan(case, alone, arguments(), replicas=myself()),
        parallel,
        alone,
        lambda pipe, _: sampled(case, pipe, arguments(), replica()),
        scheduler=lambda pipe: None,
    )
    return found


def scenario_silent(case: Case, parallel: Any, alone: Any, arguments: Callable) -> dict[str, Any]:
    """What is sent along a plan, by a run in full, and by one of as many steps as the plan has."""
    case = runs.with_plan(case, alone, arguments(), replicas=myself())
    plan = PlanFile.load(case.cache["plan"]).plans[0]
    short = {**arguments(), "num_inference_steps": len(plan.courses[0].steps)}
    sent = {}
    for name, call in (("full", arguments()), ("short", short)):
        with Collectives() as sent[name]:
            sampled(case, parallel, call)
    enable_cache(parallel, Learned(plan=case.cache["plan"], target_compute=0.4))
    with Collectives() as sent["along"]:
        sampled(case, parallel, arguments())
    disable_cache(parallel)
    return {name: each.count for name, each in sent.items()}


def scenario_calibrated(
    case: Case, parallel: Any, alone: Any, arguments: Callable
) -> dict[str, Any]:
    """The ranks' plan beside that of this process alone, both measured anew on other noise."""
    call = {**arguments(), "num_inference_steps": FITTED_STEPS}
    prompts, others = ([{"seed": seed} for seed in range(n, n + 7)] for n in (0, 50))
    fit = {"progress": False, **call}
    search = {"budgets": (0.5,), "search_evaluations": 2, "held_out": 1}
    path = shared_folder() / "plan.json"
    found = []
    for pipe, output, own in (
        (parallel, path, {}),
        (alone, Path(tempfile.mkdtemp()) / "plan.json", {"replicas": myself()}),
    ):
        counted = count_calls(pipe)
        calibrate_learned(pipe, prompts, output=output, **search, **own, **fit)
        fitted = PlanFile.load(output).plans[0]
        calls = counted()
        measure_plan(pipe, others[:2], plan=output, **own, **fit)
        measured = PlanFile.load(output).plans[0]
        found.append((fitted, measured, calls))
    (mine, mine_anew, my_calls), (one, one_anew, calls) = found
    pairs = list(zip(mine.courses, one.courses, strict=True))
    return {
        "steps": [[list(a.steps), list(b.steps)] for a, b in pairs],
        "coefficients": [[sum(a.coefficients, ()), sum(b.coefficients, ())] for a, b in pairs],
        "psnr_db": [[a.psnr_db, b.psnr_db] for a, b in pairs],
        "psnr_db_anew": [
            [a.psnr_db, b.psnr_db] for a, b in zip(mine_anew.courses, one_anew.courses, strict=True)
        ],
        "measured_on": [course.measured_on for course in mine_anew.courses],
        "settings": mine.settings == one.settings,
        "files": sorted(each.name for each in path.parent.iterdir()),
        "calls": [my_calls, calls],
    }


def scenario_learned(case: Case, parallel: Any, alone: Any, arguments: Callable) -> dict[str, Any]:
    """The second generation, after the first one has taught."""
    found = {}
    for name, pipe in (("parallel", parallel), ("alone", alone)):
        plain = sampled(case, pipe, arguments(), replica() + 1)
        enable_cache(pipe, Auto(target_compute=case.cache["target_compute"], learn=1))
        sampled(case, pipe, arguments(), replica())
        x = sampled(case, pipe, arguments(), replica() + 1)
        path = Path(tempfile.mkdtemp()) / "plan.json"
        save_plans(pipe, path)
        coefficients = sum(PlanFile.load(path).plans[0].courses[0].coefficients, ())
        found[name] = x, plain, runs.decisions(pipe), coefficients, cache_summary(pipe).plan
        disable_cache(pipe)
    x, plain, decisions, coefficients, plan = found["parallel"]
    expected, plain_alone, decisions_alone, coefficients_alone, _ = found["alone"]
    return {
        "decisions": decisions,
        "decisions_alone": decisions_alone,
        "coefficients": coefficients,
        "coefficients_alone": coefficients_alone,
        "plan": plan,
        "difference": runs.difference(x, expected),
        "uncached_difference": runs.difference(plain, plain_alone),
    }


SCENARIOS = {
    "run": scenario_run,
    "replicas": scenario_run,
    "silent": scenario_silent,
    "calibrated": scenario_calibrated,
    "learned": scenario_learned,
}


# -- pipelines, and what ranks have of their own ---------------------------------------------------


def sampled(case: Case, pipe: Any, arguments: dict[str, Any], seed: int = 0) -> Tensor:
    """Latents on every rank of a replica, wherever the pipeline has left them."""
    out = pipe(**arguments, generator=torch.Generator().manual_seed(seed))
    if case.degrees.get("data_parallel_degree"):
        return out.images
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, None if out is None else out.images)
    return next(each for each in found if each is not None)


def replica() -> int:
    from xfuser.core.distributed import get_data_parallel_rank

    return 3 * get_data_parallel_rank()


def myself() -> Any:
    """A group of this process alone."""
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return [torch.distributed.new_group([each]) for each in range(size)][rank]


def shared_folder() -> Path:
    folder = [tempfile.mkdtemp() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(folder)
    return Path(folder[0])


def count_calls(pipe: Any) -> Callable[[], int]:
    """Calls of the transformer from now on, until it is asked."""
    count = [0]

    def called(*args: Any) -> None:
        count[0] += 1

    hook = pipe.transformer.register_forward_pre_hook(called)

    def stop() -> int:
        hook.remove()
        return count[0]

    return stop


def make_flux(parallel: bool) -> Any:
    pipe = runs.make_pipeline(make_tiny_flux())
    return parallelise(pipe, runs.ENGINE_CONFIG) if parallel else pipe


def make_legacy_flux(parallel: bool) -> Any:
    from xfuser import xFuserFluxPipeline

    pipe = runs.make_pipeline(make_tiny_flux())
    return xFuserFluxPipeline(pipe, runs.ENGINE_CONFIG) if parallel else pipe


def make_pixart(parallel: bool) -> Any:
    from xfuser import xFuserPixArtAlphaPipeline

    pipe = runs.make_pixart()
    return xFuserPixArtAlphaPipeline(pipe, runs.ENGINE_CONFIG) if parallel else pipe


PIPELINES = {
    "split-flux": (make_flux, runs.flux_arguments),
    "legacy-flux": (make_legacy_flux, runs.flux_arguments),
    "legacy-pixart": (make_pixart, runs.pixart_arguments),
}
