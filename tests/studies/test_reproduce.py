"""The paper's tables on a world of a few scenes: what runs, what is missing, what fails, and what is written."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
from omegaconf import OmegaConf

from moduseg.cli import run_script
from moduseg.config import compose
from moduseg.errors import ConfigError
from moduseg.stages import evaluate
from moduseg.studies import reproduce
from moduseg.studies.reproduce import ReproduceOptions
from tests.support.runs import overrides

TABLE: dict[str, Any] = {
    "title": "Small.",
    "published": "ablation",
    "reference": {"miniature": "both", "full": "both"},
    "columns": ["proposal recall"],
    "rows": {
        "baseline": {"published": "baseline", "all": ["bank.purify.enabled=false", "bank.aggregation=hard"]},
        "nowhere": {"all": ["pseudo_masks=files", "pseudo_masks.generator.folder=nowhere"]},
        "broken": {"miniature": ["evaluation.uncovered=ignore"]},
        "both": {"published": "+ SMFA + SBP", "all": []},
        "others": {"published": "+ SBP"},
    },
    "notes": {"miniature": ["A note."]},
}
MORE = ("evaluation.panels=0", "evaluation.bootstrap=0", "evaluation.boundary_width=0")


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tables in place of the shipped one, with `small.yaml`; the working folder is empty."""
    folder = tmp_path / "configs" / "reproduce"
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(TABLE), folder / "small.yaml")
    monkeypatch.setattr("moduseg.studies.ablate.config_dir", lambda: folder.parent)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


@pytest.fixture
def small(tmp_path: Path, tables: Path) -> list[str]:
    """Overrides of a run of a second."""
    plain = overrides(tmp_path / "out", train=4, val=2, world=tmp_path)
    return [*(o for o in plain if not o.startswith("evaluation.")), *MORE]


