"""Rules and what wraps them, against tables."""

import math

import pytest
import torch

from xfuser_adacorr import AdaCorrection, Auto, Fb, Literal, Tea
from xfuser_adacorr.model_executor.cache.adacorrection.budget import Budgeted
from xfuser_adacorr.model_executor.cache.adacorrection.rule import ErrorRule
from xfuser_adacorr.model_executor.cache.engine import decide
from xfuser_adacorr.model_executor.cache.methods.base import (
    Call,
    Decision,
    Either,
    PerModel,
    Read,
    Rule,
    Signal,
    StackMethod,
    StackRule,
    Warmup,
    reuse_or_base,
)
from xfuser_adacorr.model_executor.cache.ranks import DecisionScope
from xfuser_adacorr.model_executor.cache.signals import read
from xfuser_adacorr.model_executor.cache.step import Step

STEP = Step(3, 0.5, 0.4, 5)
LAST = Step(7, 0.1, 0.0, 1)


class Told(Rule):
    """Decides what it is told, and remembers what it was asked."""

    def __init__(self, decision, signal=Signal()):  # noqa: B008
        self.decision, self.signal, self.reads, self.outcomes = decision, signal, [], []

    def measure(self, call):
        return self.signal

    def decide(self, call, read):
        self.reads.append(read)
        return self.decision

    def after_call(self, call, decision):
        self.outcomes.append((decision.compute, decision.why))


def outcome(decision):
    return decision.compute, decision.why


REUSE, BASE = Decision(False, "reuse"), Decision(True, "base")
OFFSET, FIRST = Decision(True, "offset"), Decision(True, "first")
FORCED = Decision(True, "last")


@pytest.mark.parametrize(
    ("base", "correction", "expected"),
    [
        (REUSE, REUSE, (False, "reuse")),
        (BASE, REUSE, (True, "base")),
        (REUSE, OFFSET, (True, "offset")),
        (BASE, OFFSET, (True, "base")),
        (BASE, FIRST, (True, "first")),
        (FIRST, FIRST, (True, "first")),
        (FIRST, REUSE, (True, "first")),  # a second expert's first call
        (REUSE, FORCED, (True, "last")),
        (BASE, FORCED, (True, "last")),
    ],
)
def test_either_computes_where_one_asks_for_it(base, correction, expected):
    rule = Either(Told(base), Told(correction))
    assert outcome(rule.decide(Call(step=STEP), Read())) == expected


def test_either_shows_both_measurements():
    base = Told(Decision(False, "reuse", base_signal=0.2))
    own = Told(Decision(False, "reuse", weight=0.4, temporal=0.1, expected_error=0.01))
    decision = Either(base, own).decide(Call(step=STEP), Read())
    assert (decision.base_signal, decision.weight, decision.temporal) == (0.2, 0.4, 0.1)
    assert decision.expected_error == 0.01


def test_either_gives_each_its_own_values():
    """Sums inside the model are the base method's, those over the latents the correction's."""
    base = Told(REUSE, Signal(inside=[torch.tensor(1.0)], local=[torch.tensor(2.0)]))
    own = Told(REUSE, Signal(outside=[torch.tensor(3.0)]))
    decide([Either(base, own)], [Call(step=STEP)], DecisionScope())
    assert base.reads == [Read(inside=[1.0], local=[2.0])]
    assert own.reads == [Read(outside=[3.0])]


def test_both_are_told_of_the_outcome():
    base, own = Told(REUSE), Told(OFFSET)
    rule = Either(base, own)
    rule.after_call(Call(step=STEP), rule.decide(Call(step=STEP), Read()))
    assert base.outcomes == own.outcomes == [(True, "offset")]


def test_warmup_computes_the_first_calls():
    inner = Told(FIRST)
    rule, seen = Warmup(inner, 3), []
    for decision in (FIRST, REUSE, OFFSET, REUSE, OFFSET):
        inner.decision = decision
        got = rule.decide(Call(step=STEP), Read())
        rule.after_call(Call(step=STEP), got)
        seen.append(outcome(got))
    assert seen == [
        (True, "first"),
        (True, "warmup"),
        (True, "warmup"),
        (False, "reuse"),
        (True, "offset"),
    ]
    assert inner.outcomes == seen


def test_each_model_has_a_rule_of_its_own():
    high, low = Told(BASE), Told(REUSE)
    rule = PerModel({"transformer": high, "transformer_2": low})
    for model, expected in (("transformer", (True, "base")), ("transformer_2", (False, "reuse"))):
        call = Call(step=STEP, model=model)
        decision = rule.decide(call, Read())
        assert outcome(decision) == expected
        rule.after_call(call, decision)
    assert (high.outcomes, low.outcomes) == ([(True, "base")], [(False, "reuse")])
    rule.after_call(Call(step=STEP, model=""), BASE)  # a step that no model was asked in


