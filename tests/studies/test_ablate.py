"""Tables of experiments: which file they are written to and how numbers are shown."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moduseg.config import Config, compose
from moduseg.errors import ConfigError
from moduseg.evaluation.bootstrap import image_counts, paired_bootstrap
from moduseg.evaluation.counts import FILE, ImageCounts, SplitCounts
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
    monkeypatch.setattr(ablate.evaluate, "run", lambda cfg, work: tmp_path)
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
    monkeypatch.setitem(ablate.COLUMNS, "distance", ("prediction", distance))
    (tables / "one.yaml").write_text(TABLE + "columns: [mIoU, distance]\n")
    table = ablate.run("one", [f"runtime.outputs={tmp_path / 'outputs'}"]).read_text().splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert rows[0] == ["K", "mIoU", "distance (px)", "runs"]
    assert rows[2] == ["1", "12.3", "12.345", "1"]


def test_rows_are_compared_with_a_reference_over_all_images(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of two images each: the figures are those of one confusion matrix, the draws those of `compare`.

    With a centre both K give the same counts: rows are compared with the one that differs by K alone.
    """
    confusions = {
        ("1", 0): [[[6, 2], [0, 2]], [[5, 0], [3, 2]]],
        ("1", 1): [[[7, 1], [1, 1]], [[4, 1], [0, 5]]],
        ("5", 0): [[[8, 0], [0, 2]], [[5, 0], [1, 4]]],
        ("5", 1): [[[7, 1], [0, 2]], [[4, 1], [1, 4]]],
    }
    results = {"miou": 50.0, "images": 2, "dataset": "miniature", "split": "val"}
    for (top_k, seed), matrices in confusions.items():
        folder = tmp_path / f"{top_k}-{seed}"
        write_json(folder / "results.json", {"prediction": results, "pseudo_masks": None, "proposals": None})
        counts = SplitCounts(2)
        for image, matrix in enumerate(matrices):
            counts.append(f"val_{image}", ImageCounts(np.array(matrix)))
        (folder / FILE).write_bytes(counts.to_bytes())

    def find_results(cfg: Config, work: object = None) -> Path:
        return tmp_path / f"{1 if cfg.bank.centre else cfg.retrieval.top_k}-{cfg.dataset['seed']}"

    monkeypatch.setattr(ablate.evaluate, "run", find_results)
    content = {
        "title": "One",
        "base": ["bank.centre=false"],
        "axes": {
            "K": {"1": ["retrieval.top_k=1"], "5": ["retrieval.top_k=5"]},
            "centre": {"no": [], "yes": ["bank.centre=true"]},
        },
        "replicates": [["dataset.seed=0"], ["dataset.seed=1"]],
        "reference": {"K": "1"},
    }
    (tables / "one.yaml").write_text(json.dumps(content))
    path = ablate.run("one", [f"runtime.outputs={tmp_path / 'outputs'}"])
    reference, _, other, centred = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert centred["all_images"]["difference"]["value"] == 0
    # The four matrices of a row add up to [[22, 4], [4, 10]] and to [[24, 2], [2, 12]].
    assert reference["all_images"]["miou"]["value"] == pytest.approx(100 * (22 / 30 + 10 / 18) / 2)
    assert other["all_images"]["miou"]["value"] == pytest.approx(100 * (24 / 28 + 12 / 16) / 2)
    pooled = {k: np.concatenate([confusions[k, 0], confusions[k, 1]]) for k in ("1", "5")}
    expected = paired_bootstrap(image_counts(list(pooled["1"])), image_counts(list(pooled["5"])), 1000)
    assert "difference" not in reference["all_images"]
    assert other["all_images"]["difference"] == pytest.approx(asdict(expected))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in path.read_text().splitlines()[2:]]
    assert cells[0] == ["K", "centre", "mIoU", "mIoU of all 4 images", "difference to 1", "runs"]
    assert cells[2][4] == cells[3][4] == "-"
    assert cells[4][4] == f"{expected.value:+.1f} ({expected.low:+.1f} to {expected.high:+.1f})"


