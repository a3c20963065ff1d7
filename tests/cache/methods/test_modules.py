"""Methods on modules, against their formulas written out."""

import math

import pytest
import torch
from diffusers import FluxTransformer2DModel

from tests.pipelines.dit import build
from tests.tiny import make_tiny_flux
from tests.tiny_families import BY_NAME, make_stdit3, sample_in
from xfuser_adacorr import Auto, cache_summary, disable_cache, enable_cache
from xfuser_adacorr.config import MODULE_METHODS, method_named
from xfuser_adacorr.model_executor.cache.calibration.eoc import fit_eoc, sources
from xfuser_adacorr.model_executor.cache.calibration.l2c import train_l2c
from xfuser_adacorr.model_executor.cache.calibration.lazy import convert_lazy, train_lazy
from xfuser_adacorr.model_executor.cache.calibration.module_file import load_table, save_table
from xfuser_adacorr.model_executor.cache.methods import toca, tome
from xfuser_adacorr.model_executor.cache.methods.eoc import EOC, trend
from xfuser_adacorr.model_executor.cache.methods.fora import FORA
from xfuser_adacorr.model_executor.cache.methods.goc import GOC
from xfuser_adacorr.model_executor.cache.methods.l2c import L2C, router_gates
from xfuser_adacorr.model_executor.cache.methods.lazy import Lazy
from xfuser_adacorr.model_executor.cache.methods.toca import ToCa
from xfuser_adacorr.model_executor.cache.methods.tokens import in_cells, out_of_cells
from xfuser_adacorr.model_executor.cache.methods.tome import ToMe
from xfuser_adacorr.model_executor.cache.schedulers import read_places
from xfuser_adacorr.model_executor.cache.sites.modules import find_modules

STEPS = 8


@pytest.fixture(scope="module")
def pipe():
    pipe = build()
    with torch.no_grad():  # modules that do not start near zero
        for parameter in pipe.transformer.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return pipe


def sample(pipe, steps=STEPS, seed=0, labels=(3, 5)):
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        class_labels=list(labels),
        guidance_scale=3.0,
        num_inference_steps=steps,
        generator=generator,
        output_type="np",
    ).images


def cached(pipe, method, **kwargs):
    enable_cache(pipe, method)
    try:
        return sample(pipe, **kwargs), cache_summary(pipe)
    finally:
        disable_cache(pipe)


def places_of(pipe, steps=STEPS):
    pipe.scheduler.set_timesteps(steps)
    return read_places(pipe.scheduler)


def modules_run(summary):
    return [call.modules_run for call in summary.trace.calls]


def table_file(pipe, path, method, tensors, steps=STEPS, settings=None):
    names = [place.name for place in find_modules(pipe.transformer)]
    places = places_of(pipe, steps)
    return str(save_table(path, method, pipe.transformer, names, places, tensors, settings or {}))


# -- the site ------------------------------------------------------------------------------------


def test_modules_are_found_by_class(pipe):
    found = find_modules(pipe.transformer)
    blocks = [f"transformer_blocks.{i}.{name}" for i in (0, 1) for name in ("attn1", "ff")]
    assert [place.name for place in found] == blocks
    assert {place.kind for place in find_modules(make_stdit3())} == {"attention", "feed-forward"}
    flux = [type(place.module).__name__ for place in find_modules(make_tiny_flux())]
    assert flux.count("FluxAttention") == 5 and flux.count("FeedForward") == 4


def test_models_without_modules_are_refused_by_name(pipe):
    with pytest.raises(ValueError, match="AutoencoderKL has no attention or feed-forward"):
        find_modules(_without_modules())


