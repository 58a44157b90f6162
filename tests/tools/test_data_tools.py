"""`prepare_data` and `check_data`, and the data sets they prepare on their way through the pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moduseg.cli.commands import COMMANDS
from moduseg.cli.main import errors_as_exit_code, load, to_exit_code
from moduseg.config import compose
from moduseg.datasets import build
from moduseg.datasets.io import read_label_png, write_label_png
from moduseg.errors import ConfigError, DataError, MissingError, StorageError
from moduseg.stages.infer import Infer
from moduseg.tools import check_data, prepare_data
from tests.support.skeletons import (
    VOC_LABELS,
    VOC_LISTS,
    W,
    indexed,
    noise,
    picture,
    write_ade20k,
    write_cityscapes,
    write_coco,
    write_voc,
)

SKELETONS: dict[str, Callable[[Path], Path]] = {
    "voc": write_voc,
    "voc_aug": write_voc,
    "coco2014": write_coco,
    "coco2017": lambda root: write_coco(root, 2017),
    "ade20k": write_ade20k,
    "cityscapes": write_cityscapes,
}


def _options(name: str, root: Path, outputs: Path, *more: str) -> list[str]:
    cheap = ["backbone=miniature_random", "proposer=ground_truth", "pseudo_masks=ground_truth", "runtime.device=cpu"]
    limits = ["runtime.batch_size=2", "retrieval.top_k=1", "evaluation.bootstrap=0", "evaluation.panels=0"]
    return [f"dataset={name}", f"dataset.root={root}", f"runtime.outputs={outputs}", *cheap, *limits, *more]


def _rows(table: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()]
    return {line[0]: line[1:] for line in lines}


def _check(name: str, root: Path, outputs: Path, *more: str) -> tuple[dict[str, list[str]], bool]:
    report = check_data.run(compose(_options(name, root, outputs, *more)))
    return _rows(report.table), report.is_broken


def _run(command: str, arguments: list[str]) -> int:
    with errors_as_exit_code() as status:
        status.code = to_exit_code(load(COMMANDS[command].function)(compose(arguments)))
    return status.code


# The whole way --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposer", ["ground_truth", "superpixels"])
def test_a_voc_devkit_from_end_to_end(
    tmp_path: Path, proposer: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    root = write_voc(tmp_path / "VOCdevkit" / "VOC2012")
    masks = "ground_truth" if proposer == "ground_truth" else "cam"
    options = _options("voc", root, tmp_path / "outputs", f"proposer={proposer}", f"pseudo_masks={masks}")
    assert _run("prepare_data", options) == 0
    assert _run("check_data", options) == 0
    assert "got 4 images, the published split 'train' of voc has 1464" in caplog.text
    prepared = [*options, "dataset.labels=image_labels"]
    assert _run("build_bank", prepared) == 0
    assert _run("infer", prepared) == 0
    assert "moduseg:" not in capsys.readouterr().err
    results = json.loads(next((tmp_path / "outputs" / "voc" / "infer").glob("*/results.json")).read_text())
    assert (results["images"], results["split"], results["label_source"]) == (2, "val", "masks")
    assert results["iou"]["aeroplane"] is not None
    if proposer == "ground_truth":
        assert results["pixel_accuracy"] > 90
    for id in VOC_LISTS["val"]:
        labels = read_label_png(next((tmp_path / "outputs" / "voc" / "infer").glob(f"*/labels/{id}.png")))
        assert set(np.unique(labels)) <= {0, 1, 8, 12, 15}


def test_voc_test_is_labelled_without_truth(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "VOC2012")
    options = _options("voc", root, tmp_path, "dataset.val_split=test", "proposer=superpixels", "dataset.labels=xml")
    folder = Infer.run(compose(options))
    assert (folder / "labels" / "2008_000006.png").is_file()
    assert not (folder / "results.json").exists()
    assert _check("voc", root, tmp_path, "dataset.val_split=test")[0]["masks missing"][:2] == ["0", "-"]


@pytest.mark.parametrize("mask_dir", ["SegmentationClass", "SegmentationClassAug"])
def test_the_two_truths_of_voc_are_compared(tmp_path: Path, mask_dir: str) -> None:
    root = write_voc(tmp_path / "VOC2012")
    first, second = VOC_LISTS["val"][:2]
    other = read_label_png(root / "SegmentationClassAug" / f"{first}.png")
    other[:2, :3] = 20
    (root / "SegmentationClassAug" / f"{first}.png").write_bytes(write_label_png(other))
    (root / "SegmentationClassAug" / f"{second}.png").unlink()
    options = _options("voc", root, tmp_path, f"dataset.mask_dir={mask_dir}")
    report = check_data.run(compose(options))
    rows = _rows(report.table)
    assert rows["masks that differ from the other truth"] == ["0", "1", "note", first]
    problems = [json.loads(line) for line in (report.path / "problems.jsonl").read_text().splitlines()]
    message = next(p["problem"] for p in problems if p["check"] == "masks that differ from the other truth")
    assert message.startswith(f"6 of {other.size} pixels differ from {root}")
    # The option decides which of them scores a prediction.
    semantic = build(compose(options).dataset, "val").semantic_of(first)
    assert semantic is not None
    assert bool((semantic[:2, :3] == 20).all()) == (mask_dir == "SegmentationClassAug")


def test_the_augmented_devkit(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "VOC2012")
    rows, broken = _check("voc_aug", root, tmp_path)
    assert (rows["images"][0], rows["images published"][:3], broken) == ("5", ["10582", "1449", "note"], False)
    # The trap: the augmented list with the devkit's own masks.
    rows, broken = _check("voc_aug", root, tmp_path, "dataset.mask_dir=SegmentationClass")
    assert (rows["masks missing"], broken) == (["1", "0", "broken", "2008_000005"], True)


@pytest.mark.parametrize("name", ["coco2014", "coco2017", "ade20k", "cityscapes"])
def test_the_other_skeletons_from_end_to_end(tmp_path: Path, name: str) -> None:
    root = SKELETONS[name](tmp_path / "data")
    options = _options(name, root, tmp_path / "outputs")
    assert _run("prepare_data", options) == 0
    assert _run("check_data", options) == 0
    folder = Infer.run(compose([*options, "dataset.labels=image_labels", "dataset.list_dir=lists"]))
    results = json.loads((folder / "results.json").read_text())
    assert (results["dataset"], results["label_source"]) == (name, "masks")
    assert (results["images"], results["left_out"]) == (2 if name.startswith("coco") else 1, [])


# prepare_data ---------------------------------------------------------------------------------------------------------


def test_coco_masks_on_disk_are_those_in_memory(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco")
    cfg = {"name": "coco", "root": str(root)}
    before = {id: build(cfg, "train").load(id, truth=True) for id in build(cfg, "train").ids}
    prepare_data.run(compose(_options("coco2014", root, tmp_path)))
    files = sorted(p.name for p in (root / "SegmentationClass" / "train2014").iterdir())
    assert files == [*(f"{id}.png" for id in before), "made_from.json"]
    # Without the annotations: lists, labels and masks say all there is to say but the objects.
    shutil.rmtree(root / "annotations")
    data = build({**cfg, "list_dir": "lists", "labels": "image_labels"}, "train")
    assert data.ids == tuple(before)
    for id, sample in before.items():
        again = data.load(id, truth=True)
        np.testing.assert_array_equal(again.semantic, sample.semantic)  # type: ignore[arg-type]
        assert (again.labels, again.instances) == (sample.labels, None)
    with Image.open(root / "SegmentationClass" / "train2014" / files[0]) as mask:
        assert mask.mode == "P"


@pytest.mark.parametrize("name", sorted(SKELETONS))
def test_a_second_run_changes_nothing(tmp_path: Path, name: str) -> None:
    root = SKELETONS[name](tmp_path / "data")
    cfg = compose(_options(name, root, tmp_path / "outputs"))
    assert prepare_data.run(cfg) == {}
    stamps = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
    prepare_data.run(cfg)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()} == stamps


def test_labels_follow_the_masks(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "VOC2012")
    cfg = compose(_options("voc", root, tmp_path))
    prepare_data.run(cfg)
    path = root / "image_labels" / "train.json"
    first = json.loads(path.read_text())
    assert [(e["img_id"], e["labels"]) for e in first["images"]] == [(i, [VOC_LABELS[i]]) for i in VOC_LISTS["train"]]
    mask = np.tile(np.arange(W, dtype=np.uint8) % 21, (48, 1))
    indexed(root / "SegmentationClass" / "2007_000032.png", mask)
    prepare_data.run(cfg)
    assert json.loads(path.read_text())["images"][0]["labels"] == list(range(1, 21))


def test_images_without_labels_stay_without(tmp_path: Path) -> None:
    """Nothing known is not the same as nothing there."""
    for i in range(3):
        picture(tmp_path / "images" / f"{i}.png", noise(i))
    (tmp_path / "labels.csv").write_text("image,labels\n0,cat;dog\n1,\n")
    prepare_data.run(compose(_options("folder", tmp_path, tmp_path / "outputs")))
    made = json.loads((tmp_path / "image_labels" / "val.json").read_text())
    assert [(e["img_id"], e["labels"]) for e in made["images"]] == [("0", [1, 2]), ("1", [])]
    assert made["source"] == "csv"
    assert (tmp_path / "lists" / "val.txt").read_text() == "0\n1\n2\n"


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at the third image, in the middle of a line; the images before it are not read again."""
    root = write_voc(tmp_path / "VOC2012")
    cfg = compose(_options("voc", root, tmp_path))
    expected = tmp_path / "whole"
    shutil.copytree(root, expected)
    prepare_data.run(compose(_options("voc", expected, tmp_path)))

    from moduseg.datasets.voc import VocDataset

    asked: list[str] = []
    original = VocDataset.labels_of

    def labels_of(self: VocDataset, id: str) -> tuple[int, ...] | None:
        asked.append(id)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return original(self, id)

    monkeypatch.setattr(VocDataset, "labels_of", labels_of)
    with pytest.raises(KeyboardInterrupt):
        prepare_data.run(cfg)
    journal = root / "image_labels" / ".train.jsonl"
    assert len(journal.read_text().splitlines()) == 3
    journal.write_bytes(journal.read_bytes() + b'["2007_0000')
    prepare_data.run(cfg)
    assert [id for id in asked[3:] if id in VOC_LISTS["train"]] == list(VOC_LISTS["train"][2:])
    for name in ("image_labels/train.json", "lists/train.txt"):
        assert (root / name).read_bytes() == (expected / name).read_bytes()
    assert not journal.exists()