def record_of(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return record


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """Exit code of `scripts/reproduce.py`."""
    monkeypatch.setattr("sys.argv", ["reproduce", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_script("reproduce")
    return ended.value.code


def test_a_table_of_rows_that_run_lack_something_and_fail(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "table=small", "dataset=miniature", *small) == 1
    printed = capsys.readouterr().out
    path = tmp_path / "out" / "tables" / "small-miniature.md"
    text, record = path.read_text(encoding="utf-8"), record_of(path)
    assert text in printed
    assert "Traceback" not in printed
    rows = {row["row"]: row for row in record["rows"]}
    # Other methods' figures have no place beside the miniature's.
    assert list(rows) == ["baseline", "nowhere", "broken", "both"]
    assert {name: row["status"] for name, row in rows.items()} == {
        "baseline": "done", "nowhere": "missing", "broken": "failed", "both": "done",
    }  # fmt: skip

    # What ran has the figures of `evaluate`, which makes nothing anew.
    for name, more in (("baseline", ["bank.purify.enabled=false", "bank.aggregation=hard"]), ("both", [])):
        results = json.loads((evaluate.run(compose([*small, *more])) / "results.json").read_text())
        assert rows[name]["ours"] == pytest.approx(results["prediction"]["miou"])
        assert rows[name]["columns"]["proposal recall"] == [pytest.approx(100.0)]
        assert (rows[name]["images"], rows[name]["split"], rows[name]["label_source"]) == (2, "val", "json")
        assert rows[name]["seconds"] > 0
        assert rows[name]["train_split"] == "train"
        assert rows[name]["runs"] == [[*small, *more]]
    both, baseline = rows["both"], rows["baseline"]
    assert baseline["published"]["value"] == 84.3
    assert baseline["difference"] == pytest.approx(baseline["ours"] - 84.3)
    assert baseline["published_change"] == pytest.approx(-2.0)
    assert baseline["change"] == [pytest.approx(baseline["ours"] - both["ours"])]
    assert both["change"] == []
    assert record["versions"]["torch"]

    # What did not says why, in one line.
    assert rows["nowhere"]["missing"] == [
        "pseudo_masks.generator.folder: got 'nowhere', no such folder or .zip; set pseudo_masks.generator.folder="
        "<folder or .zip of label PNGs>"
    ]
    assert rows["nowhere"]["ours"] is None
    assert "evaluation.uncovered: got 'ignore', expected 'wrong' on miniature" in rows["broken"]["errors"][0]

    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    header = ["row", "published", "ours", "difference", "published change", "our change", "proposal recall", "images"]
    assert lines[0] == [*header, "seconds"]
    shown = f"{baseline['ours']:.1f}", f"{baseline['difference']:+.1f}", f"{baseline['change'][0]:+.1f}"
    assert lines[2][:8] == ["baseline", "84.3", shown[0], shown[1], "-2.0", shown[2], "100.0", "2"]
    assert lines[3] == ["nowhere", "-", "missing", *["-"] * 6]
    assert lines[4][2] == "failed"
    assert lines[5][:6] == ["both", "86.3", f"{both['ours']:.1f}", f"{both['difference']:+.1f}", "-", "-"]
    assert "Missing in `nowhere`:\n\n- pseudo_masks.generator.folder: got 'nowhere'" in text
    assert "Failed in `broken`:\n\n- evaluation.uncovered: got 'ignore'" in text
    assert "on VOC 2012, for orientation" in text
    assert "- A note.\n" in text
    assert "- Bank of train, image-level labels from json.\n" in text
    assert "    # baseline\n    python scripts/evaluate.py proposer=ground_truth" in text


def test_complete_rows_are_not_run_again_and_artefacts_are_shared(small: list[str], tmp_path: Path) -> None:
    of_one_row = reproduce.run(ReproduceOptions("small", "miniature", "both"), small)
    assert of_one_row.num_failed == 0
    assert of_one_row.paths == [tmp_path / "out" / "tables" / "small-miniature-both.md"]
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "miniature").rglob("*") if p.is_file()}
    every = reproduce.run(ReproduceOptions("small", "miniature"), small)
    assert {p: p.stat().st_mtime_ns for p in made} == made
    assert len(list((tmp_path / "out" / "miniature" / "propose").iterdir())) == 1  # one for all rows
    first = record_of(of_one_row.paths[0])["rows"][0]
    again = next(row for row in record_of(every.paths[0])["rows"] if row["row"] == "both")
    assert (first["values"], first["seconds"], first["runs"]) == (again["values"], again["seconds"], again["runs"])


def test_another_split_is_not_compared(small: list[str]) -> None:
    path = reproduce.run(ReproduceOptions("small", "miniature", "both"), [*small, "dataset.val_split=train"]).paths[0]
    row = record_of(path)["rows"][0]
    assert (row["split"], row["images"], row["difference"]) == ("train", 4, None)
    assert "mIoU on train, percent" in path.read_text(encoding="utf-8")


def test_seeds_are_averaged(small: list[str], tmp_path: Path) -> None:
    """Two worlds; changes are those of each world."""
    without_root = [o for o in small if not o.startswith("dataset.root")]
    path = reproduce.run(ReproduceOptions("small", "miniature", seeds=2), without_root).paths[0]
    rows = {row["row"]: row for row in record_of(path)["rows"]}
    baseline, both = rows["baseline"], rows["both"]
    assert [run[-1] for run in both["runs"]] == ["dataset.seed=0", "dataset.seed=1"]
    assert both["values"][0] != both["values"][1]
    assert both["ours"] == pytest.approx(mean(both["values"]))
    assert baseline["change"] == [pytest.approx(a - b) for a, b in zip(baseline["values"], both["values"], strict=True)]
    text = path.read_text(encoding="utf-8")
    assert f"{mean(both['values']):.1f} ± {stdev(both['values']):.1f}" in text
    assert "of 2 runs, dataset.seed 0 to 1" in text


def test_without_data_every_row_says_what_is_missing(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("MODUSEG_VOC", "MODUSEG_SAM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODUSEG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert command(monkeypatch, "table=small", "runtime.device=cpu") == 0
    text = capsys.readouterr().out
    path = Path("outputs/tables/small-voc.md")
    assert f"written: {path}" in text
    rows = {row["row"]: row for row in record_of(path)["rows"]}
    # Rows without overrides are quoted, rows of the miniature are none of VOC's.
    assert {name: row["status"] for name, row in rows.items()} == {
        "baseline": "missing", "nowhere": "missing", "both": "missing", "others": "quoted",
    }  # fmt: skip
    for key in ("dataset.root", "proposer.checkpoint", "backbone.weights", "pseudo_masks.generator.weights"):
        assert f"\n- {key}: got " in text
        assert sum(line.startswith(f"{key}: got ") for line in rows["both"]["missing"]) == 1
    assert any("pseudo_masks.generator.folder: got 'nowhere'" in line for line in rows["nowhere"]["missing"])
    assert "Missing in `baseline`, `both`:" in text
    assert not Path("outputs/voc").exists()


def test_images_left_out_are_counted_and_end_with_one(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reproduce.run(ReproduceOptions("small", "miniature", "both"), small).num_failed == 0
    photograph = tmp_path / "world-4-2" / "JPEGImages" / "val_00001.png"
    photograph.write_bytes(photograph.read_bytes()[:200])
    assert command(monkeypatch, "table=small", "dataset=miniature", "row=both", *small) == 1
    text = capsys.readouterr().out
    row = record_of(tmp_path / "out" / "tables" / "small-miniature-both.md")["rows"][0]
    assert (row["status"], row["images"]) == ("done", 1)
    assert row["left_out"] >= 1
    assert f"{row['ours']:.1f}*" in text
    assert "Images left out on the way, see failures.jsonl: `both`" in text


def test_a_bug_in_one_row_does_not_end_the_night(
    small: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_evaluate = evaluate.run

    def sometimes(cfg: Any, work: Any = None) -> Path:
        if cfg.bank.aggregation == "hard":
            raise RuntimeError("out of\nmemory")
        return run_evaluate(cfg, work)

    monkeypatch.setitem(reproduce.RUNS, "evaluate", sometimes)
    made = reproduce.run(ReproduceOptions("small", "miniature"), small)
    rows = {row["row"]: row for row in record_of(made.paths[0])["rows"]}
    assert rows["baseline"]["errors"] == ["RuntimeError: out of memory"]
    assert rows["both"]["status"] == "done"
    assert made.num_failed == 2
    assert "Traceback" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), r"table: got '', expected one of small"),
        (("table=large",), r"table: got 'large', expected one of small"),
        (("table=small", "dataset=kitti"), r"dataset: got 'kitti', expected one of voc, coco, miniature for table"),
        (
            ("table=small", "row=neither"),
            r"row: got 'neither', expected one of 'baseline', 'nowhere', 'broken', 'both'",
        ),
        (
            ("table=small", "dataset=voc", "row=broken"),
            r"row: got 'broken', expected one of 'baseline', 'nowhere', 'bo",
        ),
        (("table=small", "seeds=many"), r"seeds: got 'many' \(str\), expected a whole number"),
        (("table=small", "dataset=voc", "seeds=3"), r"seeds: got 3, expected 1 on voc, where nothing is drawn"),
        (("table=small", "dataset=miniature", "seeds=0"), r"seeds: got 0, expected 1 or more"),
        (("table=small", "dataset=miniature", "retrieval.top_k=0"), r"top_k: got 0"),
        (("table=small", "dataset=miniature", "retrieval.topk=1"), r"topk.*unknown key"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(
    arguments: tuple[str, ...],
    message: str,
    tables: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    assert command(monkeypatch, *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line), line
    assert not Path("outputs").exists()


def test_the_other_training_set_by_its_name(tables: Path) -> None:
    path = reproduce.run(ReproduceOptions("small", "voc_aug", "both"), ["runtime.device=cpu"]).paths[0]
    assert path.name == "small-voc_aug-both.md"
    assert record_of(path)["rows"][0]["runs"] == [["experiment=voc", "dataset=voc_aug", "runtime.device=cpu"]]
    with pytest.raises(ConfigError, match="dataset"):
        reproduce.run(ReproduceOptions("small", "voc_train"))


def test_show_prints_every_rows_command(
    tables: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "table=small", "dataset=voc", "show") == 0
    assert capsys.readouterr().out.splitlines() == [
        "voc, baseline: python scripts/evaluate.py experiment=voc bank.purify.enabled=false bank.aggregation=hard",
        "voc, nowhere: python scripts/evaluate.py experiment=voc pseudo_masks=files "
        "pseudo_masks.generator.folder=nowhere",
        "voc, both: python scripts/evaluate.py experiment=voc",
    ]
    assert reproduce.command(["a=${oc.env:X,y}"]) == "python scripts/evaluate.py 'a=${oc.env:X,y}'"


def test_rows_of_words_alone_are_segmented(tmp_path: Path, tables: Path, small: list[str]) -> None:
    """Each row says what its method had; rows that lack weights or are of others stand beside it."""
    rows = {
        "SCLIP": {
            "published": "SCLIP",
            "kind": "training-free; no tags",
            "protocols": ["protocol={set}_sclip"],
            "miniature": ["pseudo_masks=clip_dense", "pseudo_masks.refine=none"],
        },
        "Trident B": {"published": "Trident B", "kind": "of others"},
    }
    table = {"title": "Words.", "published": "open vocabulary", "stage": "segment", "rows": rows}
    OmegaConf.save(OmegaConf.create(table), tables / "words.yaml")
    written = reproduce.run(ReproduceOptions(table="words", dataset="miniature"), small)
    (row,) = record_of(written.paths[0])["rows"]
    assert (row["status"], row["published"]["value"], row["images"]) == ("done", 59.1, 2)
    assert row["commands"][0].startswith("python scripts/segment.py ")
    text = written.paths[0].read_text()
    assert "| SCLIP | training-free; no tags |" in " ".join(text.split())
    assert "No bank; which classes compete in an image: none, all words compete." in text
    lacking = reproduce.run(ReproduceOptions(table="words", dataset="voc21"), [f"runtime.outputs={tmp_path / 'out'}"])
    statuses = {row["row"]: row["status"] for row in record_of(lacking.paths[0])["rows"]}
    assert statuses == {"SCLIP": "missing", "Trident B": "quoted"}
    assert lacking.num_failed == 0