def _without_modules():
    class AutoencoderKL(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    return AutoencoderKL()


def test_disabling_restores_everything(pipe):
    classes = [type(module) for module in pipe.transformer.modules()]
    before = sample(pipe)
    cached(pipe, FORA(interval=2))
    assert [type(module) for module in pipe.transformer.modules()] == classes
    assert (sample(pipe) == before).all()


def test_reuse_keeps_the_output_and_fresh_gates(pipe):
    """A step that reuses all: h + gate(t) * cached, through both blocks."""
    seen, hidden = {}, []
    block = pipe.transformer.transformer_blocks[0]
    hooks = [
        block.attn1.register_forward_hook(lambda m, a, out: seen.setdefault("attn", out)),
        block.ff.register_forward_hook(lambda m, a, out: seen.setdefault("ff", out)),
        block.register_forward_hook(
            lambda m, args, kwargs, out: hidden.append((args, kwargs, out)), with_kwargs=True
        ),
    ]
    cached(pipe, FORA(interval=8), steps=8)
    for hook in hooks:
        hook.remove()
    args, kwargs, out = hidden[3]
    x = args[0] if args else kwargs["hidden_states"]
    _, gate, _, _, gate_mlp = block.norm1(
        x,
        kwargs["timestep"],
        kwargs["class_labels"],
        hidden_dtype=x.dtype,
    )
    x = x + gate.unsqueeze(1) * seen["attn"]
    assert torch.equal(x + gate_mlp.unsqueeze(1) * seen["ff"], out)


def test_flops_are_those_of_the_layers(pipe):
    _, summary = cached(pipe, FORA(interval=2))
    rows, tokens, width = 4, 16, 16
    attention = 2 * tokens * 4 * width * width + 4 * tokens * tokens * width
    feed_forward = 2 * tokens * 2 * width * 4 * width
    assert summary.trace.calls[0].module_flops == 2 * rows * (attention + feed_forward)


# -- FORA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 2, 3, 5])
def test_fora_counts_down_to_a_fresh_last_step(pipe, interval):
    _, summary = cached(pipe, FORA(interval=interval))
    expected = [0 == t or (STEPS - 1 - t) % interval == 0 for t in range(STEPS)]
    assert [call.refreshed for call in summary.trace.calls] == expected
    assert modules_run(summary) == [4 * fresh for fresh in expected]
    assert summary.compute_fraction == sum(expected) / STEPS


@pytest.mark.parametrize("method", [FORA(interval=3), GOC(interval=1), ToCa(interval=1)])
def test_nothing_changes_where_everything_is_computed(pipe, method):
    kwargs = {"steps": 1} if isinstance(method, FORA) and method.interval > 1 else {}
    assert (cached(pipe, method, **kwargs)[0] == sample(pipe, **kwargs)).all() or isinstance(
        method, ToCa
    )


def test_branches_have_states_of_their_own(sampler):
    """Two calls a step: each reuses what it computed itself."""
    enable_cache(sampler.transformer, FORA(interval=3), scheduler=sampler.scheduler)
    both = sampler.run(9, guidance=2.0)
    records = cache_summary(sampler.transformer).trace.calls
    disable_cache(sampler.transformer)
    assert len(records) == 18 and len({record.context for record in records}) == 2
    enable_cache(sampler.transformer, FORA(interval=1), scheduler=sampler.scheduler)
    assert torch.equal(sampler.run(9, guidance=2.0), _uncached(sampler, 9))
    disable_cache(sampler.transformer)
    assert torch.isfinite(both).all()


def _uncached(sampler, steps):
    disable_cache(sampler.transformer)
    x = sampler.run(steps, guidance=2.0)
    enable_cache(sampler.transformer, FORA(interval=1), scheduler=sampler.scheduler)
    return x


@pytest.mark.parametrize("family", ["pixart", "opensora"])
def test_other_models_reuse_all_or_nothing(family):
    """Cross-attention and space-time blocks; on a bare model that is told its steps."""
    tiny = BY_NAME[family]
    model = tiny.make()
    x = torch.randn(2, *tiny.shape, generator=torch.Generator().manual_seed(0))
    full = [sample_in(model(**tiny.inputs(x, t))) for t in (900, 600, 300, 50)]
    enable_cache(model, FORA(interval=3, num_steps=4))
    outputs = [sample_in(model(**tiny.inputs(x, t))) for t in (900, 600, 300, 50)]
    calls = cache_summary(model).trace.calls
    disable_cache(model)
    assert [call.refreshed for call in calls] == [True, False, False, True]
    assert {call.modules for call in calls} == {len(find_modules(model))}
    assert [call.modules_run for call in calls[1:3]] == [0, 0]
    assert torch.equal(outputs[0], full[0]) and torch.equal(outputs[3], full[3])
    assert not torch.equal(outputs[1], full[1])


# -- L2C -----------------------------------------------------------------------------------------


def test_router_gates_are_pairs_of_a_threshold():
    logits = torch.tensor([[-9.0, -9.0], [2.0, -2.0], [-9.0, 9.0], [-3.0, 0.0]])
    assert router_gates(logits, 0.1).tolist() == [[1, 1], [1, 1], [1, 1], [0, 1]]
    assert router_gates(logits, 0.2).tolist() == [[1, 1], [1, 0], [1, 1], [0, 1]]
    assert router_gates(logits, 0.0, compute=0.625).tolist() == [[1, 1], [1, 0], [1, 1], [0, 0]]
    assert router_gates(logits, 0.0, compute=0.5)[1::2].sum() == 0


def test_l2c_follows_its_table(pipe, tmp_path):
    logits = torch.full((STEPS, 4), -5.0)
    logits[3, 2] = logits[5, 0] = 5.0
    path = table_file(pipe, tmp_path / "l2c.safetensors", "L2C", {"logits": logits})
    _, summary = cached(pipe, L2C(router=path))
    assert modules_run(summary) == [4, 0, 4, 1, 4, 1, 4, 0]
    assert summary.trace.calls[3].run_blocks == (False, False, True, False)


def test_l2c_with_everything_cached_is_the_published_ceiling(pipe, tmp_path):
    logits = torch.full((STEPS, 4), -5.0)
    path = table_file(pipe, tmp_path / "l2c.safetensors", "L2C", {"logits": logits})
    assert cached(pipe, L2C(router=path))[1].compute_fraction == 0.5


def test_tables_of_other_runs_are_refused(pipe, tmp_path):
    logits = torch.zeros(STEPS, 4)
    path = table_file(pipe, tmp_path / "l2c.safetensors", "L2C", {"logits": logits})
    with pytest.raises(ValueError, match="was made for 8 steps, this run has 6"):
        cached(pipe, L2C(router=path), steps=6)
    with pytest.raises(ValueError, match="not a calibration of Lazy"):
        enable_cache(pipe, Lazy(probes=path))
    with pytest.raises(ValueError, match="made for another model"):
        enable_cache(build(), L2C(router=path))
    with pytest.raises(FileNotFoundError, match="make one with calibrate"):
        enable_cache(pipe, L2C())
    with pytest.raises(FileNotFoundError, match="no file"):
        enable_cache(pipe, L2C(router=str(tmp_path / "none")))


def test_training_finds_the_module_that_may_not_be_reused(pipe, tmp_path):
    calls = [{"class_labels": [3], "seed": 1}]
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    options |= {"output": tmp_path, "iterations": 16, "progress": False}
    path = train_l2c(pipe, calls, **options, learning_rate=0.3, penalty=0.0)
    free = load_table(pipe.transformer, str(path), "", "L2C").tensors["logits"]
    path = train_l2c(pipe, calls, **options, learning_rate=0.3, penalty=1e3)
    forced = load_table(pipe.transformer, str(path), "", "L2C").tensors["logits"]
    assert (forced[1::2] < -1).all() and (free[1::2] > forced[1::2]).all()
    assert (free[::2] == 5.0).all()
    with pytest.raises(ValueError, match="must be even"):
        train_l2c(pipe, calls, **{**options, "num_inference_steps": 5})


def test_an_interrupted_training_goes_on(pipe, tmp_path):
    calls = [{"class_labels": [3], "seed": 1}]
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    options |= {"progress": False, "learning_rate": 0.1, "output": tmp_path}
    whole = train_l2c(pipe, calls, iterations=30, **options)
    whole = load_table(pipe.transformer, str(whole), "", "L2C").tensors["logits"]
    train_l2c(pipe, calls, iterations=20, work=tmp_path / "work.pt", **options)
    path = train_l2c(pipe, calls, iterations=30, work=tmp_path / "work.pt", **options)
    assert torch.equal(load_table(pipe.transformer, str(path), "", "L2C").tensors["logits"], whole)


# -- Lazy ----------------------------------------------------------------------------------------


def inputs_of(pipe, name):
    """What a module was applied to in each step of a full run."""
    seen = []
    module = pipe.transformer.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone()))
    sample(pipe)
    hook.remove()
    return seen


