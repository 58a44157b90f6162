"""Proposals of an image are made once, whichever splits it is in."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moduseg.config import compose
from moduseg.datasets.base import Dataset
from moduseg.datasets.folder import FolderDataset
from moduseg.datasets.io import write_rgb_png
from moduseg.pipeline.workspace import Workspace
from moduseg.proposers.superpixels import SuperpixelProposer
from moduseg.stages.propose import Propose
from moduseg.structures import Proposals, Sample
from tests.support.tagged_world import scene, write_folder

NUM_IMAGES = 5


class BatchingProposer(SuperpixelProposer):
    """A proposer whose masks tell how many images shared the pass, as the last bits of a network's may."""

    def propose_batch(self, samples: Sequence[Sample]) -> list[Proposals]:
        lists = [self.propose(sample) for sample in samples]
        return [Proposals(found.masks, found.predicted_iou / len(samples)) for found in lists]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder whose images are all tagged, without lists: both splits are all of them."""
    folder = write_folder(tmp_path / "data", range(NUM_IMAGES), masks=False)
    (folder / "train.txt").unlink()
    return folder


@pytest.fixture
def proposed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the images that a proposer has seen."""
    ids: list[str] = []
    propose = SuperpixelProposer.propose

    def note(proposer: SuperpixelProposer, sample: Sample) -> Proposals:
        ids.append(sample.id)
        return propose(proposer, sample)

    monkeypatch.setattr(SuperpixelProposer, "propose", note)
    return ids


def make_workspace(root: Path, outputs: Path, *more: str) -> Workspace:
    settings = ("dataset=folder", "proposer=superpixels", "runtime.device=cpu", "runtime.record_size=2")
    return Workspace(compose([*settings, f"dataset.root={root}", f"runtime.outputs={outputs}", *more]))


def run_both(work: Workspace, between: Callable[[Path], None] = lambda folder: None) -> tuple[Path, Path]:
    """Propose masks of the training split, then of the evaluated one; `between` may change the first folder."""
    first = Propose.run(work.cfg, work, "train")
    between(first)
    return first, Propose.run(work.cfg, work)


def read_masks(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "masks").iterdir()}


def test_an_image_of_both_splits_is_proposed_once(root: Path, tmp_path: Path, proposed: list[str]) -> None:
    (root / "train.txt").write_text("scene003\nscene001\n")
    (root / "val.txt").write_text("".join(f"scene{index:03d}\n" for index in range(NUM_IMAGES)))
    work = make_workspace(root, tmp_path / "a")
    run_both(work)
    assert sorted(proposed) == sorted(work.dataset("val").ids)
    alone = make_workspace(root, tmp_path / "b")
    assert read_masks(Propose.run(alone.cfg, alone)) == read_masks(work.finished_stages["propose", "val"])
    assert len(proposed) == 2 * NUM_IMAGES


