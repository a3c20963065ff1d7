"""Descriptions of model families: recognition, defaults, validation."""

import copy
from pathlib import Path

import pytest
from torch import nn

from tests.tiny_families import BY_NAME, FAMILIES, NAMES
from xfuser_adacorr import (
    BlockList,
    CacheConfig,
    apply_cache_on_transformer,
    enable_cache,
    load_family_config,
)
from xfuser_adacorr.model_executor.cache.api import site_of
from xfuser_adacorr.model_executor.cache.calibration.files import model_fingerprint
from xfuser_adacorr.model_executor.cache.diffusers_adapters import family as families
from xfuser_adacorr.model_executor.cache.diffusers_adapters.opensora import OPENSORA
from xfuser_adacorr.model_executor.cache.methods.ada import DEFAULT_SCALE
from xfuser_adacorr.model_executor.cache.methods.options import AUTO_TOLERANCE, CORRECTED_TOLERANCE

STEPS = 5
ROOT = Path(__file__).parents[3]
each_unmasked = pytest.mark.parametrize(
    "tiny", [tiny for tiny in FAMILIES if "masked" not in tiny.name], ids=lambda tiny: tiny.name
)


@pytest.mark.parametrize(
    ("tiny", "family"), [(tiny, tiny.name.removesuffix("-masked")) for tiny in FAMILIES]
)
def test_families_are_recognised(tiny, family):
    assert families.find_family(tiny.make()).name == family


def test_an_unknown_class_is_told_all_families():
    with pytest.raises(ValueError, match="no cache adapter for transformer Linear") as error:
        enable_cache(nn.Linear(2, 2), "Fb")
    for name in (
        "DiTTransformer2DModel",
        "FluxTransformer2DModel",
        "MMDiTModel",
        "PixArtTransformer2DModel",
        "STDiT3",
        "STDiT3Transformer3DModel",
    ):
        assert name in str(error.value)


@pytest.mark.parametrize("family", ["opensora-original", "opensora2"])
def test_a_similar_structure_that_is_called_otherwise_is_not_taken(family):
    class Other(nn.Module):
        def forward(self, latents, time, text):
            return latents

    model = BY_NAME[family].make()
    model.__dict__.pop("forward", None)
    model.__class__ = Other
    with pytest.raises(ValueError, match="no cache adapter for transformer Other"):
        enable_cache(model, "Fb")


@pytest.mark.parametrize("family", ["flux", "pixart", "dit", "opensora"])
def test_the_shipped_configuration_states_the_familys_defaults(family):
    known = families.family_named(family)
    configs = load_family_config(ROOT / "configs" / f"{family}.yaml")
    assert set(NAMES) <= set(configs)
    for name, config in configs.items():
        if name == "Auto":
            assert config.tolerance == AUTO_TOLERANCE
            continue
        default = CacheConfig.from_name(name)
        if name.startswith("Ada"):
            assert config.threshold == DEFAULT_SCALE
        else:
            assert config.threshold == default.threshold_for(known)
        if config.correction is not None:
            assert config.correction.tolerance == CORRECTED_TOLERANCE


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Fb", 0.1), ("Fb+AdaCorrection", 0.4), ("Tea", 0.2), ("Tea+AdaCorrection", 0.2)],
)
def test_a_corrected_method_takes_its_own_default_or_its_base_methods(name, expected):
    family = described(thresholds={"Fb": 0.1, "Fb+AdaCorrection": 0.4, "Tea": 0.2})
    assert CacheConfig.from_name(name).threshold_for(family) == expected
    with pytest.raises(ValueError, match="rel_l1_thresh must be given: family 'mine'"):
        CacheConfig.from_name("Fast+AdaCorrection").threshold_for(family)


@pytest.mark.parametrize("base", ["Fb", "Tea", "Fast", "Ada"])
def test_the_trigger_of_a_corrected_method_is_looser_unless_it_is_given(base):
    def trigger(name, **options):
        model = BY_NAME["pixart"].make()
        enable_cache(model, name, num_steps=STEPS, **options)
        method = site_of(model).stack.method
        return method.scale if base == "Ada" else method.threshold

    corrected = f"{base}+AdaCorrection"
    if base == "Ada":
        assert trigger(base) == trigger(corrected) == 1.0
    else:
        assert trigger(base) < trigger(corrected)
    assert trigger(corrected, rel_l1_thresh=0.01) == 0.01


