"""Any pattern of calls: never an answer for other conditioning, never an exception of our own."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from hypothesis import strategies as st

from tests.reliability.fuzz import fuzzed
from tests.reliability.toy import WIDTH, Toy
from xfuser_adacorr import (
    AdaCorrection,
    Auto,
    Fast,
    Fb,
    Schedule,
    disable_cache,
    enable_cache,
    reset_cache,
)

SCHEDULERS = {
    "flow": FlowMatchEulerDiscreteScheduler,
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "dpm": lambda: DPMSolverMultistepScheduler(prediction_type="sample"),
    "ancestral": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
}
ONE_STEP = (FlowMatchEulerDiscreteScheduler, DDIMScheduler, EulerAncestralDiscreteScheduler)
"""Those that keep no earlier outputs, whose shape would have to stay."""
TELLING = 2
"""Calls of a branch that tell what stays the same from what is new in every call."""
METHODS = {
    "Auto": lambda: Auto(tolerance=1e6),
    "Auto, budget": lambda: Auto(target_compute=0.3, num_steps=9),
    "Fb": lambda: Fb(threshold=1e6),
    "Fast": lambda: Fast(threshold=1e6),
    "Fb+AdaCorrection": lambda: Fb(threshold=1e6, correction=AdaCorrection(tolerance=1e6)),
    "Schedule": lambda: Schedule(every=3, num_steps=9),
    "Schedule, line": lambda: Schedule(every=3, forecast="line", num_steps=9),
}
"""As loose as can be: whatever may be reused is."""

runs = st.lists(
    st.fixed_dictionaries(
        {
            "steps": st.integers(1, 9),
            "begin": st.integers(0, 3),
            "batch": st.integers(1, 2),
            "tokens": st.integers(2, 4),
            "branches": st.sampled_from([("cond",), ("cond", "uncond"), ("uncond", "cond")]),
            "named": st.booleans(),
            "stop": st.one_of(st.none(), st.integers(0, 8)),
            "how": st.sampled_from(["left", "exception", "reset", "interrupt"]),
            "changed_at": st.one_of(st.none(), st.integers(1, 8)),
            "changes": st.integers(1, 3),
            "late": st.one_of(st.none(), st.integers(1, 6)),
            "jump": st.one_of(st.none(), st.integers(1, 8)),
            "cropped_at": st.one_of(st.none(), st.integers(1, 8)),
            "by_hand": st.booleans(),
        }
    ),
    min_size=1,
    max_size=4,
)


class Player:
    """Plays patterns of calls on a cached `Toy`, and checks every answer."""

    def __init__(self, model, scheduler):
        self.model, self.scheduler = model, scheduler
        self.made = 0

    def texts(self, names):
        """New conditioning for each branch, of a mean that no other has."""
        found = {}
        for name in names:
            self.made += 1
            found[name] = torch.full((1, 3, WIDTH), float(self.made))
        return found

    def changes(self, run, i):
        """Whether the conditioning is another one from the run's i-th step on."""
        at = run["changed_at"]
        return at is not None and at <= i < at + run["changes"]

    def call(self, x, t, text, name, named):
        timestep = torch.as_tensor(float(t) / 1000).expand(len(x))
        context = self.model.cache_context(name) if named else nullcontext()
        with context:
            (output,) = self.model(hidden_states=x, timestep=timestep, text=text)
        assert output.shape == x.shape
        wanted = torch.full_like(output, float(text.mean()))
        torch.testing.assert_close(output, wanted, rtol=1e-3, atol=1e-3)
        return output

    def play(self, run, cached):
        """One generation, which may be left, break off, change its conditioning, or jump."""
        scheduler, model = self.scheduler, self.model
        scheduler.set_timesteps(run["steps"])
        timesteps = scheduler.timesteps[: run["steps"] * getattr(scheduler, "order", 1)]
        begin = min(run["begin"], len(timesteps) - 1)
        begin -= begin % getattr(scheduler, "order", 1)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        x = torch.randn(run["batch"], run["tokens"], WIDTH)
        texts = self.texts(run["branches"])
        for i, t in enumerate(timesteps[begin:]):
            if i == run["stop"] and run["how"] != "exception":
                if run["how"] == "reset" and cached:
                    reset_cache(model)
                return i
            if self.changes(run, i) and i >= TELLING + (run["late"] or 0):
                texts = self.texts(run["branches"])
            if i == run["cropped_at"] and isinstance(scheduler, ONE_STEP) and x.shape[1] > 1:
                x = x[:, :-1]
            active = [n for k, n in enumerate(texts) if k == 0 or i >= (run["late"] or 0)]
            model.fails = i == run["stop"]
            guided = sum(self.call(x, t, texts[n], n, run["named"]) for n in active) / len(active)
            model.fails = False
            x = scheduler.step(guided, t, x, return_dict=False)[0].clamp(-1e3, 1e3)
        return None


