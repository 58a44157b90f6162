"""One's own images labelled with a finished bank, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from moduseg import Segmenter
from moduseg.bank.derived import open_bank
from moduseg.cli import entry
from moduseg.cli.options import parse
from moduseg.config import compose
from moduseg.datasets.io import read_label_png
from moduseg.errors import ArtefactError, ConfigError, DataError, MissingError, ModusegError
from moduseg.masks.palette import voc_palette
from moduseg.masks.polygons import compute_iou, fill_polygons
from moduseg.proposers.superpixels import SuperpixelProposer
from moduseg.stages.build_bank import BuildBank
from moduseg.tools import predict
from tests.support.tagged_world import CLIP, ORACLE, image_id, scene, settings, write_folder


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bank")
    write_folder(root / "own", range(12))
    return BuildBank.run(compose(settings(root / "own", root / "outputs", *CLIP)))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three scenes, one of them in a sub-folder, called by a name that has to be quoted."""
    write_folder(tmp_path / "mine", [20, 21, 22], masks=False)
    folder = tmp_path / "mine" / "images"
    (folder / "a trip").mkdir()
    (folder / f"{image_id(22)}.png").rename(folder / "a trip" / "no#1.png")
    return folder


def run(*arguments: str) -> tuple[Path, dict[str, str]]:
    return predict.run(
        *parse([*arguments, "runtime.device=cpu", "retrieval.min_area=10"], predict.PredictOptions, "predict")
    )


def test_every_format_says_the_same(bank: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out, failed = run(f"bank={bank}", "images=mine/images", "out=found", "objects=components")
    assert failed == {}
    segmenter = Segmenter.from_bank(bank, device="cpu", overrides={"retrieval": _retrieval(bank)})
    coco = COCO(str(out / "coco.json"))
    tasks = json.loads((out / "labelstudio.json").read_text())
    by_name = {image["file_name"]: image["id"] for image in coco.loadImgs(coco.getImgIds())}
    assert set(by_name) == {"scene020.png", "scene021.png", "a trip/no#1.png"}
    assert tasks[0]["data"]["image"] == "/data/local-files/?d=a%20trip/no%231.png"
    seen = 0
    for task, (name, number) in zip(tasks, by_name.items(), strict=True):
        image = Path(name).with_suffix("")
        file = tmp_path / "mine" / "images" / name
        label_map = read_label_png(out / "labels" / f"{image}.png")
        assert np.array_equal(label_map, segmenter.predict(file).label_map)
        labelme = json.loads((out / "labelme" / f"{image}.json").read_text())
        assert (out / "labelme" / image.parent / labelme["imagePath"]).resolve() == file.resolve()
        height, width = label_map.shape
        assert (labelme["imageHeight"], labelme["imageWidth"]) == (height, width)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=number))
        for label in set(np.unique(label_map).tolist()) - {0}:
            name_of = segmenter.classes[label]
            mask = label_map == label
            masks = [coco.annToMask(a).astype(bool) for a in annotations if a["category_id"] == label]
            assert compute_iou(np.any(masks, axis=0), mask) > 0.95
            rings = [np.array(s["points"]) for s in labelme["shapes"] if s["label"] == name_of]
            assert compute_iou(fill_polygons(rings, (height, width), "centres"), mask) > 0.95
            results = [r for r in task["predictions"][0]["result"] if r["value"]["polygonlabels"] == [name_of]]
            rings = [np.array(r["value"]["points"]) / 100 * [width, height] for r in results]
            assert compute_iou(fill_polygons(rings, (height, width)), mask) > 0.95
            seen += 1
        assert {a["category_id"] for a in annotations} == set(np.unique(label_map).tolist()) - {0}
    assert seen > 3
    picture = Image.open(out / "labels" / "scene020.png")
    assert (picture.mode, picture.getpalette()) == ("P", voc_palette().ravel().tolist())
    assert len(list(out.glob("overlays/**/*.png"))) == 3
    overlay = np.asarray(Image.open(out / "overlays" / "scene020.png"))
    label_map, photograph = read_label_png(out / "labels" / "scene020.png"), scene(20).image
    assert overlay.shape == photograph.shape
    assert np.array_equal(overlay[label_map == 0], photograph[label_map == 0])
    legend = np.asarray(Image.open(out / "legend.png")).reshape(-1, 3).tolist()
    assert all(segmenter.colours[label].tolist() in legend for label in range(1, len(segmenter.classes)))
    # In other colours, overlays alone are another result.
    written = (out / "overlays" / "scene020.png").read_bytes()
    run(f"bank={bank}", "images=mine/images", "out=found", "objects=components", "evaluation.report_colours=voc")
    assert (out / "overlays" / "scene020.png").read_bytes() != written
    assert (out / "classes.txt").read_text().splitlines() == list(segmenter.classes)