class Method(StackMethod):
    """Asks for what it is told."""

    def __init__(self, decision):
        self.decision = decision

    def new_state(self):
        return []

    def decide(self, state, step, read):
        return self.decision

    def after_call(self, state, step, decision):
        state.append(decision.why)


@pytest.mark.parametrize(
    ("asked", "step", "forces", "signal_only", "expected"),
    [
        (REUSE, STEP, True, False, (False, "reuse")),
        (BASE, STEP, True, False, (True, "base")),
        (REUSE, LAST, True, False, (True, "last")),
        (BASE, LAST, True, False, (True, "last")),
        (REUSE, LAST, False, False, (False, "reuse")),
        (REUSE, LAST, True, True, (False, "reuse")),  # a correction decides on the last call
        (BASE, LAST, True, True, (True, "base")),
    ],
)
def test_a_method_inside_the_model_as_a_rule(asked, step, forces, signal_only, expected):
    method = Method(asked)
    method.forces_last, method.signal_only = forces, signal_only
    rule = StackRule(method)
    first = rule.decide(Call(step=step), Read())
    rule.after_call(Call(step=step), first)
    second = rule.decide(Call(step=step), Read())
    assert (outcome(first), outcome(second)) == ((True, "first"), expected)


def test_branches_have_states_of_their_own():
    method = Method(REUSE)
    one, other = StackRule(method), StackRule(method)
    one.after_call(Call(step=STEP), BASE)
    assert (one.state, other.state) == (["base"], [])


def test_a_base_methods_decision():
    assert outcome(reuse_or_base(True, 0.1)) == (False, "reuse")
    decision = reuse_or_base(False, 0.3, run_blocks=(True, False))
    assert outcome(decision) == (True, "base")
    assert (decision.base_signal, decision.run_blocks) == (0.3, (True, False))


def test_a_turned_decision_keeps_what_was_measured():
    decision = Decision(False, "reuse", weight=0.3, base_signal=0.1, expected_error=0.02)
    turned = decision.turned(True, "inputs")
    assert turned == Decision(True, "inputs", weight=0.3, base_signal=0.1, expected_error=0.02)
    assert not decision.compute


def test_signals_are_read_at_once_in_their_groups(host_reads):
    a, b = (
        Signal([torch.tensor(x)], [torch.tensor(x + 1)], [torch.tensor(x + 2)]) for x in (1.0, 5.0)
    )
    assert read([a, Signal(), b], DecisionScope()) == [
        Read([1.0], [2.0], [3.0]),
        Read(),
        Read([5.0], [6.0], [7.0]),
    ]
    assert host_reads == ["tolist"]
    assert (a + b).inside == [*a.inside, *b.inside] and (a + b).local == [*a.local, *b.local]


# -- what options make -----------------------------------------------------------------------------


def test_rules_that_options_make():
    assert type(Auto().make_rule(None, {})) is ErrorRule
    assert Auto().make_rule(None, {}).tolerance == 0.004
    assert type(Auto(target_compute=0.5).make_rule(None, {})) is Budgeted
    warm = Auto(warmup=2).make_rule(None, {})
    assert (type(warm), warm.calls) == (Warmup, 2)
    corrected = Fb(correction=AdaCorrection(gamma=2.0, lambda_=0.5)).make_rule(
        None, {"": Told(BASE)}
    )
    assert type(corrected) is Either
    own = corrected.correction
    assert (own.gamma, own.lambda_, own.tolerance) == (2.0, 0.5, 0.01)
    half = Tea(correction=AdaCorrection(target_speedup=2.0)).make_rule(None, {"": Told(BASE)})
    assert (type(half), type(half.rule), half.budget.fraction) == (Budgeted, Either, 0.5)


def test_what_options_need():
    assert not Auto().needs_blocks and Auto().answers_steps
    assert Fb().needs_blocks and not Fb().answers_steps
    assert Fb(correction=AdaCorrection()).needs_blocks
    assert Fb(correction=AdaCorrection()).answers_steps
    assert not Fb(correction=Literal()).answers_steps
    assert not Auto().needs_steps and Auto(target_compute=0.5).needs_steps
    assert Fb(correction=AdaCorrection(target_compute=0.5)).needs_steps
    assert not Fb(correction=AdaCorrection()).needs_steps


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("threshold", [0.1, 1e9])
def test_signals_that_are_not_finite_are_refreshed_by_every_method(transformer, bad, threshold):
    """Whatever the threshold: a model that overflows must not be answered from the cache."""
    from xfuser_adacorr import Fast
    from xfuser_adacorr.model_executor.cache.diffusers_adapters.flux import FLUX

    for options in (Fb(threshold=threshold), Tea(threshold=threshold), Fast(threshold=threshold)):
        method = options.make_stack(transformer, FLUX)
        state = method.new_state()
        if isinstance(options, Fast):
            state.inputs = {0: None}
        decision = method.decide(state, STEP, Read(inside=[bad, 1.0]))
        assert outcome(decision) == (True, "base"), options.label
