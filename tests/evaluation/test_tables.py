from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from moduseg.evaluation.bootstrap import Interval
from moduseg.evaluation.published import BENCHMARKS, PUBLISHED, TABLES, published_markdown, published_rows
from moduseg.evaluation.tables import markdown_table, results_markdown, results_record, versions

CLASSES = ("background", "dog", "a|b", "cat")
MATRIX = np.array([[6, 1, 0, 1], [1, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


def _record(**changes: object) -> dict:
    arguments: dict = {
        "dataset": "miniature",
        "split": "val",
        "images": 3,
        "label_source": "json",
        "config": {"top_k": 25},
        "seconds": {"search": 1.23456},
        "failures": ["b", "a"],
        "interval": Interval(42.2, 30.0, 50.0),
    }
    return results_record(MATRIX, CLASSES, **{**arguments, **changes})


def test_results_hold_what_is_promised() -> None:
    record = json.loads(json.dumps(_record(extra={"seed": 42}), allow_nan=False))
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


def test_empty_results_are_null_not_nan() -> None:
    record = results_record(
        torch.zeros(2, 2), ("background", "dog"), dataset="d", split="s", images=0, label_source="none", config={}
    )
    assert record["miou"] is None
    assert "null" in json.dumps(record, allow_nan=False)
    assert "mIoU - %" in results_markdown(record)


def test_record_arguments() -> None:
    with pytest.raises(ValueError, match=r"got \(4, 4\), expected \(1, 1\)"):
        results_record(MATRIX, ("background",), dataset="d", split="s", images=1, label_source="none", config={})
    with pytest.raises(ValueError, match="extra: got miou"):
        _record(extra={"miou": 100})


def test_versions_name_what_decides_numbers() -> None:
    found = versions()
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    assert found["python"]
    assert found["moduseg"]


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
