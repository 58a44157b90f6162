"""`Segmenter` and what it returns: many photographs, pictures, files, reasons, corrections."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

import moduseg
import moduseg.kept_proposals
from moduseg import Segmenter
from moduseg.bank import edit
from moduseg.bank.store import Bank
from moduseg.config import compose
from moduseg.datasets.io import read_label_png, write_rgb_png
from moduseg.errors import ArtefactError, ConfigError, DataError, MissingError
from moduseg.masks.palette import choose_class_colours, voc_palette
from moduseg.masks.polygons import compute_iou, fill_polygons
from moduseg.retrieval.pointing import find_region_at
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.infer import Infer
from moduseg.structures import Proposals
from tests.support.tagged_world import CLASSES, CLIP, ORACLE, scene, settings, write_folder

NAME = "purple blob"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def bank(outputs: Path) -> Path:
    write_folder(outputs / "own", range(12))
    return BuildBank.run(compose(settings(outputs / "own", outputs / "outputs", *CLIP, "retrieval.min_area=10")))


@pytest.fixture(scope="module")
def shared(bank: Path) -> Segmenter:
    return Segmenter.from_bank(bank, device="cpu")


@pytest.fixture
def segmenter(shared: Segmenter) -> Segmenter:
    """One that may learn."""
    made = shared.with_bank(shared.bank)
    made.folder = shared.folder
    return made


def centre_of_object(prediction: moduseg.ImagePrediction) -> tuple[int, int]:
    """A pixel `(x, y)` of the first object that is seen."""
    rows, columns = np.nonzero(prediction.label_map > 0)
    return int(columns[len(columns) // 2]), int(rows[len(rows) // 2])


# What goes in ---------------------------------------------------------------------------------------------------------


def test_many_photographs_are_predicted_like_one(shared: Segmenter, tmp_path: Path) -> None:
    scenes = [scene(index).image for index in range(20, 60)]
    images = [image for image in scenes if image.shape == scenes[0].shape][:5]
    expected = [shared.predict(image).label_map for image in images]
    file = tmp_path / "a b.png"
    file.write_bytes(write_rgb_png(images[0]))
    listed = shared.predict([str(file), Image.fromarray(images[1]), *images[2:]], batch_size=2)
    assert isinstance(listed, list)
    assert [p.picture.name for p in listed] == ["a b", *4 * ["image"]]
    assert all(np.array_equal(p.label_map, e) for p, e in zip(listed, expected, strict=True))
    stacked = shared.predict(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255)
    assert all(np.array_equal(p.label_map, e) for p, e in zip(stacked, expected, strict=True))
    assert shared.predict([]) == []
    for size in (-1, 0):
        with pytest.raises(ConfigError, match=f"batch_size: got {size}"):
            shared.predict(images, batch_size=size)
    with pytest.raises(ValueError, match=r"got \(64, 48, 2\)"):
        shared.predict([images[0][:, :, :2]])


def test_an_iterator_is_read_no_further_than_asked(shared: Segmenter) -> None:
    read = []

    def photographs() -> Any:
        for index in range(20, 30):
            read.append(index)
            yield scene(index).image

    predictions = shared.predict(photographs(), batch_size=2)
    assert read == []
    next(predictions)
    next(predictions)
    assert read == [20, 21]


def test_banks_are_found_by_latest_and_by_run(
    outputs: Path, bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtefactError, match=r"got 'latest', found none below outputs/"):
        Segmenter.from_bank("latest")
    monkeypatch.chdir(outputs)
    expected = Bank.load(bank).pooled
    assert torch.equal(Segmenter.from_bank("latest", "cpu").bank.pooled, expected)
    run = Infer.run(
        compose(
            settings(outputs / "own", outputs / "outputs", *CLIP, "dataset.val_split=train", "retrieval.min_area=10")
        )
    )
    assert torch.equal(Segmenter.from_bank(run, "cpu").bank.pooled, expected)
    # Moved together, they are found beside each other.
    shutil.copytree(outputs / "outputs", tmp_path / "moved")
    shutil.move(bank, outputs / "gone")
    try:
        moved = Segmenter.from_bank(tmp_path / "moved" / run.relative_to(outputs / "outputs"), "cpu")
        assert torch.equal(moved.bank.pooled, expected)
    finally:
        shutil.move(outputs / "gone", bank)


def test_import_costs_little() -> None:
    """Without torch: seconds of the processor, of which a busy machine takes no more."""
    command = (
        "import resource, sys; before = resource.getrusage(resource.RUSAGE_SELF); import moduseg; dir(moduseg); "
        "after = resource.getrusage(resource.RUSAGE_SELF); "
        "print(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, env=os.environ)
    seconds, has_torch = run.stdout.split()
    assert float(seconds) < 0.3
    assert has_torch == "False"


# What comes out -------------------------------------------------------------------------------------------------------


def test_a_prediction_says_what_it_is(shared: Segmenter) -> None:
    prediction = shared.predict(scene(20).image)
    text = repr(prediction)
    assert len(text) < 160
    assert "48 x 64 pixels" in text
    assert sum(prediction.shares.values()) == pytest.approx(1)
    assert f"{next(iter(prediction.shares))} {100 * next(iter(prediction.shares.values())):.0f} %" in text
    html = prediction._repr_html_()
    assert html.count("data:image/jpeg;base64,") == 1
    assert len(html) < 40_000
    for name in prediction.masks():
        assert name in html
    picture = Image.open(io.BytesIO(prediction._repr_png_()))
    assert picture.width >= 64
    assert picture.height > 64


def test_overlays_have_the_size_of_the_photograph(shared: Segmenter) -> None:
    image = scene(20).image
    prediction = shared.predict(image)
    overlay = np.asarray(prediction.overlay())
    assert overlay.shape == image.shape
    assert np.array_equal(overlay[prediction.label_map == 0], image[prediction.label_map == 0])
    solid = np.asarray(prediction.overlay(alpha=1, outline=False))
    colours = choose_class_colours(CLASSES)
    assert np.array_equal(solid[prediction.label_map > 0], colours[prediction.label_map[prediction.label_map > 0]])
    assert (np.asarray(prediction.overlay(names=True)) != overlay).any()
    x, y = centre_of_object(prediction)
    legend = np.asarray(prediction.legend()).reshape(-1, 3).tolist()
    assert solid[y, x].tolist() in legend


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"alpha": 2}, "overlay: got alpha=2, expected a share of 0 to 1", id="share"),
        pytest.param({"outline": -1}, "overlay: got outline=-1, expected pixels, 0 or more", id="width"),
    ],
)
def test_overlays_refuse_what_they_cannot_draw(shared: Segmenter, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shared.predict(scene(20).image).overlay(**settings)


@pytest.mark.parametrize("value", [{"a": 1}, {"photo.jpg"}, {}])
def test_what_has_no_order_holds_no_photographs(shared: Segmenter, value: Any) -> None:
    with pytest.raises(TypeError, match=r"image: got (dict|set), expected a path"):
        shared.predict(value)


def test_files_are_written_by_their_suffix(shared: Segmenter, tmp_path: Path) -> None:
    photograph = tmp_path / "in" / "photo.png"
    photograph.parent.mkdir()
    photograph.write_bytes(write_rgb_png(scene(20).image))
    prediction = shared.predict(photograph)
    labels = prediction.save(tmp_path / "photo.png")
    assert np.array_equal(read_label_png(labels), prediction.label_map)
    assert Image.open(labels).getpalette() == voc_palette().ravel().tolist()
    overlay = np.asarray(Image.open(prediction.save(tmp_path / "photo.overlay.png")))
    assert np.array_equal(overlay, np.asarray(prediction.overlay()))
    assert Image.open(prediction.save(tmp_path / "photo.jpg")).size == (48, 64)
    coco = COCO(str(prediction.save(tmp_path / "photo.json")))
    assert coco.loadImgs(1)[0]["file_name"] == "photo.png"
    masks = np.stack([coco.annToMask(a) for a in coco.loadAnns(coco.getAnnIds())]).any(0)
    assert (masks == (prediction.label_map > 0)).mean() > 0.98
    labelme = json.loads(prediction.save(tmp_path / "photo.labelme.json").read_text())
    assert (tmp_path / labelme["imagePath"]).resolve() == photograph
    assert {shape["label"] for shape in labelme["shapes"]} == set(prediction.masks())
    assert read_label_png(prediction.save(tmp_path / "x.dat", kind="labels")).shape == (64, 48)
    with pytest.raises(ConfigError, match=r"save: got 'x\.dat', expected a name that ends in"):
        prediction.save(tmp_path / "x.dat")


def test_masks_polygons_and_objects_agree(shared: Segmenter) -> None:
    prediction = shared.predict(scene(20).image)
    masks, polygons = prediction.masks(), prediction.polygons(tolerance=0)
    assert list(masks) == list(polygons)
    for name, mask in masks.items():
        assert np.array_equal(mask, prediction.label_map == prediction.classes.index(name))
        rings = fill_polygons(polygons[name], mask.shape)
        assert compute_iou(rings, mask) > 0.95
    visible = np.any([found.mask for found in prediction.objects("components")], axis=0)
    assert np.array_equal(visible, prediction.label_map > 0)
    assert prediction.confidence.shape == prediction.label_map.shape
    assert prediction.confidence.max() == 255


def test_confidence_is_that_of_the_pipeline(shared: Segmenter, bank: Path) -> None:
    cfg = Bank.load(bank).info["config"]["retrieval"]
    asked = Segmenter.from_bank(bank, "cpu", overrides={"retrieval": {**cfg, "confidence": True}})
    image = scene(20).image
    expected = asked.predict(image).retrieved.confidence
    assert expected is not None
    assert np.array_equal(shared.predict(image).confidence, expected)


def test_many_masks_are_kept_as_bits(shared: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    image = scene(20).image[:, :61]
    loose = shared.predict(image)
    monkeypatch.setattr(moduseg.kept_proposals, "_MAX_LOOSE_PIXELS", 0)
    packed = shared.predict(image)
    assert torch.equal(packed.proposals.masks, loose.proposals.masks)
    assert torch.equal(packed.proposals.areas, loose.proposals.areas)
    assert len(packed.objects()) == len(loose.objects())
    ids = torch.arange(12).view(3, 4) // 2
    retrieved = replace(loose.retrieved, proposals=Proposals.of_id_map(ids, 6))
    disjoint = moduseg.ImagePrediction(loose.picture, retrieved, loose.pooled, loose.view)
    assert torch.equal(disjoint.proposals.id_map, ids.int())  # type: ignore[arg-type]


@pytest.mark.parametrize("max_loose", [pytest.param(10**6, id="as they are"), pytest.param(0, id="as bits")])
@pytest.mark.parametrize("selection", ["nms", "majority"])
def test_a_point_means_the_same_however_masks_are_kept(
    bank: Path, selection: str, max_loose: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moduseg.kept_proposals, "_MAX_LOOSE_PIXELS", max_loose)
    settings = {**Bank.load(bank).info["config"]["retrieval"], "selection": selection}
    segmenter = Segmenter.from_bank(bank, "cpu", overrides={"retrieval": settings})
    prediction = segmenter.predict(scene(20).image[:, :43])
    for y, x in np.ndindex(66, 45):
        expected = find_region_at(prediction.retrieved, x - 1, y - 1, is_majority=selection == "majority")
        assert prediction.at(x - 1, y - 1) == expected


def test_one_mask_is_looked_at_without_the_others(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A photograph has hundreds of them, which take longer to decode than a region takes to be explained."""
    image = scene(20).image[:, :61]
    masks = segmenter.predict(image).proposals.masks.numpy()
    monkeypatch.setattr(moduseg.kept_proposals, "_MAX_LOOSE_PIXELS", 0)
    packed = segmenter.predict(image)
    decode = moduseg.kept_proposals.KeptProposals.decode
    calls: list[Any] = []
    monkeypatch.setattr(
        moduseg.kept_proposals.KeptProposals, "decode", lambda kept: (calls.append(kept), decode(kept))[1]
    )
    assert all(np.array_equal(packed.get_mask(proposal), mask) for proposal, mask in enumerate(masks))
    packed.explain(0)
    packed.why(*centre_of_object(packed))
    assert not calls
    segmenter.correct(packed, 0, NAME)
    assert len(calls) == 1  # all are labelled again


