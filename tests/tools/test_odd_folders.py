"""Folders as people make them: what cannot be what it is taken for is said, and never scored in silence."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moduseg import datasets
from moduseg.config import Config, compose
from moduseg.datasets.io import read_label_png
from moduseg.errors import DataError
from moduseg.evaluation.predictions import PredictionFolder
from moduseg.stages.evaluate_folder import run as evaluate_folder
from moduseg.stages.infer import Infer
from moduseg.tools import check_data
from tests.support.odd_folders import write_picture

SIZE = (40, 48)
CHEAP = (
    "dataset=folder", "backbone=miniature_random", "proposer=ground_truth", "pseudo_masks=ground_truth",
    "runtime.device=cpu", "retrieval.top_k=1", "evaluation.bootstrap=0", "evaluation.panels=0",
    "evaluation.report=false",
)  # fmt: skip


def _write_masks(root: Path, draw: Callable[[int], np.ndarray], suffix: str = "png") -> None:
    (root / "masks").mkdir(exist_ok=True)
    for i in range(3):
        Image.fromarray(draw(i)).save(root / "masks" / f"p{i}.png", format="JPEG" if suffix == "jpg" else None)


def _box(value: int) -> np.ndarray:
    mask = np.zeros(SIZE, np.uint8)
    mask[8:30, 10:36] = value
    return mask


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three photographs with two classes, label maps of the right kind."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)).save(folder / "images" / f"p{i}.jpg")
    (folder / "classes.txt").write_text("background\ndisc\nsquare\n")
    _write_masks(folder, lambda i: _box(1 + i % 2))
    return folder


def _options(root: Path, *more: str) -> list[str]:
    return [*CHEAP, f"dataset.root={root}", f"runtime.outputs={root.parent / 'outputs'}", *more]


def _check(root: Path, *more: str) -> tuple[dict[str, list[str]], bool]:
    report = check_data.run(compose(_options(root, *more)))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in report.table.strip().splitlines()]
    return {line[0]: line[1:] for line in lines}, report.is_broken


@pytest.mark.parametrize(
    ("values", "check"),
    [
        pytest.param((0, 255), "masks without a class", id="binary masks"),
        pytest.param((0, 0), "masks without a class", id="background alone"),
        pytest.param((255, 255), "masks without a class", id="ignored alone"),
        pytest.param((2, 2), "masks of a single class", id="one value everywhere"),
        pytest.param((0, 7), "mask ids out of range", id="ids of another list"),
    ],
)
def test_masks_that_are_no_label_maps_are_broken(root: Path, values: tuple[int, int], check: str) -> None:
    _write_masks(root, lambda _: np.where(_box(1) == 1, values[1], values[0]).astype(np.uint8))
    rows, is_broken = _check(root)
    assert rows[check] == ["3", "3", "broken", "p0"]
    assert is_broken


def test_single_masks_without_a_class_are_a_note(root: Path) -> None:
    Image.fromarray(_box(255)).save(root / "masks" / "p1.png")
    rows, is_broken = _check(root)
    assert (rows["masks without a class"], is_broken) == (["1", "1", "note", "p1"], False)


def _score_predictions(cfg: Config) -> None:
    folder = Path(str(cfg.predictions))
    folder.mkdir()
    for i in range(3):
        Image.fromarray(_box(0)).save(folder / f"p{i}.png")
    evaluate_folder(cfg)


@pytest.mark.parametrize("score", [Infer.run, _score_predictions], ids=["infer", "evaluate"])
def test_a_truth_without_classes_is_not_scored(root: Path, score: Callable[[Config], object]) -> None:
    _write_masks(root, lambda _: _box(255))
    cfg = compose(_options(root))
    if score is _score_predictions:
        cfg = replace(cfg, predictions=str(root / "predictions"))
    with pytest.raises(DataError, match=r"got 3 label maps in which no class occurs.*expected ids 1\.\.2"):
        score(cfg)
    assert not list((root.parent / "outputs").glob("**/results.json"))


@pytest.mark.parametrize(
    ("suffix", "draw", "words"),
    [
        pytest.param("jpg", lambda _: _box(1), "got a JPEG", id="a JPEG of grey ids"),
        pytest.param("jpg", lambda _: np.stack([_box(1)] * 3, 2), "got a JPEG", id="a JPEG of colours"),
        pytest.param("png", lambda _: np.stack([_box(255)] * 3, 2), "outside the VOC palette", id="white on black"),
    ],
)
def test_masks_in_colours_or_jpeg_are_unreadable(
    root: Path, suffix: str, draw: Callable[[int], np.ndarray], words: str
) -> None:
    _write_masks(root, draw, suffix)
    with pytest.raises(DataError, match=words):
        read_label_png(root / "masks" / "p0.png")
    rows, is_broken = _check(root)
    assert (rows["masks unreadable"], is_broken) == (["3", "3", "broken", "p0"], True)
    problems = (root.parent / "outputs" / "folder" / "check_data" / "problems.jsonl").read_text().splitlines()
    assert words in json.loads(problems[0])["problem"]


@pytest.mark.parametrize("name", ["{}_mask.png", "{}-labels.png", "mask_{}.png", "{}_GT.PNG", "{}_seg.png"])
def test_other_names_of_masks_are_recognised(root: Path, name: str) -> None:
    for i in range(3):
        (root / "masks" / f"p{i}.png").rename(root / "masks" / name.format(f"p{i}"))
    data = datasets.build({"name": "folder", "root": str(root)}, "train")
    assert [data.labels_of(image_id) for image_id in data.ids] == [(1,), (2,), (1,)]


def test_names_of_images_win_over_names_of_masks(root: Path) -> None:
    (root / "images" / "p1.jpg").rename(root / "images" / "p0_mask.jpg")
    (root / "masks" / "p1.png").rename(root / "masks" / "p0_mask.png")
    data = datasets.build({"name": "folder", "root": str(root)}, "val")
    assert {i: data.labels_of(i) for i in data.ids} == {"p0": (1,), "p0_mask": (2,), "p2": (1,)}


def test_masks_and_tags_that_fit_no_image_are_counted_and_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "masks" / "p1.png").rename(root / "masks" / "q1.png")
    (root / "masks" / "p2.png").rename(root / "masks" / "p2.tif")
    data = datasets.build({"name": "folder", "root": str(root)}, "train")
    with caplog.at_level(logging.WARNING):
        assert data.ids == ("p0",)
    assert f"{root / 'masks'}: 2 of 3 files fit no image: p2.tif, q1.png; expected <id>.png" in caplog.text
    (root / "labels.csv").write_text("image,labels\np0.jpg,disc\nold/p9.jpg,disc\n")
    with caplog.at_level(logging.WARNING):
        assert datasets.build({"name": "folder", "root": str(root)}, "train").ids == ("p0",)
    assert "labels.csv: 1 of 2 names fit no image: old/p9" in caplog.text


def test_predictions_that_fit_no_image_are_counted_and_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "masks" / "p2.png").rename(root / "masks" / "gone.png")
    with caplog.at_level(logging.WARNING):
        PredictionFolder(root / "masks", ["p0", "p1"], 3)
    assert "1 of 3 files fit no image: gone.png" in caplog.text


def test_names_are_the_same_in_both_forms_of_unicode(root: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Gr\u00f6\u00dfe \u00e9") for form in ("NFC", "NFD"))
    (root / "images" / "p0.jpg").rename(root / "images" / f"{decomposed}.jpg")
    (root / "masks" / "p0.png").rename(root / "masks" / f"{decomposed}.png")
    (root / "train.txt").write_text(f"{composed}\n")
    (root / "val.txt").write_text(f"{decomposed}.jpg\n")
    for split in ("train", "val"):
        data = datasets.build({"name": "folder", "root": str(root)}, split)
        assert (data.ids, data.labels_of(composed)) == ((composed,), (1,))
    assert PredictionFolder(root / "masks", [composed], 3).read(composed, SIZE).max() == 1


def test_the_first_problems_are_printed_with_their_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("p0", "p1"):
        write_picture(tmp_path / "images" / f"{name}.png", np.zeros((4, 6, 3), np.uint8))
        write_picture(tmp_path / "masks" / f"{name}.png", np.full((4, 6), 255, np.uint8))
    (tmp_path / "classes.txt").write_text("background\ndisc")
    cfg = compose(["dataset=folder", f"dataset.root={tmp_path}", f"runtime.outputs={tmp_path}/outputs"])
    assert check_data.main(cfg) == 1
    assert [message.partition(": its")[0] for message in caplog.messages if ": its" in message] == [
        "masks without a class: p0", "masks without a class: p1",
    ]  # fmt: skip
