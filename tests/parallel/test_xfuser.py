"""Caches under xfuser's parallel engine, on processes over gloo.

The cases are listed in `tests.parallel.cases`. Importing xfuser takes long, so one group of
processes runs all cases of its size, once (`tests.parallel.worker`); the tests read what the ranks
reported.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.parallel.cases import CASES, CFG, NEVER_REUSE, STEPS
from xfuser_adacorr.model_executor.cache.ranks import MAX_REDUCED_SUMS

ROOT = Path(__file__).resolve().parents[2]
GROUP_SECONDS = 1500
ROUNDING = 2e-5
"""Relative difference of a whole run that the order of sums can explain, uncached or not."""

pytestmark = pytest.mark.timeout(GROUP_SECONDS + 60)


@pytest.fixture(scope="session")
def groups(tmp_path_factory):
    """Folder with what every rank of every group said and reported; the processes are gone."""
    directory = tmp_path_factory.mktemp("groups")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.parallel.worker", str(directory)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LOG_LEVEL": "error"},
        start_new_session=True,
    )
    try:
        process.wait(GROUP_SECONDS)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
    return directory


@pytest.fixture(scope="session")
def reports(groups):
    found = {}
    for path in sorted(groups.glob("*/rank*.jsonl")):
        for line in path.read_text().splitlines():
            report = json.loads(line)
            found.setdefault(report["case"], []).append(report)

    def get(case):
        reported = found.get(case.name, [])
        if len(reported) < case.world_size:
            logs = sorted((groups / str(case.world_size)).glob("rank*.log"))
            said = "\n".join(f"{log.stem}:\n{log.read_text()[-4000:]}" for log in logs)
            pytest.fail(f"not all ranks reported this case\n{said}")
        for report in reported:
            if "error" in report:
                pytest.fail(f"rank {report['rank']}: {report['traceback']}")
        return reported

    return get


def named(*scenarios):
    chosen = [case for case in CASES if case.scenario in scenarios]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


RUNS = ("run", "interrupted", "shapes", "replicas")


@named(*RUNS)
def test_result_equals_that_of_one_process(reports, case):
    for report in reports(case):
        if not case.exact:
            continue
        tolerance = max(ROUNDING, 10 * report["uncached_difference"])
        assert report["uncached_difference"] < ROUNDING, "the engine itself differs"
        assert report["difference"] < tolerance


@named(*RUNS)
def test_decisions_are_those_of_one_process(reports, case):
    found = reports(case)
    for report in found:
        if case.exact and not is_later_stage(case, report):
            # xfuser's loops name no branch; alone, the branches are one batch
            first = case.family.endswith("pipeline") or case.family == "branches"
            alone = [call[first:] for call in report["decisions_alone"]]
            assert [call[first:] for call in report["decisions"]] == alone


@named("run", "interrupted", "shapes")
def test_ranks_decide_alike(reports, case):
    """Branch, step and outcome; a later pipeline stage knows no reason of its own."""
    sequences = [[call[:3] for call in report["decisions"]] for report in reports(case)]
    if case.degrees.get("pipefusion_parallel_degree", 1) > 1 and case.cache["use_cache"] == "Fast":
        sequences = [[call[:2] for call in sequence] for sequence in sequences]
    assert all(sequence == sequences[0] for sequence in sequences)


@named(*RUNS)
def test_the_cache_is_active(reports, case):
    threshold = case.cache.get("rel_l1_thresh")
    for report in reports(case):
        outcomes = {call[2] for call in report["decisions"]}
        assert outcomes == ({True} if threshold == 0.0 else {True, False})
        assert (report["changed"] > 0.0) == (threshold != 0.0)
        assert report["restored"], "disabling must give the model back"


@named("replicas")
def test_replicas_decide_by_themselves(reports, case):
    found = reports(case)
    assert found[0]["output"] != found[-1]["output"]


@named(*RUNS)
def test_decisions_send_at_most_one_small_message_a_call(reports, case):
    """And one of four floats a refresh, of what the line missed, where outputs are split."""
    branches_alone = case.family == "pixart-pipeline" and case.degrees == CFG
    whole = case.family in ("flux1", "opensora") or branches_alone
    corrected = case.cache["use_cache"] == "Auto" or case.cache.get("enable_adacorrection")
    for report in reports(case):
        assert all(size <= 4 * MAX_REDUCED_SUMS == 64 for size in report["messages"])
        refreshes = sum(call[2] for call in report["decisions"]) if corrected and not whole else 0
        allowed = messages_expected(case, len(report["decisions"]) + refreshes)
        assert len(report["messages"]) <= allowed
        if (whole and case.cache["use_cache"] == "Auto") or case.cache["use_cache"] == "Learned":
            assert report["messages"] == []


def messages_expected(case, of_one_run):
    """The runs that went before the reported one are as long, or shorter."""
    return of_one_run * (2 if case.scenario in ("interrupted", "shapes") else 1)


def is_later_stage(case, report):
    stages = case.degrees.get("pipefusion_parallel_degree", 1)
    return report["rank"] >= case.world_size // stages


@named("silent")
def test_a_plan_sends_nothing(reports, case):
    """A run of 12 steps along a plan sends what an uncached one of the plan's 5 steps does; but
    xfuser's pipeline gathers the branches of guidance itself in every step."""
    for report in reports(case):
        assert report["along"] == report["full" if case.degrees == CFG else "short"]
        if case.degrees.get("data_parallel_degree"):
            assert report["full"] == 0
        else:
            assert 0 < report["short"] < report["full"]


