"""All methods side by side on a world of a few scenes: what runs, what is missing, what fails, and what is written."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from moduseg.cli import run_script
from moduseg.config.command_keys import MethodsOptions
from moduseg.errors import ConfigError
from moduseg.evaluation.bootstrap import bootstrap
from moduseg.evaluation.counts import FILE, SplitCounts
from moduseg.files import read_json
from moduseg.report.page import read_script
from moduseg.studies import methods
from moduseg.studies.methods import MethodStudy
from tests.support.runs import overrides

TABLE: dict[str, Any] = {
    "title": "Small.",
    "worlds": [0, 5],
    "base": {"miniature": ["retrieval.top_k=3"]},
    "forms": {
        "masks": {"stage": "pseudo_masks", "overrides": ["pseudo_masks.refine=none"]},
        "retrieval": {"stage": "infer", "overrides": ["pseudo_masks.refine=none"]},
        "student": {
            "stage": "predict_student",
            "overrides": ["pseudo_masks.refine=none"],
            "miniature": ["student=linear"],
        },
    },
    "methods": {
        "truth": {"miniature": ["pseudo_masks=ground_truth"], "published": {"masks": ["iSeg", "iSeg", "train"]}},
        "CAM": {"miniature": ["pseudo_masks=cam"]},
        "nowhere": {"miniature": ["pseudo_masks=files", "pseudo_masks.generator.folder=nowhere"]},
        "elsewhere": {"voc": ["pseudo_masks=cam"]},
    },
    "notes": ["A note."],
}
STEPS = ("student.training.steps=3", "student.training.warmup=1", "student.training.batch=2")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with `configs/methods/small.yaml` and room for outputs, which the tests share."""
    folder = tmp_path_factory.mktemp("methods")
    (folder / "configs" / "methods").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(TABLE), folder / "configs" / "methods" / "small.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moduseg.studies.ablate.config_dir", lambda: folder / "configs")
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def small(home: Path) -> list[str]:
    """Overrides of runs of a second each."""
    plain = [o for o in overrides(home / "out", train=5, val=3) if not o.startswith(("dataset.root", "pseudo_masks"))]
    return [*plain, *STEPS]