# Tools that read the files -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(bank: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of images, and that of their predictions, with every corner."""
    root = tmp_path_factory.mktemp("exported")
    write_folder(root, [20, 21], masks=False)
    return root / "images", run(
        f"bank={bank}", f"images={root / 'images'}", f"out={root / 'out'}", "tolerance=0", "objects=components"
    )[0]


def test_labelme_reads_its_files(exported: tuple[Path, Path]) -> None:
    labelme = pytest.importorskip("labelme", exc_type=ImportError)
    _, out = exported
    ids = {name: label for label, name in enumerate((out / "classes.txt").read_text().splitlines())}
    for path in sorted((out / "labelme").glob("*.json")):
        label_map = read_label_png(out / "labels" / f"{path.stem}.png")
        shapes = labelme.LabelFile(str(path)).shapes
        assert shapes
        drawn, _ = labelme.utils.shapes_to_label(label_map.shape, shapes, ids)
        assert np.array_equal(drawn, label_map)


def test_supervision_reads_the_coco_file(exported: tuple[Path, Path]) -> None:
    supervision = pytest.importorskip("supervision", exc_type=ImportError)
    images, out = exported
    dataset = supervision.DetectionDataset.from_coco(str(images), str(out / "coco.json"), force_masks=True)
    assert len(dataset) == 2
    coco = COCO(str(out / "coco.json"))
    for path, _, detections in dataset:
        label_map = read_label_png(out / "labels" / f"{Path(path).stem}.png")
        assert detections.mask is not None
        # It fills polygons with their outline, which runs along the edges of pixels: half a pixel more all around.
        assert (
            compute_iou(detections.mask.any(0), cv2.dilate((label_map > 0).astype(np.uint8), np.ones((2, 2))) > 0)
            > 0.95
        )
        assert detections.mask.any(0)[label_map > 0].all()
    assert len(coco.getAnnIds()) == sum(len(detections) for _, _, detections in dataset)


def test_label_studio_takes_the_tasks(exported: tuple[Path, Path]) -> None:
    label_interface = pytest.importorskip("label_studio_sdk.label_interface", exc_type=ImportError)
    _, out = exported
    interface = label_interface.LabelInterface((out / "labelstudio.xml").read_text())
    for task in json.loads((out / "labelstudio.json").read_text()):
        assert interface.validate_task({"data": task["data"]})
        (prediction,) = task["predictions"]
        assert prediction["result"]
        assert interface.validate_prediction(prediction, return_errors=True) == []


def _retrieval(bank: Path) -> dict[str, object]:
    stored = json.loads((bank / "bank.json").read_text())["config"]["retrieval"]
    return {**stored, "min_area": 10}


def test_low_scores_are_unknown_here(bank: Path, images: Path, tmp_path: Path) -> None:
    sure, _ = run(f"bank={bank}", f"images={images}", f"out={tmp_path / 'sure'}", "formats=png;coco")
    strict, _ = run(
        f"bank={bank}", f"images={images}", f"out={tmp_path / 'strict'}", "min_score=0.8", "formats=[png,coco]"
    )
    none, _ = run(f"bank={bank}", f"images={images}", f"out={tmp_path / 'none'}", "min_score=1.0", "formats=png;coco")
    maps = [read_label_png(folder / "labels" / "scene020.png") for folder in (sure, strict, none)]
    assert 255 not in maps[0]
    assert 0 < (maps[1] == 255).sum() < maps[1].size
    assert set(np.unique(maps[2])) <= {0, 255}
    assert (maps[2] == 255).mean() > 0.9  # all but superpixels of less than min_area
    counts = [len(json.loads((folder / "coco.json").read_text())["annotations"]) for folder in (sure, strict, none)]
    assert counts[0] > counts[1] > counts[2] == 0
    scores = [a["score"] for a in json.loads((strict / "coco.json").read_text())["annotations"]]
    assert min(scores) >= 0.8
    assert not (sure / "overlays").exists()
    assert not (sure / "labelstudio.json").exists()


def test_the_log_names_the_bank_and_its_classes(
    bank: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="moduseg"):
        run(f"bank={bank}", f"images={images}", f"out={tmp_path / 'out'}", "formats=png")
    first, second, third, *others = open_bank(bank).classes[1:]
    assert f"predict: the bank is {bank} ({first}, {second}, {third} and {len(others)} more)" in caplog.text