def test_masks_that_exist_are_kept(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco")
    cfg = compose(_options("coco2014", root, tmp_path))
    prepare_data.run(cfg)
    folder = root / "SegmentationClass" / "train2014"
    kept, redone = sorted(folder.glob("*.png"))
    stamp, content = kept.stat().st_mtime_ns, redone.read_bytes()
    redone.unlink()
    prepare_data.run(cfg)
    assert (kept.stat().st_mtime_ns, redone.read_bytes()) == (stamp, content)


def test_masks_of_other_settings_do_not_mix(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco")
    prepare_data.run(compose(_options("coco2014", root, tmp_path)))
    other = compose(_options("coco2014", root, tmp_path, "dataset.crowd=ignore"))
    for use in (prepare_data.run, check_data.run, Infer.run):
        with pytest.raises(ConfigError, match=r'dataset\.mask_dir: .*"crowd": "count".*expected .*"crowd": "ignore"'):
            use(other)
    elsewhere = compose(_options("coco2014", root, tmp_path, "dataset.crowd=ignore", "dataset.mask_dir=ignored"))
    assert prepare_data.run(elsewhere) == {}
    assert 255 in read_label_png(next((root / "ignored" / "train2014").glob("*70.png")))
    (root / "ignored" / "train2014" / "made_from.json").unlink()
    with pytest.raises(ConfigError, match="masks that this script did not make"):
        prepare_data.run(elsewhere)


def test_damaged_images_are_left_out_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    root = write_voc(tmp_path / "VOC2012")
    options = _options("voc", root, tmp_path)
    mask = root / "SegmentationClass" / "2007_000033.png"
    whole = mask.read_bytes()
    mask.write_bytes(whole[:60])
    assert _run("prepare_data", options) == 1
    assert "left out: 2007_000033" in caplog.text
    labels = root / "image_labels" / "train.json"
    assert len(json.loads(labels.read_text())["images"]) == 3
    mask.write_bytes(whole)
    assert _run("prepare_data", options) == 0
    assert len(json.loads(labels.read_text())["images"]) == 4
    capsys.readouterr()
    # A list that leaves the folder costs everything, in one line, and nothing is written outside.
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("../../../evil\n")
    assert _run("prepare_data", options) == 2
    said = capsys.readouterr().err
    assert "got image id '../../../evil'" in said
    assert said.count("\n") == 1
    assert not list(tmp_path.parent.rglob("evil*"))


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "VOC2012")
    (root / "image_labels").write_text("")
    with pytest.raises(StorageError, match=r"prepare_data writes below dataset\.root") as caught:
        prepare_data.run(compose(_options("voc", root, tmp_path)))
    assert "\n" not in str(caught.value)


# check_data -----------------------------------------------------------------------------------------------------------

FIRST = "2007_000032"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _shift_labels(root: Path) -> None:
    """Everybody's id one too high: the mistake of counting the background."""
    (root / "image_labels.json").write_text(json.dumps({id: [label + 1] for id, label in VOC_LABELS.items()}))


def _label_file(root: Path, **entries: list[int]) -> None:
    """Everybody's right label, but for `entries`; an entry without labels is left out."""
    labels = {id: entries.get(f"_{id}", [label]) for id, label in VOC_LABELS.items()}
    (root / "image_labels.json").write_text(json.dumps({id: ids for id, ids in labels.items() if ids}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "images missing": (lambda r: (r / "JPEGImages" / f"{FIRST}.jpg").unlink(), "no file"),
    "images unreadable": (lambda r: _cut(r / "JPEGImages" / f"{FIRST}.jpg"), "unreadable"),
    "masks missing": (lambda r: (r / "SegmentationClass" / f"{FIRST}.png").unlink(), "no file"),
    "masks unreadable": (lambda r: _cut(r / "SegmentationClass" / f"{FIRST}.png"), "unreadable"),
    "mask ids out of range": (
        lambda r: indexed(r / "SegmentationClass" / f"{FIRST}.png", np.full((48, 64), 21)),
        "label id 21",
    ),
    "masks of another size than their image": (
        lambda r: indexed(r / "SegmentationClass" / f"{FIRST}.png", np.zeros((64, 48), np.uint8)),
        r"mask (64, 48), image (48, 64)",
    ),
    "object maps unusable": (
        lambda r: picture(r / "SegmentationObject" / f"{FIRST}.png", noise(1)),
        "expected an indexed or grey",
    ),
    "training images without labels": (lambda r: _label_file(r, **{f"_{FIRST}": []}), "no labels in json"),
    "labels unusable": (lambda r: _label_file(r, **{f"_{FIRST}": [99]}), "label 99"),
    "labels that disagree with the mask": (_shift_labels, "labels ['bicycle'], mask ['aeroplane']"),
}


@pytest.mark.parametrize("check", DAMAGE)
def test_everything_that_can_be_broken_is_found(tmp_path: Path, check: str) -> None:
    root = write_voc(tmp_path / "VOC2012")
    assert not _check("voc", root, tmp_path)[1]
    damage, words = DAMAGE[check]
    damage(root)
    rows, broken = _check("voc", root, tmp_path)
    assert (int(rows[check][0]) > 0, rows[check][2], rows[check][3], broken) == (True, "broken", FIRST, True)
    problems = [json.loads(line) for line in (tmp_path / "voc/check_data/problems.jsonl").read_text().splitlines()]
    assert any(p["check"] == check and p["id"] == FIRST and words in p["problem"] for p in problems)


def test_exit_codes_and_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_voc(tmp_path / "VOC2012")
    assert _run("check_data", _options("voc", root, tmp_path)) == 0
    table = capsys.readouterr().out
    assert table == (tmp_path / "voc" / "check_data" / "table.md").read_text()
    assert all(line.startswith("|") for line in table.splitlines())
    _cut(root / "JPEGImages" / f"{FIRST}.jpg")
    assert _run("check_data", _options("voc", root, tmp_path)) == 1
    assert _run("check_data", _options("voc", tmp_path / "absent", tmp_path)) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "absent" in line and line.startswith("moduseg: error: dataset.root")]


def test_what_is_only_worth_a_note(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "VOC2012")
    grey = root / "SegmentationClass" / f"{FIRST}.png"
    Image.fromarray(read_label_png(grey)).save(grey)
    labels = {**{i: [n] for i, n in VOC_LABELS.items()}, FIRST: [1, 2], "2009_000001": [3]}
    (root / "image_labels.json").write_text(json.dumps(labels))
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text(f"2007_000042\n{FIRST}\n")
    rows, broken = _check("voc", root, tmp_path)
    assert not broken
    for check, count in (
        ("masks not indexed with the VOC palette", "1"),
        ("labels that disagree with the mask", "1"),
        ("labels of no listed image", "3"),  # of the lists' 4 + 1 images, the file has 8
        ("classes without a training image", "15"),
    ):
        assert (rows[check][0], rows[check][2]) == (count, "note"), check
    assert rows["images listed in both splits"] == ["-", "1", "note", FIRST]


@pytest.mark.parametrize("name", sorted(SKELETONS))
def test_whole_skeletons_are_not_broken(tmp_path: Path, name: str) -> None:
    rows, broken = _check(name, SKELETONS[name](tmp_path / "data"), tmp_path)
    assert not broken
    assert rows["images published"][2] == "note"
    assert all(cells[:2] != ["-", "-"] for cells in rows.values())


def test_the_table_shows_problems_first(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "VOC2012")
    (root / "SegmentationClass" / f"{FIRST}.png").unlink()
    rows, _ = _check("voc", root, tmp_path)
    names = [name for name in rows if name in ("images", "images published", *check_data.CHECKS)]
    assert names[:2] == ["images", "masks missing"]
    verdicts = [rows[name][2] for name in names[1:]]
    assert verdicts == sorted(verdicts, key=("broken", "note", "ok").index)
    assert set(verdicts) == {"broken", "note", "ok"}


def test_a_split_checked_alone(tmp_path: Path) -> None:
    rows, broken = _check("voc", write_voc(tmp_path / "VOC2012"), tmp_path, "dataset.val_split=train")
    assert (len(rows["images"]), broken) == (3, False)


def test_a_folder_without_truth_and_with_some(tmp_path: Path) -> None:
    root = tmp_path / "my"
    for i in range(3):
        picture(root / "images" / "trip" / f"{i}.jpg", noise(i))
    (root / "labels.csv").write_text("image,labels\ntrip/0,cat\ntrip/1.jpg,dog\ntrip/gone.jpg,dog\n")
    rows, broken = _check("folder", root, tmp_path)
    assert (rows["images"][:2], broken) == (["2", "3"], False)
    # Where there are no masks, and nobody published a number of images, no row says so.
    assert not [name for name in rows if "mask" in name or name == "images published"]
    assert rows["labels of no listed image"] == ["1", "-", "note", "trip/gone"]
    (root / "masks" / "trip").mkdir(parents=True)
    (root / "masks" / "trip" / "0.png").write_bytes(write_label_png(np.ones((48, 64), np.uint8)))
    rows, broken = _check("folder", root, tmp_path)
    assert (rows["masks missing"][:3], broken) == (["0", "0", "ok"], False)
    # A class that is in no class list is an error of the image's labels.
    (root / "classes.txt").write_text("background\ncat\n")
    rows, broken = _check("folder", root, tmp_path)
    assert (rows["labels unusable"], broken) == (["1", "1", "broken", "trip/1"], True)


def test_errors_of_the_whole_data_set_are_raised(tmp_path: Path) -> None:
    root = write_voc(tmp_path / "VOC2012")
    (root / "image_labels.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        check_data.run(compose(_options("voc", root, tmp_path)))
    with pytest.raises(MissingError, match=r"dataset split: got 'nope'"):
        check_data.run(compose(_options("voc", root, tmp_path, "dataset.train_split=nope")))