def test_probes_decide_by_the_sum_over_tokens(pipe, tmp_path):
    """Of the step before; with the bias-free probe w: reuse iff sigmoid(sum Z . w) > 0.5."""
    z = [x.sum(1) for x in inputs_of(pipe, "transformer_blocks.0.attn1")]
    tensors = {str(m): torch.zeros(STEPS, 16) for m in range(4)}
    apart = z[0][0] - z[0][1]  # a probe that tells the first two samples of the batch apart
    probe = apart - (apart @ (z[0][0] + z[0][1]) / 2) / (z[0][2] @ z[0][2]) * z[0][2]
    tensors["0"][1] = probe
    path = table_file(pipe, tmp_path / "lazy.safetensors", "Lazy", tensors)
    _, summary = cached(pipe, Lazy(probes=path))
    lazy = torch.sigmoid(z[0] @ probe) > 0.5
    share = summary.trace.calls[1].module_flops / summary.trace.calls[0].module_flops
    attention, feed_forward = 16 * (8 * 256 + 4 * 256), 16 * 16 * 256
    expected = 1 - float(lazy.float().mean()) * attention / (2 * (attention + feed_forward))
    assert 0 < lazy.sum() < 4 and share == pytest.approx(expected)
    assert [call.compute_fraction for call in summary.trace.calls[2:]] == [1.0] * (STEPS - 2)


