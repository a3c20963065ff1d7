"""Options, configuration files, and what bad input is told."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xfuser_adacorr import (
    CacheConfig,
    apply_cache_on_transformer,
    enable_cache,
    load_config,
    load_family_config,
)
from xfuser_adacorr.model_executor.cache.calibration import (
    load_fast_maps,
    load_tea_polynomial,
    model_fingerprint,
    save_fast_maps,
    save_tea_polynomial,
)
from xfuser_adacorr.model_executor.cache.diffusers_adapters.registry import TeaPolynomial

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"use_cache": "Fbx"}, ValueError, "use_cache must be one of Fb, Tea, Fast, Ada, Auto"),
        ({"rel_l1_thresh": -0.1}, ValueError, "rel_l1_thresh must be finite and at least 0"),
        ({"rel_l1_thresh": float("nan")}, ValueError, "rel_l1_thresh must be finite"),
        ({"rel_l1_thresh": "0.1"}, TypeError, "rel_l1_thresh must be a number"),
        ({"motion_threshold": 1.5}, ValueError, "motion_threshold must be in"),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1"),
        ({"num_steps": 2.5}, TypeError, "num_steps must be an integer"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps must be at least 0"),
        ({"enable_adacorrection": 1}, TypeError, "enable_adacorrection must be True or False"),
        ({"adacorr_gamma": -1.0}, ValueError, "adacorr_gamma"),
        ({"adacorr_lambda": float("inf")}, ValueError, "adacorr_lambda"),
        ({"adacorr_tolerance": 0.0}, ValueError, "adacorr_tolerance must be above 0"),
        ({"adacorr_mode": "full"}, ValueError, "adacorr_mode must be one of adaptive, literal"),
        (
            {"use_cache": "Fb", "static_tokens": True},
            ValueError,
            "static_tokens is an option of Fast",
        ),
        ({"use_cache": "Fb", "calibration": "x"}, ValueError, "calibration is an option of Tea"),
    ],
)
def test_bad_options_name_what_is_accepted(options, error, message):
    with pytest.raises(error, match=message):
        CacheConfig(**options)


def test_unknown_names_and_keys_are_rejected(transformer):
    with pytest.raises(ValueError, match="unknown option 'threshold'; accepted: use_cache"):
        enable_cache(transformer, "Fb", threshold=0.1)
    with pytest.raises(ValueError, match="unknown cache method 'Fbb'"):
        enable_cache(transformer, "Fbb")
    with pytest.raises(TypeError, match="config must be a CacheConfig"):
        enable_cache(transformer, 3)
    with pytest.raises(TypeError, match="belong into the CacheConfig"):
        enable_cache(transformer, CacheConfig(), rel_l1_thresh=1.0)


def test_unknown_transformers_are_rejected():
    with pytest.raises(ValueError, match="no cache adapter for transformer Linear; accepted: DiT"):
        enable_cache(torch.nn.Linear(2, 2), "Fb")
    with pytest.raises(TypeError, match="expected a transformer or a pipeline"):
        enable_cache("FLUX.1-dev", "Fb")


def test_wrong_return_order_is_rejected(transformer):
    with pytest.raises(ValueError, match="return_hidden_states_first must be None or False"):
        apply_cache_on_transformer(transformer, return_hidden_states_first=True)


def test_scheduler_without_timesteps_is_rejected(transformer):
    with pytest.raises(ValueError, match="scheduler must have timesteps and a config"):
        enable_cache(transformer, "Auto", scheduler=object())


def test_configuration_survives_a_round_trip():
    config = CacheConfig(use_cache="Tea", rel_l1_thresh=0.3, enable_adacorrection=True)
    assert CacheConfig.from_dict(config.to_dict()) == config
    assert config.name == "Tea+AdaCorrection"
    assert CacheConfig.from_name("Auto").name == "Auto"


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.relative_to(CONFIGS).as_posix()
)
def test_shipped_configurations_load(path):
    configs = load_family_config(path)
    assert {"Fb", "Tea", "Fast", "Auto", "Fast+AdaCorrection"} <= set(configs)
    assert all(config.name == name for name, config in configs.items())
    assert load_config(path) == next(iter(configs.values()))
    assert load_config(path, "Fb").use_cache == "Fb"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: {Fb: {rel_l1_tresh: 1}}", "Fb: unknown option 'rel_l1_tresh'"),
        ("methods: {Foo: {}}", "unknown cache method 'Foo'"),
        ("method: {Fb: {}}", "methods to options"),
        ("methods: {Fb: {}}\nextra: 1", "unknown key"),
        ("methods: {Fb: {}}\ndefault_method: Tea", "default_method must be one of Fb"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_configuration_files_are_explained(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_family_config(path)


def test_missing_configuration_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ValueError, match="method must be one of"):
        load_config(CONFIGS / "flux.yaml", "Nope")


def test_tea_calibration_is_bound_to_its_model(tmp_path, transformer):
    from tests.tiny import make_tiny_flux

    path = tmp_path / "teacache.json"
    polynomial = TeaPolynomial(coefficients=(1.0, 2.0), domain=(0.0, 0.5))
    save_tea_polynomial(path, polynomial, transformer, {"steps": 50})
    assert load_tea_polynomial(transformer, str(path)) == polynomial
    with pytest.raises(ValueError, match="was made for another model"):
        load_tea_polynomial(make_tiny_flux(seed=1), str(path))
    transformer.register_to_config(_name_or_path=str(tmp_path))
    assert load_tea_polynomial(transformer, None) == polynomial, "beside the model"


def test_calibration_files_that_are_none_are_rejected(tmp_path, transformer):
    path = tmp_path / "junk"
    path.write_bytes(b"junk")
    with pytest.raises(ValueError, match="not a TeaCache calibration"):
        load_tea_polynomial(transformer, str(path))
    with pytest.raises(ValueError, match="not a FastCache calibration"):
        load_fast_maps(transformer, str(path))
    with pytest.raises(FileNotFoundError, match="calibration: no file"):
        load_fast_maps(transformer, str(tmp_path / "none"))
    save_fast_maps(path, {"blocks.0.hidden_states.weight": torch.zeros(2, 2)}, transformer, {})
    with pytest.raises(ValueError, match="not a TeaCache calibration"):
        load_tea_polynomial(transformer, str(path))


def test_fingerprint_knows_the_weights_but_not_the_dtype(transformer):
    rounded = transformer.half()
    fingerprint = model_fingerprint(rounded)
    assert model_fingerprint(rounded.float()) == fingerprint
    rounded.proj_out.weight.mul_(1.5)
    assert model_fingerprint(rounded) != fingerprint


def test_importing_the_package_is_light():
    code = (
        "import sys, xfuser_adacorr as x; x.CacheConfig();"
        "heavy = [m for m in ('xfuser', 'diffusers', 'transformers') if m in sys.modules];"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
