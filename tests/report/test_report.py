"""Reports of finished runs: what they say is what the run said, whatever of it is still there."""

from __future__ import annotations

import base64
import io
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from moduseg.bank.corrections import Correction, CorrectionFile, apply_corrections
from moduseg.bank.derived import digest_bank, open_bank, write_derived
from moduseg.bank.edit import remove
from moduseg.bank.store import Bank
from moduseg.cli import run_script
from moduseg.config import compose
from moduseg.errors import ArtefactError, ConfigError, MissingError, ModusegError
from moduseg.masks.palette import choose_class_colours, format_colour
from moduseg.miniature.world.scenes import CLASSES
from moduseg.report.packing import SIMILARITY_STEPS
from moduseg.report.page import read_program, read_script
from moduseg.stages import evaluate
from moduseg.stages.infer import Infer
from moduseg.tools import report
from tests.support.runs import overrides


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs of a small run whose report was written on the way."""
    folder = tmp_path_factory.mktemp("outputs")
    Infer.run(compose(overrides(folder, "evaluation.report=true", train=10, val=5)))
    return folder


@pytest.fixture
def copy(outputs: Path, tmp_path: Path) -> Path:
    """A copy of those outputs, moved to another place."""
    shutil.copytree(outputs, tmp_path / "moved")
    for manifest in (tmp_path / "moved").rglob("manifest.json"):
        manifest.write_text(manifest.read_text().replace(str(outputs), "/gone/outputs"))
    return tmp_path / "moved"


def folder_of(outputs: Path, stage: str = "infer") -> Path:
    return next(iter(sorted((outputs / "miniature" / stage).iterdir())))


def value(path: Path, key: str) -> Any:
    return read_script(path / "report" / "data" / f"{key}.js")


def picture(text: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(text))) as opened:
        assert opened.mode == "P"
        return np.asarray(opened)


def test_the_head_says_what_the_results_say(outputs: Path) -> None:
    run = folder_of(outputs)
    results = json.loads((run / "results.json").read_text())
    head = value(run, "summary")
    for key in ("miou", "miou_interval", "iou", "confusion", "pixel_accuracy"):
        assert head["record"][key] == results[key]
    assert (head["dataset"], head["split"], head["what"]) == ("miniature", "val", "prediction")
    assert (head["total"], head["shown"]) == (5, 5)
    assert "top_k: 1" in head["config"]
    assert [name for name, _ in head["seconds"]][-1] == "infer (val)"
    assert {"propose (val)", "build_bank (train)", "queries (val)"} <= {name for name, _ in head["seconds"]}
    assert head["published"] == []
    assert head["colours"] == [format_colour(colour) for colour in choose_class_colours(CLASSES)[[*range(13), 255]]]
    assert (run / "report" / "index.html").read_bytes() == read_program()["index.html"]


def test_time_by_step_is_time_on_the_clock(copy: Path) -> None:
    """`wall` alone counts: the other seconds of a manifest are its parts."""
    run = folder_of(copy)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["seconds"] = {"wall": 7.25, "load": 1.0, "work": 6.0, "model": 5.0, "write": 0.5}
    (run / "manifest.json").write_text(json.dumps(manifest))
    report.run(str(run), [f"dataset.root={copy / 'world-10-5'}"])
    assert value(run, "summary")["seconds"][-1] == ["infer (val)", 7.25]


def test_every_image_has_its_photograph_maps_and_counts(outputs: Path) -> None:
    run = folder_of(outputs)
    images, head = value(run, "images"), value(run, "summary")
    size = len(head["classes"])
    total = np.zeros(size * size, dtype=np.int64)
    for index, image_id in enumerate(images["ids"]):
        labels = np.asarray(Image.open(run / "labels" / f"{image_id}.png"))
        assert tuple(images["sizes"][index]) == labels.shape
        maps = value(run, f"labels/{index:06d}")
        np.testing.assert_array_equal(picture(maps["labels"]), labels)
        cells, counts = images["cells"][index]
        truth = picture(maps["truth"])
        assert sum(counts) == (truth != 255).sum()
        total[cells] += counts
        with Image.open(run / "report" / "photos" / f"{index:06d}.jpg") as photograph:
            assert photograph.size == labels.shape[::-1]
        assert dict(images["areas"][index]) == {int(v): int((labels == v).sum()) for v in np.unique(labels)}
    assert total.reshape(size, size).tolist() == head["record"]["confusion"]


def test_the_reasons_paint_the_prediction(outputs: Path) -> None:
    """Proposals, labels and order of a report, put together, give the label map that the run stored."""
    run = folder_of(outputs)
    bank = value(run, "bank")
    bank_labels = np.frombuffer(base64.b64decode(bank["labels"]), "<u2")
    for index, image_id in enumerate(value(run, "images")["ids"]):
        why = value(run, f"why/{index:06d}")
        layers = [picture(layer) for layer in why["layers"]]
        painted = np.zeros(layers[0].shape, np.uint8)
        for proposal in reversed(why["kept"]):
            inside = layers[why["layer"][proposal]] == why["code"][proposal]
            assert inside.sum() == why["area"][proposal]
            if why["label"][proposal]:
                painted[inside] = why["label"][proposal]
        np.testing.assert_array_equal(painted, np.asarray(Image.open(run / "labels" / f"{image_id}.png")))
        near = why["neighbours"]
        rows = np.frombuffer(base64.b64decode(near["rows"]), "<u4").reshape(-1, near["k"])
        steps = np.frombuffer(base64.b64decode(near["similarities"]), "<u2").reshape(-1, near["k"])
        assert rows.shape == (len(why["label"]), 1)  # top_k is 1 here: the neighbour's label and similarity are all
        for proposal, row in enumerate(rows[:, 0].tolist()):
            if row < bank["rows"]:
                assert bank_labels[row] == why["label"][proposal] == why["votes"][proposal][0][0]
                assert steps[proposal, 0] / SIMILARITY_STEPS - 1 == pytest.approx(why["score"][proposal], abs=2e-4)


def test_regions_of_the_bank_have_pictures_and_neighbours(outputs: Path) -> None:
    run = folder_of(outputs)
    bank = value(run, "bank")
    stored = json.loads((folder_of(outputs, "build_bank") / "bank.json").read_text())
    assert bank["rows"] == stored["vectors"]
    assert bank["pictured"] == list(range(bank["rows"]))
    for row in bank["pictured"]:
        assert (run / "report" / "bank" / f"{row:06d}.jpg").is_file()
    image = np.frombuffer(base64.b64decode(bank["image"]), "<u4")
    assert {bank["ids"][i] for i in image} <= set(stored["image_ids"])
    for i in set(image.tolist()):
        assert (run / "report" / "bank" / f"image-{i:06d}.jpg").is_file()
    near = bank["neighbours"]
    rows = np.frombuffer(base64.b64decode(near["rows"]), "<u4").reshape(bank["rows"], near["k"])
    steps = np.frombuffer(base64.b64decode(near["similarities"]), "<u2").reshape(rows.shape)
    assert all(row not in rows[row] for row in range(bank["rows"]))
    assert (np.diff(steps.astype(int), axis=1) <= 0).all()
    assert set(bank["maps"]) == {"pca"}
    used = np.frombuffer(base64.b64decode(bank["used"]), "<u4")
    assert used.sum() == sum(len(value(run, f"why/{i:06d}")["label"]) for i in range(5))
    for entry in bank["worst"]:
        assert entry["wrong"] > 0
        assert sum(pixels for _, pixels in entry["truth"]) <= entry["wrong"] + len(entry["truth"])


def test_what_infer_remembers_is_what_a_second_search_finds(copy: Path) -> None:
    """`infer` hands its answers over; a report that is written later asks again, and gets the same."""
    data = folder_of(copy) / "report" / "data"
    before = {path.name: path.read_bytes() for path in [*(data / "why").iterdir(), data / "bank.js"]}
    report.run(str(folder_of(copy)), [f"dataset.root={copy / 'world-10-5'}"])
    assert {path.name: path.read_bytes() for path in [*(data / "why").iterdir(), data / "bank.js"]} == before


def test_a_report_is_written_when_something_changed(copy: Path) -> None:
    settings = overrides(copy, "evaluation.report=true", train=10, val=5)
    run = Infer.run(compose(settings))
    index = run / "report" / "index.html"
    stamp = index.stat().st_mtime_ns
    assert Infer.run(compose(settings)) == run
    assert index.stat().st_mtime_ns == stamp
    Infer.run(compose([*settings, "evaluation.report_regions=3"]))
    assert index.stat().st_mtime_ns != stamp
    assert len(value(run, "bank")["pictured"]) == 3
    shutil.rmtree(run / "report")
    assert Infer.run(compose([*settings, "evaluation.report=false"])) == run
    assert not (run / "report").exists()
    Infer.run(compose([*settings, "evaluation.report_images=2", "evaluation.report_size=64"]))
    assert value(run, "images")["ids"] == ["val_00000", "val_00004"]
    assert value(run, "summary")["total"] == 5
    assert max(picture(value(run, "labels/000000")["labels"]).shape) == 64


def test_evaluate_adds_its_figures(copy: Path) -> None:
    settings = overrides(copy, "evaluation.report=true", train=10, val=5)
    path = evaluate.run(compose(settings))
    names = [name for name, _, _, _ in value(folder_of(copy), "summary")["figures"]]
    assert names[0] == "mIoU of pseudo masks, train"
    assert {"mean Dice of pseudo masks, train", "pixel accuracy of pseudo masks, train"} <= set(names)
    assert any("objects by proposals" in name for name in names)
    assert report.run(str(path)) == folder_of(copy) / "report" / "index.html"
    assert [name for name, _, _, _ in value(folder_of(copy), "summary")["figures"]] == names


def test_what_is_gone_is_left_out(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = folder_of(copy)
    world = copy / "world-10-5"
    photographs = [p for p in world.rglob("val_00001.*") if "Class" not in str(p) and "Object" not in str(p)]
    for path in photographs:
        path.write_bytes(b"")
    next((folder_of(copy, "queries") / "vectors").glob("val_00002*")).unlink()
    report.run(str(run), [f"dataset.root={copy / 'world-10-5'}"])
    assert value(run, "images")["photographs"] == [1, 0, 1, 1, 1]
    assert "label" not in value(run, "why/000002")
    assert "label" in value(run, "why/000003")
    assert "nothing to say why" in caplog.text
    shutil.rmtree(folder_of(copy, "queries"))
    report.run(str(run), [f"dataset.root={copy / 'world-10-5'}"])
    head = value(run, "summary")
    assert (head["bank"], head["record"]["images"]) == (False, 5)
    assert not (run / "report" / "data" / "bank.js").exists()
    assert not (run / "report" / "bank").exists()


def test_pseudo_masks_are_a_run_of_the_training_split(copy: Path) -> None:
    path = folder_of(copy, "pseudo_masks")
    report.run(str(path), [f"dataset.root={copy / 'world-10-5'}"])
    head = value(path, "summary")
    assert (head["split"], head["what"], head["shown"], head["bank"]) == ("train", "pseudo mask", 10, False)


def test_stored_scores_are_a_layer_of_the_pseudo_masks(copy: Path) -> None:
    """Ground truth as a generator scores each pixel's own class with 1, so that its layer is the truth of a class."""
    path = folder_of(copy, "pseudo_masks")
    report.run(str(path), [f"dataset.root={copy / 'world-10-5'}"])
    images = value(path, "images")
    assert (value(path, "summary")["heat"], images["heat"]) == ("class scores", [1] * 10)
    for index in range(10):
        heat = {int(label): picture(text) for label, text in value(path, f"heat/{index:06d}").items()}
        truth = picture(value(path, f"labels/{index:06d}")["truth"])
        assert set(np.unique(truth)) <= {0, 255, *heat}
        for label in heat.keys() - {0}:
            np.testing.assert_array_equal(heat[label] == 255, truth == label)


