from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from moduseg.evaluation.bootstrap import Interval
from moduseg.evaluation.measures import LabelMapCounts
from moduseg.evaluation.published import (
    BENCHMARKS,
    DIFFSEGMENTER,
    ISEG,
    LATER,
    OPEN,
    PAPER,
    PUBLISHED,
    PUBLISHED_COSTS,
    TABLES,
    published_markdown,
    published_rows,
)
from moduseg.evaluation.tables import (
    ContourWidth,
    ScoredRun,
    markdown_table,
    results_markdown,
    results_record,
    versions,
)

CLASSES = ("background", "dog", "a|b", "cat")
MATRIX = np.array([[6, 1, 0, 1], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


RUN = ScoredRun("miniature", "val", 3, "json", {"top_k": 25}, {"search": 1.23456}, ["b", "a"])


def _record(counts: LabelMapCounts | None = None, run: ScoredRun = RUN, contours: ContourWidth | None = None) -> dict:
    interval = Interval(42.2, 30.0, 50.0)
    return results_record(counts or LabelMapCounts(MATRIX), CLASSES, run, interval=interval, contours=contours)


def test_results_hold_what_is_promised() -> None:
    record = json.loads(json.dumps(_record(run=replace(RUN, extra={"seed": 42})), allow_nan=False))
    assert record["iou"] == {
        "background": pytest.approx(200 / 3), "dog": pytest.approx(60), "a|b": None, "cat": 0.0,
    }  # fmt: skip
    assert record["miou"] == pytest.approx((200 / 3 + 60) / 3)
    assert record["miou_classes_in_truth"] == pytest.approx((200 / 3 + 60) / 2)
    assert record["pixel_accuracy"] == 75.0
    assert record["confusion"] == MATRIX.tolist()
    assert record["left_out"] == ["a", "b"]
    assert record["seconds"] == {"search": 1.235}
    assert record["miou_interval"] == {"low": 30.0, "high": 50.0, "confidence": 0.95, "over": "images"}
    for key in ("dataset", "split", "images", "label_source", "config", "versions", "seed"):
        assert record[key]


def test_precision_recall_and_contours_of_each_class() -> None:
    counts = LabelMapCounts(MATRIX, np.array([[2, 1, 0, 0], [4, 1, 0, 0], [4, 3, 0, 2]]))
    record = json.loads(json.dumps(_record(counts, contours=ContourWidth(0.02, [8, 12, 9])), allow_nan=False))
    assert record["precision"] == {"background": pytest.approx(600 / 7), "dog": 75.0, "a|b": None, "cat": 0.0}
    assert record["recall"] == {"background": 75.0, "dog": 75.0, "a|b": None, "cat": None}
    assert record["boundary_iou"] == {
        "miou": pytest.approx((100 / 3 + 100 / 3 + 0) / 3),
        "iou": {"background": pytest.approx(100 / 3), "dog": pytest.approx(100 / 3), "a|b": None, "cat": 0.0},
        "width": 0.02,
        "width_of": "the image's diagonal",
        "width_pixels": [8, 12],
    }
    assert "| boundary mIoU (2 % of the diagonal, 8 to 12 pixels) |  22.2 |" in results_markdown(record)


def test_without_background_both_numbers_are_reported() -> None:
    strict, flattering = (
        _record(LabelMapCounts(MATRIX, has_background=False, uncovered=rule)) for rule in ("wrong", "ignore")
    )
    # The row of label 0 does not count; of class 1, 1 pixel of 4 was left uncovered.
    assert strict["uncovered"] == {"rule": "wrong", "share": 25.0, "miou_wrong": 75.0, "miou_ignored": 100.0}
    assert (strict["miou"], flattering["miou"]) == (75.0, 100.0)
    assert (strict["miou_classes_in_truth"], strict["pixel_accuracy"]) == (75.0, 75.0)
    assert strict["iou"] == {"background": None, "dog": 75.0, "a|b": None, "cat": None}
    text = results_markdown(strict)
    assert "| mIoU, uncovered pixels counted as wrong |  75.0 |" in text
    assert "| uncovered pixels                        |  25.0 |" in text


def test_empty_results_are_null_not_nan() -> None:
    empty = LabelMapCounts(np.zeros((2, 2), dtype=np.int64))
    record = results_record(empty, ("background", "dog"), ScoredRun("d", "s", 0, "none", {}))
    assert record["miou"] is None
    assert "null" in json.dumps(record, allow_nan=False)
    assert "mIoU - %" in results_markdown(record)


def test_record_arguments() -> None:
    with pytest.raises(ValueError, match=r"got \(4, 4\), expected \(1, 1\)"):
        results_record(LabelMapCounts(MATRIX), ("background",), RUN)
    with pytest.raises(ValueError, match="extra: got miou"):
        _record(run=replace(RUN, extra={"miou": 100}))


def test_versions_name_what_decides_numbers() -> None:
    by_package = versions()
    assert by_package["torch"] in (torch.__version__, torch.__version__.split("+")[0])
    assert by_package["python"]
    assert by_package["moduseg"]


def test_markdown_of_results() -> None:
    text = results_markdown(_record())
    head, by_class, totals = text.split("\n\n")
    table = by_class.splitlines()
    assert "**mIoU 42.2 %** (30.0 to 50.0), pixel accuracy 75.0 %" in head
    assert "miniature val, 3 images, image-level labels: json; left out: 2 (a, b)" in head
    assert len({len(line) for line in table}) == 1
    cells = {row[0]: row[1:] for row in ([c.strip() for c in line.split(" | ")] for line in table[2:])}
    assert cells["| dog"] == ["60.0", "75.0", "75.0", "33.3 |"]
    assert cells["| cat"] == ["0.0", "0.0", "-", "0.0 |"]
    assert cells["| a\\|b"] == ["-", "-", "-", "0.0 |"]
    assert "| mIoU over classes in the truth |  63.3 |" in totals
    assert "boundary" not in totals
    assert "uncovered" not in totals


def test_markdown_table_is_aligned() -> None:
    assert markdown_table(("name", "x"), [("a", 1), ("long name", 22.5)]) == (
        "| name      |    x |\n|-----------|-----:|\n| a         |    1 |\n| long name | 22.5 |\n"
    )
    assert markdown_table(("a",), []) == "| a   |\n|-----|\n"
    with pytest.raises(ValueError, match="another length"):
        markdown_table(("a", "b"), [("only one",)])


def test_published_rows_stand_beside_ours() -> None:
    rows = published_rows("main", "coco/val", {"ModuSeg (C-RADIOv4-SO400M)": 55.5})
    assert rows[0] == ("ModuSeg (C-RADIOv4-SO400M)", 56.7, 55.5)
    assert "S2C (CVPR 24)" not in [row[0] for row in rows]
    assert len(published_rows("main", "voc/val")) == 8
    text = published_markdown("proposer", "voc/val", {"SAM 2": 81.04})
    assert [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()[2:]] == [
        ["EntitySeg", "86.3", "not measured"],
        ["SAM 2", "82.6", "81.0"],
    ]


@pytest.mark.parametrize(
    ("table", "benchmark", "ours", "words"),
    [
        ("main", "coco150/val", None, "'main' on 'coco150/val', expected one of"),
        ("best", "voc/val", None, "got 'best'"),
        ("proposer", "voc/val", {"SAM 3": 1.0}, "got 'SAM 3', expected one of EntitySeg, SAM 2"),
    ],
)
def test_published_arguments(table: str, benchmark: str, ours: dict | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        published_rows(table, benchmark, ours)


def test_published_data_is_consistent() -> None:
    keys = [(row.table, row.method, row.benchmark) for row in PUBLISHED]
    assert len(keys) == len(set(keys))
    assert all(0 < row.value < 100 for row in PUBLISHED)
    value = {key: row.value for key, row in zip(keys, PUBLISHED, strict=True)}
    full = value["main", "ModuSeg (C-RADIOv4-SO400M)", "voc/val"]
    for table, method in (("backbone", "C-RADIOv4-SO400M"), ("proposer", "EntitySeg"), ("images per class", "all")):
        assert value[table, method, "voc/val"] == full
    for table in TABLES:
        assert any(published_rows(table, benchmark) for benchmark in BENCHMARKS)


@pytest.mark.parametrize(
    ("table", "benchmark", "values"),
    [
        ("main", "voc/val", [86.3, 82.5, 79.5, 79.3, 78.4, 78.2, 76.4, 76.4]),
        ("main", "voc/test", [86.6, 82.4, 79.6, 79.0, 78.5, 77.5, 77.2, 75.0]),
        ("main", "coco/val", [56.7, 54.1, 50.6, 49.8, 50.3, 47.1, 47.4]),
        ("main", "ade20k/val", [44.7]),
        ("main", "cityscapes/val", [66.0]),
        ("ablation", "voc/val", [84.3, 84.6, 85.2, 86.3]),
        ("backbone", "voc/val", [82.9, 84.7, 85.3, 86.3]),
        ("backbone", "coco/val", [51.0, 53.5, 55.8, 56.7]),
        ("proposer", "voc/val", [86.3, 82.6]),
        ("upper bound", "voc/val", [86.3, 86.7, 95.7]),
        ("images per class", "voc/val", [69.8, 80.2, 86.3]),
        ("pseudo masks", "voc/train", [68.7, 78.8, 76.6, 82.4]),
        ("pseudo masks", "coco/train", [42.5, 54.6, 55.1, 60.2]),
        (
            "open vocabulary",
            "ade20k/val",
            [3.2, 16.1, 16.7, 17.4, 19.1, 20.2, 21.9, 26.9, 28.6, 33.2, 31.8, 40.0],
        ),
    ],
)
def test_every_published_table_is_there(table: str, benchmark: str, values: list[float]) -> None:
    assert [value for _, value, _ in published_rows(table, benchmark)] == values


def test_every_published_figure_names_its_source() -> None:
    later = {"arXiv 2308.12469", "arXiv 2308.03005", "arXiv 2507.06848", "arXiv 2212.09506"}
    assert {row.source for row in PUBLISHED} == {PAPER, LATER, OPEN, ISEG, DIFFSEGMENTER} | later
    assert {row.benchmark for row in PUBLISHED if row.source == LATER} == {"ade20k/val", "cityscapes/val"}
    assert {row.benchmark: row.note for row in PUBLISHED if row.note and row.source == LATER} == {
        "ade20k/val": "uncovered pixels counted as class 1",
        "cityscapes/val": "uncovered pixels ignored, which flatters",
    }
    costs = {row.method: (row.minutes, row.gpu_memory_gb, row.source) for row in PUBLISHED_COSTS}
    assert costs == {
        "CLIMS": (1068, 18.0, PAPER),
        "MCTformer+": (1496, 18.0, PAPER),
        "WeCLIP": (270, 6.2, PAPER),
        "ModuSeg": (84, 5.3, PAPER),
    }
