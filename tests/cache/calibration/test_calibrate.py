"""`calibrate` on tiny pipelines: what it fits, where it is stored, and that it is found again."""

import inspect
import json
import math

import pytest
import torch
from safetensors import safe_open

import xfuser_adacorr
from tests.pipelines import CASES, run
from tests.tiny_families import BY_NAME
from xfuser_adacorr import cache_summary, calibrate, disable_cache, enable_cache, is_cache_enabled
from xfuser_adacorr.model_executor.cache.api import site_of
from xfuser_adacorr.model_executor.cache.calibration.ada import load_ada_codebook
from xfuser_adacorr.model_executor.cache.calibration.fast import load_fast_maps
from xfuser_adacorr.model_executor.cache.calibration.files import model_fingerprint
from xfuser_adacorr.model_executor.cache.calibration.tea import load_tea_polynomial

FILES = {"Tea": "teacache.json", "Fast": "fastcache.safetensors", "Ada": "adacache.json"}
ADA = {"rates": (3, 2, 1), "compute_fraction": 0.5}
STEPS = 9
DESCRIBED, GUIDED_BATCH, INFERRED, TWO_CALLS = "flux", "sd3", "qwenimage", "flux-true-cfg"
LISTED = (DESCRIBED, GUIDED_BATCH, INFERRED, TWO_CALLS)


def calibrated(pipe, method, case, **options):
    """Two runs of a case's arguments, each from noise of its own."""
    arguments = case.arguments(False) | {"output_type": "latent"}
    prompts = [arguments, arguments | {"seed": 5}]
    own = ADA if method == "Ada" else {}
    options = {"num_inference_steps": STEPS, "progress": False, **own, **options}
    return calibrate(pipe, method, prompts, **options)


@pytest.fixture(params=LISTED)
def case(request):
    return CASES[request.param]


@pytest.mark.parametrize("method", FILES)
def test_a_calibration_lies_beside_the_weights_and_is_found_there(case, method, tmp_path):
    pipe = case.build()
    model, before = pipe.transformer, run(case, pipe)
    model.register_to_config(_name_or_path=str(tmp_path))
    path = calibrated(pipe, method, case)
    assert path == tmp_path / FILES[method] and path.is_file()
    assert not is_cache_enabled(pipe) and torch.equal(run(case, pipe), before)
    enable_cache(pipe, method, rel_l1_thresh=0.5)
    (inside,) = (stack.method for stack in site_of(pipe).stacks.values())
    found = {
        "Tea": lambda: inside.polynomial == load_tea_polynomial(model, str(path)),
        "Fast": lambda: inside.maps.keys() == load_fast_maps(model, str(path)).keys(),
        "Ada": lambda: inside.codebook == load_ada_codebook(model, str(path)),
    }
    assert found[method]()
    assert run(case, pipe).isfinite().all()
    assert cache_summary(pipe).num_steps == case.steps


def test_maps_are_of_every_block_and_stream_of_an_inferred_family(tmp_path):
    case = CASES[INFERRED]
    pipe = case.build()
    maps = load_fast_maps(pipe.transformer, str(calibrated(pipe, "Fast", case, output=tmp_path)))
    blocks = len(pipe.transformer.transformer_blocks)
    streams = ("hidden_states", "encoder_hidden_states")
    units = {f"blocks.{i}.{name}" for i in range(blocks) for name in streams}
    units |= {"stack.hidden_states"}
    assert maps.keys() == {f"{unit}.{kind}" for unit in units for kind in ("weight", "bias")}


def test_a_file_says_of_which_runs_it_was_made(tmp_path):
    case = CASES[DESCRIBED]
    pipe = case.build()
    path = calibrated(pipe, "Ada", case, output=tmp_path / "mine.json", seed=3)
    content = json.loads(path.read_text())
    assert path.name == "mine.json"
    assert content["fingerprint"] == model_fingerprint(pipe.transformer)
    assert [rate for _, rate in content["codebook"]] == [3, 2, 1]
    assert content["settings"] == {
        "num_prompts": 2,
        "seed": 3,
        "num_inference_steps": STEPS,
        "guidance_scale": 3.5,
        "height": 16,
        "width": 16,
        "output_type": "latent",
        "compute_fraction": 0.5,
    }
    maps = calibrated(pipe, "Fast", case, output=tmp_path)
    with safe_open(maps, framework="pt") as file:
        assert file.metadata()["method"] == "Fast"
        assert json.loads(file.metadata()["settings"])["num_inference_steps"] == STEPS