def test_rows_that_are_computed_are_those_of_the_whole_batch(pipe, tmp_path):
    """All probes lazy is FORA with N = 2 from the first step on; none lazy changes nothing."""
    zero = {str(m): torch.zeros(STEPS, 16) for m in range(4)}
    path = table_file(pipe, tmp_path / "lazy.safetensors", "Lazy", zero)
    assert (cached(pipe, Lazy(probes=path))[0] == sample(pipe)).all()
    assert cached(pipe, Lazy(probes=path, laziness=0))[1].computed_steps == 1


def test_published_probes_are_turned_round(pipe, tmp_path):
    published = torch.randn(STEPS, 2, 2, 16)
    path = convert_lazy(pipe.transformer, published, places_of(pipe), tmp_path)
    tensors = load_table(pipe.transformer, str(path), "", "Lazy").tensors
    assert torch.equal(tensors["3"][0], -published[STEPS - 1, 1, 1])
    with pytest.raises(ValueError, match=r"published must be \[8, 2, 2, D\]"):
        convert_lazy(pipe.transformer, published[:4], places_of(pipe), tmp_path)


def test_trained_probes_are_lazier_under_a_larger_penalty(pipe, tmp_path):
    calls = [{"class_labels": [3], "seed": 1}]
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    options |= {"output": tmp_path, "iterations": 12, "progress": False, "learning_rate": 0.01}
    path = train_lazy(pipe, calls, **options, penalty=1e3)
    _, summary = cached(pipe, Lazy(probes=str(path)), steps=4, seed=1, labels=(3,))
    assert summary.compute_fraction == 0.5  # the published ceiling
    path = train_lazy(pipe, calls, **options, penalty=0.0)
    _, summary = cached(pipe, Lazy(probes=str(path)), steps=4, seed=1, labels=(3,))
    assert summary.compute_fraction > 0.5


# -- ToCa ----------------------------------------------------------------------------------------


def test_full_steps_of_toca():
    assert [toca.full_interval(3, s, 50) for s in (49, 25, 15, 5, 0)] == [5, 3, 2, 2, 2]
    for s in range(50):
        expected = 2 if 10 <= s <= 20 else round(3 / (1.4 - 0.8 * s / 50))
        assert toca.full_interval(3, s, 50) == expected


def test_ratios_of_toca():
    """step 1 + 2 - 4 s / T, layer 0.8 + 0.4 l / 27, attention 0, feed-forward 2.5."""
    options = ToCa()
    for s, layer in ((0, 0), (10, 27), (30, 13)):
        step, depth = 3 - 4 * s / 50, 0.8 + 0.4 * layer / 27
        share = toca.fresh_share(options, s, 50, layer, 28, True)
        assert share == pytest.approx(min(0.07 * step * depth * 2.5, 1))
        assert toca.fresh_share(options, s, 50, layer, 28, False) == 0
    assert toca.fresh_share(options, 45, 50, 5, 28, True) == 0


