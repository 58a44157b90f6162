from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from moduseg.errors import ConfigError, DataError
from moduseg.proposers import build
from moduseg.structures import Sample
from tests.proposers.contract import CPU, ProposerContract

# One class of two parts (one touching at a corner only), another class, an ignored pixel.
SEMANTIC = np.array(
    [
        [1, 1, 0, 0, 1],
        [1, 0, 0, 0, 255],
        [0, 1, 2, 2, 0],
    ],
    np.uint8,
)
INSTANCES = np.array(
    [
        [1, 1, 0, 0, 2],
        [1, 0, 0, 0, 2],
        [0, 3, 7, 7, 0],
    ],
    np.int32,
)
BACKGROUND = SEMANTIC == 0


class TestGroundTruth(ProposerContract):
    def config(self, folder: Path, samples: Sequence[Sample]) -> dict[str, object]:
        return {"name": "ground_truth"}

    def test_needs_truth(self, tmp_path: Path) -> None:
        assert self.make(tmp_path, []).needs_truth


def picture(semantic: np.ndarray | None, instances: np.ndarray | None) -> Sample:
    return Sample("a", np.zeros((3, 5, 3), np.uint8), None, semantic, instances)


@pytest.mark.parametrize(
    ("options", "truth", "areas"),
    [
        ({}, (SEMANTIC, INSTANCES), [3, 1, 1, 2, 7]),
        ({"background": False}, (SEMANTIC, INSTANCES), [3, 1, 1, 2]),
        ({"source": "instances"}, (SEMANTIC, INSTANCES), [3, 1, 1, 2, 7]),
        ({"source": "instances"}, (None, INSTANCES), [3, 2, 1, 2, 7]),
        ({}, (None, INSTANCES), [3, 2, 1, 2, 7]),
        ({}, (SEMANTIC, None), [4, 1, 2, 7]),
        ({"source": "semantic"}, (SEMANTIC, INSTANCES), [4, 1, 2, 7]),
        ({"source": "semantic", "min_component_area": 2}, (SEMANTIC, INSTANCES), [4, 2, 7]),
        ({"source": "semantic", "min_component_area": 8}, (SEMANTIC, INSTANCES), []),
    ],
)
def test_areas(
    options: dict[str, object], truth: tuple[np.ndarray | None, np.ndarray | None], areas: list[int]
) -> None:
    proposals = build({"name": "ground_truth", **options}, CPU).propose(picture(*truth))
    assert proposals.areas.tolist() == areas
    assert proposals.masks.shape[1:] == (3, 5)
    if areas and truth[0] is not None:
        assert not proposals.masks[:, 1, 4].any(), "an ignored pixel is in a proposal"


def test_background_is_last_and_exact() -> None:
    masks = build({"name": "ground_truth"}, CPU).propose(picture(SEMANTIC, INSTANCES)).masks.numpy()
    np.testing.assert_array_equal(masks[-1], BACKGROUND)


@pytest.mark.parametrize(
    ("source", "truth"),
    [("auto", (None, None)), ("instances", (SEMANTIC, None)), ("semantic", (None, INSTANCES))],
)
def test_no_truth(source: str, truth: tuple[np.ndarray | None, np.ndarray | None]) -> None:
    with pytest.raises(DataError, match="image 'a': got no"):
        build({"name": "ground_truth", "source": source}, CPU).propose(picture(*truth))


@pytest.mark.parametrize("options", [{"source": "boxes"}, {"min_component_area": 0}])
def test_wrong_values(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="got"):
        build({"name": "ground_truth", **options}, CPU)