def test_every_prompt_has_noise_of_its_own_seed(monkeypatch, tmp_path):
    case, seeds = CASES[DESCRIBED], []
    pipe = case.build()
    call = type(pipe).__call__

    def noted(self, *args, generator, **kwargs):
        seeds.append(generator.initial_seed())
        return call(self, *args, generator=generator, **kwargs)

    noted.__signature__ = inspect.signature(call)
    monkeypatch.setattr(type(pipe), "__call__", noted)
    arguments = case.arguments(False) | {"output_type": "latent"}
    prompts = [arguments, arguments, arguments | {"seed": 99}]
    options = {"num_inference_steps": STEPS, "progress": False, "output": tmp_path, "seed": 7}
    calibrate(pipe, "Tea", prompts, **options)
    assert seeds == [7, 8, 99]


def test_a_model_without_texts_is_calibrated(tmp_path):
    """DiT takes labels."""
    from diffusers import AutoencoderKL, DiTPipeline, DPMSolverMultistepScheduler

    pipe = DiTPipeline(
        transformer=BY_NAME["dit"].make(),
        vae=AutoencoderKL(latent_channels=4, block_out_channels=(32,)).eval(),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    prompts = [{"class_labels": [3]}, {"class_labels": [5]}]
    options = {"num_inference_steps": 4, "progress": False, "output_type": "pt"}
    path = calibrate(pipe, "Tea", prompts, output=tmp_path, **options)
    polynomial = load_tea_polynomial(pipe.transformer, str(path))
    assert len(polynomial.coefficients) == 5 and all(map(math.isfinite, polynomial.coefficients))


# -- bad input -----------------------------------------------------------------------------------


@pytest.fixture
def pipe():
    return CASES[DESCRIBED].build()


BAD = [
    ({"method": "Fb"}, ValueError, "method must be one of Tea, Fast, Ada"),
    ({"method": None}, TypeError, "method must be a name"),
    ({"prompts": []}, ValueError, "prompts must not be empty"),
    ({"prompts": "a cat"}, TypeError, "prompts must be a list of texts"),
    ({"prompts": [3]}, TypeError, "prompts must hold texts or mappings, got 3"),
    ({"num_inference_steps": 0}, ValueError, "num_inference_steps must be at least 1"),
    ({"compute_fraction": 0.5}, ValueError, "compute_fraction is an option of Ada, not of Tea"),
    ({"hight": 64}, ValueError, "hight: neither an option of this calibration nor an argument"),
    ({"method": "Ada", "compute_fraction": 0.1}, ValueError, "compute_fraction must be between"),
    ({"denoiser": "unet"}, ValueError, "denoisers must name models of the pipeline"),
    ({"output": "nowhere/file"}, FileNotFoundError, "output: there is no directory nowhere"),
    ({"output": None}, ValueError, "output must be given: FluxTransformer2DModel was not loaded"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=lambda x: str(x)[:30])
def test_mistakes_are_named_before_anything_runs(pipe, tmp_path, changes, error, message):
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *args: calls.append(args))
    options = {"method": "Tea", "prompts": ["a cat"], "num_inference_steps": STEPS}
    options |= {"output": tmp_path, **changes}
    with pytest.raises(error, match=message):
        calibrate(pipe, options.pop("method"), options.pop("prompts"), **options)
    assert not calls and not is_cache_enabled(pipe)


def test_a_model_alone_cannot_sample_prompts(pipe):
    with pytest.raises(TypeError, match="pipe must be a pipeline.*got FluxTransformer2DModel"):
        calibrate(pipe.transformer, "Tea", ["a cat"], num_inference_steps=STEPS)


def test_a_cache_must_be_disabled_first(pipe, tmp_path):
    enable_cache(pipe, "Auto")
    with pytest.raises(ValueError, match="a cache is enabled on the pipeline"):
        calibrated(pipe, "Tea", CASES[DESCRIBED], output=tmp_path)
    disable_cache(pipe)


def test_too_few_changes_write_nothing(pipe, tmp_path):
    with pytest.raises(ValueError, match="a codebook of 6 rates needs at least 24 changes, got"):
        calibrated(pipe, "Ada", CASES[DESCRIBED], output=tmp_path, rates=(6, 5, 4, 3, 2, 1))
    assert not list(tmp_path.iterdir()) and not is_cache_enabled(pipe)


def test_a_failing_run_leaves_the_pipeline_as_it_was(pipe, tmp_path):
    def fail(*_):
        raise OSError("the device is gone")

    handle = pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(OSError, match="the device is gone"):
        calibrated(pipe, "Fast", CASES[DESCRIBED], output=tmp_path)
    handle.remove()
    assert not is_cache_enabled(pipe) and not pipe.transformer._forward_hooks


def test_the_verb_is_at_the_front():
    assert "calibrate" in xfuser_adacorr.__all__