def test_scores_of_toca():
    attended, age = torch.rand(2, 16), torch.randint(0, 4, (2, 16)).float()
    score = toca.token_scores(attended, age, 3, 0.25, (4, 4))
    for b in range(2):
        plain = attended[b] / attended[b].norm() + 0.25 * age[b] / 3
        for y in (0, 2):
            for x in (0, 2):
                cell = [4 * (y + i) + x + j for i in (0, 1) for j in (0, 1)]
                best = max(cell, key=lambda n: plain[n])
                for n in cell:
                    expected = plain[n] * (1.6 if n == best else 1)
                    assert score[b, n] == pytest.approx(float(expected))


def test_column_sums_of_toca():
    query, key = torch.randn(1, 2, 4, 3), torch.randn(1, 2, 4, 3)
    got = toca.column_sums(query, key, 0.5)
    for n in range(4):
        total = 0.0
        for h in range(2):
            for m in range(4):
                row = [math.exp(0.5 * float(query[0, h, m] @ key[0, h, j])) for j in range(4)]
                total += row[n] / sum(row) / 2
        assert float(got[0, n]) == pytest.approx(total, rel=1e-5)


def test_cells_there_and_back():
    x = torch.arange(2 * 24.0).view(2, 24)
    assert in_cells(x, (4, 6))[0, 0].tolist() == [0, 1, 6, 7]
    assert torch.equal(out_of_cells(in_cells(x, (4, 6)), (4, 6)), x)


def test_toca_with_all_tokens_fresh_computes_everything(pipe):
    """Queries are cut and keys stay whole: with a share of 1 in every module nothing is reused."""
    options = ToCa(interval=4, fresh_ratio=1.0, step_weight=0, layer_weight=0, module_weight=0)
    x, summary = cached(pipe, options)
    assert torch.allclose(torch.tensor(x), torch.tensor(sample(pipe)), atol=2e-5)
    assert any(not call.refreshed for call in summary.trace.calls)


def test_toca_computes_the_share_it_says(pipe):
    options = ToCa(interval=8, fresh_ratio=0.25, step_weight=0, layer_weight=0, module_weight=0)
    _, summary = cached(pipe, options)
    partial = [call for call in summary.trace.calls if not call.refreshed]
    rows, tokens, some, width = 4, 16, 4, 16
    attention = 4 * some * width * width + 4 * tokens * width * width + 4 * some * tokens * width
    feed_forward = 2 * some * 8 * width * width
    assert {call.module_flops for call in partial} == {2 * rows * (attention + feed_forward)}


# -- ToMe ----------------------------------------------------------------------------------------


def test_merging_links_the_most_similar_tokens():
    keys = torch.randn(2, 16, 5)
    places = tome.matched(keys, (4, 4), 0.25)
    stay, merged = [0, 2, 8, 10], 4
    for b in range(2):
        unit = keys[b] / keys[b].norm(dim=-1, keepdim=True)
        best = {}
        for n in sorted({*range(16)} - {*stay}):
            scores = [float(unit[n] @ unit[m]) for m in stay]
            best[n] = (max(scores), stay[scores.index(max(scores))])
        linked = sorted(best, key=lambda n: -best[n][0])[:merged]
        for n in linked:
            assert places[b, n] == places[b, best[n][1]]
        assert len(set(places[b].tolist())) == 12 and int(places[b].max()) == 11


def test_merged_tokens_are_means_and_unmerge_copies_them():
    x, places = torch.randn(1, 4, 3), torch.tensor([[0, 1, 1, 2]])
    merged, size = tome.merge(x, places, 3)
    assert torch.allclose(merged[0, 1], (x[0, 1] + x[0, 2]) / 2) and size.tolist() == [[1, 2, 1]]
    back = tome.unmerge(merged, places)
    assert torch.equal(back[0, 1], back[0, 2]) and torch.equal(back[0, 0], x[0, 0])


def test_attention_to_merged_tokens_is_weighed_by_their_number(pipe):
    """Equal tokens, merged and weighed by log(size), attend as they did apart."""
    attention = pipe.transformer.transformer_blocks[0].attn1
    x = torch.randn(1, 3, 16)
    doubled = x[:, [0, 1, 1, 2]]
    whole = attention(doubled)
    merged, size = tome.merge(doubled, torch.tensor([[0, 1, 1, 2]]), 3)
    assert torch.allclose(
        attention(merged, attention_mask=size.log()), whole[:, [0, 1, 3]], atol=1e-5
    )


