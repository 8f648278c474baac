"""Schedules at the steps where they turn."""

import pytest

from locat_lightning.optim import linear_rule, warmup_then_linear

RECIPE = {"steps": 100, "warmup": 20, "peak": 1e-3, "start": 1e-7, "end": 1e-7}


def test_the_paper_s_rate_follows_the_batch():
    assert linear_rule(5e-4, 1024, 512) == pytest.approx(1e-3)
    assert linear_rule(5e-4, 64, 512) == pytest.approx(6.25e-5)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 1e-7),
        (10, (1e-7 + 1e-3) / 2),
        (20, 1e-3),
        (20 + 79 // 2, 1e-3 - (1e-3 - 1e-7) * 39 / 79),
        (99, 1e-7),
        (150, 1e-7),  # a run that is made longer than it was told stays at the end
    ],
)
def test_linear_up_then_linear_down(step, rate):
    assert warmup_then_linear(step, **RECIPE) == pytest.approx(rate)


def test_without_warm_up_the_first_step_has_the_peak():
    options = RECIPE | {"warmup": 0}
    assert warmup_then_linear(0, **options) == pytest.approx(1e-3)
    assert warmup_then_linear(99, **options) == pytest.approx(1e-7)
    assert warmup_then_linear(0, **options | {"steps": 1}) == pytest.approx(1e-3)
