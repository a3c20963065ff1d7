"""AdaCorrection as printed: its weight, its blend, and what bounds the deviation."""

from types import SimpleNamespace

import pytest
import torch

from tests.cached import run_cached
from tests.tiny import FluxSampler, all_blocks, embed, euler, head, make_tiny_flux
from xfuser_adacorr import CacheConfig
from xfuser_adacorr.model_executor.cache.methods.base import BlockCall, Decision, StackMethod
from xfuser_adacorr.model_executor.cache.methods.literal import LiteralBlend, literal_weight

STEPS = 20
FAMILY = SimpleNamespace(output_stream="hidden_states")


class Computing(StackMethod):
    """A base method that keeps nothing: all blends are of what the literal mode itself keeps."""

    def new_state(self):
        return None

    def after_call(self, state, step, decision):
        pass

    def run_block(self, state, call, decision):
        return call.run()


def blend_call(literal, state, hidden, fresh, refreshed):
    """One call of a model with one block; returns the blended stream."""
    streams = {"hidden_states": hidden}
    call = BlockCall(0, 1, None, {}, streams, lambda: {"hidden_states": fresh})
    decision = Decision(refreshed, "first" if refreshed else "reuse")
    literal.after_call(state, None, decision)
    return literal.run_block(state, call, decision)["hidden_states"]


def test_every_block_is_computed(sampler):
    config = CacheConfig(
        use_cache="Fast", rel_l1_thresh=0.3, enable_adacorrection=True, adacorr_mode="literal"
    )
    _, summary = run_cached(sampler, config)
    assert summary.compute_fraction == 1.0
    assert summary.reused_steps > 0
    reused = [c for c in summary.trace.calls if not c.refreshed]
    assert all(0.0 <= c.weight <= 1.0 for c in reused if c is not summary.trace.calls[-1])
    assert sum(c.weight is not None for c in reused) >= len(reused) - 1


def test_weight_follows_the_papers_formula():
    generator = torch.Generator().manual_seed(0)
    h, previous = torch.randn(2, 1, 6, 8, generator=generator) * 0.2
    d_temp = (h.double() - previous.double()).norm(dim=-1).mean()
    d_sp = h.double().std(-1, unbiased=False).mean()
    expected = min(max(0.7 * (d_temp**2 + 0.3 * d_sp), 0.0), 1.0)
    assert literal_weight(h, previous, 0.7, 0.3).item() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.05, 0.3, 1.0, 3.0])
def test_deviation_is_bounded_on_lipschitz_blocks(gamma):
    """||h^ - B(h)|| <= (1 - w) * Lip * accumulated change of the input since it was fresh."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    lipschitz = torch.linalg.matrix_norm(weight, 2).item()  # tanh is 1-Lipschitz
    literal = LiteralBlend(Computing(), gamma, 0.2, FAMILY)
    state, travelled, previous, bound_used = literal.new_state(), 0.0, None, []
    hidden = 0.3 * torch.randn(1, 5, 8, generator=generator, dtype=torch.float64)
    for t in range(12):
        w = 1.0
        if previous is not None:
            hidden = hidden + 0.05 * torch.randn(1, 5, 8, generator=generator, dtype=torch.float64)
            travelled += (hidden - previous).norm().item()
            w = literal_weight(hidden, previous, gamma, 0.2).item()
        fresh = torch.tanh(hidden @ weight)
        out = blend_call(literal, state, hidden, fresh, t == 0)
        deviation = (out - fresh).norm().item()
        assert deviation <= (1.0 - w) * lipschitz * travelled + 1e-6
        bound_used.append(deviation)
        previous = hidden
    assert gamma > 2.0 or max(bound_used) > 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_blend_of_equals_is_equal(dtype):
    """In the type itself ``(1 - w) x + w x`` would be off by up to two roundings."""
    literal = LiteralBlend(Computing(), 0.3, 0.0, FAMILY)
    generator = torch.Generator().manual_seed(0)
    hidden, out = torch.randn(2, 1, 64, 8, generator=generator).to(dtype)
    state = literal.new_state()
    blend_call(literal, state, hidden[None], out[None], True)
    blended = blend_call(literal, state, hidden[None] + 0.3, out[None], False)
    (weight,) = state.weights
    assert 0.0 < weight.item() < 1.0
    assert blended.dtype == dtype and torch.equal(blended[0], out)


def test_blend_matches_a_naive_loop():
    """Against Algorithm 1 written out over the blocks of the real transformer."""
    sampler = FluxSampler(make_tiny_flux(3))
    model, memory, gamma, lambda_ = sampler.transformer, {}, 0.4, 0.1
    weights = []

    def velocity(inputs, index, last):
        h, e, shared = embed(model, inputs)
        forced, used = index == 0, []
        for n, block in enumerate(all_blocks(model)):
            e_new, h_new = block(h, e, **shared)
            if not forced:
                h_prev, cached_h, cached_e = memory[n]
                d_temp = (h - h_prev).norm(dim=-1).mean()
                d_sp = h.std(-1, unbiased=False).mean()
                w = (gamma * (d_temp**2 + lambda_ * d_sp)).clamp(0, 1)
                used.append(float(w))
                h_new = (1 - w) * cached_h + w * h_new
                e_new = (1 - w) * cached_e + w * e_new
            memory[n] = (h, h_new, e_new)
            h, e = h_new, e_new
        weights.append(sum(used) / len(used) if used else None)
        return head(model, h, shared)

    expected = euler(sampler, velocity, STEPS)
    config = CacheConfig(
        use_cache="Fb",
        rel_l1_thresh=100.0,
        enable_adacorrection=True,
        adacorr_mode="literal",
        adacorr_gamma=gamma,
        adacorr_lambda=lambda_,
    )
    x, summary = run_cached(sampler, config)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
    # a call's weights are read with the next decision: those of the last one are never known
    noted = [call.weight for call in summary.trace.calls[1:-1]]
    assert noted == pytest.approx(weights[1:-1], rel=1e-4)