def test_tome_runs_every_module_on_fewer_tokens(pipe):
    x, summary = cached(pipe, ToMe(ratio=0.5))
    assert modules_run(summary) == [4] * STEPS and 0.4 < summary.compute_fraction < 0.75
    assert (cached(pipe, ToMe(ratio=0.0))[0] == 0).all() or torch.allclose(
        torch.tensor(cached(pipe, ToMe(ratio=0.0))[0]), torch.tensor(sample(pipe)), atol=2e-5
    )
    assert not (x == sample(pipe)).all()


def test_corrected_tome_merges_in_the_steps_that_are_computed(pipe):
    _, plain = cached(pipe, ToMe())
    _, summary = cached(pipe, method_named("ToMe+AdaCorrection", target_compute=0.3))
    computed = [call for call in summary.trace.calls if call.refreshed]
    share = plain.trace.calls[0].compute_fraction
    assert {call.compute_fraction for call in computed} == {share}
    assert summary.reused_steps > 0 and computed


# -- EOC and GOC ---------------------------------------------------------------------------------


def test_trend_of_both_forms():
    cached_, then, now = torch.randn(4, 3, 2), torch.tensor([[1.0, 2], [0, -4]]), None
    now = torch.tensor([[1.5, 2], [1, 0]])
    rows = torch.tensor([[0.5, 0], [0.5, 0], [1, 4], [1, 4]]).unsqueeze(1)
    assert torch.equal(trend("additive", cached_, then, now), rows.expand(4, 3, 2))
    clipped = torch.tensor([[0.5, 0], [0.5, 0], [1, -1.0]])[[0, 1, 2, 2]].unsqueeze(1)
    assert torch.allclose(trend("relative", cached_, then, now), cached_ * clipped, atol=1e-5)


def test_sources_are_those_of_fora():
    assert sources(8, 3) == [0, 1, 1, 1, 4, 4, 4, 7]


def test_eoc_corrects_what_prior_runs_had_in_common(pipe, tmp_path):
    """On a run that is the prior itself the corrected picture is nearer than the reused one."""
    calls = [{"class_labels": [3], "seed": seed} for seed in (1, 1)]
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "np"}
    path = fit_eoc(pipe, calls, output=tmp_path, intervals=(3,), progress=False, **options)
    table = load_table(pipe.transformer, str(path), "", "EOC")
    for form in ("additive", "relative"):
        theta = table.tensors[f"theta.3.{form}"]
        assert theta[[0, 1, 4, 7]].abs().max() == 0 and theta[2].abs().max() > 0
    full = sample(pipe, seed=1, labels=(3,))
    errors = []
    for method in (FORA(interval=3), EOC(interval=3, prior=str(path))):
        errors.append(float(abs(cached(pipe, method, seed=1, labels=(3,))[0] - full).mean()))
    assert errors[1] < errors[0]
    with pytest.raises(ValueError, match=r"interval must be one that .* was fitted for, \[3\]"):
        enable_cache(pipe, EOC(interval=2, prior=str(path)))


def test_goc_goes_on_as_the_last_outputs_did(pipe):
    """``f + k (f1 - f2)`` of the used outputs, in the steps that are named."""
    used = []
    module = pipe.transformer.transformer_blocks[0].attn1
    block = pipe.transformer.transformer_blocks[0]
    seen = []
    hook = module.register_forward_hook(lambda m, a, out: seen.append(out))
    method = GOC(interval=2, factor=1.2, corrected_steps=(4,))
    enable_cache(pipe, method)
    inner = block.attn1.__dict__["_cache_call_handler"]
    block.attn1.__dict__["_cache_call_handler"] = lambda *a, **k: (
        used.append(inner(*a, **k)) or used[-1]
    )
    sample(pipe)
    disable_cache(pipe)
    hook.remove()
    assert len(seen) == 5  # 0, 1, 3, 5, 7
    assert torch.allclose(used[4], seen[2] + 1.2 * (used[3] - used[2]))
    assert torch.equal(used[6], seen[3])


def test_goc_acts_on_steps_that_reuse(pipe):
    """By default it is not what FORA is."""
    assert not (cached(pipe, GOC(interval=2))[0] == cached(pipe, FORA(interval=2))[0]).all()


