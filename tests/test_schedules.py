"""Schedules at the steps where they turn."""

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR

from locat_lightning.schedules import linear_rule, one_cycle, warmup_then_linear

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


@pytest.mark.parametrize("steps", [20, 37, 200])
def test_one_cycle_is_torchs(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    options = {"pct_start": 0.25, "anneal_strategy": "linear", "div_factor": 1e4, "final_div_factor": 1e4}
    torchs = OneCycleLR(optimizer, 1e-3, total_steps=steps, cycle_momentum=False, **options)
    for step in range(steps):
        rate = torchs.get_last_lr()[0]
        assert one_cycle(step, steps=steps, peak=1e-3) == pytest.approx(rate, rel=1e-9, abs=1e-15)
        optimizer.step()
        if step < steps - 1:
            torchs.step()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("up", [0, 0.25, 1])
def test_one_cycle_stays_within_its_ends(steps, up):
    assert all(0 < one_cycle(step, steps=steps, peak=1e-3, up=up) <= 1e-3 for step in range(steps + 1))
