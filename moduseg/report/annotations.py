"""Convert predicted objects to the formats that annotation tools import: COCO, LabelMe, Label Studio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np

from moduseg.masks.palette import voc_palette
from moduseg.masks.polygons import Convention, find_polygons
from moduseg.structures import IGNORE_INDEX, Prediction

LABELME_VERSION = "5.5.0"
"""Version of the format; LabelMe warns when its own differs."""
FROM_NAME, TO_NAME = "label", "image"
"""Tag names in a Label Studio configuration, to which its tasks refer."""


@dataclass(frozen=True)
class PredictedObject:
    """One predicted object of an image.

    Attributes:
        label: class id, 1..C.
        score: mean cosine similarity to the neighbours that voted for it.
        mask: `[H, W]` bool, its visible pixels.
    """

    label: int
    score: float
    mask: np.ndarray


def split_objects(
    prediction: Prediction, min_score: float | None = None, components: bool = False
) -> tuple[np.ndarray, list[PredictedObject]]:
    """Split a prediction into objects, and mark pixels of low score as unknown.

    Proposals whose score is below `min_score` are uncertain, whatever their label. Their pixels become 255 unless a
    certain proposal covers them too.

    Args:
        prediction: of one image.
        min_score: `None` for no limit.
        components: whether an object is a connected region of one class; else it is the visible part of one proposal.

    Returns:
        The label map, `[H, W]` uint8 with ids 0..C and 255, and the objects: by proposal in descending score, or by
        class and then from top to bottom.
    """
    masks = prediction.proposals.masks.cpu().numpy()
    labels, scores = prediction.labels.cpu().numpy(), prediction.scores.cpu().numpy()
    order = prediction.kept.cpu().tolist()
    certain = [i for i in order if min_score is None or scores[i] >= min_score]
    # Paint low scores first, so that high scores stay on top.
    owner = np.full(prediction.label_map.shape, -1, dtype=np.int64)
    for i in reversed(certain):
        if labels[i] > 0:
            owner[masks[i]] = i
    label_map = np.where(owner >= 0, labels[owner], 0).astype(np.uint8) if len(labels) else prediction.label_map.copy()
    uncertain = [i for i in range(len(labels)) if min_score is not None and scores[i] < min_score]
    if uncertain:
        covered = masks[certain].any(0) if certain else np.zeros(owner.shape, dtype=bool)
        label_map[masks[uncertain].any(0) & ~covered] = IGNORE_INDEX
    if components:
        score_map = np.where(owner >= 0, scores[owner], 0.0) if len(scores) else np.zeros(owner.shape)
        return label_map, _find_components(label_map, score_map)
    visible = [(i, owner == i) for i in certain if labels[i] > 0]
    return label_map, [PredictedObject(int(labels[i]), float(scores[i]), mask) for i, mask in visible if mask.any()]


def to_record(predicted: PredictedObject, tolerance: float) -> dict[str, Any]:
    """Return an object as JSON values, from which the formats below are made.

    Args:
        predicted: an object.
        tolerance: of its polygons, as in `moduseg.masks.polygons.find_polygons`.

    Returns:
        `label`, `score`, `area` (pixels), `bbox` (`[x, y, w, h]`), and its polygons along pixel `edges` and `centres`.
    """
    left, top, width, height = cv2.boundingRect(np.ascontiguousarray(predicted.mask).view(np.uint8))
    conventions: tuple[Convention, ...] = ("edges", "centres")
    polygons: dict[str, Any] = {
        convention: [np.round(ring, 2).tolist() for ring in find_polygons(predicted.mask, tolerance, convention)]
        for convention in conventions
    }
    return {
        "label": predicted.label,
        "score": round(predicted.score, 6),
        "area": int(predicted.mask.sum()),
        "bbox": [left, top, width, height],
        **polygons,
    }


def to_coco(
    images: Sequence[tuple[str, tuple[int, int], Sequence[Mapping[str, Any]]]], classes: Sequence[str]
) -> dict[str, Any]:
    """Return an instances file of COCO.

    Args:
        images: file name, `(H, W)` and object records of each image.
        classes: names by id; the background, first, is no category.

    Returns:
        `info`, `licenses`, `images`, `annotations` (`segmentation` is a list of polygons; `score` as in COCO's
        results), `categories`. Ids count from 1; the id of a category is its class id.
    """
    annotations: list[dict[str, Any]] = []
    for image_id, (_, _, objects) in enumerate(images, start=1):
        for record in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": record["label"],
                    "segmentation": [[v for point in ring for v in point] for ring in record["edges"]],
                    "area": record["area"],
                    "bbox": record["bbox"],
                    "iscrowd": 0,
                    "score": record["score"],
                }
            )
    return {
        "info": {"description": "predicted by moduseg", "version": "1.0"},
        "licenses": [],
        "images": [
            {"id": image_id, "file_name": name, "height": size[0], "width": size[1]}
            for image_id, (name, size, _) in enumerate(images, start=1)
        ],
        "annotations": annotations,
        "categories": [
            {"id": label, "name": name, "supercategory": ""} for label, name in enumerate(classes) if label > 0
        ],
    }


def to_labelme(
    image_path: str, size: tuple[int, int], objects: Sequence[Mapping[str, Any]], classes: Sequence[str]
) -> dict[str, Any]:
    """Return LabelMe's file of one image; polygons of one object share a `group_id`.

    Args:
        image_path: the picture, relative to the folder that the file will be in.
        size: `(H, W)`.
        objects: records of its objects.
        classes: names by id.
    """
    shapes = [
        {
            "label": classes[record["label"]],
            "points": ring,
            "group_id": number if len(record["centres"]) > 1 else None,
            "description": f"score {record['score']:.3f}",
            "shape_type": "polygon",
            "flags": {},
            "mask": None,
        }
        for number, record in enumerate(objects, start=1)
        for ring in record["centres"]
    ]
    return {
        "version": LABELME_VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": image_path,
        "imageData": None,
        "imageHeight": size[0],
        "imageWidth": size[1],
    }


def to_label_studio_task(
    url: str, size: tuple[int, int], objects: Sequence[Mapping[str, Any]], classes: Sequence[str]
) -> dict[str, Any]:
    """Return a task of Label Studio with predictions; coordinates are percent of width and height.

    Args:
        url: where Label Studio finds the picture.
        size: `(H, W)`.
        objects: records of its objects.
        classes: names by id.
    """
    results = []
    for number, record in enumerate(objects, start=1):
        for part, ring in enumerate(record["edges"], start=1):
            points = [[round(100 * x / size[1], 5), round(100 * y / size[0], 5)] for x, y in ring]
            results.append(
                {
                    "id": f"o{number}-{part}",
                    "type": "polygonlabels",
                    "from_name": FROM_NAME,
                    "to_name": TO_NAME,
                    "original_width": size[1],
                    "original_height": size[0],
                    "image_rotation": 0,
                    "score": record["score"],
                    "value": {"points": points, "closed": True, "polygonlabels": [classes[record["label"]]]},
                }
            )
    scores = [record["score"] for record in objects]
    # Label Studio refuses scores outside 0..1, and a cosine may be negative.
    score = min(max(sum(scores) / len(scores), 0.0), 1.0) if scores else 0.0
    prediction = {"model_version": "moduseg", "score": score, "result": results}
    return {"data": {TO_NAME: url}, "predictions": [prediction]}


def to_label_studio_config(classes: Sequence[str]) -> str:
    """Return the labelling configuration (XML) that the tasks refer to, in the colours of the label maps."""
    palette = voc_palette()
    labels = "\n".join(
        f'    <Label value={quoteattr(name)} background="#{bytes(palette[label]).hex()}"/>'
        for label, name in enumerate(classes)
        if label > 0
    )
    return (
        f'<View>\n  <Image name="{TO_NAME}" value="${TO_NAME}" zoom="true"/>\n'
        f'  <PolygonLabels name="{FROM_NAME}" toName="{TO_NAME}">\n{labels}\n  </PolygonLabels>\n</View>\n'
    )


def to_url(prefix: str, name: str) -> str:
    """Return the address of a picture, its name quoted except for slashes."""
    return prefix + quote(name)


def _find_components(label_map: np.ndarray, score_map: np.ndarray) -> list[PredictedObject]:
    components = []
    for label in (int(v) for v in np.unique(label_map) if v not in (0, IGNORE_INDEX)):
        count, numbers = cv2.connectedComponents((label_map == label).astype(np.uint8), connectivity=8)
        for number in range(1, count):
            mask = numbers == number
            components.append(PredictedObject(label, float(score_map[mask].mean()), mask))
    return components
