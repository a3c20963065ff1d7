"""How far a reader walks: what a reused step enters, how long files are, how large classes."""

import ast
import sys
from pathlib import Path

import pytest

import xfuser_adacorr
from tests.tiny import FluxSampler, make_tiny_flux
from xfuser_adacorr import Auto, cache_summary, enable_cache

PACKAGE = Path(xfuser_adacorr.__file__).parent
CACHE = PACKAGE / "model_executor" / "cache"
STEPS = 20


def walks(method):
    """The functions that each reused step enters, once both outputs of a line are known.

    From the pipeline's ``cache_context`` to the latents that the sampler's step returns; lambdas
    and comprehensions belong to the functions that they are in. The last step also ends the run.
    """
    sampler = FluxSampler(make_tiny_flux())
    enable_cache(sampler.transformer, method, scheduler=sampler.scheduler)
    sampler.scheduler.set_timesteps(STEPS)
    x, entered, found = sampler.noise(), set(), []

    def note(frame, event, argument):
        code = frame.f_code
        ours = event == "call" and Path(code.co_filename).is_relative_to(PACKAGE)
        if ours and not code.co_name.startswith("<"):
            entered.add((code.co_filename, code.co_qualname))

    for t in sampler.scheduler.timesteps[:-1]:
        entered.clear()
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            v = sampler.call(x, t)
            x = sampler.scheduler.step(v, t, x, return_dict=False)[0]
        finally:
            sys.setprofile(before)
        calls = cache_summary(sampler.transformer).trace.calls
        if not calls[-1].refreshed and sum(call.refreshed for call in calls) > 2:
            found.append(set(entered))
    return found


@pytest.mark.parametrize(
    ("method", "functions", "files"),
    [(Auto(tolerance=0.1), 20, 8), (Auto(tolerance=0.01), 20, 8), (Auto(), 28, 9)],
    ids=["loose", "tight", "default"],  # the default's tolerance has a budget as its limit
)
def test_a_reused_step_is_a_short_walk(method, functions, files):
    found = walks(method)
    assert len(found) >= 3
    for entered in found:
        listed = "\n".join(sorted(f"{Path(file).name}: {name}" for file, name in entered))
        assert len(entered) <= functions, listed
        assert len({file for file, _ in entered}) <= files, listed


def test_the_walk_goes_from_the_call_to_the_repair():
    """Else nothing was counted."""
    names = {name for _, name in walks(Auto(tolerance=0.1))[0]}
    assert {"InterceptedModel.__call__", "ErrorRule.decide", "reuse", "EulerRepair.skip"} <= names


@pytest.mark.parametrize(
    "path",
    [CACHE / "engine.py", CACHE / "sites" / "sampler.py", PACKAGE / "reference.py"],
    ids=lambda path: path.name,
)
def test_files_that_show_the_algorithm_are_short(path):
    assert len(path.read_text().splitlines()) < 200


def test_no_class_has_more_than_15_methods():
    crowded = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                methods = sum(isinstance(each, ast.FunctionDef) for each in node.body)
                crowded += [f"{path.name}: {node.name} has {methods}"] * (methods > 15)
    assert not crowded