@pytest.fixture(scope="module")
def written(small: list[str], home: Path) -> Path:
    """The folder that the command wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["methods", "table=small", "worlds=2", *small])
        with pytest.raises(SystemExit) as ended:
            run_script("methods")
    assert ended.value.code == 0
    (folder,) = (home / "out" / "miniature" / "methods").glob("small-*")
    return folder


def load(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = read_json(folder / "table.json")
    return record


def rows_of(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["method"], row["form"]): row for row in load(folder)["rows"]}


def test_each_method_has_a_row_for_each_form(written: Path) -> None:
    rows = rows_of(written)
    assert list(rows) == [(m, f) for m in ("truth", "CAM", "nowhere") for f in ("masks", "retrieval", "student")]
    assert {key[0]: row["status"] for key, row in rows.items()} == {
        "truth": "done", "CAM": "done", "nowhere": "missing",
    }  # fmt: skip
    assert [(row["images"], row["num_worlds"]) for row in rows.values() if row["status"] == "done"] == [(6, 2)] * 6
    assert rows["truth", "masks"]["miou"] == 100.0 == rows["truth", "masks"]["boundary_miou"]
    assert rows["truth", "masks"]["train_miou"] == 100.0
    assert rows["truth", "retrieval"]["train_miou"] is None
    assert rows["truth", "masks"]["published"] == 75.2


def test_worlds_are_pooled(written: Path) -> None:
    row = rows_of(written)["CAM", "retrieval"]
    counts = [SplitCounts.from_bytes((Path(p) / FILE).read_bytes(), p).label_counts() for p in row["results"]]
    expected = bootstrap(np.concatenate(counts), 50)
    assert (row["miou"], row["miou_low"], row["miou_high"]) == pytest.approx(
        (expected.value, expected.low, expected.high)
    )
    assert row["mious"] == [read_json(Path(path) / "results.json")["miou"] for path in row["results"]]
    seeds = [read_json(Path(path) / "manifest.json")["config"]["dataset"]["seed"] for path in row["results"]]
    assert seeds == [0, 5]


def test_learnt_numbers_are_those_of_fit_and_student(written: Path) -> None:
    rows = rows_of(written)
    student = next(written.parents[1].glob("train_student/*/manifest.json"))
    trained = read_json(student)["parameters"]["trained_parameters"]
    assert rows["truth", "masks"]["num_parameters"] == 0 == rows["truth", "retrieval"]["num_parameters"]
    assert rows["truth", "student"]["num_parameters"] == trained
    # Class activation maps in closed form: a vector for each of 12 classes, and the mean.
    width = rows["CAM", "masks"]["num_parameters"] // 13
    assert rows["CAM", "masks"]["num_parameters"] == 13 * width > 0
    assert rows["CAM", "student"]["num_parameters"] == 13 * width + trained


def test_costs_are_those_of_one_picture(written: Path) -> None:
    rows = rows_of(written)
    for key in (("CAM", "masks"), ("CAM", "retrieval"), ("CAM", "student")):
        assert rows[key]["cpu"] > 0
        assert rows[key]["memory"] > 0
    assert rows["truth", "masks"]["preparation_cpu"] == 0
    assert rows["CAM", "student"]["preparation_cpu"] > rows["CAM", "masks"]["preparation_cpu"] > 0


def test_what_differs_is_marked(written: Path) -> None:
    record, rows = load(written), rows_of(written)
    masks = next(d for d in record["differences"] if d["form"] == "masks")
    assert {masks["first"], masks["second"]} == {"truth", "CAM"}
    assert masks["is_certain"]
    assert masks["high"] < 0
    assert set(rows["truth", "masks"]["alike"]).isdisjoint(rows["CAM", "masks"]["alike"])
    # Nothing gains on the truth, and two runs of equal label maps do not differ.
    assert rows["truth", "retrieval"]["gain"]["difference"] <= 0
    assert rows["nowhere", "masks"]["alike"] is None
    assert rows["nowhere", "retrieval"]["gain"] is None


def test_the_files_say_the_same(written: Path) -> None:
    text, rows = (written / "table.md").read_text(encoding="utf-8"), rows_of(written)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert lines[0][:4] == ["method", "form", "mIoU", "95 % interval"]
    assert len(lines) == 2 + len(rows)
    for line, ((method, form), row) in zip(lines[2:], rows.items(), strict=True):
        assert line[:2] == [method, form]
        assert line[2] == ("missing" if row["miou"] is None else f"{row['miou']:.1f}")
    assert "75.2 (voc train, tags given)" in text
    assert "miniature val, 2 worlds (seeds 0, 5), 6 pictures" in text
    assert "- A note." in text
    assert text.count("- nowhere: pseudo_masks.generator.folder: got 'nowhere', no such folder or .zip") == 1
    with (written / "table.csv").open(encoding="utf-8", newline="") as file:
        in_csv = list(csv.DictReader(file))
    assert [float(line["miou"] or 0) for line in in_csv] == pytest.approx([row["miou"] or 0 for row in rows.values()])
    assert in_csv[0]["published_source"].startswith("arXiv")
    with Image.open(written / "quality_time.png") as picture:
        assert picture.width > 800
    assert "best for its time" in (written / "quality_time.svg").read_text(encoding="utf-8")
    summary = read_script(written / "report" / "data" / "summary.js")
    assert summary["methods"] == load(written)


def test_what_is_done_is_not_done_again(written: Path, small: list[str], home: Path) -> None:
    """Neither by the same command, nor by one that has a part of its rows."""
    files = [
        p for p in (home / "out").rglob("*") if p.is_file() and "methods" not in p.parts and "latest" not in p.parts
    ]
    made = {path: path.stat().st_mtime_ns for path in files}
    before = (written / "table.md").read_bytes()
    folder, num_failed = methods.run(MethodsOptions(worlds=2, table="small"), small)
    assert (folder, num_failed) == (written, 0)
    part, _ = methods.run(MethodsOptions(worlds=1, methods=("CAM",), table="small"), small)
    assert part != written
    assert load(part)["methods"] == ["CAM"]
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert (written / "table.md").read_bytes() == before


def test_a_row_that_fails_does_not_stop_the_others(small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the disk is\ngone")

    monkeypatch.setattr("moduseg.studies.methods.Infer.run", fail)
    folder, num_failed = methods.run(MethodsOptions(worlds=1, methods=("CAM",), table="small"), small)
    rows = rows_of(folder)
    assert num_failed == 1
    assert rows["CAM", "retrieval"]["errors"] == ["RuntimeError: the disk is gone"]
    assert [rows["CAM", form]["status"] for form in ("masks", "student")] == ["done", "done"]
    assert "Failed:\n\n- every retrieval: RuntimeError: the disk is gone\n" in (folder / "table.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(("override", "message"), [
    pytest.param("pseudo_masks=cam", "pseudo_masks: got 'pseudo_masks=cam', expected none", id="the generator"),
    pytest.param("pseudo_masks.refine=pamr", "pseudo_masks.refine: got .*table=<file>", id="what a form sets"),
    pytest.param("dataset.seed=77", "dataset.seed: got .*worlds=<number>", id="the world"),
    pytest.param("student.training.stepz=3", "student.training.stepz: got .*a key that a row", id="a student's key"),
    pytest.param("pseudo_masks.generator.no=3", "pseudo_masks.generator.no: got", id="a generator's key"),
])  # fmt: skip
def test_no_override_is_dropped_without_a_word(small: list[str], override: str, message: str) -> None:
    """Rows that all run the same generator, or another world than the table says, would have the wrong names."""
    with pytest.raises(ConfigError, match=message):
        MethodStudy(MethodsOptions(table="small", worlds=1, methods=("CAM",)), [*small, override])


def test_keys_of_another_student_reach_it(small: list[str]) -> None:
    """The table has a linear student, which has no such key."""
    plain = [override for override in small if not override.startswith("student.")]
    key = "student.model.drop_path=0.3"
    study = MethodStudy(
        MethodsOptions(table="small", worlds=1, methods=("CAM",)), [*plain, "student=segformer_b0", key]
    )
    student = study.rows["CAM", "student"].cfgs[0].student
    assert student is not None
    assert student.model["drop_path"] == 0.3


@pytest.mark.parametrize(("options", "message"), [
    pytest.param({"worlds": 3}, "worlds: got 3, expected 1 to 2; leave it out", id="worlds"),
    pytest.param({"worlds": 2, "dataset": "voc"}, "worlds: got 2, expected 1 on voc, where", id="a set without worlds"),
    pytest.param({"dataset": "context"}, "dataset: got 'context', expected one of miniature", id="data set"),
    pytest.param({"methods": ("CAN",)}, "methods: got 'CAN', expected some of truth, CAM", id="method"),
    pytest.param({"table": "large"}, "table: got 'large', expected one of small", id="table"),
])  # fmt: skip
def test_mistakes_are_named_before_anything_runs(small: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MethodStudy(MethodsOptions(**{"table": "small", **options}), small)
