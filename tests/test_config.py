"""Options, configuration files, and what bad input is told."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from xfuser_adacorr import (
    METHODS,
    Ada,
    AdaCorrection,
    Auto,
    CacheConfig,
    Fast,
    Fb,
    Literal,
    Schedule,
    Tea,
    apply_cache_on_transformer,
    enable_cache,
    load_config,
    load_family_config,
    method_named,
)

CONFIGS = Path(__file__).parent.parent / "configs"
FB = {"use_cache": "Fb"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"use_cache": "Fbx"}, ValueError, "use_cache must be one of Fb, Tea, Fast, Ada, Auto"),
        ({**FB, "rel_l1_thresh": -0.1}, ValueError, "^rel_l1_thresh must be finite and at least 0"),
        ({**FB, "rel_l1_thresh": float("nan")}, ValueError, "^rel_l1_thresh must be finite"),
        ({**FB, "rel_l1_thresh": "0.1"}, TypeError, "^rel_l1_thresh must be a number"),
        (
            {"use_cache": "Fast", "static_tokens": True, "motion_threshold": 1.5},
            ValueError,
            "motion_threshold must be finite and at most 1",
        ),
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1"),
        ({"num_steps": 2.5}, TypeError, "num_steps must be an integer"),
        ({"warmup_steps": -1}, ValueError, "^warmup_steps must be at least 0"),
        ({"enable_adacorrection": 1}, TypeError, "enable_adacorrection must be True or False"),
        ({"adacorr_gamma": -1.0}, ValueError, "^adacorr_gamma must be"),
        ({"adacorr_lambda": float("inf")}, ValueError, "^adacorr_lambda must be"),
        ({"adacorr_tolerance": 0.0}, ValueError, "^adacorr_tolerance must be finite and above 0"),
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
    with pytest.raises(ValueError, match="unknown option 'threshold'; accepted: adacorr_gamma"):
        enable_cache(transformer, "Fb", threshold=0.1)
    with pytest.raises(ValueError, match="unknown cache method 'Fbb'"):
        enable_cache(transformer, "Fbb")
    with pytest.raises(TypeError, match="method must be a method's options or its name, got 3"):
        enable_cache(transformer, 3)
    with pytest.raises(TypeError, match=r"\['warmup_steps'\] belong into the Auto options given"):
        enable_cache(transformer, CacheConfig(), warmup_steps=1)


def test_unknown_transformers_are_rejected():
    with pytest.raises(ValueError, match="no cache adapter for transformer Linear.*by hand: .*DiT"):
        enable_cache(torch.nn.Linear(2, 2), "Fb")
    with pytest.raises(TypeError, match="expected a .*pipeline"):
        enable_cache("FLUX.1-dev", "Fb")


def test_wrong_return_order_is_rejected(transformer):
    with pytest.raises(ValueError, match="return_hidden_states_first must be None or False"):
        apply_cache_on_transformer(transformer, return_hidden_states_first=True)


def test_scheduler_without_timesteps_is_rejected(transformer):
    with pytest.raises(ValueError, match="scheduler must have timesteps, a config and step"):
        enable_cache(transformer, "Auto", scheduler=object())


METHOD_OPTIONS = [
    Fb(threshold=0.1),
    Fb(threshold=0.1, warmup=2, correction=AdaCorrection(gamma=0.5, tolerance=0.02)),
    Tea(threshold=0.3, num_steps=20, correction=AdaCorrection(target_compute=0.4)),
    Tea(threshold=0.3, correction=AdaCorrection(lambda_=2.0, target_speedup=2.5)),
    Fast(static_tokens=True, motion_threshold=0.3),
    Fast(threshold=0.2, correction=Literal(gamma=0.3, lambda_=0.5)),
    Ada(codebook={0.1: 3, 1.0: 1}, moreg=True, moreg_divisor=1.2),
    Auto(),
    Auto(tolerance=0.002, gamma=2.0, lambda_=0.5, warmup=3),
    Auto(target_compute=0.4, num_steps=28),
    Schedule(every=3, forecast="line"),
    Schedule(steps=[0, 4, 7], forecast="last"),
    Schedule(steps=[0, 4, 7], correction=AdaCorrection()),
    Schedule(every=2, forecast="residual"),
    Schedule(stored="file.json", interpolate=True, correction=AdaCorrection()),
]


@pytest.mark.parametrize("method", METHOD_OPTIONS, ids=repr)
def test_flat_options_are_those_of_the_classes(method):
    """There and back: what traces and files hold makes the same options again."""
    flat = method.to_dict()
    assert CacheConfig.from_dict(flat) == CacheConfig(**flat) == method
    assert hash(CacheConfig(**flat)) == hash(method)
    rest = {k: v for k, v in flat.items() if k not in ("use_cache", "enable_adacorrection")}
    assert method_named(method.name, **rest) == method


def test_flat_keywords_make_the_classes_options():
    assert CacheConfig() == Auto()
    assert CacheConfig(use_cache="Fb", rel_l1_thresh=0.1, warmup_steps=2) == Fb(
        threshold=0.1, warmup=2
    )
    options = {"adacorr_gamma": 2.0, "adacorr_lambda": 0.5, "adacorr_tolerance": 0.03}
    assert CacheConfig(use_cache="Auto", **options) == Auto(gamma=2.0, lambda_=0.5, tolerance=0.03)
    assert CacheConfig(use_cache="Tea", enable_adacorrection=True, **options) == Tea(
        correction=AdaCorrection(gamma=2.0, lambda_=0.5, tolerance=0.03)
    )
    assert CacheConfig(use_cache="Schedule", schedule=3, stand_in="forecast") == Schedule(
        every=3, forecast="line"
    )


def test_display_names():
    assert [CacheConfig.from_name(name).name for name in METHODS] == list(METHODS)
    for name in ("Fb", "Tea", "Fast", "Ada", "Schedule"):
        corrected = f"{name}+AdaCorrection"
        options = {"schedule": 3} if name == "Schedule" else {}
        assert CacheConfig.from_name(corrected, **options).name == corrected


ONLY = {
    "rel_l1_thresh": (0.1, {"Fb", "Tea", "Fast", "Ada"}),
    "static_tokens": (True, {"Fast"}),
    "codebook": ("fast", {"Ada"}),
    "moreg": (True, {"Ada"}),
    "schedule": (3, {"Schedule"}),
    "stand_in": ("reuse", {"Schedule"}),
    "schedule_interpolation": (True, {"Schedule"}),
    "warmup_steps": (1, {"Fb", "Tea", "Fast", "Ada", "Auto"}),
    "adacorr_tolerance": (0.1, {"Auto", "Fb+AdaCorrection", "Tea+AdaCorrection"}),
    "adacorr_gamma": (2.0, {"Auto", "Fb+AdaCorrection", "Tea+AdaCorrection"}),
    "target_compute": (0.5, {"Auto", "Fb+AdaCorrection", "Tea+AdaCorrection"}),
}
"""Option -> a value, and the methods among these that have it."""
NAMES = (
    *("Fb", "Tea", "Fast", "Ada", "Auto", "Schedule"),
    *("Fb+AdaCorrection", "Tea+AdaCorrection", "Schedule+AdaCorrection"),
)


@pytest.mark.parametrize("option", ONLY)
@pytest.mark.parametrize("name", NAMES)
def test_an_option_that_cannot_act_raises_and_names_those_that_have_it(name, option):
    value, takers = ONLY[option]
    label = name.removesuffix("+AdaCorrection")
    if label in takers or name in takers:
        if (name, option) == ("Schedule+AdaCorrection", "stand_in"):
            return  # its forecast stands in
        if option == "schedule_interpolation":
            assert method_named(name, **{option: value}).interpolate
        else:
            assert method_named(name, **{option: value}).to_dict()[option] in (value, "fast")
        return
    with pytest.raises(ValueError, match=f"^{option} is an option of ") as raised:
        method_named(name, **{option: value})
    assert str(raised.value).endswith(f"not of {name}")
    said = str(raised.value).split(" is an option of ")[1]
    assert all(taker in said for taker in takers)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Auto(tolerance=0.1, target_compute=0.4), ValueError, "tolerance and target_comp"),
        (lambda: Auto(tolerance=-1), ValueError, "^tolerance must be finite and above 0, got -1"),
        (lambda: Fb(threshold="x"), TypeError, "^threshold must be a number, got 'x'"),
        (lambda: Fb(correction=True), TypeError, r"correction must be AdaCorrection\(...\), Lit"),
        (lambda: Schedule(every=2, steps=[0]), ValueError, "every and steps: give one of them"),
        (lambda: Schedule(every=0), ValueError, "every must be at least 1, got 0"),
        (
            lambda: Schedule(every=2, correction=AdaCorrection(gamma=2.0)),
            ValueError,
            "AdaCorrection must have its defaults for Schedule",
        ),
        (
            lambda: Schedule(every=2, forecast="line", correction=AdaCorrection()),
            ValueError,
            "stand_in must be None with AdaCorrection",
        ),
        (lambda: Fb(gamma=1.0), TypeError, "unexpected keyword argument 'gamma'"),
        (lambda: Auto(0.1), TypeError, "positional argument"),
    ],
)
def test_option_classes_check_themselves(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_options_cannot_be_changed_but_replaced():
    method = Fb(threshold=0.1)
    with pytest.raises(AttributeError):
        method.threshold = 0.2
    assert replace(method, threshold=0.2) == Fb(threshold=0.2)


@pytest.mark.parametrize(
    ("name", "meant"), [("fb", "Fb"), ("TeaCache", "Tea"), ("FastCach", "Fast"), ("auto", "Auto")]
)
def test_a_near_miss_of_a_name_is_pointed_out(name, meant):
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        CacheConfig.from_name(name)


TUNED = {"Fb", "Tea", "Fast", "Auto", "Fast+AdaCorrection"}
NOT_TUNED = {"sd": {"Auto"}, "sd3": {"Auto"}, "wan": {"Auto"}}
"""Test families: what they run with is the package's default."""


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.relative_to(CONFIGS).as_posix()
)
def test_shipped_configurations_load(path):
    configs = load_family_config(path)
    assert NOT_TUNED.get(path.stem, TUNED) <= set(configs)
    assert all(config.name == name for name, config in configs.items())
    assert load_config(path) == next(iter(configs.values()))
    assert load_config(path, "Auto").name == "Auto"


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


def test_importing_the_package_is_light():
    code = (
        "import sys, xfuser_adacorr as x; x.CacheConfig();"
        "heavy = [m for m in ('xfuser', 'diffusers', 'transformers') if m in sys.modules];"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