def test_records_are_not_read_for_splits_without_a_common_image(
    root: Path, tmp_path: Path, proposed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    monkeypatch.setattr("moduseg.stages.propose.list_stored_files", lambda folder, locate: read.append(folder) or {})
    (root / "train.txt").write_text("scene003\n")
    (root / "val.txt").write_text("scene001\n")
    run_both(make_workspace(root, tmp_path / "a"))
    assert proposed == ["scene003", "scene001"]
    assert not read
    (root / "val.txt").write_text("scene001\nscene003\n")
    _, folder = run_both(make_workspace(root, tmp_path / "b"))
    assert len(read) == 1
    assert sorted(read_masks(folder)) == ["scene001.json", "scene003.json"]


@pytest.mark.parametrize(
    ("more", "times"),
    [
        pytest.param((), 1, id="the same proposer"),
        pytest.param(("proposer@train_proposer=superpixels",), 1, id="the same one said twice"),
        pytest.param(("proposer@train_proposer=superpixels", "train_proposer.scales=[15]"), 2, id="another one"),
        pytest.param(("dataset.train_split=val",), 1, id="one split"),
    ],
)
def test_both_splits_have_the_same_proposer(
    root: Path, tmp_path: Path, proposed: list[str], more: tuple[str, ...], times: int
) -> None:
    work = make_workspace(root, tmp_path / "a", *more)
    Propose.run(work.cfg, work, work.train_split)
    Propose.run(work.cfg, work)
    assert len(proposed) == times * NUM_IMAGES


def test_what_is_damaged_or_changed_is_proposed_again(root: Path, tmp_path: Path, proposed: list[str]) -> None:
    def damage(folder: Path) -> None:
        file = folder / "masks" / "scene001.json"
        file.write_bytes(file.read_bytes().replace(b"640", b"641")[:-1] + b" ")
        (folder / "masks" / "scene002.json").unlink()
        (folder / "batches" / "000002.json").write_text("{")
        (root / "images" / "scene003.png").write_bytes(write_rgb_png(np.ascontiguousarray(scene(3).image[::-1])))

    work = make_workspace(root, tmp_path / "a")
    _, folder = run_both(work, damage)
    assert sorted(proposed[NUM_IMAGES:]) == ["scene001", "scene002", "scene003", "scene004"]
    shutil.rmtree(tmp_path / "a")
    alone = make_workspace(root, tmp_path / "a")
    assert Propose.run(alone.cfg, alone) == folder
    assert len(proposed) == 2 * NUM_IMAGES + 4


def write_sizes_alone(folder: Path) -> None:
    """Rewrite the records of a folder as earlier versions wrote them: of an input they held the size."""
    for file in (folder / "batches").iterdir():
        record = json.loads(file.read_text())
        record["stamps"] = [[size for size, _, _ in stamps] for stamps in record["stamps"]]
        file.write_text(json.dumps(record))


@pytest.mark.parametrize(
    "between",
    [
        pytest.param(lambda folder: None, id="equally old"),
        pytest.param(write_sizes_alone, id="recorded by size"),
    ],
)
def test_another_image_of_the_same_name_is_proposed(
    between: Callable[[Path], None], tmp_path: Path, proposed: list[str]
) -> None:
    splits: dict[str, Dataset] = {}
    for index, split in enumerate(("train", "val")):
        folder = write_folder(tmp_path / split, [0], masks=False)
        (folder / "images" / "scene000.png").unlink()
        file = folder / "images" / "scene000.bmp"
        Image.fromarray(scene(index).image).save(file)
        os.utime(file, (1000, 1000))
        for name in ("train.txt", "val.txt"):
            (folder / name).unlink(missing_ok=True)
        splits[split] = FolderDataset(str(folder), split)
    cfg = make_workspace(tmp_path / "train", tmp_path / "a").cfg
    work = Workspace(cfg, splits)
    first, second = run_both(work, between)
    assert proposed == ["scene000", "scene000"]
    assert read_masks(first) != read_masks(second)


@pytest.mark.parametrize(
    ("train", "damaged", "num_again"),
    [
        pytest.param([0, 1, 2, 3, 4], None, 0, id="the same batches"),
        pytest.param([1, 2, 3, 4], None, 5, id="other batches"),
        pytest.param([0, 1, 2, 4], None, 3, id="one batch, and parts of the others"),
        pytest.param([0, 1, 2, 3, 4], "scene000", 2, id="a damaged file"),
    ],
)
def test_images_that_share_passes_are_taken_in_whole_batches(
    root: Path,
    tmp_path: Path,
    proposed: list[str],
    train: list[int],
    damaged: str | None,
    num_again: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("moduseg.proposers.PROPOSERS", {"superpixels": BatchingProposer})
    (root / "train.txt").write_text("".join(f"scene{index:03d}\n" for index in train))
    (root / "val.txt").write_text("".join(f"scene{index:03d}\n" for index in range(NUM_IMAGES)))

    def damage(folder: Path) -> None:
        if damaged is not None:
            (folder / "masks" / f"{damaged}.json").write_bytes(b"{}")

    work = make_workspace(root, tmp_path / "a")
    _, folder = run_both(work, damage)
    assert len(proposed) == len(train) + num_again
    alone = make_workspace(root, tmp_path / "b")
    assert read_masks(Propose.run(alone.cfg, alone)) == read_masks(folder)