def test_detections_of_supervision(shared: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    prediction = shared.predict(scene(20).image)
    try:
        import supervision  # noqa: F401
    except ImportError:
        with pytest.raises(MissingError, match="pip install supervision"):
            prediction.to_detections()
        return
    detections, found = prediction.to_detections(), prediction.objects()
    assert len(detections) == len(found) > 0
    assert np.array_equal(detections.mask, np.stack([o.mask for o in found]))
    assert detections.data["class_name"].tolist() == [prediction.classes[o.label] for o in found]


def test_why_names_the_regions_that_decided(shared: Segmenter) -> None:
    prediction = shared.predict(scene(20).image)
    x, y = centre_of_object(prediction)
    explanation = prediction.why(x, y)
    assert explanation.label == prediction.classes[prediction.label_map[y, x]]
    assert explanation.proposal == prediction.at(x, y)
    voters = [n for n in explanation.neighbours if n.has_voted]
    assert [n.row for n in voters] == prediction.neighbours[explanation.proposal].tolist()
    assert len(explanation.neighbours) >= 6
    assert str(explanation).count("\n") == len(explanation.neighbours)
    assert explanation._repr_html_().count("<tr>") == 1 + len(explanation.neighbours)
    assert all(n.picture is not None for n in explanation.neighbours)
    assert explanation.picture.width > 5 * 160
    with pytest.raises(ConfigError, match=r"point: got \(-1, 0\), where no proposal is"):
        prediction.why(-1, 0)


# What it learns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [NAME, "background", "red disc"])
def test_a_correction_changes_what_was_clicked(segmenter: Segmenter, label: str) -> None:
    prediction = segmenter.predict(scene(20).image)
    x, y = centre_of_object(prediction)
    before = prediction.classes[prediction.label_map[y, x]]
    label = next(name for name in (label, "blue cross") if name != before)
    corrected = segmenter.correct(prediction, (x, y), f" {label} ")
    assert corrected.classes[corrected.label_map[y, x]] == label
    assert (prediction.at(x, y), before, label) in [(c.proposal, c.before, c.after) for c in corrected.changes]
    assert f"{len(corrected.changes)} regions changed" in repr(corrected)
    assert np.array_equal(segmenter.predict(scene(20).image).label_map, corrected.label_map)
    explanation = corrected.why(x, y)
    assert next((n.label, n.has_voted) for n in explanation.neighbours) == (label, True)
    assert explanation.votes == {label: 1}
    assert explanation.neighbours[0].picture is not None
    # The old prediction still explains itself by the bank that it was made with.
    assert prediction.why(x, y).label == before
    back = segmenter.correct(corrected, (x, y), before)
    assert back.classes[back.label_map[y, x]] == before


def test_others_see_one_bank_while_it_is_exchanged(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a search gives are those of the bank in the same prediction, whenever another thread predicts."""
    image, meanwhile = scene(20).image, []
    prediction = segmenter.predict(image)
    set_attribute = Segmenter.__setattr__

    def predict_after(made: Segmenter, name: str, value: Any) -> None:
        set_attribute(made, name, value)
        if made is segmenter:
            meanwhile.append(made.predict(image))

    monkeypatch.setattr(Segmenter, "__setattr__", predict_after)
    segmenter.correct(prediction, centre_of_object(prediction), NAME)
    assert meanwhile
    for each in meanwhile:
        assert int(each.view.retriever.bank.rows.max()) == len(each.view.bank) - 1


def test_what_was_learned_is_saved_and_opened(segmenter: Segmenter, tmp_path: Path) -> None:
    prediction = segmenter.predict(scene(20).image)
    x, y = centre_of_object(prediction)
    wanted = segmenter.correct(prediction, (x, y), NAME)
    folder = segmenter.save(tmp_path / "learned")
    opened = Segmenter.from_bank(folder, "cpu")
    again = opened.predict(scene(20).image)
    assert np.array_equal(again.label_map, wanted.label_map)
    first, shown = again.why(x, y).neighbours[0], wanted.why(x, y).neighbours[0]
    assert (first.label, first.image) == (NAME, shown.image)
    assert np.array_equal(first.picture, shown.picture)  # type: ignore[arg-type]
    with pytest.raises(ArtefactError, match="is the folder of the bank itself"):
        opened.save(folder)


def test_a_photograph_that_is_corrected_again_keeps_its_regions(segmenter: Segmenter, tmp_path: Path) -> None:
    """Those that are named in the folder of the bank, too."""
    prediction = segmenter.predict(scene(20).image)
    masks, kept = prediction.proposals.masks, [int(i) for i in prediction.kept if int(prediction.labels[i]) > 0]
    first = kept[0]
    second = next(i for i in kept[1:] if not bool((masks[i] & masks[first]).any()))
    shown = segmenter.correct(prediction, first, NAME).explain(first).neighbours[0].picture
    folder = segmenter.save(tmp_path / "first")
    opened = Segmenter.from_bank(folder, "cpu")
    opened.correct(opened.predict(scene(20).image), second, "another name")
    saved = opened.save(tmp_path / "second")
    for each in (opened, Segmenter.from_bank(saved, "cpu")):
        again = each.predict(scene(20).image).explain(first).neighbours[0]
        assert again.label == NAME
        assert np.array_equal(again.picture, shown)  # type: ignore[arg-type]
    (file,) = (saved / "labels" / "corrected").glob("*.png")
    labels = {opened.classes[label] for label in np.unique(read_label_png(file)) if label != 255}
    assert labels == {NAME, "another name"}


def test_pictures_stay_with_their_bank(segmenter: Segmenter) -> None:
    """Two banks may have learned from photographs of one name."""
    others = segmenter.with_bank(segmenter.bank)
    segmenter.add(scene(12).image, [CLASSES[label] for label in scene(12).labels])
    others.add(scene(13).image, [CLASSES[label] for label in scene(13).labels])
    assert segmenter.bank.image_ids == others.bank.image_ids
    label = int(others.bank.labels[-1])
    drawn, joined = (
        each.predict(scene(13).image).view.draw("added/image", others.classes[label])
        for each in (others, segmenter.with_bank(others.bank))
    )
    assert drawn is not None
    assert joined is None


def test_added_images_give_what_a_longer_list_gives(
    bank: Path, segmenter: Segmenter, outputs: Path, tmp_path: Path
) -> None:
    """The bank of twelve images with two added equals one built from fourteen."""
    root = write_folder(outputs / "more", range(14))
    whole = Bank.load(BuildBank.run(compose(settings(root, tmp_path, *CLIP, "retrieval.min_area=10"))))
    tags = [[CLASSES[label] for label in scene(index).labels] for index in (12, 13)]
    counts = segmenter.add([scene(12).image, Image.fromarray(scene(13).image)], [tags[0], ";".join(tags[1])])
    assert sum(counts.values()) == len(whole) - len(Bank.load(bank))
    assert torch.equal(segmenter.bank.labels, whole.labels)
    assert torch.allclose(segmenter.bank.pooled, whole.pooled, atol=1e-5)
    assert segmenter.bank.image_ids[-2:] == ("added/image", "added/image-2")
    saved = segmenter.save(tmp_path / "more")
    assert len(Segmenter.from_bank(saved, "cpu").bank) == len(whole)


def test_another_bank_keeps_the_pictures_that_this_one_learned(segmenter: Segmenter, tmp_path: Path) -> None:
    tags = [CLASSES[label] for label in scene(12).labels]
    segmenter.add(scene(12).image, tags)
    # Without its first class every id moves up by one, and the label maps have to follow.
    gone = next(name for name in segmenter.bank.classes[1:] if name not in tags)
    for bank in (segmenter.bank, edit.remove(segmenter.bank, classes=[gone])):
        saved = segmenter.with_bank(bank).save(tmp_path / str(len(bank.classes)))
        assert (np.array(Image.open(saved / "images/added/image.png")) == scene(12).image).all()
        labels = set(np.unique(read_label_png(saved / "labels/added/image.png"))) - {255}
        assert {bank.classes[label] for label in labels} <= {bank.classes[0], *tags}
        assert len(labels) > 1
    without = segmenter.with_bank(edit.remove(segmenter.bank, images=["added/image"])).save(tmp_path / "without")
    assert not (without / "images").exists()


@pytest.mark.parametrize("more", [
    pytest.param(["bank.parts=40"], id="parts"),
    pytest.param(["bank.parts=40", "bank.flips=true"], id="parts and mirror images"),
    pytest.param(["bank.parts=40", "pseudo_masks.refine=region_vote"], id="parts, and a vote of the same regions"),
])  # fmt: skip
def test_added_images_have_parts_like_the_others(more: list[str], outputs: Path, tmp_path: Path) -> None:
    """Of images of 96 pixels, whose superpixels are large enough for parts."""
    roots = [write_folder(outputs / f"large{count}", range(count), size=96) for count in (2, 4)]
    options = [*CLIP, *more, "retrieval.min_area=10"]
    short, long = (BuildBank.run(compose(settings(root, tmp_path, *options))) for root in roots)
    segmenter, expected = Segmenter.from_bank(short, "cpu"), Bank.load(long)
    # Of each image and its mirror image, four classes at most.
    assert len(expected) > 4 * 2 * 4
    scenes = [scene(index, 96) for index in (2, 3)]
    segmenter.add([each.image for each in scenes], [[CLASSES[label] for label in each.labels] for each in scenes])
    assert torch.equal(segmenter.bank.labels, expected.labels)
    assert torch.allclose(segmenter.bank.pooled, expected.pooled, atol=1e-5)


def test_masks_take_the_place_of_pseudo_masks(outputs: Path, tmp_path: Path) -> None:
    root = write_folder(outputs / "own", range(12))
    made = BuildBank.run(compose(settings(root, tmp_path, *ORACLE, "retrieval.min_area=10")))
    segmenter = Segmenter.from_bank(made, "cpu", overrides={"proposer": {"name": "superpixels"}})
    image, mask = scene(20).image, np.where(scene(20).semantic > 0, np.uint8(13), np.uint8(0))
    with pytest.raises(ConfigError, match=r"'ground_truth', which reads ground truth.*give masks="):
        segmenter.add(image, NAME)
    with pytest.raises(ValueError, match=r"masks: got \(64, 48\).*up to 13"):
        segmenter.add(image, "red disc", masks=mask)
    with pytest.raises(ValueError, match=r"masks: got \(64, 48\) int64 from -1 up to 0"):
        segmenter.add(image, NAME, masks=np.where(mask > 0, -1, 0))
    assert segmenter.add(image, NAME, masks=mask) == {"background": 1, NAME: 1}
    assert NAME in segmenter.predict(image).shares
    with pytest.raises(ConfigError, match="got 2 images, 1 entries of tags"):
        segmenter.add([image, image], [NAME])
    with pytest.raises(ConfigError, match="tags: got ' ; '"):
        segmenter.add(image, " ; ")


def test_classes_that_are_not_searched_cannot_be_taught(bank: Path) -> None:
    settings = Bank.load(bank).info["config"]["bank"]
    segmenter = Segmenter.from_bank(bank, "cpu", overrides={"bank": {**settings, "classes": ["red disc"]}})
    prediction = segmenter.predict(scene(20).image)
    for teach in (
        lambda: segmenter.correct(prediction, 0, NAME),
        lambda: segmenter.add(scene(20).image, ["red disc", NAME]),
    ):
        with pytest.raises(ConfigError, match=rf"label: got '{NAME}', expected background or some of bank\.classes"):
            teach()
    assert NAME not in segmenter.classes
    for name in ("background", "red disc"):
        segmenter.correct(prediction, 0, name)


def test_a_proposal_may_be_counted_by_numpy(segmenter: Segmenter) -> None:
    prediction = segmenter.predict(scene(20).image)
    largest = prediction.proposals.areas.numpy().argmax()
    corrected = segmenter.correct(prediction, largest, NAME)
    assert corrected.classes[int(corrected.labels[largest])] == NAME


def test_mistakes_in_corrections_are_one_line(segmenter: Segmenter) -> None:
    prediction = segmenter.predict(scene(20).image)
    for point, label, message in (
        ((-5, 3), NAME, r"point: got \(-5, 3\)"),
        (10_000, NAME, r"proposal 10000, expected 0\.\."),
        (0, "  ", r"label: got '  ', expected the name of a class"),
    ):
        with pytest.raises(ConfigError, match=message):
            segmenter.correct(prediction, point, label)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"missing\.png"):
        segmenter.predict("missing.png")


def test_proposals_are_shown(tmp_path: Path) -> None:
    shown = moduseg.show_proposals(scene(20).image, "superpixels", "cpu")
    assert len(shown) == len(shown.proposals) > 10
    assert shown.picture.size == (48, 64)
    assert repr(shown) == f"<{len(shown)} proposals of superpixels, 48 x 64 pixels>"
    assert "data:image/jpeg" in shown._repr_html_()
    assert shown._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="nonsense"):
        moduseg.show_proposals(scene(20).image, "nonsense")


def test_one_begins_without_a_bank(tmp_path: Path) -> None:
    segmenter = Segmenter.begin(["proposer=superpixels", "backbone=miniature_random", "retrieval.min_area=10"], "cpu")
    prediction = segmenter.predict(scene(20).image)
    assert prediction.shares == {"background": 1.0}
    first = segmenter.correct(prediction, (5, 5), NAME)
    # With a single named region, everything resembles it most.
    assert set(first.labels.tolist()) == {1}
    second = segmenter.correct(first, (40, 50), "background")
    assert set(second.shares) == {NAME, "background"}
    saved = segmenter.save(tmp_path / "named")
    assert np.array_equal(Segmenter.from_bank(saved, "cpu").predict(scene(20).image).label_map, second.label_map)
