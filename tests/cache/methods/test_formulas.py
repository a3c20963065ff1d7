"""Every base method against its published formula, written out without the package."""

import pytest
import torch

from tests.cached import refreshed, run_cached
from tests.tiny import all_blocks, embed, euler, head, run_blocks
from xfuser_adacorr import CacheConfig, TeaPolynomial, cache_summary, enable_cache

STEPS = 20


def test_fb_follows_its_formula(sampler):
    model, threshold, computed, memory = sampler.transformer, 0.45, [], {}

    def velocity(inputs, index, last):
        h, e, shared = embed(model, inputs)
        e1, h1 = all_blocks(model)[0](h, e, **shared)
        r = h1 - h
        hit = index > 0 and ((memory["r"] - r).abs().mean() / memory["r"].abs().mean() < threshold)
        computed.append(not hit)
        if not hit:
            out, _ = run_blocks(all_blocks(model)[1:], h1, e1, shared)
            memory.update(r=r, residual=out - h1)
        return head(model, h1 + memory["residual"], shared)

    expected = euler(sampler, velocity, STEPS)
    x, summary = run_cached(sampler, CacheConfig(use_cache="Fb", rel_l1_thresh=threshold))
    assert refreshed(summary) == computed
    assert 1 < sum(computed) < STEPS
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_tea_follows_its_formula(sampler):
    model, threshold, computed, memory = sampler.transformer, 0.15, [], {"a": 0.0}

    def velocity(inputs, index, last):
        h, e, shared = embed(model, inputs)
        f = all_blocks(model)[0].norm1(h, emb=shared["temb"])[0]
        if index > 0:
            memory["a"] += float((f - memory["f"]).abs().mean() / memory["f"].abs().mean())
        memory["f"] = f
        hit = index > 0 and not last and memory["a"] < threshold
        computed.append(not hit)
        if not hit:
            out, _ = run_blocks(all_blocks(model), h, e, shared)
            memory.update(a=0.0, residual=out - h)
        return head(model, h + memory["residual"], shared)

    expected = euler(sampler, velocity, STEPS)
    x, summary = run_cached(sampler, CacheConfig(use_cache="Tea", rel_l1_thresh=threshold))
    assert refreshed(summary) == computed
    assert computed[0] and computed[-1] and not computed[1]
    assert 2 < sum(computed) < STEPS
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_tea_uses_the_published_polynomial_for_flux_dev_only(transformer):
    from xfuser_adacorr.model_executor.cache.diffusers_adapters.flux import FLUX

    dev = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24}
    polynomial = FLUX.published_polynomial(dev)
    for x, expected in ((0.05, 0.181), (0.1, 0.207), (0.2, 0.262)):
        assert polynomial(x) == pytest.approx(expected, abs=5e-4)
    assert FLUX.published_polynomial(transformer.config) is None


def test_tea_polynomial_is_clamped_at_zero_and_to_its_fit_range():
    polynomial = TeaPolynomial(coefficients=(1.0, -0.5), domain=(0.1, 0.8))
    assert polynomial(0.2) == 0.0
    assert polynomial(5.0) == pytest.approx(0.3)


def fast_reference(model, threshold, computed):
    """Per-block test on the input that the stand-ins of the earlier blocks predict."""
    blocks, memory = all_blocks(model), {}

    def velocity(inputs, index, last):
        h, e, shared = embed(model, inputs)
        run = [True] * len(blocks)
        if index > 0:
            predicted = h
            for n in range(len(blocks)):
                reference = memory[n]["h"]
                delta = (predicted - reference).norm() / reference.norm()
                run[n] = last or bool(delta > threshold)
                predicted = predicted + memory[n]["dh"]
        computed.append(run)
        for n, block in enumerate(blocks):
            if run[n]:
                e_out, h_out = block(h, e, **shared)
                memory[n] = {"h": h, "dh": h_out - h, "de": e_out - e}
                h, e = h_out, e_out
            else:
                h, e = h + memory[n]["dh"], e + memory[n]["de"]
        return head(model, h, shared)

    return velocity


def test_fast_follows_its_formula(sampler):
    # a strong second block makes the later blocks' inputs large and their relative changes small
    sampler.transformer.transformer_blocks[1].ff.net[2].weight.mul_(30.0)
    computed = []
    expected = euler(sampler, fast_reference(sampler.transformer, 0.1, computed), STEPS)
    x, summary = run_cached(sampler, CacheConfig(use_cache="Fast", rel_l1_thresh=0.1))
    assert refreshed(summary) == [all(run) for run in computed]
    assert any(any(run) and not all(run) for run in computed), "no call was computed in part"
    assert any(not any(run) for run in computed), "no call was reused in full"
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_fast_runs_every_real_block_at_the_first_and_the_last_step(sampler):
    _, summary = run_cached(sampler, CacheConfig(use_cache="Fast", rel_l1_thresh=10.0))
    fractions = [call.compute_fraction for call in summary.trace.calls]
    assert fractions == [1.0] + [0.0] * (STEPS - 2) + [1.0]


