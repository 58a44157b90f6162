"""Masks become polygons and come back; objects in the formats of annotation tools."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pytest
import torch
from matplotlib.path import Path as Outline
from PIL import Image, ImageDraw
from pycocotools.coco import COCO

from moduseg.config import RetrievalConfig
from moduseg.masks.polygons import Convention, compute_iou, fill_polygons, find_polygons
from moduseg.masks.tidy import tidy_label_map
from moduseg.miniature.world.scenes import render_scene
from moduseg.report.annotations import (
    PredictedObject,
    split_objects,
    to_coco,
    to_label_studio_config,
    to_label_studio_task,
    to_labelme,
    to_record,
    to_url,
)
from moduseg.retrieval.assemble import assemble
from moduseg.retrieval.majority import assemble_majority
from moduseg.retrieval.retriever import Retriever
from moduseg.structures import Prediction, Proposals, SearchBank

CLASSES = ("background", "dog & co", "cat")


def drawn(*rows: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in rows])


MASKS = {
    "pixel": drawn("....", ".#..", "....", "...."),
    "line": drawn("....", "####", "....", "...."),
    "whole": drawn("###", "###", "###"),
    "block": drawn("......", ".####.", ".####.", ".####.", "......"),
    "hole": drawn("......", ".####.", ".#..#.", ".####.", "......"),
    "pixel hole": drawn("###", "#.#", "###"),
    "two holes": drawn("#######", "#.###.#", "#.###.#", "#######"),
    "hole with an island": drawn("#######", "#.....#", "#.###.#", "#.#.#.#", "#.###.#", "#.....#", "#######"),
    "two parts": drawn("##....", "##....", "....##", "....##"),
    "touching at a corner": drawn("##..", "##..", "..##", "..##"),
    "hole at a corner": drawn("#####", "#.###", "##..#", "#####"),
    "stairs": drawn("#....", "##...", "###..", "####.", "#####"),
    "comb": drawn("#.#.#", "#.#.#", "#####"),
}


def at_centres(polygons: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Even-odd rule at the centre of every pixel, edge by edge: the plain definition."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    inside = np.zeros(size, dtype=bool)
    for polygon in polygons:
        crossings = np.zeros(size, dtype=int)
        for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            if y0 != y1:
                spans = (np.minimum(y0, y1) <= y) & (y < np.maximum(y0, y1))
                crossings += spans & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
        inside |= crossings % 2 == 1
    return inside


@pytest.mark.parametrize("name", MASKS)
def test_polygons_hold_exactly_the_pixels_of_the_mask(name: str) -> None:
    mask = MASKS[name]
    size = (mask.shape[0], mask.shape[1])
    polygons = find_polygons(mask)
    assert np.array_equal(at_centres(polygons, size), mask)
    assert np.array_equal(fill_polygons(polygons, size), mask)
    assert np.array_equal(fill_polygons(find_polygons(mask, 0.0, "centres"), size, "centres"), mask)
    assert all(polygon.shape[1] == 2 and len(polygon) >= 3 for polygon in polygons)


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(MASKS["pixel"], id="one pixel"),
        pytest.param(drawn("....", ".##.", "...."), id="two pixels in a row"),
        pytest.param(drawn("..", ".#", ".#"), id="two pixels in a column"),
        pytest.param(drawn("#..", ".#.", "..#"), id="a diagonal"),
        pytest.param(drawn("#...", "#...", "####"), id="an angle"),
        pytest.param(drawn("#####", "#...#", "#...#", "#####"), id="a frame one pixel wide"),
        pytest.param(drawn("##.......", "##.......", ".......##"), id="a block and a speck"),
        pytest.param(drawn("#" * 30), id="a long line"),
    ],
)
@pytest.mark.parametrize("convention", ["edges", "centres"])
@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_every_polygon_has_an_area(mask: np.ndarray, convention: Convention, tolerance: float) -> None:
    polygons = find_polygons(mask, tolerance, convention)
    assert polygons
    for polygon in polygons:
        corners = list(zip(polygon, np.roll(polygon, -1, axis=0), strict=True))
        assert abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in corners)) > 0
    if tolerance == 0:
        assert np.array_equal(fill_polygons(polygons, (mask.shape[0], mask.shape[1]), convention), mask)


@pytest.mark.parametrize(
    ("name", "count"),
    [("block", 1), ("hole", 1), ("two holes", 1), ("two parts", 2), ("hole with an island", 2), ("pixel hole", 1)],
)
def test_one_polygon_for_each_component(name: str, count: int) -> None:
    assert len(find_polygons(MASKS[name])) == count


def test_edges_and_centres_are_half_a_pixel_apart() -> None:
    edges, centres = find_polygons(MASKS["block"])[0], find_polygons(MASKS["block"], 0, "centres")[0]
    assert sorted(map(tuple, edges.tolist())) == [(1, 1), (1, 4), (5, 1), (5, 4)]
    assert sorted(map(tuple, centres.tolist())) == [(1, 1), (1, 3), (4, 1), (4, 3)]


def test_an_empty_mask_has_no_polygon_and_wrong_arguments_are_named() -> None:
    assert find_polygons(np.zeros((3, 4), dtype=bool)) == []
    assert not fill_polygons([], (3, 4)).any()
    assert compute_iou(np.zeros((2, 2), dtype=bool), np.zeros((2, 2), dtype=bool)) == 1.0
    with pytest.raises(ValueError, match=r"got \(2, 2\) uint8, expected \[H, W\] bool"):
        find_polygons(np.zeros((2, 2), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"tolerance: got -1"):
        find_polygons(np.zeros((2, 2), dtype=bool), -1)


@pytest.mark.parametrize("convention", ["edges", "centres"])
@pytest.mark.parametrize("tolerance", [0.5, 1.0, 3.0])
def test_simplified_polygons_stay_near_the_mask(convention: Convention, tolerance: float) -> None:
    points = {0.0: 0, tolerance: 0}
    for index in range(6):
        scene = render_scene(3, "val", index)
        for number in range(1, scene.instances.max() + 1):
            mask = scene.instances == number
            for how in points:
                polygons = find_polygons(mask, how, convention)
                points[how] += sum(len(p) for p in polygons)
                assert compute_iou(fill_polygons(polygons, (mask.shape[0], mask.shape[1]), convention), mask) >= 0.97
    assert points[tolerance] < 0.6 * points[0.0]


@pytest.fixture
def found() -> list[PredictedObject]:
    """An object with a hole, one of two parts, and a disc."""
    ring = np.zeros((40, 60), dtype=bool)
    ring[4:20, 5:25] = True
    ring[9:15, 10:20] = False
    parts = np.zeros_like(ring)
    parts[25:36, 3:15] = True
    parts[25:36, 20:31] = True
    y, x = np.mgrid[:40, :60]
    disc = (x - 45) ** 2 + (y - 20) ** 2 < 100
    return [PredictedObject(1, 0.9, ring), PredictedObject(2, 0.8, parts), PredictedObject(1, 0.7, disc)]


def test_coco_files_load_in_pycocotools(found: list[PredictedObject], tmp_path: Path) -> None:
    records = [to_record(f, 1.0) for f in found]
    file = tmp_path / "coco.json"
    file.write_text(json.dumps(to_coco([("a/b.jpg", (40, 60), records), ("c.jpg", (9, 9), [])], CLASSES)))
    coco = COCO(str(file))
    assert coco.loadCats(coco.getCatIds()) == [
        {"id": 1, "name": "dog & co", "supercategory": ""},
        {"id": 2, "name": "cat", "supercategory": ""},
    ]
    assert [image["file_name"] for image in coco.loadImgs(coco.getImgIds())] == ["a/b.jpg", "c.jpg"]
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=1))
    assert [a["category_id"] for a in annotations] == [1, 2, 1]
    assert [len(a["segmentation"]) for a in annotations] == [1, 2, 1]
    assert coco.getAnnIds(imgIds=2) == []
    for annotation, original in zip(annotations, found, strict=True):
        mask = coco.annToMask(annotation).astype(bool)
        assert compute_iou(mask, original.mask) > 0.95
        assert annotation["area"] == original.mask.sum()
        rows, columns = np.nonzero(original.mask)
        left, top, width, height = annotation["bbox"]
        assert (left, top) == (columns.min(), rows.min())
        assert (left + width - 1, top + height - 1) == (columns.max(), rows.max())
        assert annotation["iscrowd"] == 0


def test_labelme_files_have_its_keys_and_rasterise_to_the_masks(found: list[PredictedObject]) -> None:
    records = [to_record(f, 1.0) for f in found]
    file = json.loads(json.dumps(to_labelme("../images/a.jpg", (40, 60), records, CLASSES)))
    assert set(file) == {"version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth"}
    assert (file["imagePath"], file["imageData"]) == ("../images/a.jpg", None)
    assert (file["imageHeight"], file["imageWidth"]) == (40, 60)
    for shape in file["shapes"]:
        assert set(shape) == {"label", "points", "group_id", "description", "shape_type", "flags", "mask"}
        assert shape["shape_type"] == "polygon"
        assert len(shape["points"]) >= 3
        assert all(0 <= x <= 59 and 0 <= y <= 39 for x, y in shape["points"])
    assert [s["label"] for s in file["shapes"]] == ["dog & co", "cat", "cat", "dog & co"]
    assert [s["group_id"] for s in file["shapes"]] == [None, 2, 2, None]
    for original, shapes in ((found[0], file["shapes"][:1]), (found[1], file["shapes"][1:3])):
        canvas = Image.new("L", (60, 40))
        for shape in shapes:
            ImageDraw.Draw(canvas).polygon([tuple(point) for point in shape["points"]], fill=1, outline=1)
        assert compute_iou(np.asarray(canvas) > 0, original.mask) > 0.95


def test_to_label_studio_tasks_are_in_percent_and_fit_their_configuration(found: list[PredictedObject]) -> None:
    records = [to_record(f, 1.0) for f in found]
    url = to_url("/data/local-files/?d=", "my images/a#1.jpg")
    task = json.loads(json.dumps(to_label_studio_task(url, (40, 60), records, CLASSES)))
    assert task["data"] == {"image": "/data/local-files/?d=my%20images/a%231.jpg"}
    (prediction,) = task["predictions"]
    assert prediction["model_version"] == "moduseg"
    assert prediction["score"] == pytest.approx(0.8)
    config = ElementTree.fromstring(to_label_studio_config(CLASSES))
    image, labels = config.find("Image"), config.find("PolygonLabels")
    assert image is not None
    assert labels is not None
    assert image.get("value") == "$image"
    names = [label.get("value") for label in labels]
    assert names == ["dog & co", "cat"]
    assert [label.get("background") for label in labels] == ["#800000", "#008000"]
    results: list[dict[str, Any]] = prediction["result"]
    assert len({r["id"] for r in results}) == len(results) == 4
    for result in results:
        assert (result["type"], result["image_rotation"]) == ("polygonlabels", 0)
        assert (result["from_name"], result["to_name"]) == (labels.get("name"), image.get("name"))
        assert labels.get("toName") == image.get("name")
        assert (result["original_width"], result["original_height"]) == (60, 40)
        value = result["value"]
        assert value["closed"] is True
        assert value["polygonlabels"][0] in names
        assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in value["points"])
    ring = Outline(np.array(results[0]["value"]["points"]) / 100 * [60, 40])
    y, x = np.mgrid[:40, :60] + 0.5
    inside = ring.contains_points(np.stack([x.ravel(), y.ravel()], 1)).reshape(40, 60)
    assert compute_iou(inside, found[0].mask) > 0.95


def prediction_of(masks: np.ndarray, labels: list[int], scores: list[float]) -> Prediction:
    stack = torch.from_numpy(masks)
    voted, means = torch.tensor(labels, dtype=torch.int64), torch.tensor(scores)
    label_map, kept = assemble(stack, voted, means, 0.4)
    empty = torch.zeros(len(labels), 1)
    rows = empty.long()
    return Prediction(label_map.numpy(), Proposals(stack), voted, means, kept, rows, rows, empty)


@pytest.mark.parametrize("components", [False, True])
def test_objects_make_up_the_label_map(rng: np.random.Generator, components: bool) -> None:
    for _ in range(20):
        masks = np.zeros((6, 12, 14), dtype=bool)
        for mask in masks:
            top, left = rng.integers(0, 9), rng.integers(0, 11)
            mask[top : top + rng.integers(2, 6), left : left + rng.integers(2, 6)] = True
        prediction = prediction_of(masks, rng.integers(0, 3, 6).tolist(), rng.random(6).tolist())
        label_map, objects = split_objects(prediction, components=components)
        assert np.array_equal(label_map, prediction.label_map)
        painted = np.zeros_like(label_map)
        for found in objects:
            assert not painted[found.mask].any()
            painted[found.mask] = found.label
        assert np.array_equal(painted, label_map)


def test_what_scores_too_little_is_unknown() -> None:
    masks = np.zeros((4, 8, 8), dtype=bool)
    masks[0, :4, :4] = True  # known, class 1
    masks[1, 2:6, 2:6] = True  # too little: unknown where nothing known lies
    masks[2, 4:, :3] = True  # known background blocks the unknown
    masks[3, 7, 7] = True  # unknown background
    prediction = prediction_of(masks, [1, 2, 0, 0], [0.9, 0.3, 0.8, 0.1])
    label_map, objects = split_objects(prediction, 0.5)
    expected = np.zeros((8, 8), dtype=np.uint8)
    expected[2:6, 2:6] = 255
    expected[7, 7] = 255
    expected[4:, :3] = 0
    expected[:4, :4] = 1
    assert np.array_equal(label_map, expected)
    assert [(f.label, f.score) for f in objects] == [(1, pytest.approx(0.9))]
    assert np.array_equal(objects[0].mask, masks[0])
    everything, _ = split_objects(prediction, 0.95)
    assert set(np.unique(everything[masks.any(0)])) == {255}
    assert 255 not in split_objects(prediction)[0]


def test_objects_follow_a_tidied_label_map() -> None:
    """Closed holes belong to the nearest object of their class, and removed specks to none."""
    masks = np.zeros((3, 9, 12), dtype=bool)
    masks[0, 1:6, 1:5] = masks[1, 1:6, 7:11] = masks[2, 8, 0] = True
    masks[0, 3, 3] = masks[1, 2, 8] = False
    prediction = prediction_of(masks, [1, 1, 2], [0.9, 0.8, 0.7])
    tidied = replace(prediction, label_map=tidy_label_map(prediction.label_map, min_object_area=5, max_hole_area=1))
    label_map, objects = split_objects(tidied)
    assert np.array_equal(label_map, tidied.label_map)
    assert [(o.label, int(o.mask.sum()), o.score) for o in objects] == [
        (1, 20, pytest.approx(0.9)),
        (1, 20, pytest.approx(0.8)),
    ]
    assert objects[0].mask[3, 3]
    assert objects[1].mask[2, 8]
    settings = RetrievalConfig(min_object_area=5, max_hole_area=1)
    assert np.array_equal(split_objects(prediction, 0.0, settings=settings)[0], label_map)


def test_objects_of_a_vote_are_those_of_its_label_map(rng: np.random.Generator) -> None:
    """Where all proposals vote, the label map is not what painting by score gives; objects follow the map."""
    settings = RetrievalConfig(selection="majority")
    is_other = False
    for _ in range(20):
        masks = rng.random((9, 6, 7)) < 0.5
        painted = prediction_of(masks, rng.integers(0, 3, 9).tolist(), rng.random(9).tolist())
        voted = assemble_majority(painted.proposals.masks, painted.labels, painted.scores).numpy()
        prediction = replace(painted, label_map=voted, kept=painted.scores.argsort(descending=True))
        is_other |= not np.array_equal(voted, painted.label_map)
        for components in (False, True):
            label_map, objects = split_objects(prediction, components=components)
            assert np.array_equal(label_map, voted)
            together = np.zeros_like(voted)
            for found in objects:
                together[found.mask] = found.label
            assert np.array_equal(together, voted)
        certain = (painted.scores >= 0.5).nonzero()[:, 0]
        expected = assemble_majority(painted.proposals.masks[certain], painted.labels[certain], painted.scores[certain])
        label_map, _ = split_objects(prediction, 0.5, settings=settings)
        assert np.array_equal(label_map[label_map < 255], expected.numpy()[label_map < 255])
        covered = painted.proposals.masks[certain].any(0).numpy()
        assert np.array_equal(label_map == 255, masks.any(0) & ~covered)
    assert is_other


@pytest.mark.parametrize("selection", ["nms", "majority", "shares"])
def test_disjoint_proposals_have_one_vote_under_every_rule(selection: Literal["nms", "majority", "shares"]) -> None:
    """Two neighbours of different classes: the vote takes the nearer one, a divided vote the smaller label."""
    vectors, labels = torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.tensor([2, 1])
    settings = RetrievalConfig(min_area=0, top_k=2, selection=selection)
    retriever = Retriever(SearchBank(vectors, labels, torch.arange(2)), settings)
    proposals = Proposals.of_id_map(torch.tensor([[0, 0], [1, -1]]), 2)
    prediction = retriever.predict(proposals, vectors[[0, 0]])
    assert prediction.label_map.tolist() == [[2, 2], [2, 0]]
    assert np.array_equal(split_objects(prediction, 0.0, settings=settings)[0], prediction.label_map)


def test_background_that_is_certain_is_known_under_every_rule() -> None:
    masks = np.zeros((2, 4, 4), dtype=bool)
    masks[0, :, :2] = masks[1, :2] = True
    prediction = replace(prediction_of(masks, [0, 1], [0.9, 0.3]), kept=torch.tensor([1]))
    label_map, _ = split_objects(prediction, 0.5, settings=RetrievalConfig(selection="margin"))
    assert (label_map == 255).tolist() == [[False, False, True, True]] * 2 + [[False] * 4] * 2


def test_a_picture_without_proposals_has_no_objects() -> None:
    prediction = prediction_of(np.zeros((0, 5, 6), dtype=bool), [], [])
    for components in (False, True):
        label_map, objects = split_objects(prediction, 0.5, components)
        assert (label_map.shape, label_map.any(), objects) == ((5, 6), False, [])


@pytest.mark.parametrize(("score", "expected"), [(-0.25, 0.0), (0.5, 0.5), (1.000001, 1.0)])
def test_label_studio_gets_scores_in_its_range(score: float, expected: float) -> None:
    record = to_record(PredictedObject(1, score, MASKS["block"]), 0.0)
    assert to_label_studio_task("a.png", (5, 6), [record], CLASSES)["predictions"][0]["score"] == expected


@pytest.mark.parametrize(("height", "width"), [(1, 2), (1, 1), (5, 1), (2, 2), (3, 4)])
def test_no_shape_without_area_is_written(height: int, width: int) -> None:
    mask = np.zeros((12, 12), bool)
    mask[3 : 3 + height, 4 : 4 + width] = True
    record = to_record(PredictedObject(1, 0.5, mask), 1.0)
    shapes = to_labelme("a.png", (12, 12), [record], ("background", "dog"))["shapes"]
    (shape,) = shapes
    assert cv2.contourArea(np.array(shape["points"], dtype=np.float32)) > 0
    assert np.array_equal(fill_polygons([np.array(shape["points"])], (12, 12), "centres"), mask)
    assert len(to_coco([("a.png", (12, 12), [record])], ("background", "dog"))["annotations"]) == 1