def test_a_prediction_of_other_images_has_no_scores(outputs: Path) -> None:
    run = folder_of(outputs)
    assert (value(run, "summary")["heat"], value(run, "images")["heat"]) == (None, [0] * 5)
    assert not (run / "report" / "data" / "heat").exists()


def test_scores_that_are_gone_are_left_out(copy: Path) -> None:
    path = folder_of(copy, "pseudo_masks")
    next((folder_of(copy, "scores") / "maps").iterdir()).write_bytes(b"damaged")
    report.run(str(path), [f"dataset.root={copy / 'world-10-5'}"])
    assert sorted(value(path, "images")["heat"]) == [0] + [1] * 9


def test_anyones_pngs_and_two_of_them_compared(copy: Path, tmp_path: Path) -> None:
    run = folder_of(copy)
    other = tmp_path / "theirs"
    shutil.copytree(run / "labels", other)
    changed = np.asarray(Image.open(other / "val_00003.png")).copy()
    changed[:64] = 0
    Image.fromarray(changed).save(other / "val_00003.png")
    world = [f"dataset.root={copy / 'world-10-5'}", "dataset.train=10", "dataset.val=5", f"runtime.outputs={copy}"]
    index = report.run(None, [*world, "evaluation.bootstrap=20"], predictions=str(other))
    theirs = index.parent.parent
    assert theirs.parent.name == "evaluate"
    head = value(theirs, "summary")
    assert (head["why"], head["bank"], head["shown"]) == (False, False, 5)
    assert set(value(theirs, "labels/000000")) == {"labels", "truth"}

    compared = report.run(str(run), [world[0], "evaluation.bootstrap=20"], against=str(other)).parent.parent
    assert compared.parent.name == "compare"
    head, images = value(compared, "summary"), value(compared, "images")
    assert head["compare"]["miou"]["difference"] != 0
    assert head["bank"]
    np.testing.assert_array_equal(picture(value(compared, "labels/000003")["second"]), changed)
    assert [one == two for one, two in zip(images["cells"], images["second"], strict=True)].count(False) == 1
    again = report.run(str(run), [world[0]], against=str(theirs)).parent.parent
    assert value(again, "summary")["compare"]["second"].startswith("theirs-val")