# -- corrected -----------------------------------------------------------------------------------


def test_corrected_methods_skip_whole_steps(pipe):
    for name in ("FORA", "GOC", "ToCa"):
        method = method_named(f"{name}+AdaCorrection", target_compute=0.5)
        x, summary = cached(pipe, method)
        assert {call.compute_fraction for call in summary.trace.calls} == {0.0, 1.0}
        assert summary.computed_steps == 4 and torch.isfinite(torch.tensor(x)).all()


def test_corrected_l2c_and_lazy(pipe, tmp_path):
    logits = torch.full((STEPS, 4), -5.0)
    router = table_file(pipe, tmp_path / "l2c.safetensors", "L2C", {"logits": logits})
    zero = {str(m): torch.zeros(STEPS, 16) for m in range(4)}
    probes = table_file(pipe, tmp_path / "lazy.safetensors", "Lazy", zero)
    for name, option in (("L2C", {"router": router}), ("Lazy", {"probes": probes})):
        method = method_named(f"{name}+AdaCorrection", target_compute=0.5, **option)
        assert cached(pipe, method)[1].computed_steps == 4
    # the first of every pair, and what the expected error asks for
    method = method_named("L2C+AdaCorrection", router=router, adacorr_tolerance=1e9)
    assert set(range(0, STEPS, 2)) <= {
        c.step_index for c in cached(pipe, method)[1].trace.calls if c.refreshed
    }


def test_reads_once_a_step_at_most(pipe, tmp_path, host_reads):
    zero = {str(m): torch.zeros(STEPS, 16) for m in range(4)}
    path = table_file(pipe, tmp_path / "lazy.safetensors", "Lazy", zero)
    sample(pipe)
    plain = len(host_reads)
    for method, most in ((Lazy(probes=path), STEPS), (FORA(), 0), (ToCa(), 0), (ToMe(), 0)):
        enable_cache(pipe, method)
        sample(pipe)  # the schedule is read once a run
        host_reads.clear()
        sample(pipe)
        assert len(host_reads) - plain <= most + 4
        host_reads.clear()
        disable_cache(pipe)


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [ToCa(), ToMe()])
def test_tokens_cannot_be_cut_out_of_rotary_attention(method):
    model = make_tiny_flux()
    assert isinstance(model, FluxTransformer2DModel)
    with pytest.raises(ValueError, match="needs diffusers' plain Attention"):
        enable_cache(model, method) if isinstance(method, ToMe) else enable_cache(
            model, ToCa(num_steps=8)
        )


def test_grids_that_do_not_fit_are_refused(pipe):
    with pytest.raises(ValueError, match="grid must be"):
        cached(pipe, ToMe(grid=(2, 4)))


def test_a_bare_model_is_told_its_steps(pipe):
    with pytest.raises(ValueError, match="num_steps must be given for FORA"):
        enable_cache(pipe.transformer, FORA())
    with pytest.raises(ValueError, match="scheduler must be given for ToMe"):
        enable_cache(pipe.transformer, method_named("ToMe+AdaCorrection"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FORA(interval=0), "interval must be at least 1"),
        (lambda: L2C(compute=0.4), "compute must be finite and at least 0.5"),
        (lambda: Lazy(laziness=2), "laziness must be"),
        (lambda: ToCa(fresh_ratio=-1), "fresh_ratio must be"),
        (lambda: ToMe(ratio=0.9), "ratio must be"),
        (lambda: EOC(form="other"), "form must be one of additive, relative"),
        (lambda: GOC(factor=-1), "factor must be"),
        (lambda: FORA(correction=1), "correction must be"),
        (lambda: method_named("FORA", rel_l1_thresh=0.1), "rel_l1_thresh is an option of"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_names_and_flat_options():
    assert {each.label for each in MODULE_METHODS} == {
        "FORA", "L2C", "Lazy", "ToCa", "ToMe", "EOC", "GOC",
    }  # fmt: skip
    method = method_named("FORA+AdaCorrection", interval=2, target_compute=0.5)
    assert method.name == "FORA+AdaCorrection"
    assert method_named(method.name, **{
        k: v for k, v in method.to_dict().items() if k not in ("use_cache", "enable_adacorrection")
    }) == method  # fmt: skip
    assert Auto().name == "Auto"
