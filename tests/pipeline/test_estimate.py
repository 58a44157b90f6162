"""How long a stage and the run will take, as it is said after the first images and after each stage."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from moduseg.config import compose
from moduseg.pipeline import estimate
from moduseg.pipeline.estimate import RunEstimate, StageWork, TimeEstimate, format_duration
from moduseg.stages.infer import Infer
from moduseg.stages.propose import Propose
from tests.support.runs import overrides

PROPOSE, SCORES, LABEL = ("propose", "train"), ("scores", "train"), ("propose", "val")
"""Names of stages; the first and the last run the same model."""


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    """Log what is said beside warnings."""
    caplog.set_level(logging.INFO, logger="moduseg")


@pytest.fixture
def run() -> RunEstimate:
    """A run of three stages of 100, 100 and 50 images."""
    return RunEstimate([
        StageWork(PROPOSE, "propose train", "SAM", 100),
        StageWork(SCORES, "class scores train", "CLIP", 100),
        StageWork(LABEL, "propose val", "SAM", 50),
    ])  # fmt: skip


def pass_batches(monkeypatch: pytest.MonkeyPatch, seconds: list[float], make: Callable[[], TimeEstimate]) -> None:
    """Finish a batch of eight images at each of these times."""
    times = iter([0.0, *seconds])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    begun = make()
    for _ in seconds:
        begun.update(8)


@pytest.mark.parametrize(("seconds", "expected"), [
    pytest.param([320.0], "t: 40.00 s an image, about 48 min for the 72 that are left", id="slow from the start"),
    pytest.param([50.0, 58.0, 99.0], "t: 1.00 s an image, about 1 min for the 64 that are left", id="first loads"),
    pytest.param([1.0, 1.1], "", id="less than a minute"),
])  # fmt: skip
def test_the_rest_is_estimated_after_the_first_images(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, seconds: list[float], expected: str
) -> None:
    pass_batches(monkeypatch, seconds, lambda: TimeEstimate("t", 80))
    assert caplog.messages == [expected][: bool(expected)]


def test_stages_of_the_same_model_are_estimated_with_the_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, run: RunEstimate
) -> None:
    pass_batches(monkeypatch, [50.0, 130.0], lambda: TimeEstimate("propose train", 100, run, PROPOSE))
    # 84 and 50 images of 10 s each.
    assert caplog.messages == [
        "propose train: 10.00 s an image, about 14 min for the 84 that are left",
        "all stages: at least 22 min left; class scores train is not measured yet",
    ]


def test_the_estimate_follows_the_stages(caplog: pytest.LogCaptureFixture, run: RunEstimate) -> None:
    run.measure(PROPOSE, 10.0, 0)
    run.finish(PROPOSE)
    run.measure(SCORES, 3.0, 40)
    run.say(SCORES)
    run.finish(SCORES)
    run.measure(LABEL, 12.0, 20)
    run.say(LABEL)
    run.say(LABEL)
    run.finish(LABEL)
    assert caplog.messages == [
        "all stages: at least 8 min left; class scores train is not measured yet",
        "all stages: about 10 min left",
        "all stages: about 8 min left",
    ]


@pytest.mark.parametrize(("speed", "expected"), [
    pytest.param(0.39, "", id="less than a minute"),
    pytest.param(0.41, "all stages: at least 1 min left; class scores train is not measured yet", id="a minute"),
])  # fmt: skip
def test_short_runs_are_not_worth_a_line(
    caplog: pytest.LogCaptureFixture, run: RunEstimate, speed: float, expected: str
) -> None:
    run.measure(PROPOSE, speed, 100)
    run.say(PROPOSE)
    assert caplog.messages == [expected][: bool(expected)]


def test_a_stage_that_was_complete_says_nothing(caplog: pytest.LogCaptureFixture, run: RunEstimate) -> None:
    run.finish(PROPOSE)
    run.finish(("evaluate", "val"))
    assert caplog.messages == []


def test_a_run_estimates_its_own_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(estimate, "_MIN_SECONDS", 1e-9)
    settings = overrides(tmp_path, "proposer=superpixels", "pseudo_masks=cam", "evaluation.panels=0", train=4, val=4)
    Infer.run(compose(settings))
    said = [line for line in caplog.messages if line.startswith("all stages: ")]
    # The proposer is measured on the training images, and the backbone when the bank is built.
    assert said[0].endswith("; pseudo masks train, build bank train, queries val, infer val are not measured yet")
    late = [line for line in said if "build bank" not in line]
    assert late
    assert all(line.endswith("left; infer val is not measured yet") for line in late)
    # What an earlier run has done is not counted again.
    before = len(caplog.messages)
    Propose.run(compose(settings))
    assert not [line for line in caplog.messages[before:] if line.startswith("all stages: ")]


def test_durations() -> None:
    assert [format_duration(seconds) for seconds in (1, 150, 19_200)] == ["1 min", "2 min", "5 h 20 min"]