def test_changes_of_the_configuration_are_named(copy: Path) -> None:
    settings = overrides(copy, "evaluation.report=false", train=10, val=5)
    second = Infer.run(compose([*settings, "retrieval.top_k=3"]))
    first = next(p for p in (copy / "miniature" / "infer").iterdir() if p.name != second.name)
    page = report.run(str(first), [f"dataset.root={copy / 'world-10-5'}"], against=str(second)).parent.parent
    changes = {key: (one, other) for key, one, other in value(page, "summary")["compare"]["changes"]}
    assert changes["retrieval.top_k"] == ("1", "3")
    assert not any(key.startswith(("runtime", "evaluation")) for key in changes)


def test_images_without_truth_are_shown(tmp_path: Path, copy: Path) -> None:
    world = copy / "world-10-5"
    shutil.rmtree(tmp_path / "own", ignore_errors=True)
    (tmp_path / "own" / "images").mkdir(parents=True)
    for i in range(3):
        found = next(p for p in world.rglob(f"val_0000{i}.*") if "Class" not in str(p) and "Object" not in str(p))
        shutil.copy(found, tmp_path / "own" / "images" / found.name)
    (tmp_path / "own" / "labels.csv").write_text("image,labels\nval_00000,disc\nval_00001,disc star\nval_00002,star\n")
    (tmp_path / "own" / "classes.txt").write_text("background\ndisc\nstar\n")
    run = Infer.run(
        compose(
            ["dataset=folder", f"dataset.root={tmp_path / 'own'}", "proposer=superpixels", "backbone=miniature_random",
             "pseudo_masks=cam", f"runtime.outputs={tmp_path / 'out'}", "runtime.device=cpu", "bank.min_area=1",
             "evaluation.report=true", "evaluation.panels=0"]
        )
    )  # fmt: skip
    head, images = value(run, "summary"), value(run, "images")
    assert head["record"] is None
    assert images["cells"] is None
    assert head["bank"]
    assert value(run, "bank")["worst"] == []
    assert set(value(run, "labels/000001")) >= {"labels"}
    assert "truth" not in value(run, "labels/000001")