@contextmanager
def enabled(model, method, scheduler):
    enable_cache(model, method, scheduler=scheduler)
    try:
        yield
    finally:
        disable_cache(model)


@pytest.mark.parametrize("name", METHODS)
@fuzzed(6, sampler=st.sampled_from(sorted(SCHEDULERS)), pattern=runs)
def test_no_answer_is_stale_with_a_scheduler(name, sampler, pattern):
    torch.manual_seed(0)
    player = Player(Toy(), SCHEDULERS[sampler]())
    with torch.no_grad(), enabled(player.model, METHODS[name](), player.scheduler):
        for run in pattern:
            broken = False
            try:
                broken = player.play(run, cached=True) is not None
            except OSError:
                player.model.fails = False
            if run["by_hand"] and not broken:  # outside of a run
                text = player.texts(["cond"])["cond"]
                player.call(torch.ones(1, 2, WIDTH), 500.0, text, "cond", False)


class BarePlayer(Player):
    """The same without a scheduler: the timesteps alone tell where a call stands."""

    def play(self, run, cached):
        levels = torch.linspace(1.0, 0.0, run["steps"] + 1)[:-1][run["begin"] :].tolist()
        x, texts = torch.randn(run["batch"], run["tokens"], WIDTH), self.texts(run["branches"])
        for i, level in enumerate(levels):
            if i == run["stop"] and run["how"] != "exception":
                if run["how"] == "reset" and cached:
                    reset_cache(self.model)
                return
            if self.changes(run, i):
                texts = self.texts(run["branches"])
            if i == run["jump"]:
                continue
            if i == run["cropped_at"] and x.shape[1] > 1:
                x = x[:, :-1]
            active = [n for k, n in enumerate(texts) if k == 0 or i >= (run["late"] or 0)]
            self.model.fails = i == run["stop"]
            for name in active:
                self.call(x, 1000 * level, texts[name], name, run["named"])
            self.model.fails = False
            x = x * 0.99


@pytest.mark.parametrize("name", METHODS)
@fuzzed(6, pattern=runs)
def test_no_answer_is_stale_on_a_bare_model(name, pattern):
    torch.manual_seed(0)
    player = BarePlayer(Toy(), None)
    with torch.no_grad(), enabled(player.model, METHODS[name](), None):
        for run in pattern:
            try:
                player.play(run, cached=True)
            except OSError:
                player.model.fails = False
            except ValueError as error:  # a schedule that does not fit the steps that were made
                assert "schedule" in str(error)


def test_the_toy_is_reused_at_all():
    """The tests above look at something."""
    for name, make in METHODS.items():
        player = Player(Toy(), FlowMatchEulerDiscreteScheduler())
        with enabled(player.model, make(), player.scheduler):
            player.play({**PLAIN, "steps": 9}, cached=True)
        inside = isinstance(make(), Fb | Fast) or name == "Schedule"
        assert inside or player.model.computed < 9, name


PLAIN = {
    "begin": 0,
    "batch": 1,
    "tokens": 3,
    "branches": ("cond",),
    "named": True,
    "stop": None,
    "how": "left",
    "changed_at": None,
    "changes": 1,
    "late": None,
    "jump": None,
    "cropped_at": None,
}
