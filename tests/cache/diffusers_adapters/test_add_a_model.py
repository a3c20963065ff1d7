"""docs/add_a_model.md, followed step by step with the code that stands in the page."""

import copy
import re
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from tests.tiny_families import NAMES, TEXT, FamilySampler, TinyFamily, cached, loose, never, texts
from xfuser_adacorr import cache_summary, disable_cache, enable_cache
from xfuser_adacorr.model_executor.cache.api import site_of
from xfuser_adacorr.model_executor.cache.diffusers_adapters import family as families

PAGE = Path(__file__).parents[3] / "docs" / "add_a_model.md"
_, DESCRIBE, CHECK = re.findall(
    r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE
)
STEPS = 8


def make_cogvideox():
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=12,
        num_layers=3,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        max_text_seq_length=TEXT,
    )


def inputs(x, t):
    timestep = torch.as_tensor(t, dtype=torch.float32).expand(len(x))
    return {
        "hidden_states": x,
        "encoder_hidden_states": texts(x, TEXT, 12),
        "timestep": timestep,
    }


COGVIDEOX = TinyFamily(
    name="cogvideox",
    make_model=make_cogvideox,
    shape=(3, 4, 8, 8),
    other_shape=(3, 4, 4, 4),
    inputs=inputs,
    blocks=lambda model: list(model.transformer_blocks),
    signal_module=lambda model: model.time_embedding,
    followed=lambda out: out,
)


@pytest.fixture(autouse=True)
def registered(own_registry):
    """Follow step 2."""
    namespace = {}
    exec(compile(DESCRIBE, str(PAGE), "exec"), namespace)
    return namespace["COGVIDEOX"]


def test_the_family_is_known_once_described(registered):
    assert families.find_family(COGVIDEOX.make()) is registered
    assert families.family_named("cogvideox") is registered


def test_the_check_of_the_page_passes():
    noise = FamilySampler(COGVIDEOX).noise()
    exec(
        compile(CHECK, str(PAGE), "exec"),
        {"transformer": COGVIDEOX.make(), "inputs": lambda t: inputs(noise * t / 1000, t)},
    )


def test_the_check_of_the_page_catches_a_wrong_description(registered):
    """Streams returned in another order than the blocks' are noticed."""
    from dataclasses import replace

    swapped = replace(registered.block_lists[0], returns=registered.block_lists[0].returns[::-1])
    families.register_family(replace(registered, block_lists=(swapped,)))
    with pytest.raises((AssertionError, RuntimeError)):
        test_the_check_of_the_page_passes()


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_never_hits_is_bit_equal(name):
    expected = FamilySampler(COGVIDEOX).run(STEPS)
    assert torch.equal(cached(COGVIDEOX, never(name)).run(STEPS), expected)


@pytest.mark.parametrize("name", NAMES)
def test_methods_hit_and_disabling_restores_the_model(name):
    sampler = FamilySampler(COGVIDEOX)
    model, plain = sampler.model, sampler.run(STEPS)
    before = copy.deepcopy(model.state_dict())
    enable_cache(model, loose(name), scheduler=sampler.scheduler)
    x = sampler.run(STEPS)
    summary = cache_summary(model)
    forced = 4 if name.startswith("Ada") else 3  # Ada: two calls at both ends
    assert summary.reused_steps >= STEPS - forced and summary.compute_fraction < 0.7
    assert x.isfinite().all() and not torch.equal(x, plain)
    disable_cache(model)
    assert type(model) is CogVideoXTransformer3DModel
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(sampler.run(STEPS), plain)


def test_published_polynomials_are_taken_by_depth(registered):
    assert registered.published_polynomial({"num_layers": 30}).coefficients[0] == -31.0658903
    model = COGVIDEOX.make()
    enable_cache(model, "Tea")
    assert site_of(model).stack.method.polynomial(0.37) == pytest.approx(0.37)