def test_a_bank_made_of_another_is_shown_with_its_regions(outputs: Path, tmp_path: Path) -> None:
    """`bank.path`: other ids than the data set's, label maps found through the bank it came from."""
    source = folder_of(outputs, "build_bank")
    bank = Bank.load(source)
    held = [name for name in bank.classes[1:] if bank.counts[name]]
    fewer = remove(bank, classes=held[:1], images=[bank.image_ids[0]])
    given = write_derived(fewer, "remove", sources=[source], details={}, folder=tmp_path / "fewer", outputs=tmp_path)
    shutil.copytree(outputs, tmp_path / "outputs")
    settings = overrides(tmp_path / "outputs", f"bank.path={given}", "evaluation.report=true", train=10, val=5)
    run = Infer.run(compose(settings))
    shown = value(run, "bank")
    assert shown["rows"] == len(fewer) < len(bank)
    # Corrections name the bank in its folder, whose class list is shorter than that of the run.
    assert (shown["digest"], shown["path"]) == (digest_bank(open_bank(given)), "fewer")
    assert value(folder_of(outputs), "bank")["path"] == f"outputs/miniature/build_bank/{source.name}"
    assert shown["pictured"] == list(range(len(fewer)))
    names = [value(run, "summary")["classes"][i] for i in np.frombuffer(base64.b64decode(shown["labels"]), "<u2")]
    assert names == [fewer.classes[i] for i in fewer.labels.tolist()]
    assert held[0] not in names
    painted = {label for i in range(5) for label in value(run, f"why/{i:06d}")["label"]}
    assert bank.classes.index(held[0]) not in painted