@named("calibrated")
def test_ranks_calibrate_what_one_process_does(reports, case):
    """Sums of the same samples: of all ranks' prompts, or of all parts of the latents."""
    for report in reports(case):
        for mine, one in report["steps"]:
            assert mine == one
        for mine, one in report["coefficients"]:
            assert mine == pytest.approx(one, abs=1e-4)
        for psnr_db in ("psnr_db", "psnr_db_anew"):
            for mine, one in report[psnr_db]:
                assert mine == pytest.approx(one, abs=0.02)
        assert report["measured_on"] == [2] and report["settings"]
        assert report["files"] == ["plan.json"]
        mine, one = report["calls"]
        assert mine < 0.65 * one if case.degrees.get("data_parallel_degree") else mine == one


@named("learned")
def test_what_ranks_learn_is_what_one_process_does(reports, case):
    """From one generation: of a rank's own where replicas are, of the same one else."""
    found = reports(case)
    for report in found:
        assert report["plan"] == "learned from 1 generations"
        assert [call[1:] for call in report["decisions"]] == [
            call[1:] for call in report["decisions_alone"]
        ]
        assert {call[2] for call in report["decisions"]} == {True, False}
        assert report["coefficients"] == pytest.approx(report["coefficients_alone"], abs=1e-3)
        assert report["uncached_difference"] < ROUNDING
        assert report["difference"] < 10 * ROUNDING
    alike = found[0]["coefficients"] == found[1]["coefficients"]
    assert alike != bool(case.degrees.get("data_parallel_degree"))


@named("perturbed", "misconfigured")
def test_ranks_that_disagree_raise_alike(reports, case):
    found = reports(case)
    messages = {report["raised"] for report in found}
    assert len(messages) == 1
    message = messages.pop()
    assert "decided or measured differently" in message
    assert "rank 0" in message and "rank 1" in message
    for report in found:
        assert not report["enabled"] and report["difference"] < ROUNDING, "the model is unharmed"


def test_stale_patches_without_a_hit_are_xfusers_own(reports):
    """A cache that never hits leaves PipeFusion's patches bit for bit as they were."""
    case = next(c for c in CASES if c.options.get("patches") and c.cache is NEVER_REUSE)
    for report in reports(case):
        contexts = {call[0] for call in report["decisions"]}
        assert contexts == {"default", "default#0", "default#1"}
        assert len(report["decisions"]) == 2 + 2 * (STEPS - 2)
        assert report["changed"] == 0.0


def test_a_failing_rank_ends_all_with_its_own_message():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.Popen(
        [*command, "--nproc_per_node", "2", "-m", "tests.parallel.failing"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    watchdog = threading.Timer(180, process.terminate)  # torchrun ends its children then
    watchdog.start()
    try:
        start = None
        text = ""
        for line in process.stdout:
            text += line
            start = start or ("both are running" in line and time.monotonic())
        assert process.wait(60) != 0
    finally:
        watchdog.cancel()
        process.kill()
    assert "ValueError: rank 1 has run out of luck" in text
    assert time.monotonic() - start < 60.0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 NVIDIA GPUs")
def test_ring_attention_is_cached(tmp_path):
    """Ring attention needs a GPU kernel that returns the log-sum-exp."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    script = [str(ROOT / "benchmark" / "cache_execute.py"), "--ring_degree", "2"]
    options = ["--cache_methods", "None", "Tea", "--num_prompts", "1", "--output_dir"]
    subprocess.run([*command, *script, *options, str(tmp_path / "out")], check=True, timeout=300)


@named("faithful")
def test_correction_under_stale_patches_is_closer_to_the_uncached_run(reports, case):
    """On the trained pipeline; PipeFusion's own staleness is in both runs."""
    for report in reports(case):
        methods = report["methods"]
        plain = methods.pop(case.cache["use_cache"])
        assert methods.keys() == {case.cache["use_cache"] + "+AdaCorrection", "Auto"}
        for corrected in methods.values():
            assert corrected["compute"] < 0.35
            assert corrected["compute"] < 1.05 * plain["compute"]
            assert corrected["error"] < 0.6 * plain["error"]
    for name in methods:
        first, last = ([c[:3] for c in r["methods"][name]["decisions"]] for r in reports(case))
        assert first == last


def test_cases_have_names_of_their_own():
    assert len({case.name for case in CASES}) == len(CASES)
