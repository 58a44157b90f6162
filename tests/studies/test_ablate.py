"""Tables of experiments: which file they are written to and how numbers are shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moduseg.errors import ConfigError
from moduseg.evaluation.measures import Measure, mean_iou
from moduseg.files import write_json
from moduseg.studies import ablate
from tests.support.runs import overrides

TABLE = "title: One\naxes: {K: {'1': [retrieval.top_k=1], '5': [retrieval.top_k=5]}}\n"


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tables with `one`, whose runs all give the same results."""
    folder = tmp_path / "config" / "table"
    folder.mkdir(parents=True)
    (folder / "one.yaml").write_text(TABLE)
    results: dict[str, Any] = {"miou": 12.345, "images": 3, "dataset": "miniature", "split": "val"}
    write_json(tmp_path / "results.json", {"prediction": results, "pseudo_masks": None, "proposals": None})
    monkeypatch.setattr(ablate, "config_dir", lambda: folder.parent)
    monkeypatch.setattr(ablate.evaluate, "run", lambda cfg: tmp_path)
    return folder


def test_overrides_have_a_file_of_their_own(tables: Path, tmp_path: Path) -> None:
    outputs = f"runtime.outputs={tmp_path / 'outputs'}"
    plain = ablate.run("one", [outputs])
    assert plain.name == "one.md"
    changed, other = (ablate.run("one", [outputs, f"bank.min_area={area}"]) for area in (100, 200))
    assert len({plain, changed, other}) == 3
    assert all(path.name.startswith("one-") for path in (changed, other))
    assert ablate.run("one", [f"runtime.outputs={tmp_path / 'outputs'}", "bank.min_area=100"]) == changed
    assert all(path.with_suffix(".json").is_file() for path in (plain, changed, other))


def test_a_column_has_the_decimals_and_the_unit_of_its_measure(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distance = Measure(name="miou", title="distance", compute=mean_iou, unit="px", decimals=3)
    monkeypatch.setitem(ablate.FIGURES, "distance", ("prediction", distance))
    (tables / "one.yaml").write_text(TABLE + "columns: [mIoU, distance]\n")
    table = ablate.run("one", [f"runtime.outputs={tmp_path / 'outputs'}"]).read_text().splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert rows[0] == ["K", "mIoU", "distance (px)", "runs"]
    assert rows[2] == ["1", "12.3", "12.345", "1"]


def test_words_alone_are_a_stage_of_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells run `segment`; figures of pseudo masks and proposals are not among its results."""
    content = {
        "title": "Words.",
        "stage": "segment",
        "base": ["pseudo_masks=ground_truth"],
        "axes": {"classes": {"given": ["tagger=given"], "all": []}},
    }
    (tmp_path / "configs" / "table").mkdir(parents=True)
    (tmp_path / "configs" / "table" / "words.yaml").write_text(json.dumps(content))
    monkeypatch.setattr(ablate, "config_dir", lambda: tmp_path / "configs")
    path = ablate.run("words", overrides(tmp_path, val=2, train=1))
    rows = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert [row["figures"]["mIoU"] for row in rows] == [[100.0], [100.0]]
    assert [row["options"]["classes"] for row in rows] == ["given", "all"]
    content["columns"] = ["mIoU", "pseudo-mask mIoU"]
    (tmp_path / "configs" / "table" / "words.yaml").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"columns: got mIoU, pseudo-mask mIoU, expected figures of predictions"):
        ablate.load_table("words")
