"""AdaCache's published rule written out in float64, and FLUX and the sampling loop under it."""

from itertools import pairwise

import numpy as np

from tests.tiny import all_blocks, embed, euler, head, run_blocks

STEPS = 18
EVERY_STEP = {1.0: 1}


class PublishedRule:
    """The schedule and the metric of AdaCache in float64; steps are counted from 1."""

    def __init__(self, codebook, steps=STEPS, *, frames=None, divisor=1.0):
        self.codebook, self.steps = codebook, steps
        self.frames, self.divisor = frames, divisor
        self.step = self.previous = 0
        self.rate, self.motion, self.residual = 1, 1.0, None
        self.computed, self.changes = [], []

    def begin_step(self):
        self.step += 1
        self.active = self.step == self.previous + self.rate
        self.active = self.active or self.step in (1, self.steps - 1, self.steps)
        self.computed.append(self.active)
        return self.active

    def measure(self, p):
        p, rate = p.double(), self.rate
        if self.residual is not None:
            change = (self.residual - p).abs().sum() / self.residual.abs().sum() / rate
            if self.frames is not None:
                change = change * self.motion_factor(p, rate)
            self._decide(float(change))
        self.residual, self.previous = p, self.step

    def _decide(self, change):
        self.changes.append(change)
        self.rate = next(
            (value for key, value in self.codebook.items() if change < key),
            list(self.codebook.values())[-1],
        )

    def _within(self):
        return 4 * self.steps / 30 <= self.step <= 26 * self.steps / 30

    def motion_factor(self, p, rate):
        motion = 1.0
        frames = p.unflatten(1, (self.frames, -1))
        later, earlier = frames[:, 1:], frames[:, :-1]
        measured = (later - earlier).abs().sum() / (later.abs().sum() + earlier.abs().sum())
        if self._within():
            motion = float((measured / 0.385) ** 8 / self.divisor)
        gradient = 10 * (motion - self.motion) / rate
        self.motion = motion
        return motion + abs(gradient)


def quantile_codebook(changes, rates):
    """Thresholds that split what an uncached run measures evenly among the rates."""
    shares = np.arange(1, len(rates)) / len(rates)
    return dict(zip([*np.quantile(changes, shares).tolist(), 1e9], rates, strict=True))


def assert_varied(computed):
    """At least two different gaps lie between the computed steps, besides the forced ones."""
    at = [i for i, active in enumerate(computed) if active]
    assert len({b - a for a, b in pairwise(at[:-2])}) > 1


def flux_reference(model, rule):
    """FLUX under AdaCache; p is the whole residual of the middle block."""
    memory, blocks = {}, all_blocks(model)
    middle = (len(blocks) - 1) // 2

    def velocity(inputs, index, last):
        h, e, shared = embed(model, inputs)
        if rule.begin_step():
            before, e = run_blocks(blocks[:middle], h, e, shared)
            after, e = run_blocks(blocks[middle : middle + 1], before, e, shared)
            rule.measure(after - before)
            out, _ = run_blocks(blocks[middle + 1 :], after, e, shared)
            memory["residual"] = out - h
        return head(model, h + memory["residual"], shared)

    return velocity


def flux_codebook(sampler, rates=(5, 3, 2)):
    rule = PublishedRule(EVERY_STEP)
    euler(sampler, flux_reference(sampler.transformer, rule), STEPS)
    return quantile_codebook(rule.changes, rates)
