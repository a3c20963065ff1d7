"""The study of reused calls: what is timed, and what its shares are of."""

from types import SimpleNamespace

import pytest

from benchmark.models.families import EULER
from benchmark.run.rows import cached_row, uncached_row
from benchmark.studies import reuse_cost
from xfuser_adacorr import CacheConfig


@pytest.mark.parametrize(("steps", "budget"), [(28, 10), (50, 18), (12, None)])
def test_the_learned_plan_is_timed_where_there_is_one(steps, budget):
    settings = SimpleNamespace(
        model_type="flux",
        model="benchmark/pipelines/flux",
        config="configs/flux.yaml",
        num_inference_steps=(steps,),
        guidance_scale=3.5,
    )
    rows = reuse_cost.timed_rows(settings, EULER)
    assert rows[0].is_reference and {"Auto", "Tea+AdaCorrection"} < {row.name for row in rows}
    learned = [row.config.to_dict()["target_compute"] for row in rows if row.name == "Learned"]
    assert learned == ([] if budget is None else [pytest.approx(budget / steps)])


def test_a_share_is_of_the_median_uncached_call(monkeypatch):
    rows = [uncached_row(3), cached_row("Auto", 3, CacheConfig.from_name("Auto"))]
    rounds = iter([9.0, 1.0, 2.0])  # the first one warms up

    def timed(bench, row):
        if row.is_reference:
            timed.scale = next(rounds)
            return {"full": [timed.scale] * 3, "reused": []}
        return {"full": [timed.scale], "reused": [0.03 * timed.scale] * 2}

    monkeypatch.setattr(reuse_cost, "time_calls", timed)
    bench = SimpleNamespace(settings=SimpleNamespace(repetitions=2))
    found = reuse_cost.measure(bench, rows)
    assert found["full_call_s"] == 1.5
    assert found["methods"]["Auto"]["calls"] == 4
    share = found["methods"]["Auto"]["share_of_full_call"]
    assert share["median"] == pytest.approx((0.03 + 0.06) / 2 / 1.5)
