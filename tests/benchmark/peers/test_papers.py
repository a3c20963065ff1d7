"""Methods written from their papers, against the formulas written out in numpy."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from benchmark.models.package import read_places
from benchmark.peers import bag, di_cache, tc_pade
from benchmark.peers.bud_cache import first_mask
from benchmark.peers.dp_cache import path_costs, taylor_weights
from benchmark.peers.easy_cache import EasyCache, LazyCache
from benchmark.peers.l2p import HAND_MADE, L2P, causal_ridge, even, hand_made, trained_weights
from benchmark.peers.mean_cache import MeanCache, edge_costs, edge_weights
from benchmark.peers.olss import fitted, longest_jumps, project, searched_path
from benchmark.peers.paths import annealed_mask, cheapest_path, cheapest_path_of_pairs
from benchmark.peers.sampler_step import Walk, noise_levels, predicts_velocity
from benchmark.peers.spectrum import Spectrum, chebyshev_weights, line_weights
from benchmark.small.noise import BETAS
from xfuser_adacorr.models import RectifiedFlowScheduler

RANDOM = np.random.default_rng(0)


def flow_walk(steps=10, index=0, **more):
    return Walk(levels=[(i / steps, 1 - i / steps) for i in range(steps + 1)], flow=True, **more)


def schedulers():
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    dpm = DPMSolverMultistepScheduler(**BETAS, algorithm_type="dpmsolver++")
    return flow, RectifiedFlowScheduler(use_timestep_transform=False), DDIMScheduler(**BETAS), dpm


# -- the sampler's step ------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", schedulers(), ids=lambda s: type(s).__name__)
def test_noise_levels_are_those_that_the_package_reads(scheduler):
    scheduler.set_timesteps(8)
    places = read_places(scheduler)
    levels = noise_levels(scheduler)
    assert len(levels) == 9
    for (a, s), step in zip(levels, places.steps, strict=False):
        assert s == pytest.approx(step.sigma, abs=1e-6)
        assert a + s == pytest.approx(step.mass, abs=1e-6)
    assert levels[-1][1] == pytest.approx(places.sigmas[-1], abs=1e-6)


def test_a_predicted_noise_becomes_the_velocity_and_comes_back():
    picture, noise = torch.randn(2, 4, 5).double().unbind(0)
    a, s = 0.6, 0.8
    walk = Walk(levels=[(a, s), (1.0, 0.0)], flow=False, latents=a * picture + s * noise)
    velocity = walk.seen(noise)
    assert torch.allclose(velocity, noise - picture)
    assert torch.allclose(walk.output(velocity), noise)
    t = walk.times[0]
    assert torch.allclose(walk.y, (1 - t) * picture + t * noise)


def test_the_package_s_own_sign_of_open_sora_is_turned():
    scheduler = RectifiedFlowScheduler()
    assert predicts_velocity(scheduler)
    walk = flow_walk(sign=-1.0)
    output = torch.randn(3)
    assert torch.equal(walk.seen(output), -output)
    assert torch.equal(walk.output(walk.seen(output)), output)


# -- Spectrum ----------------------------------------------------------------------------------


def test_the_chebyshev_forecast_is_the_ridge_solution():
    known, target, steps, degree, ridge = [0, 1, 2, 3, 4, 6, 9], 12, 20, 4, 0.1
    values = RANDOM.normal(size=(len(known), 3))
    tau = [2 * k / steps - 1 for k in known]
    design = np.array([[np.cos(m * np.arccos(t)) for m in range(degree + 1)] for t in tau])
    stacked = np.concatenate([design, np.sqrt(ridge) * np.eye(degree + 1)])
    padded = np.concatenate([values, np.zeros((degree + 1, 3))])
    coefficients = np.linalg.lstsq(stacked, padded, rcond=None)[0]
    aim = [np.cos(m * np.arccos(2 * target / steps - 1)) for m in range(degree + 1)]
    weights = chebyshev_weights(known, target, steps, degree, ridge)
    assert np.allclose(weights @ values, aim @ coefficients)


def test_spectrum_s_published_settings_compute_14_and_10_of_50_steps():
    for growth, expected in ((0.75, 14), (3.0, 10)):
        policy, walk = Spectrum(warm_up=5, growth=growth), flow_walk(50)
        for walk.index in range(50):
            if policy.computes(walk):
                walk.computed.append(walk.index)
        assert len(walk.computed) == expected
        gaps = np.diff(walk.computed[4:])
        assert list(gaps) == sorted(gaps)


def test_a_line_goes_on_through_the_last_two_values():
    assert np.allclose(line_weights([0, 2, 5], 7) @ [0.0, 4.0, 10.0], 14.0)
    assert list(line_weights([3], 5)) == [1.0]


# -- L2P ---------------------------------------------------------------------------------------


def test_l2p_solves_a_causal_ridge_for_every_step():
    vectors = RANDOM.normal(size=(6, 40))
    weights = causal_ridge(vectors @ vectors.T, ridge=0.01)
    assert not np.triu(weights).any()
    for t in range(1, 6):
        past = vectors[:t]
        penalty = 0.01 * (past**2).sum() / t
        stacked = np.concatenate([past.T, np.sqrt(penalty) * np.eye(t)])
        aim = np.concatenate([vectors[t], np.zeros(t)])
        assert np.allclose(weights[t, :t], np.linalg.lstsq(stacked, aim, rcond=None)[0])


def test_l2p_is_trained_by_adam_on_all_one_step_forecasts():
    outputs = torch.randn(6, 40, dtype=torch.float64)
    outputs = outputs / outputs.square().mean().sqrt()
    earlier = torch.tril(torch.ones(6, 6, dtype=torch.float64), diagonal=-1)
    weights = torch.diag(torch.ones(5, dtype=torch.float64), diagonal=-1).requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=0.01)
    with torch.enable_grad():
        for _ in range(30):
            forecast = (weights * earlier) @ outputs
            loss = (forecast - outputs)[1:].square().mean(1).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    gram = (outputs @ outputs.T / 40).numpy()
    expected = (weights.detach() * earlier).numpy()
    assert np.allclose(trained_weights(gram, epochs=30), expected, atol=1e-6)


def test_l2p_s_forecasts_enter_its_history():
    weights = np.array([[0, 0, 0], [2, 0, 0], [1, 3, 0]], dtype=float)
    policy, walk = L2P(weights, (0,)), flow_walk()
    policy.computed(walk, torch.ones(2))
    walk.index = 1
    assert torch.equal(policy.forecast(walk), torch.full((2,), 2.0))
    walk.index = 2
    assert torch.equal(policy.forecast(walk), torch.full((2,), 7.0))


def test_l2p_s_schedules_are_the_paper_s_at_50_steps_and_shrink_with_the_run():
    for interval, places in HAND_MADE.items():
        assert hand_made(interval, 50) == places
        assert max(hand_made(interval, 20)) < 20
    assert even(5, 20) == (0, 4, 8, 12, 16)


# -- OLSS --------------------------------------------------------------------------------------


def trajectories(steps=8, size=60):
    """Latents y_0 to y_T and outputs as rows, and the Gram matrix."""
    times = np.linspace(1, 0, steps + 1)
    curve = RANDOM.normal(size=(4, size))
    outputs = np.array([sum(c * t**k for k, c in enumerate(curve)) for t in times[:-1]])
    latents = [RANDOM.normal(size=size)]
    for v, h in zip(outputs, np.diff(times), strict=True):
        latents.append(latents[-1] + h * v)
    vectors = np.concatenate([latents, outputs])
    return vectors, vectors @ vectors.T / size, times


def test_olss_projects_latents_onto_the_start_and_the_outputs_so_far():
    steps = 8
    vectors, gram, _ = trajectories(steps)
    path = [0, 3, 5]
    weights = fitted(gram, steps, path)
    assert [len(w) for w in weights] == [2, 3, 4]
    for k, target in enumerate([3, 5, steps]):
        basis = vectors[[0, *(steps + 1 + j for j in path[: k + 1])]]
        expected = np.linalg.lstsq(basis.T, vectors[target], rcond=None)[0]
        assert np.allclose(weights[k] @ basis, expected @ basis, atol=1e-6)


def test_olss_takes_the_longest_jumps_within_a_bound_and_meets_the_budget():
    steps = 8
    _, gram, _ = trajectories(steps)
    bound = 0.5 * project(gram, [0, steps + 1], steps)[1]
    path = longest_jumps(gram, steps, bound)
    for k, (start, stop) in enumerate(itertools.pairwise([*path, steps])):
        basis = [0, *(steps + 1 + j for j in path[: k + 1])]
        errors = {n: project(gram, basis, n)[1] for n in range(start + 1, steps + 1)}
        within = [n for n, error in errors.items() if error <= bound]
        assert stop == max(within, default=start + 1)
    for computed in (2, 4, 6):
        found = searched_path(gram, steps, computed)
        assert found[0] == 0 and len(found) == len(set(found)) == computed


# -- MeanCache ---------------------------------------------------------------------------------


def test_meancache_s_average_velocity_is_the_paper_s():
    times = np.array([1.0, 0.9, 0.75, 0.6, 0.4])
    y, v = RANDOM.normal(size=(5, 3)), RANDOM.normal(size=(5, 3))
    start, stop, span = 2, 4, 2
    t, r, s = times[start], times[start - span], times[stop]
    slope = (y[start] - y[start - span] - (t - r) * v[start - span]) / (t - r) ** 2
    w = edge_weights(times, start, stop, span)
    moved = y[start] - y[start - span]
    found = w["v"] * v[start] + w["v_back"] * v[start - span] + w["moved"] * moved
    assert np.allclose(found, v[start] + (s - t) * slope)
    assert edge_weights(times, 2, 4, 1) == {"v": 1.0, "v_back": 0.0, "moved": 0.0}


def test_meancache_s_edge_cost_is_the_distance_from_the_true_average_velocity():
    steps = 8
    vectors, gram, times = trajectories(steps)
    costs, spans = edge_costs(gram, times)
    y, v = vectors[: steps + 1], vectors[steps + 1 :]
    start, stop = 4, 7
    true = (y[stop] - y[start]) / (times[stop] - times[start])
    errors = []
    for span in range(1, 5):
        w = edge_weights(times, start, stop, span)
        back = start - span
        average = v[start] + w["v_back"] * v[back] + w["moved"] * (y[start] - y[back])
        errors.append(np.sqrt(np.mean((average - true) ** 2)))
    assert costs[start, stop] == pytest.approx(min(errors), rel=1e-6)
    assert spans[start, stop] == 1 + np.argmin(errors)
    assert not costs.diagonal(1).any()


def test_meancache_follows_a_velocity_that_changes_evenly():
    """Its slope is half the derivative, as the mean over a step of a line in time is."""
    steps, slope = 10, torch.tensor([2.0, -1.0])
    policy, walk = MeanCache([0, 1, 2], [1, 1, 3]), flow_walk(steps)
    times, y = walk.times, torch.zeros(2, dtype=torch.float64)
    velocities = [slope * t for t in times]
    for walk.index in range(3):  # exact steps: the mean velocity of each
        walk.latents = y
        policy.computed(walk, velocities[walk.index])
        walk.computed.append(walk.index)
        mean = (velocities[walk.index] + velocities[walk.index + 1]) / 2
        y = y + (times[walk.index + 1] - times[walk.index]) * mean
    walk.index, walk.latents = 3, y
    back = 0
    moved = (y - 0) / (times[3] - times[back])
    expected = velocities[2] + (moved - velocities[back]) / (times[3] - times[back]) * (
        times[4] - times[3]
    )
    assert torch.allclose(policy.forecast(walk), expected)


# -- DPCache -----------------------------------------------------------------------------------


def test_taylor_weights_are_nested_differences():
    anchors, target = [1, 3, 7], 10
    f = RANDOM.normal(size=3)
    before, slope = (f[1] - f[0]) / 2, (f[2] - f[1]) / 4
    curvature = (slope - before) / 4
    expected = f[2] + 3 * slope + 3**2 / 2 * curvature
    assert taylor_weights(anchors, target, 2) @ f == pytest.approx(expected)
    assert taylor_weights(anchors, target, 1) @ f == pytest.approx(f[2] + 3 * slope)
    assert taylor_weights([4], 6, 2) @ [5.0] == 5.0


def test_dpcache_s_cost_sums_the_errors_between_two_anchors():
    outputs = RANDOM.normal(size=(7, 30))
    costs = path_costs(outputs @ outputs.T / 30, order=1)
    expected = 0.0
    for target in (4, 5):
        forecast = outputs[3] + (target - 3) / 2 * (outputs[3] - outputs[1])
        expected += np.sqrt(np.mean((forecast - outputs[target]) ** 2))
    assert costs[1, 3, 6] == pytest.approx(expected)
    assert costs[1, 3, 4] == 0.0


# -- searches ----------------------------------------------------------------------------------


def test_the_cheapest_path_is_that_of_all_paths():
    nodes, edges = 7, 4
    cost = RANDOM.random((nodes, nodes)) ** 4
    total = {
        inner: sum(cost[edge] for edge in itertools.pairwise((0, *inner, nodes - 1)))
        for inner in itertools.combinations(range(1, nodes - 1), edges - 1)
    }
    assert cheapest_path(cost, edges) == (0, *min(total, key=total.get))


def test_the_cheapest_path_of_pairs_is_that_of_all_paths():
    nodes, edges = 7, 4
    cost = RANDOM.random((nodes, nodes, nodes))

    def total(inner):
        path = (0, 0, *inner, nodes - 1)
        return sum(cost[path[k : k + 3]] for k in range(len(path) - 2))

    inner = min(itertools.combinations(range(1, nodes - 1), edges - 1), key=total)
    assert cheapest_path_of_pairs(cost, edges) == (0, *inner)


def test_an_annealed_mask_keeps_its_size_and_forced_steps_and_gets_better():
    aim, asked = {0, 1, 4, 9, 15}, Counter()

    def score(mask):
        asked[mask] += 1
        return 0.05 * len(aim ^ set(mask))

    start, forced = first_mask(5, 20)
    found = annealed_mask(score, start, 20, 200, forced)
    assert {len(mask) for mask in asked} == {5}
    assert all(0 in mask for mask in asked)
    assert score(found) == min(score(mask) for mask in list(asked)) < score(start)


# -- EasyCache and LazyCache -------------------------------------------------------------------


def test_easycache_skips_while_the_expected_change_is_below_the_threshold():
    """The rule written out with numbers, on a run whose tensors have one element."""
    x, o = [10.0, 9.0, 7.0, 6.5, 6.0, 4.0], [1.0, 1.5, 2.5, 3.0, 3.2, 4.0]
    policy, walk = EasyCache(threshold=0.3, start=0.0, end=1.0), flow_walk(6)
    rate = summed = last = previous = None
    for walk.index in range(6):
        walk.latents = torch.tensor([x[walk.index]])
        computes = walk.index == 0 or policy.computes(walk)
        if walk.index == 0:
            expected, summed = True, 0.0
        elif rate is None:
            expected = True
        else:
            summed += rate * abs(x[walk.index] - last) / abs(previous)
            expected = summed >= 0.3
            summed = 0.0 if expected else summed
        assert computes == expected
        if computes:
            if last is not None:
                rate = abs(o[walk.index] - previous) / abs(x[walk.index] - last)
            last, previous = x[walk.index], o[walk.index]
            policy.computed(walk, torch.tensor([o[walk.index]]))
        else:
            reused = x[walk.index] + previous - last
            assert policy.forecast(walk).item() == pytest.approx(reused)


def test_lazycache_reuses_the_way_to_the_predicted_picture():
    policy, walk = LazyCache(threshold=1.0), flow_walk(10)
    walk.latents, velocity = torch.tensor([2.0]), torch.tensor([0.5])
    policy.computed(walk, velocity)
    walk.index, walk.latents = 1, torch.tensor([1.9])
    picture = 1.9 + (2.0 - 1.0 * 0.5) - 2.0
    assert policy.forecast(walk).item() == pytest.approx((1.9 - picture) / 0.9)


# -- BAG ---------------------------------------------------------------------------------------


def test_the_gate_sees_the_six_numbers_of_the_paper():
    seen = bag.features(step=6, steps=20, spent=3, computed=8, last=4, since=0.2, moved=0.1)
    assert seen == pytest.approx([8 / 20, 5 / 8, 5 / 14, 2, 0.2, 0.1])
    assert sum(p.numel() for p in bag.build_gate().parameters()) < 1000


@pytest.mark.parametrize("wish", [0.0, 1.0])
def test_a_gate_spends_its_budget_exactly(wish):
    inputs = torch.rand(50, 6)
    gate = bag.trained_gate(inputs, torch.full((50,), wish))
    policy, walk = bag.BAG(gate, 4), flow_walk(10)
    for walk.index in range(10):
        walk.latents = torch.full((3,), 10.0 - walk.index)
        if walk.index == 0 or policy.computes(walk):
            walk.computed.append(walk.index)
            policy.computed(walk, walk.latents)
    expected = [0, 1, 2, 3] if wish else [0, 7, 8, 9]
    assert walk.computed == expected


# -- DiCache and TC-Pade -----------------------------------------------------------------------


def test_dicache_follows_the_residuals_as_far_as_its_probe_moved():
    policy = di_cache.DiCache(threshold=1.0, retained=0.0, steps=10)
    old, new, old_probe, new_probe = torch.randn(4, 5).unbind(0)
    policy.residuals, policy.probe_residuals = [old, new], [old_probe, new_probe]
    probe = old_probe + 1.3 * (new_probe - old_probe)
    assert torch.allclose(policy.residual(probe), old + 1.3 * (new - old), atol=1e-5)
    far = old_probe + 9.0 * (new_probe - old_probe)
    assert torch.allclose(policy.residual(far), old + 1.5 * (new - old), atol=1e-5)


def test_dicache_sums_the_change_of_the_probe_until_the_threshold():
    policy, one = di_cache.DiCache(threshold=0.25, retained=0.0, steps=10), torch.ones(1)
    probes = [1.0, 1.1, 1.2, 1.5, 1.6]
    summed, expected = 0.0, []
    for step, probe in enumerate(probes):
        change = abs(probe - probes[step - 1]) / probes[step - 1] if step else 0.0
        summed += change
        computed = step == 0 or summed >= 0.25
        summed = 0.0 if computed else summed
        expected.append(computed)
        found = policy.reused(step, one, probe * one)
        assert (found is None) == computed
        if computed:
            policy.computed(step, one, probe * one, 2 * one)
    assert expected == [True, False, False, True, False]


def test_the_pade_forecast_is_the_published_one():
    before, newest = RANDOM.normal(size=(2, 50))
    change, size = np.abs(newest - before), (np.abs(newest) + np.abs(before)) / 2
    d = np.exp(-5 * change / (size + 1e-7))
    forecast = (2 * d * newest - d * before) / (1 - 0.1 * d)
    middle = 0.6 * newest + 0.4 * before
    reach = np.maximum(change / 2, size / 10)
    forecast = middle + np.clip(forecast - middle, -reach, reach)
    expected = (0.7 * d + 0.3) * forecast + (0.7 - 0.7 * d) * middle
    found = tc_pade.pade([torch.tensor(before), torch.tensor(newest)], steady=True)
    assert np.allclose(found.numpy(), expected)


def test_tc_pade_turns_with_the_direction_of_the_differences():
    straight = [torch.tensor([0.0, float(k)]) for k in range(3)]
    assert tc_pade.turning(straight) == pytest.approx(0.0, abs=1e-5)
    back = [torch.zeros(2), torch.tensor([0.0, 1.0]), torch.zeros(2)]
    assert tc_pade.turning(back) == pytest.approx(1.0, abs=1e-5)


def test_tc_pade_uses_no_slope_in_the_first_third_and_more_of_it_in_the_last():
    policy = tc_pade.TCPade(interval=4, turn=2.0, start=2, steps=20)
    policy.residuals = [torch.randn(3) for _ in range(3)]
    before, newest = policy.residuals[-2:]
    assert torch.allclose(policy.forecast(5), 0.9 * newest + 0.1 * before)
    middle = policy.forecast(10)
    assert torch.allclose(policy.forecast(18), middle + 0.3 * (newest - before))