def test_a_corrected_region_is_the_one_that_is_shown(outputs: Path, tmp_path: Path) -> None:
    """Its pseudo mask has the label before, and another region may have the new one."""
    source = folder_of(outputs, "build_bank")
    bank = Bank.load(source)
    # Two regions of one image: the first gets the name of the second, whose picture is not its own.
    images = bank.image_index.tolist()
    first = next(row for row in range(1, len(bank)) if bank.labels[row] > 0 and images.count(images[row]) > 2)
    second = next(
        row for row in range(len(bank)) if images[row] == images[first] and bank.labels[row] > 0 and row != first
    )
    names = [bank.classes[int(bank.labels[row])] for row in (first, second)]
    entry = Correction(first, bank.image_ids[images[first]], *names)
    corrected = apply_corrections(bank, CorrectionFile(digest_bank(bank), (entry,)))
    folder = tmp_path / "corrected"
    write_derived(corrected, "correct", sources=[source], details={}, folder=folder, outputs=tmp_path)
    shutil.copytree(outputs, tmp_path / "outputs")
    settings = overrides(tmp_path / "outputs", f"bank.path={folder}", "evaluation.report=true", train=10, val=5)
    run = Infer.run(compose(settings))
    shown = []
    for path, row in ((folder_of(outputs), first), (folder_of(outputs), second), (run, first)):
        with Image.open(path / "report" / "bank" / f"{row:06d}.jpg") as picture:
            shown.append(np.asarray(picture.convert("RGB").resize((32, 32))).astype(int))
    before, other, after = shown
    # Outlines have the colour of the label that the row has.
    assert np.abs(after - before).mean() < 0.5 * np.abs(after - other).mean()


def test_umap_is_a_second_map_where_it_is_installed(
    copy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = folder_of(copy)
    asked = [f"dataset.root={copy / 'world-10-5'}", "evaluation.report_map=umap"]
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ConfigError, match=r"report_map: got 'umap', but the package umap-learn is not installed"):
        report.run(str(run), asked)
    settings = overrides(copy, "evaluation.report=true", "evaluation.report_map=umap", train=10, val=5)
    assert Infer.run(compose(settings)) == run  # a report costs a warning, never the run
    assert "report: not written: evaluation.report_map: got 'umap'" in caplog.text
    assert not (run / "report" / "index.html").exists()

    class Umap:
        def __init__(self, **arguments: Any) -> None:
            assert arguments["random_state"] == 42

        def fit_transform(self, vectors: np.ndarray) -> np.ndarray:
            return vectors[:, :2]

    module = types.ModuleType("umap")
    module.UMAP = Umap  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "umap", module)
    report.run(str(run), asked)
    assert set(value(run, "bank")["maps"]) == {"pca", "umap"}


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ("nowhere", MissingError, "got 'nowhere', no such folder"),
        ("miniature/propose", ArtefactError, "no finished run"),
        ("miniature/propose/*", ArtefactError, "a propose artefact; expected a finished folder of infer, evaluate"),
    ],
)
def test_wrong_folders_are_one_line(outputs: Path, target: str, error: type[ModusegError], message: str) -> None:
    path = target if target == "nowhere" else str(next(iter(outputs.glob(target))))
    with pytest.raises(error, match=message):
        report.run(path)


def test_the_command_names_its_mistakes(
    outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, message in (
        ([], "expected one of them; set run=<folder of a run>"),
        (["run=a", "predictions=b"], "expected one of them"),
        ([f"run={folder_of(outputs)}", "evaluation.report_size=5"], "report_size: got 5, expected 32 to 4096"),
        ([f"run={folder_of(outputs)}", "evaluation.report_sise=5"], "report_sise: unknown key"),
        ([f"run={folder_of(outputs)}", "nonsense"], "moduseg: error"),
    ):
        monkeypatch.setattr(sys, "argv", ["report", *argv])
        with pytest.raises(SystemExit) as caught:
            run_script("report")
        assert caught.value.code == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert len(error.splitlines()) == 1


def test_confidence_is_a_layer_where_it_was_asked_for(outputs: Path, tmp_path: Path) -> None:
    """At the size of the page, as `infer` stored it; runs without it have no such layer."""
    shutil.copytree(outputs, tmp_path / "outputs")
    options = ("evaluation.report=true", "retrieval.confidence=true", "retrieval.top_k=3", "evaluation.report_size=64")
    path = Infer.run(compose(overrides(tmp_path / "outputs", *options, train=10, val=5)))
    layer = picture(value(path, "labels/000000")["confidence"])
    with Image.open(sorted((path / "scores").glob("*.png"))[0]) as opened:
        stored = np.asarray(opened)
    height, width = layer.shape
    assert max(layer.shape) == 64
    assert np.array_equal(layer, cv2.resize(stored, (width, height), interpolation=cv2.INTER_NEAREST_EXACT))
    assert len(np.unique(layer)) > 1
    assert "confidence" not in value(folder_of(outputs), "labels/000000")