def test_fast_replaces_blocks_by_their_fitted_maps(sampler, tmp_path):
    from xfuser_adacorr.model_executor.cache.calibration.fast import save_fast_maps

    model, maps = sampler.transformer, {}
    generator = torch.Generator().manual_seed(3)
    for n in range(len(all_blocks(model))):
        for stream in ("hidden_states", "encoder_hidden_states"):
            maps[f"blocks.{n}.{stream}.weight"] = 0.01 * torch.randn(32, 32, generator=generator)
            maps[f"blocks.{n}.{stream}.bias"] = 0.01 * torch.randn(32, generator=generator)
    path = tmp_path / "maps.safetensors"
    save_fast_maps(path, maps, model, {})

    def velocity(inputs, index, last):
        h, e, shared = embed(model, inputs)
        if index in (0, STEPS - 1):
            h, _ = run_blocks(all_blocks(model), h, e, shared)
        else:
            for n in range(len(all_blocks(model))):
                key = f"blocks.{n}.hidden_states"
                h = h + h @ maps[f"{key}.weight"].T + maps[f"{key}.bias"]
        return head(model, h, shared)

    expected = euler(sampler, velocity, STEPS)
    config = CacheConfig(use_cache="Fast", rel_l1_thresh=10.0, calibration=str(path))
    x, _ = run_cached(sampler, config)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_fast_static_tokens_bypass_the_blocks(sampler):
    """With every block due, static tokens take the stack's last residual, the others the blocks."""
    model, tau, memory = sampler.transformer, 0.3, {}

    def velocity(inputs, index, last):
        h, e, shared = embed(model, inputs)
        blocks = all_blocks(model)
        if index == 0 or last:
            out, _ = run_blocks(blocks, h, e, shared)
            memory.update(seen=h.clone(), residual=out - h)
            return head(model, out, shared)
        motion = (h - memory["seen"]).square().sum(-1)[0]
        moving = (motion > tau * motion.max()).nonzero()[:, 0]
        memory.setdefault("moving", []).append(len(moving))
        cos, sin = shared["image_rotary_emb"]
        rows = torch.cat([torch.arange(e.shape[1]), moving + e.shape[1]])
        subset = {**shared, "image_rotary_emb": (cos[rows], sin[rows])}
        part, _ = run_blocks(blocks, h[:, moving], e, subset)
        out = h + memory["residual"]
        out[:, moving] = part
        memory["seen"][:, moving] = h[:, moving]
        return head(model, out, shared)

    expected = euler(sampler, velocity, STEPS)
    config = CacheConfig(
        use_cache="Fast", rel_l1_thresh=0.0, static_tokens=True, motion_threshold=tau
    )
    x, summary = run_cached(sampler, config)
    assert min(memory["moving"]) < 16
    assert summary.compute_fraction < 1.0
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_cache", ["Fb", "Tea", "Fast"])
def test_zero_threshold_never_hits_and_is_bit_equal(sampler, use_cache):
    plain = sampler.run(STEPS)
    x, summary = run_cached(sampler, CacheConfig(use_cache=use_cache, rel_l1_thresh=0.0))
    assert summary.compute_fraction == 1.0
    assert torch.equal(x, plain)


def test_fb_hit_keeps_the_first_block(sampler):
    """On identical inputs a hit must return the computed output, not one without block 0."""
    model = sampler.transformer
    enable_cache(model, "Fb", rel_l1_thresh=0.1, num_steps=50)
    first = sampler.call(sampler.noise(), 900.0)
    second = sampler.call(sampler.noise(), 899.9)
    assert [c.refreshed for c in cache_summary(model).trace.calls] == [True, False]
    torch.testing.assert_close(second, first, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("use_cache", ["Fb", "Tea", "Fast"])
def test_warmup_steps_are_computed(sampler, use_cache):
    config = CacheConfig(use_cache=use_cache, rel_l1_thresh=10.0, warmup_steps=4)
    _, summary = run_cached(sampler, config)
    assert refreshed(summary)[:5] == [True] * 4 + [False]


@pytest.mark.parametrize("use_cache", ["Fb", "Tea", "Fast"])
def test_decisions_are_taken_in_float32_on_half_precision_models(sampler, use_cache):
    model = sampler.transformer.to(torch.bfloat16)
    enable_cache(model, use_cache, rel_l1_thresh=0.45, scheduler=sampler.scheduler)
    x = sampler.noise().bfloat16()
    sampler.scheduler.set_timesteps(4)
    for t in sampler.scheduler.timesteps:
        v = sampler.call(x, t)
        assert v.dtype == torch.bfloat16
        x = sampler.scheduler.step(v, t, x, return_dict=False)[0]
    signals = [c.base_signal for c in cache_summary(model).trace.calls if c.base_signal is not None]
    assert signals and all(torch.tensor(s).bfloat16().item() != s for s in signals)