def test_rows_are_compared_on_the_images_that_both_have(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that lost an image is compared on the others, image by image, and says on how many."""
    confusions = {
        "1": {"b": [[5, 0], [3, 2]], "c": [[7, 1], [1, 1]]},
        "5": {"a": [[8, 0], [0, 2]], "c": [[6, 2], [0, 2]]},
    }
    for top_k, matrices in confusions.items():
        results = {"miou": 50.0, "images": 2, "dataset": "miniature", "split": "val"}
        write_json(tmp_path / top_k / "results.json", {"prediction": results, "pseudo_masks": None, "proposals": None})
        counts = SplitCounts(2)
        for image_id, matrix in matrices.items():
            counts.append(image_id, ImageCounts(np.array(matrix)))
        (tmp_path / top_k / FILE).write_bytes(counts.to_bytes())
    monkeypatch.setattr(ablate.evaluate, "run", lambda cfg, work=None: tmp_path / str(cfg.retrieval.top_k))
    (tables / "one.yaml").write_text(TABLE + "reference: {K: '1'}\n")
    path = ablate.run("one", [f"runtime.outputs={tmp_path / 'outputs'}"])
    difference = json.loads(path.with_suffix(".json").read_text())["rows"][1]["all_images"]["difference"]
    expected = 100 * ((6 / 8 + 2 / 4) / 2 - (7 / 9 + 1 / 3) / 2)
    assert (difference["value"], difference["images"]) == (pytest.approx(expected), 1)
    assert path.read_text().splitlines()[5].split("|")[4].strip().endswith(", 1 images")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        pytest.param(
            "reference: {K: '9'}\n", r"reference: got .*9.*expected an axis and one of its options", id="no such row"
        ),
        pytest.param(
            "reference: {k: '1'}\n", r"reference: got .*expected an axis and one of its options", id="no such axis"
        ),
        pytest.param("reference: {K: '1'}\nstage: segment\n", r"reference: got one with stage segment", id="stage"),
        pytest.param(
            "reference: {B: one}\naxes: {B: {one: [[dataset.seed=0]], two: [[dataset.seed=0], [dataset.seed=1]]}}\n",
            r"reference: got options of B with unequal numbers of runs \(one 1, two 2\)",
            id="numbers of runs",
        ),
    ],
)
def test_a_reference_has_to_be_a_row(tables: Path, lines: str, message: str) -> None:
    content = TABLE.splitlines()[0] + "\n" + lines if "axes:" in lines else TABLE + lines
    (tables / "one.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        ablate.load_table("one")


def test_costs_and_masks_from_tags_are_columns(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(ablate, "config_dir", lambda: tables.parent)
    columns = ["tagged mIoU", "mask time", "mask CPU time", "mask memory", "prediction time", "prediction memory"]
    one = {"title": "One", "axes": {"masks": {"truth": ["pseudo_masks=ground_truth"]}}, "columns": columns}
    (tables / "one.yaml").write_text(json.dumps(one))
    path = ablate.run("one", overrides(tmp_path))
    figures = json.loads(path.with_suffix(".json").read_text())["rows"][0]["figures"]
    # The generator is told the truth, on the evaluated split as well.
    assert figures.pop("tagged mIoU") == [100.0]
    assert all(value > 0 for values in figures.values() for value in values)
    header = [cell.strip() for cell in path.read_text().splitlines()[2].split("|")[2:4]]
    assert header == ["tagged mIoU", "mask time (s)"]


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


def test_a_reference_needs_draws(tables: Path) -> None:
    (tables / "one.yaml").write_text(TABLE + "reference: {K: '1'}\n")
    with pytest.raises(ConfigError, match=r"evaluation\.bootstrap: got 0, expected 1 draw or more.*try 1000"):
        ablate.run("one", ["evaluation.bootstrap=0"])


@pytest.mark.parametrize("name", ["modules_256", "modules_spill"])
def test_rows_of_the_modules_differ_in_the_bank_alone(name: str) -> None:
    table = ablate.load_table(name)
    settings = {row: compose([*table.base, *changes]).as_dict() for row, changes in table.axes["modules"].items()}
    banks = {row: cfg.pop("bank") for row, cfg in settings.items()}
    assert all(cfg == settings["none"] for cfg in settings.values())
    used = {row: (bank["purify"]["enabled"], bank["aggregation"]) for row, bank in banks.items()}
    assert used == {
        "none": (False, "hard"),
        "SMFA": (False, "soft"),
        "SBP": (True, "hard"),
        "SBP + SMFA": (True, "soft"),
    }