def test_what_is_done_is_not_done_again(
    bank: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (f"bank={bank}", f"images={images}", f"out={tmp_path / 'out'}")
    out, _ = run(*arguments, "formats=png;coco")
    before = {path: path.stat().st_mtime_ns for path in (out / "labels").rglob("*.png")}
    whole = (out / "coco.json").read_bytes()
    calls: list[object] = []
    inner = Segmenter.predict
    monkeypatch.setattr(Segmenter, "predict", lambda self, image: calls.append(1) or inner(self, image))
    run(*arguments, "formats=png;coco")
    assert calls == []
    (out / "labels" / "scene021.png").unlink()
    (out / "records" / "scene020.json").write_text("{")
    run(*arguments, "formats=png;coco")
    assert len(calls) == 2
    assert (out / "coco.json").read_bytes() == whole
    assert set(before) == set((out / "labels").rglob("*.png"))
    run(*arguments)  # more formats
    assert len(calls) == 5
    for more in ("retrieval.top_k=2", "min_score=0.5", "objects=components", "runtime.precision=bfloat16"):
        with pytest.raises(ArtefactError, match=r"result of another bank or other settings; set out=<new folder>"):
            run(*arguments, more)
    with pytest.raises(ArtefactError, match=r"holds other files; set out="):
        run(*arguments[:2], f"out={images}")


@pytest.mark.parametrize("selection", ["majority", "margin"])
def test_label_maps_are_those_of_the_segmenter(selection: str, bank: Path, images: Path, tmp_path: Path) -> None:
    keys = ("proposer=superpixels", f"retrieval.selection={selection}")
    tidying = {"retrieval.min_object_area": 40, "retrieval.max_hole_area": 9, "retrieval.smoothing_radius": 1}
    plain, _ = run(f"bank={bank}", f"images={images}", f"out={tmp_path / 'plain'}", "formats=[png]", *keys)
    tidy, _ = run(
        *(f"bank={bank}", f"images={images}", f"out={tmp_path / 'tidy'}", "formats=[png]", *keys),
        *(f"{key}={value}" for key, value in tidying.items()),
    )
    cfg = json.loads((tidy / "manifest.json").read_text())["config"]
    segmenter = Segmenter.from_bank(bank, device="cpu", overrides=cfg)
    num_changed = 0
    for file in sorted(images.rglob("*.png")):
        name = file.relative_to(images)
        label_map = read_label_png(tidy / "labels" / name)
        assert np.array_equal(label_map, segmenter.predict(file).label_map)
        num_changed += int((label_map != read_label_png(plain / "labels" / name)).sum())
    assert num_changed > 0


def test_settings_that_tidy_are_in_the_key_where_they_are_set(
    bank: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents: list[dict[str, Any]] = []
    monkeypatch.setattr(predict, "digest_of", lambda content: contents.append(content) or "0" * 64)
    for index, more in enumerate(([], ["retrieval.max_hole_area=9"], ["retrieval.confidence=true"])):
        run(f"bank={bank}", f"images={images}", f"out={tmp_path / str(index)}", "formats=[png]", *more)
    names = {"min_object_area", "max_hole_area", "smoothing_radius", "confidence"}
    found = [names & content["config"]["retrieval"].keys() for content in contents]
    assert found == [set(), {"max_hole_area"}, {"confidence"}]
    assert not (tmp_path / "0" / "scores").exists()
    assert [path.stem for path in sorted((tmp_path / "2" / "scores").rglob("*.png"))] == [
        path.stem for path in sorted((tmp_path / "2" / "labels").rglob("*.png"))
    ]


def test_a_broken_image_is_left_out_and_tried_again(bank: Path, images: Path, tmp_path: Path) -> None:
    broken = images / "scene020.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:50])
    arguments = (f"bank={bank}", f"images={images}", f"out={tmp_path / 'out'}", "formats=png;coco")
    out, failed = run(*arguments)
    assert list(failed) == ["scene020"]
    assert json.loads((out / "failures.jsonl").read_text())["id"] == "scene020"
    assert len(json.loads((out / "coco.json").read_text())["images"]) == 2
    with pytest.raises(DataError, match=r"none of 1 images could be processed; first .*scene020"):
        run(f"bank={bank}", f"images={broken}", f"out={tmp_path / 'other'}")
    broken.write_bytes(whole)
    out, failed = run(*arguments)
    assert failed == {}
    assert len(json.loads((out / "coco.json").read_text())["images"]) == 3


def test_mistakes_are_one_line(bank: Path, images: Path, tmp_path: Path) -> None:
    own = write_folder(tmp_path / "own", [0, 1])
    oracle = BuildBank.run(compose(settings(own, tmp_path / "o", *ORACLE)))
    given = (f"bank={bank}", f"images={images}", f"out={tmp_path / 'out'}")
    for arguments, kind, message in (
        ((*given, "min_score=high"), ConfigError, r"min_score: got 'high'"),
        ((*given, "min_score=5"), ConfigError, r"min_score: got 5\.0, expected a cosine"),
        ((*given, "formats=png;svg"), ConfigError, r"formats: got \['svg'\], expected some of png, overlay"),
        ((*given, "tolerance=-1"), ConfigError, r"tolerance: got -1\.0"),
        ((*given, "objects=things"), ConfigError, r"objects: got 'things'.*one of proposals, components"),
        ((given[0], f"images={tmp_path / 'no'}"), MissingError, r"images: got .*no such file or folder"),
        (given[1:], ConfigError, r"bank: missing"),
        ((f"bank={tmp_path}", *given[1:]), ArtefactError, r"got no bank\.json"),
        ((f"bank={oracle}", *given[1:]), ConfigError, r"proposer\.name: got 'ground_truth', which needs ground truth"),
        ((*given, "backbone=miniature"), ArtefactError, r"made with backbone weights"),
    ):
        with pytest.raises(ModusegError, match=message) as caught:
            run(*arguments)
        assert caught.type is kind
        assert "\n" not in str(caught.value)


def test_more_votes_than_the_rarest_class_has_vectors_is_warned_of(
    bank: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="moduseg"):
        run(f"bank={bank}", f"images={images}", f"out={tmp_path / 'out'}", "retrieval.top_k=50", "formats=png")
    assert "50 neighbours vote, but a class of the bank has only" in caplog.text


@pytest.mark.parametrize("setting", ["retrieval.vote_temperature=0.02", "retrieval.cap_top_k=true"])
def test_votes_that_rare_classes_can_win_are_not_warned_of(
    setting: str, bank: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="moduseg"):
        run(f"bank={bank}", f"images={images}", f"out={tmp_path / 'out'}", "retrieval.top_k=50", setting, "formats=png")
    assert caplog.text == ""


def test_the_command_exits_with_one_where_an_image_was_left_out(
    bank: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "scene020.png").write_bytes(b"no picture")
    arguments = [f"bank={bank}", f"images={images}", f"out={tmp_path / 'out'}", "formats=png"]
    monkeypatch.setattr("sys.argv", ["moduseg", "predict", *arguments])
    with pytest.raises(SystemExit) as ended:
        entry()
    captured = capsys.readouterr()
    assert ended.value.code == 1
    assert "3 images (2 now, 0 done before), 1 failed" in captured.out


def test_another_image_of_the_same_size_is_labelled_again(bank: Path, images: Path, tmp_path: Path) -> None:
    """Bitmaps of equal width and height have equal sizes, so the size tells nothing."""
    first, second = (np.asarray(Image.open(images / f"{image_id(i)}.png").convert("RGB")) for i in (20, 21))
    second = np.resize(second, first.shape)
    folder = tmp_path / "bitmaps"
    folder.mkdir()
    Image.fromarray(first).save(folder / "a.bmp")
    arguments = f"bank={bank}", f"images={folder}", f"out={tmp_path / 'out'}", "formats=png"
    record = run(*arguments)[0] / "records" / "a.json"
    before = record.stat().st_mtime_ns
    run(*arguments)
    assert record.stat().st_mtime_ns == before
    Image.fromarray(second).save(folder / "a.bmp")
    run(*arguments)
    assert record.stat().st_mtime_ns != before


def test_a_record_of_the_size_alone_is_believed(bank: Path, images: Path, tmp_path: Path) -> None:
    """Earlier versions recorded nothing else."""
    arguments = f"bank={bank}", f"images={images}", f"out={tmp_path / 'out'}", "formats=png"
    record = run(*arguments)[0] / "records" / f"{image_id(20)}.json"
    content = json.loads(record.read_text())
    content["bytes"] = content.pop("stamp")[0]
    record.write_text(json.dumps(content))
    run(*arguments)
    assert "bytes" in json.loads(record.read_text())


def test_other_weights_of_the_proposer_are_another_result(
    bank: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = f"bank={bank}", f"images={images}", f"out={tmp_path / 'out'}", "formats=png"
    run(*arguments)
    monkeypatch.setattr(SuperpixelProposer, "digest", "0" * 64)
    with pytest.raises(ArtefactError, match="holds the result of another bank or other settings"):
        run(*arguments)


def test_names_do_not_climb_out_of_the_folder(
    bank: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere" / "deep")
    out, _ = run(f"bank={bank}", f"images={images}", "out=found", f"labelstudio_root={tmp_path}")
    names = [image["file_name"] for image in json.loads((out / "coco.json").read_text())["images"]]
    assert names == ["a trip/no#1.png", "scene020.png", "scene021.png"]
    urls = [task["data"]["image"] for task in json.loads((out / "labelstudio.json").read_text())]
    inside = images.relative_to(tmp_path).as_posix()
    assert urls == [f"/data/local-files/?d={inside}/{name.replace(' ', '%20').replace('#', '%23')}" for name in names]
    with pytest.raises(ConfigError, match=r"labelstudio_root: got '.*elsewhere', which does not hold"):
        run(f"bank={bank}", f"images={images}", "out=other", f"labelstudio_root={tmp_path / 'elsewhere'}")
