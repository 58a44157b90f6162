"""Engines and storage of the search, and disjoint proposals, through the stages: the same labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moduseg.config import compose
from moduseg.masks import encoded
from moduseg.proposers import sa1b
from moduseg.stages.infer import Infer
from tests.support.runs import overrides


@pytest.fixture(scope="module")
def world(finished: Path) -> tuple[Path, Path]:
    """Outputs of a run with the default search, and its folder of results."""
    return finished, Infer.run(compose(overrides(finished)))


def labels(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "labels").rglob("*.png"))}


def test_faiss_gives_the_same_label_maps_in_a_folder_of_its_own(world: tuple[Path, Path]) -> None:
    pytest.importorskip("faiss", reason="faiss is an extra: pip install 'moduseg[faiss]'")
    outputs, folder = world
    other_folder = Infer.run(compose(overrides(outputs, "retrieval.engine=faiss")))
    assert other_folder != folder
    assert labels(other_folder) == labels(folder)


def test_half_precision_has_a_folder_of_its_own(world: tuple[Path, Path]) -> None:
    outputs, folder = world
    other_folder = Infer.run(compose(overrides(outputs, "retrieval.storage=float16")))
    assert other_folder != folder
    assert labels(other_folder).keys() == labels(folder).keys()


def test_disjoint_proposals_give_what_their_masks_give(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run when nobody notices that the objects of the truth share no pixel: labels, and vectors to the bit."""
    outputs, folder = world
    with_maps = [sa1b.read_proposals(path) for path in sorted(outputs.rglob("masks/*.json"))]
    assert all(proposals.id_map is not None for proposals in with_maps)
    monkeypatch.setattr(encoded, "merge_disjoint_runs", lambda runs, size: None)
    without = [sa1b.read_proposals(path) for path in sorted(outputs.rglob("masks/*.json"))]
    assert all(proposals.id_map is None for proposals in without)
    for a, b in zip(with_maps, without, strict=True):
        np.testing.assert_array_equal(a.masks, b.masks)
    other_folder = Infer.run(compose(overrides(tmp_path, world=outputs)))
    assert labels(other_folder) == labels(folder)
    vectors = {path.name: path.read_bytes() for path in outputs.rglob("vectors/*.safetensors")}
    assert vectors == {path.name: path.read_bytes() for path in tmp_path.rglob("vectors/*.safetensors")}