def test_tea_uses_the_published_polynomial_for_open_sora_1_2_only():
    released = {"depth": 28, "hidden_size": 1152, "num_heads": 16, "in_channels": 4}
    polynomial = OPENSORA.published_polynomial(released)
    by_hand = 217.546007e-4 - 118.329252e-3 + 26.8662585e-2 - 0.0459364272e-1 + 0.048442624
    assert polynomial(0.1) == pytest.approx(by_hand) == pytest.approx(0.216, abs=5e-4)
    assert OPENSORA.published_polynomial({**released, "in_channels": 16}) is None
    for tiny in FAMILIES:
        model = tiny.make()
        enable_cache(model, "Tea")
        assert site_of(model).stack.method.polynomial(0.37) == pytest.approx(0.37)


def test_tea_reads_the_options_of_a_model_with_a_config_object():
    model = BY_NAME["opensora-original"].make()
    vars(model.config).update(depth=28, hidden_size=1152, num_heads=16, in_channels=4)
    enable_cache(model, "Tea")
    assert site_of(model).stack.method.polynomial(0.1) == pytest.approx(0.216, abs=5e-4)


def described(**changes):
    stream = ("x",)
    options = {
        "name": "mine",
        "transformer_class": "Mine",
        "block_lists": (BlockList(attribute="blocks", streams=stream, returns=stream),),
        "latents": "x",
        "timestep": "t",
        "output_stream": "x",
        "modulated_input": lambda block, arguments: arguments["x"],
    }
    return families.ModelFamily(**{**options, **changes})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"block_lists": ()}, "block_lists of family 'mine' must not be empty"),
        ({"output_stream": "y"}, "streams of blocks in family 'mine' must contain"),
        (
            {"block_lists": (BlockList(attribute="b", streams=("x",), returns=("y",)),)},
            "returns of b in family 'mine' must contain",
        ),
        (
            {
                "block_lists": (
                    BlockList(attribute="b", streams=("x",), returns=("x",), interleaved=True),
                )
            },
            "the first list must be neither interleaved nor joint",
        ),
    ],
)
def test_contradictory_descriptions_are_rejected(changes, named):
    with pytest.raises(ValueError, match=named):
        described(**changes)


def test_interleaved_lists_of_unequal_length_are_rejected():
    model = BY_NAME["opensora"].make()
    model.temporal_blocks.append(copy.deepcopy(model.temporal_blocks[0]))
    message = "equally many, got {'spatial_blocks': 2, 'temporal_blocks': 3}"
    with pytest.raises(ValueError, match=message):
        enable_cache(model, "Fb")


def test_a_family_without_a_default_asks_for_the_threshold(own_registry):
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Identity()])

        def forward(self, x, t):
            return self.blocks[0](x)

    families.register_family(described())
    with pytest.raises(ValueError, match="rel_l1_thresh must be given: family 'mine'"):
        enable_cache(Mine(), "Fb")


def test_a_family_registered_by_hand_replaces_a_built_in_one(monkeypatch):
    """Even if the built-in ones are imported later, which happens with the first look-up."""
    monkeypatch.setattr(families, "_FAMILIES", {})
    pixart = {
        "transformer_class": "PixArtTransformer2DModel",
        "latents": "hidden_states",
        "timestep": "timestep",
    }
    built_in = described(**pixart)
    monkeypatch.setattr(families, "import_module", lambda name: families.register_family(built_in))
    model = BY_NAME["pixart"].make()
    assert families.find_family(model) is built_in
    monkeypatch.setattr(families, "_FAMILIES", {})
    mine = families.register_family(described(**pixart))
    assert families.find_family(model) is mine is not built_in


@pytest.mark.parametrize("module", ["flux", "pixart", "dit", "opensora", "opensora2"])
def test_every_familys_module_offers_the_entry_point(module):
    from importlib import import_module

    adapter = import_module(f"{families.__package__}.{module}")
    assert adapter.apply_cache_on_transformer is apply_cache_on_transformer


@each_unmasked
def test_calibrations_are_bound_to_the_weights(tiny):
    assert model_fingerprint(tiny.make()) == model_fingerprint(tiny.make().bfloat16())
    assert model_fingerprint(tiny.make()) != model_fingerprint(tiny.make(seed=1))
