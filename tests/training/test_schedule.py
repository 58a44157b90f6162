"""Learning rates against their formulas."""

from __future__ import annotations

import math

import pytest

from moduseg.training.options import TrainingOptions
from moduseg.training.schedule import compute_rate


@pytest.mark.parametrize(
    ("settings", "step", "expected"),
    [
        pytest.param({}, 0, 0.1, id="first step of the warm-up"),
        pytest.param({}, 9, 1.0, id="end of the warm-up"),
        pytest.param({}, 10, 1.0, id="start of the cosine"),
        pytest.param({}, 60, 0.5, id="middle of the cosine"),
        pytest.param({}, 85, (1 + math.cos(0.75 * math.pi)) / 2, id="three quarters"),
        pytest.param({"min_rate": 0.2}, 60, 0.6, id="cosine that ends above 0"),
        pytest.param({"schedule": "poly"}, 60, 0.5**0.9, id="poly"),
        pytest.param({"schedule": "poly", "power": 2.0, "min_rate": 0.5}, 35, 0.5 + 0.5 * 0.75**2, id="poly, power"),
        pytest.param({"schedule": "constant"}, 100, 1.0, id="constant"),
        pytest.param({"warmup": 0}, 0, 1.0, id="no warm-up"),
        pytest.param({"warmup": 500}, 99, 0.2, id="warm-up longer than the training"),
    ],
)
def test_rate(settings: dict[str, object], step: int, expected: float) -> None:
    options = TrainingOptions(**{"steps": 110, "warmup": 10} | settings)  # type: ignore[arg-type]
    assert compute_rate(step, options) == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["cosine", "poly"])
def test_rate_falls_after_the_warm_up(schedule: str) -> None:
    options = TrainingOptions(steps=50, warmup=5, schedule=schedule)  # type: ignore[arg-type]
    rates = [compute_rate(step, options) for step in range(50)]
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.05


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"learning_rate": 0.0}, "learning_rate: got 0"),
        ({"batch": 10, "accumulation": 4}, "accumulation: got 4 passes for a batch of 10.*try batch=12"),
        ({"ema": 1.0}, "ema: got 1"),
        ({"min_rate": 2.0}, "min_rate: got 2"),
        ({"betas": (0.9, 1.0)}, "betas: got"),
        ({"clip_norm": 0.0}, "clip_norm: got 0"),
        ({"weight_decay": -1.0}, "weight_decay: got -1"),
        ({"measure_every": 0}, "measure_every: got 0"),
    ],
)
def test_options_out_of_range(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingOptions(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"workers": 3}, {"save_minutes": 1.0}, {"log_every": 2}, {"tensorboard": True}])
def test_books_are_not_in_keys(change: dict[str, object]) -> None:
    assert TrainingOptions(**change).key_parts() == TrainingOptions().key_parts()  # type: ignore[arg-type]
    assert TrainingOptions(seed=1).key_parts() != TrainingOptions().key_parts()
