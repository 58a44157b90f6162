"""Scores of label maps, a run's own and anyone's; two of them compared; predictions packed for a server."""

from __future__ import annotations

import io
import json
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moduseg.cli import run_script
from moduseg.config import compose, from_hydra
from moduseg.datasets.folder import FolderDataset
from moduseg.errors import ConfigError, DataError, ModusegError
from moduseg.evaluation import measures
from moduseg.evaluation.counts import FILE, SplitCounts
from moduseg.evaluation.measures import Measure
from moduseg.masks.palette import voc_palette
from moduseg.stages import evaluate
from moduseg.stages.infer import Infer
from moduseg.tools import compare, voc_package
from tests.support.runs import overrides

CLASSES = ("background", "dog", "cat")


def _write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def own(tmp_path: Path, rng: np.random.Generator) -> Path:
    """A folder data set of five images, one without truth, and two folders of grey PNGs made from the truth."""
    root = tmp_path / "own"
    for i in range(5):
        truth = np.zeros((20, 24), dtype=np.uint8)
        truth[4:14, 3 + i : 12 + i] = 1 + i % 2
        _write(root / "images" / f"{i}.png", np.repeat(truth[:, :, None] * np.uint8(90), 3, 2))
        shifted, half = np.roll(truth, 2, 1), truth.copy()
        half[9:] = 0
        _write(tmp_path / "shifted" / f"{i}.png", shifted)
        _write(tmp_path / "half" / f"{i}.png", half)
        truth[0, :] = 255
        if i < 4:
            _write(root / "masks" / f"{i}.png", truth)
    (root / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root


def arguments(own: Path, *more: str) -> list[str]:
    return [
        "dataset=folder",
        f"dataset.root={own}",
        f"runtime.outputs={own.parent / 'outputs'}",
        "evaluation.bootstrap=30",
        "evaluation.panels=1",
        *more,
    ]


def run_command(command: str, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", [command, *argv])
    with pytest.raises(SystemExit) as caught:
        run_script(command)
    return int(caught.value.code or 0)


def test_anyones_pngs_are_scored(own: Path) -> None:
    shifted = own.parent / "shifted"
    path = evaluate.run(compose(arguments(own, f"predictions={shifted}")))
    results = json.loads((path / "results.json").read_text())
    assert (results["pseudo_masks"], results["proposals"], results["bank"]) == (None, None, None)
    record = results["prediction"]
    confusion = np.zeros((3, 3), dtype=np.int64)
    for i in range(4):
        truth, labels = (np.asarray(Image.open(f / f"{i}.png")) for f in (own / "masks", shifted))
        np.add.at(confusion, (truth[truth != 255], labels[truth != 255]), 1)
    assert record["confusion"] == confusion.tolist()
    assert record["iou"]["dog"] == pytest.approx(100 * 7 / 11)
    assert record["precision"]["dog"] == pytest.approx(100 * 7 / 9)
    assert record["recall"]["cat"] == pytest.approx(100 * 7 / 9)
    assert record["boundary_iou"]["width"] == 0.02
    assert record["boundary_iou"]["width_pixels"] == [1, 1]
    assert record["boundary_iou"]["miou"] < record["miou"]
    assert (record["images"], record["left_out"]) == (4, ["4"])
    assert record["miou_interval"]["low"] <= record["miou"] <= record["miou_interval"]["high"]
    assert "made elsewhere" in record["label_source"]
    assert set(record["config"]) == {"predictions", "dataset", "evaluation", "runtime"}
    assert "| dog " in (path / "results.md").read_text()
    assert len(list(path.glob("panels/*.png"))) == 1
    np.testing.assert_array_equal(SplitCounts.from_bytes((path / FILE).read_bytes(), "x").matrix(), confusion)


def test_the_content_of_the_files_decides_what_is_scored_again(own: Path) -> None:
    cfg = compose(arguments(own, f"predictions={own.parent / 'half'}"))
    path = evaluate.run(cfg)
    stamps = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    assert evaluate.run(cfg) == path
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == stamps
    assert evaluate.run(compose(arguments(own, f"predictions={own.parent / 'half'}", "evaluation.workers=3"))) == path
    copy = own.parent / "elsewhere" / "half"
    shutil.copytree(own.parent / "half", copy)
    assert evaluate.run(compose(arguments(own, f"predictions={copy}"))) == path
    shutil.copy(own.parent / "shifted" / "0.png", copy / "0.png")
    assert evaluate.run(compose(arguments(own, f"predictions={copy}"))) != path
    (path / FILE).unlink()
    evaluate.run(cfg)
    assert (path / FILE).is_file()


def test_photographs_are_not_needed_to_score(own: Path) -> None:
    for i in range(4):
        (own / "images" / f"{i}.png").write_bytes(b"\x89PNG")
    path = evaluate.run(compose(arguments(own, f"predictions={own.parent / 'half'}")))
    assert (path / "results.json").is_file()
    assert not (path / "panels").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: _write(f / "2.png", np.full((20, 24), 255, np.uint8)), "2.png: got 255 (ignored) in 480 pixels"),
        (lambda f: _write(f / "2.png", np.full((20, 24), 3, np.uint8)), "2.png: got label id 3 in 480 pixels"),
        (lambda f: _write(f / "2.png", np.zeros((10, 24), np.uint8)), "got 24 x 10 pixels, expected 24 x 20"),
        (lambda f: _write(f / "2.png", np.zeros((20, 24, 3), np.uint8)), "2.png: got a colour picture (RGB)"),
        (lambda f: (f / "2.png").unlink(), "2.png: no such file; got predictions for 4 of 5 images"),
        (lambda f: shutil.rmtree(f), "no such folder; expected a folder of <id>.png"),
    ],
)
def test_a_wrong_png_ends_the_command_in_one_line(
    own: Path,
    change: Callable[[Path], None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(own.parent / "half")
    argv = arguments(own, f"predictions={own.parent / 'half'}")
    assert run_command("evaluate", argv, monkeypatch) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("moduseg: error: ")
    assert message in error
    assert "half" in error


def test_a_truth_of_another_size_than_its_image_is_left_out(own: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(own / "masks" / "1.png", np.zeros((20, 23), np.uint8))
    with pytest.raises(DataError, match="got 24 x 20 pixels, expected 23 x 20"):
        evaluate.run(compose(arguments(own, f"predictions={own.parent / 'half'}")))
    (own / "masks" / "1.png").write_bytes(b"damaged")
    path = evaluate.run(compose(arguments(own, f"predictions={own.parent / 'half'}")))
    assert json.loads((path / "results.json").read_text())["prediction"]["left_out"] == ["1", "4"]
    assert "not scored" in caplog.text


def test_without_background_the_strict_number_stands_beside_the_flattering_one(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = arguments(own, f"predictions={own.parent / 'half'}")
    with pytest.raises(ConfigError, match=r"evaluation\.uncovered: got 'ignore', expected 'wrong' on folder"):
        evaluate.run(compose([*cfg, "evaluation.uncovered=ignore"]))
    monkeypatch.setattr(FolderDataset, "has_background", False)
    with pytest.raises(DataError, match=r"image '0': its truth has \d+ pixels of label 0, expected 1\.\.2 or 255"):
        evaluate.run(compose(cfg))
    for i in range(4):
        truth = np.asarray(Image.open(own / "masks" / f"{i}.png")).copy()
        truth[truth == 0] = 255
        _write(own / "masks" / f"{i}.png", truth)
    records = []
    for rule in ("wrong", "ignore"):
        path = evaluate.run(compose([*cfg, f"evaluation.uncovered={rule}"]))
        records.append(json.loads((path / "results.json").read_text())["prediction"])
    strict, flattering = records
    assert strict["miou"] == strict["uncovered"]["miou_wrong"] == pytest.approx(50.0)
    assert flattering["miou"] == strict["uncovered"]["miou_ignored"] == 100.0
    assert strict["uncovered"]["share"] == pytest.approx(50.0)
    assert strict["iou"]["background"] is None
    assert strict["confusion"] == flattering["confusion"]
    assert strict["miou_interval"]["high"] < flattering["miou_interval"]["low"]
    assert "mIoU, uncovered pixels counted as wrong" in (path / "results.md").read_text()


def test_a_run_and_its_own_pngs_get_the_same_score(finished: Path) -> None:
    path = Infer.run(compose(overrides(finished)))
    mine = json.loads((path / "results.json").read_text())
    theirs = evaluate.run(compose(overrides(finished, f"predictions={path / 'labels'}")))
    record = json.loads((theirs / "results.json").read_text())["prediction"]
    for key in ("miou", "iou", "precision", "boundary_iou", "miou_interval", "confusion", "images", "split"):
        assert record[key] == mine[key]
    assert (theirs / FILE).read_bytes() == (path / FILE).read_bytes()


def test_workers_change_nothing_and_missing_counts_are_made_again(finished: Path) -> None:
    path = Infer.run(compose(overrides(finished)))
    data, stamp = (path / FILE).read_bytes(), (path / "results.json").stat().st_mtime_ns
    Infer.run(compose(overrides(finished, "evaluation.workers=3")))
    assert (path / "results.json").stat().st_mtime_ns == stamp
    (path / FILE).unlink()
    Infer.run(compose(overrides(finished, "evaluation.workers=3")))
    assert (path / FILE).read_bytes() == data
    stripped = Infer.run(compose(overrides(finished, "evaluation.boundary_width=0")))
    assert stripped == path
    assert "boundary_iou" not in json.loads((path / "results.json").read_text())


def test_two_folders_are_compared(own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    folders = [str(own.parent / name) for name in ("shifted", "half")]
    assert run_command("compare", [*folders, *arguments(own)], monkeypatch) == 0
    path = Path(capsys.readouterr().out.strip().splitlines()[-1].split(" -> ")[1])
    record = json.loads((path / "results.json").read_text())
    assert record["images"] == 4
    assert record["dataset"] == "folder"
    assert record["classes"]["dog"]["difference"] == pytest.approx(50 - 100 * 7 / 11)
    assert record["classes"]["dog"]["share_flipped"] == 0.0
    assert "| dog " in (path / "results.md").read_text()

    # The same from the results that scoring left, without a data set; and mixed.
    results = sorted((own.parent / "outputs" / "folder" / "evaluate").glob("*"), reverse=True)
    plain = compose([f"runtime.outputs={own.parent / 'outputs'}", "evaluation.bootstrap=30"])
    again = compare.run(str(results[0]), str(results[1]), plain, names_dataset=False)
    other = json.loads((again / "results.json").read_text())
    assert {k: other[k] for k in ("miou", "classes")} == {k: record[k] for k in ("miou", "classes")}
    mixed = compare.run(str(results[0]), folders[1], compose(arguments(own)), names_dataset=True)
    assert json.loads((mixed / "results.json").read_text())["classes"] == record["classes"]


def test_what_cannot_be_compared_is_one_line(
    own: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shifted, half = (str(own.parent / name) for name in ("shifted", "half"))
    mine = Infer.run(compose(overrides(finished)))
    bare = own.parent / "bare"
    bare.mkdir()
    (bare / "results.json").write_text(json.dumps({"classes": ["background"]}))
    damaged = own.parent / "damaged"
    shutil.copytree(bare, damaged)
    shutil.copy(mine / FILE, damaged / FILE)
    cases = [
        ([shifted], "compare: got 1 folders"),
        ([shifted, half, half], "compare: got 3 folders"),
        ([shifted, "nowhere"], "compare: got 'nowhere', no such folder"),
        (
            ["SHIFTED_WITHOUT_DATASET", half],
            "which holds no results.json; expected a folder of results, or of PNGs and",
        ),
        ([str(bare), half], "holds results.json but not confusion.safetensors"),
        ([str(damaged), half], "lacks 'dataset', expected what evaluation writes"),
        ([str(mine), half], "has data set 'miniature'"),
        ([shifted, half, "evaluation.bootstrap=0"], "evaluation.bootstrap: got 0, expected 1 resample or more"),
    ]
    for argv, message in cases:
        more = arguments(own)
        if argv[0] == "SHIFTED_WITHOUT_DATASET":
            argv, more = [shifted, half], [f"runtime.outputs={own.parent / 'outputs'}"]
        folders = [a for a in argv if "=" not in a]
        code = run_command("compare", [*folders, *more, *(a for a in argv if "=" in a)], monkeypatch)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert code == 2, message
        assert message in error


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """A VOC skeleton with a test split of three, and predictions for it by somebody else."""
    root = tmp_path / "VOC2012"
    ids = [f"2008_00000{i}" for i in range(3)]
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "test.txt").write_text("\n".join(ids) + "\n")
    for i, image_id in enumerate(ids):
        _write(root / "JPEGImages" / f"{image_id}.jpg", np.full((12 + i, 16, 3), 80 * i, np.uint8))
        _write(tmp_path / "mine" / f"{image_id}.png", np.full((12 + i, 16), 20 - i, np.uint8))
    return root


def _pack(devkit: Path, *more: str) -> Path:
    return voc_package.run(
        compose(
            [
                "dataset=voc",
                f"dataset.root={devkit}",
                "dataset.val_split=test",
                f"runtime.outputs={devkit.parent / 'outputs'}",
                f"predictions={devkit.parent / 'mine'}",
                *more,
            ]
        )
    )


def test_predictions_are_packed_for_the_server(devkit: Path) -> None:
    path = _pack(devkit)
    data = (path / "results.tgz").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        names = archive.getnames()
        assert names == [f"results/VOC2012/Segmentation/comp6_test_cls/2008_00000{i}.png" for i in range(3)]
        extracted = archive.extractfile(names[2])
        assert extracted is not None
        picture = Image.open(io.BytesIO(extracted.read()))
    assert (picture.mode, picture.size, np.unique(np.asarray(picture)).tolist()) == ("P", (16, 14), [18])
    palette = picture.getpalette()
    assert palette is not None
    assert palette[:63] == voc_palette(21).ravel().tolist()
    # Made again, it has the same bytes; a damaged one is noticed.
    (path / "results.tgz").write_bytes(data[:-1])
    assert _pack(devkit) == path
    assert (path / "results.tgz").read_bytes() == data
    shutil.rmtree(path)
    assert (_pack(devkit) / "results.tgz").read_bytes() == data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "2008_000001.png").unlink(), r"2008_000001\.png: no such file; got predictions for 2 of 3"),
        (lambda f: _write(f / "2008_000001.png", np.zeros((12, 16), np.uint8)), "got 16 x 12 pixels, expected 16 x 13"),
        (lambda f: _write(f / "2008_000001.png", np.full((13, 16), 255, np.uint8)), r"got 255 \(ignored\)"),
        (lambda f: _write(f / "2008_000001.png", np.full((13, 16), 21, np.uint8)), r"got label id 21 .*0\.\.20"),
    ],
)
def test_what_the_server_would_refuse_is_refused(devkit: Path, change: Callable[[Path], None], message: str) -> None:
    change(devkit.parent / "mine")
    with pytest.raises(DataError, match=message):
        _pack(devkit)


def test_a_runs_own_predictions_are_packed(devkit: Path) -> None:
    """The whole way on a skeleton: bank from masks, labels for the test images, the archive."""
    (devkit / "ImageSets" / "Segmentation" / "train.txt").write_text("2007_000001\n")
    labels = np.zeros((16, 16), np.uint8)
    labels[:, 8:] = 3
    _write(devkit / "JPEGImages" / "2007_000001.jpg", np.repeat(labels[:, :, None] * np.uint8(60), 3, 2))
    _write(devkit / "SegmentationClass" / "2007_000001.png", labels)
    small = ("proposer=superpixels", "pseudo_masks=ground_truth", "backbone=miniature_random", "runtime.device=cpu")
    path = _pack(devkit, *small, "predictions=null", "evaluation.panels=0")
    with tarfile.open(path / "results.tgz") as archive:
        assert len(archive.getnames()) == 3
    assert json.loads((path / "manifest.json").read_text())["inputs"].keys() == {"infer"}


def test_other_classes_than_vocs_are_refused(own: Path) -> None:
    with pytest.raises(DataError, match=r"got 3 classes \(background, dog, cat, \.\.\.\), expected VOC's 21"):
        voc_package.run(compose(arguments(own, f"predictions={own.parent / 'half'}")))


def test_predictions_are_a_folder_even_if_they_look_like_a_number() -> None:
    cfg = compose(["predictions=3"])
    assert cfg.predictions == "3"
    with pytest.raises(ModusegError, match=r"predictions: got 3, expected a folder"):
        from_hydra({**cfg.as_dict(), "predictions": 3})


@pytest.mark.parametrize(
    ("more", "is_scored"),
    [
        pytest.param([], False, id="nothing changed"),
        pytest.param(["runtime.seed=7"], True, id="the seed of the interval"),
        pytest.param(["evaluation.bootstrap=0"], True, id="no interval"),
    ],
)
def test_what_decides_a_score_scores_again(finished: Path, more: list[str], is_scored: bool) -> None:
    path = Infer.run(compose(overrides(finished)))
    before = (path / "results.json").read_bytes()
    Infer.run(compose(overrides(finished, *more)))
    assert ((path / "results.json").read_bytes() != before) is is_scored
    record = json.loads((path / "results.json").read_text())
    assert not more or "bootstrap" in more[0] or record["seed"] == 7


def test_a_new_measure_is_added_to_finished_results(finished: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run and of anyone's PNGs: label maps stay, `results.json` is written again, once."""
    jobs = [
        lambda: Infer.run(compose(overrides(finished))),
        lambda: evaluate.run(compose(arguments(own, f"predictions={own.parent / 'half'}"))),
    ]
    for job in jobs:
        job()
    worst = Measure(name="worst_iou", title="worst IoU", compute=lambda counts: np.nanmin(measures.iou(counts), -1))
    monkeypatch.setattr(measures, "MEASURES", (*measures.MEASURES, worst))
    for job in jobs:
        file = job() / "results.json"
        record = json.loads(file.read_text())
        record = record.get("prediction", record)
        assert record["worst_iou"] == min(value for value in record["iou"].values() if value is not None)
        stamp = file.stat().st_mtime_ns
        job()
        assert file.stat().st_mtime_ns == stamp


def test_two_folders_are_compared_by_a_new_measure_too(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, folders = compose(arguments(own)), [str(own.parent / name) for name in ("shifted", "half")]
    path = compare.run(*folders, cfg, names_dataset=True)
    assert "worst_iou" not in json.loads((path / "results.json").read_text())["measures"]
    worst = Measure(name="worst_iou", title="worst IoU", compute=lambda counts: np.nanmin(measures.iou(counts), -1))
    monkeypatch.setattr(measures, "MEASURES", (*measures.MEASURES, worst))
    assert compare.run(*folders, cfg, names_dataset=True) == path
    assert json.loads((path / "results.json").read_text())["measures"]["worst_iou"]["first"] > 0
    assert "| worst IoU " in (path / "results.md").read_text()
