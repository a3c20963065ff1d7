"""Other projects' caches under the harness, and the FLOPs that every row is counted by."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmark import peers
from benchmark.errors import BenchmarkError
from benchmark.models.families import FAMILIES
from benchmark.peers import PEERS, bag, bud_cache, peer_config, restoring, sweep_options
from benchmark.run.flops import counted_flops
from benchmark.run.generate import make_picture, prepared
from benchmark.run.rows import cached_row
from benchmark.run.store import write_json
from benchmark.run.trajectories import Samples
from tests.benchmark.tiny import TINY, read_settings, tiny_pipeline
from xfuser_adacorr import CacheConfig, cache_summary, disable_cache, enable_cache

SHIPPED = Path(__file__).parents[3] / "benchmark" / "pipelines"
STEPS = 8
FAMILY_PEERS = [(family, name) for name, peer in PEERS.items() for family in peer.families]
THRESHOLDS = [{"rel_l1_thresh": value} for value in (0.3, 9.0)]


@pytest.fixture(scope="module")
def pipelines():
    """A tiny random pipeline of every family that peers have; the shipped ones of sd and sd3."""
    made = {"flux": tiny_pipeline()}
    for family in ("sd", "sd3"):
        made[family] = FAMILIES[family].load_class().from_pretrained(SHIPPED / family)
    for family, make in TINY.items():
        pipe, transformer = make()
        torch.manual_seed(0)
        for parameter in transformer.parameters():  # the output layer's are zero at first
            torch.nn.init.normal_(parameter, std=0.1)
        pipe.register_modules(transformer=transformer)
        made[family] = pipe
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
    return made


def picture(pipe, family, steps=STEPS, seed=3, scale=1):
    return make_picture(pipe, settings_of(family, scale), entry_of(pipe, family, seed), steps)


def entry_of(pipe, family, seed=3):
    if family == "dit":
        return {"class_label": next(iter(pipe.labels)), "seed": seed}
    moving = ", moving right slowly" if FAMILIES[family].num_frames else ""
    return {"prompt": f"a red circle{moving}", "seed": seed}


def settings_of(family, scale=1):
    frames = {"opensora": ["--num_frames", "4"], "wan": ["--num_frames", "5"]}.get(family, [])
    return read_settings(["--model_type", family, "--true_cfg_scale", str(scale), *frames])


def row(name, options, family, true_cfg=False, calibration=None):
    solver = FAMILIES[family].solvers[0]
    two_calls = true_cfg or FAMILIES[family].guided_in_two_calls
    config = replace(peer_config(name, options), true_cfg=two_calls, calibration=calibration)
    return cached_row(name, STEPS, config, solver)


@pytest.fixture
def calibrated(pipelines, tmp_path, monkeypatch):
    """Peers are calibrated on one picture, with searches of two masks."""
    for module in (bud_cache, bag):
        monkeypatch.setattr(module, "ITERATIONS", 2)
    monkeypatch.setattr(bag, "PROMPTS", 1)
    monkeypatch.setattr(bag, "SHARES", (0.5,))
    monkeypatch.setattr(bag, "EPOCHS", 5)

    def calibrate(family, name, options):
        found = peers.calibration_of(peer_config(name, options))
        if found is None:
            return None
        pipe = pipelines[family]
        entries = [entry_of(pipe, family)]
        samples = Samples(pipe, settings_of(family), entries, lambda n: tmp_path / f"{n}.json")
        write_json(tmp_path / "kept.json", found[1](samples, STEPS))
        return str(tmp_path / "kept.json")

    return calibrate


def denoiser(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def attributes(pipe):
    modules = dict(denoiser(pipe).named_modules())
    return {name: (type(m), sorted(m.__dict__), m.forward) for name, m in modules.items()}


@pytest.mark.parametrize(("family", "name"), FAMILY_PEERS)
def test_a_peer_saves_compute_and_leaves_the_pipeline_as_it_was(
    pipelines, calibrated, family, name
):
    if not peers.is_installed(PEERS[name]):
        pytest.skip(f"{PEERS[name].package} is not installed")
    pipe = pipelines[family]
    with counted_flops([denoiser(pipe)]) as uncached:
        before = picture(pipe, family)
    known = attributes(pipe), sorted(pipe.__dict__), sorted(pipe.scheduler.__dict__)
    options = dict(sweep_options(name, THRESHOLDS, STEPS)[-1])
    if name.endswith("MagCache"):
        options |= {"mag_ratios": (1.0,) * STEPS, "threshold": 9.0}
    cached_by = row(name, options, family, calibration=calibrated(family, name, options))
    with counted_flops([denoiser(pipe)]) as flops, prepared(pipe, cached_by):
        cached = picture(pipe, family)
        again = picture(pipe, family)
    assert 0 < flops.total < 2 * uncached.total
    assert torch.equal(cached, again)  # the second begins from nothing, too
    assert not torch.equal(cached, before)
    assert torch.equal(picture(pipe, family), before)
    assert (attributes(pipe), sorted(pipe.__dict__), sorted(pipe.scheduler.__dict__)) == known


@pytest.mark.parametrize("name", ["diffusers:FirstBlockCache", "cache-dit:DBCache"])
def test_each_branch_of_two_calls_a_step_has_a_state_of_its_own(pipelines, name):
    if not peers.is_installed(PEERS[name]):
        pytest.skip(f"{PEERS[name].package} is not installed")
    pipe, shares = pipelines["flux"], []
    options = sweep_options(name, THRESHOLDS, STEPS)[-1]
    for scale in (1, 2):
        with counted_flops([pipe.transformer]) as uncached:
            picture(pipe, "flux", scale=scale)
        guided = row(name, options, "flux", true_cfg=scale > 1)
        with counted_flops([pipe.transformer]) as flops, prepared(pipe, guided):
            picture(pipe, "flux", scale=scale)
        shares.append(flops.total / uncached.total)
    # Were the state shared, the second branch would begin with the first one's residual.
    assert shares[0] == pytest.approx(shares[1], rel=1e-6)
    assert shares[0] < 1


def test_a_peer_that_fails_in_the_middle_leaves_the_pipeline_as_it_was(pipelines):
    pipe = pipelines["flux"]
    known = attributes(pipe)
    options = {"threshold": 0.1}
    with (
        pytest.raises(KeyboardInterrupt),
        prepared(pipe, row("diffusers:FirstBlockCache", options, "flux")),
    ):
        raise KeyboardInterrupt
    assert attributes(pipe) == known


def test_an_option_that_a_peer_refuses_is_named(pipelines):
    wrong = row("diffusers:FirstBlockCache", {"treshold": 0.1}, "flux")
    with (
        pytest.raises(BenchmarkError, match="diffusers:FirstBlockCache: .*'treshold'"),
        prepared(pipelines["flux"], wrong),
    ):
        pass


def test_restoring_removes_what_was_added_and_brings_back_what_was_taken(pipelines):
    pipe = pipelines["flux"]
    blocks = pipe.transformer.transformer_blocks
    with restoring.restored(pipe):
        pipe.transformer.transformer_blocks = torch.nn.ModuleList()
        pipe.transformer.extra = torch.nn.Identity()
        blocks[0].forward = None
        blocks[0].register_forward_hook(print)
        pipe.scheduler.step = None
    assert pipe.transformer.transformer_blocks is blocks
    assert not hasattr(pipe.transformer, "extra")
    assert callable(blocks[0].forward) and not blocks[0]._forward_hooks
    assert callable(pipe.scheduler.step)


# -- FLOPs ---------------------------------------------------------------------------------------


def test_flops_are_those_of_torchs_own_counter(pipelines):
    pipe = pipelines["pixart"]
    calls = []
    look = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with counted_flops([pipe.transformer]) as flops:
        picture(pipe, "pixart")
    look.remove()
    # Without its kernel of the CPU the attention is two products, which the counter knows.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            for args, kwargs in calls:
                pipe.transformer(*args, **kwargs)
    assert flops.total == counter.get_total_flops()


@pytest.mark.parametrize(
    ("config", "enters_every_call"),
    [
        (CacheConfig.from_name("Fb", rel_l1_thresh=0.5), True),
        (CacheConfig.from_name("Schedule", schedule=3), True),
        (CacheConfig.from_name("Schedule", schedule=3, stand_in="forecast"), False),
        (CacheConfig.from_name("Auto", adacorr_tolerance=0.5), False),
    ],
)
def test_compute_is_the_share_of_the_calls_and_more_where_every_call_enters_the_model(
    pipelines, config, enters_every_call
):
    pipe = pipelines["flux"]
    with counted_flops([pipe.transformer]) as uncached:
        picture(pipe, "flux")
    with counted_flops([pipe.transformer]) as flops:
        enable_cache(pipe, config)
        picture(pipe, "flux")
        summary = cache_summary(pipe)
        disable_cache(pipe)
    computed = summary.computed_steps / (summary.computed_steps + summary.reused_steps)
    share = flops.total / uncached.total
    assert computed < 1
    if enters_every_call:  # embedders and head, and Fb's first block
        assert computed < share < 1
    else:
        assert share == pytest.approx(computed, rel=1e-6)


# -- which peers there are -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--model_type dit --cache_methods xfuser:fbcache", "FLUX alone; accepted: flux"),
        ("--model_type opensora --cache_methods cache-dit:DBCache", "no adapter of it"),
        ("--model_type dit --cache_methods diffusers:FasterCache", "accepted: flux, pixart"),
        ("--cache_methods xfuser:teacache --true_cfg_scale 2", "one state for both branches"),
        ("--cache_methods diffusers:MegaCache", "diffusers:MagCache"),
    ],
)
def test_a_peer_that_cannot_run_is_refused_with_the_reason(arguments, named):
    with pytest.raises(BenchmarkError, match=named):
        read_settings(arguments.split())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(peers, "is_installed", lambda peer: peer.package != "cache-dit")
    with pytest.raises(BenchmarkError, match=r"cache-dit:DBCache needs the package cache-dit: pip"):
        read_settings(["--cache_methods", "cache-dit:DBCache"])
    names, left_out = peers.available("flux")
    assert "diffusers:MagCache" in names
    assert not any(name.startswith("cache-dit") for name in names)
    assert sum("needs the package cache-dit" in reason for reason in left_out) == 6


def test_a_sweep_of_a_peer_begins_with_its_recommended_setting_and_repeats_none():
    for name, peer in PEERS.items():
        tried = sweep_options(name, THRESHOLDS, 28)
        assert tried[0] == peer.recommended
        assert len({str(options) for options in tried}) == len(tried) >= 3


def test_a_schedule_is_given_as_an_interval_or_as_steps():
    given = read_settings("--cache_methods Schedule --schedule 3".split())
    assert given.cache_options == {"schedule": 3}
    given = read_settings(
        "--cache_methods Schedule+AdaCorrection --schedule 0 2 5 --stand_in forecast".split()
    )
    assert given.cache_methods == ("Schedule+AdaCorrection",)
    assert given.cache_options == {"schedule": (0, 2, 5), "stand_in": "forecast"}
