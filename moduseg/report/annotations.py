"""Predicted objects in the formats that annotation tools import: COCO, LabelMe, Label Studio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np

from moduseg.masks.palette import voc_palette
from moduseg.masks.polygons import Convention, mask_polygons
from moduseg.structures import IGNORE_INDEX, Prediction

LABELME_VERSION = "5.5.0"
"""The version of the format, which LabelMe compares with its own."""
FROM_NAME, TO_NAME = "label", "image"
"""Names of the tags of a Label Studio configuration that results refer to."""


@dataclass(frozen=True)
class FoundObject:
    """One object of a picture.

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
) -> tuple[np.ndarray, list[FoundObject]]:
    """The label map with what is unknown, and the objects in it.

    A proposal whose score is below `min_score` is unknown, whatever its label: where no proposal that is known covers
    them, its pixels become 255.

    Args:
        prediction: of one image.
        min_score: `None` for no such limit.
        components: whether an object is a connected region of one class, in place of what is visible of one proposal.

    Returns:
        `[H, W]` uint8 with ids 0..C and 255, and the objects: by proposal in descending score, or by class.
    """
    masks = prediction.proposals.masks.cpu().numpy()
    labels, scores = prediction.labels.cpu().numpy(), prediction.scores.cpu().numpy()
    order = prediction.kept.cpu().tolist()
    known = [i for i in order if min_score is None or scores[i] >= min_score]
    owner = np.full(prediction.label_map.shape, -1, dtype=np.int64)
    for i in reversed(known):
        if labels[i] > 0:
            owner[masks[i]] = i
    label_map = np.where(owner >= 0, labels[owner], 0).astype(np.uint8) if len(labels) else prediction.label_map.copy()
    unknown = [i for i in range(len(labels)) if min_score is not None and scores[i] < min_score]
    if unknown:
        covered = masks[known].any(0) if known else np.zeros(owner.shape, dtype=bool)
        label_map[masks[unknown].any(0) & ~covered] = IGNORE_INDEX
    if components:
        score_map = np.where(owner >= 0, scores[owner], 0.0) if len(scores) else np.zeros(owner.shape)
        return label_map, _components(label_map, score_map)
    visible = [(i, owner == i) for i in known if labels[i] > 0]
    return label_map, [FoundObject(int(labels[i]), float(scores[i]), mask) for i, mask in visible if mask.any()]


def object_record(found: FoundObject, tolerance: float) -> dict[str, Any]:
    """What the formats below are made of, JSON values: label, score, pixels, `[x, y, w, h]` and polygons.

    Args:
        found: an object.
        tolerance: see `moduseg.masks.polygons.mask_polygons`.
    """
    left, top, width, height = cv2.boundingRect(np.ascontiguousarray(found.mask).view(np.uint8))
    conventions: tuple[Convention, ...] = ("edges", "centres")
    polygons: dict[str, Any] = {
        c: [np.round(p, 2).tolist() for p in mask_polygons(found.mask, tolerance, c)] for c in conventions
    }
    return {
        "label": found.label,
        "score": round(found.score, 6),
        "area": int(found.mask.sum()),
        "bbox": [left, top, width, height],
        **polygons,
    }


def coco_annotations(
    images: Sequence[tuple[str, tuple[int, int], Sequence[Mapping[str, Any]]]], classes: Sequence[str]
) -> dict[str, Any]:
    """An instances file of COCO.

    Args:
        images: file name, `(H, W)` and object records of each image.
        classes: names by id, background first, which becomes no category.

    Returns:
        `info`, `licenses`, `images`, `annotations` (`segmentation` is a list of polygons; a `score` beside them, as
        results have it), `categories`. Ids count from 1; a category has its class id.
    """
    annotations: list[dict[str, Any]] = []
    for image_id, (_, _, objects) in enumerate(images, start=1):
        for found in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": found["label"],
                    "segmentation": [[v for point in ring for v in point] for ring in found["edges"]],
                    "area": found["area"],
                    "bbox": found["bbox"],
                    "iscrowd": 0,
                    "score": found["score"],
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


def labelme_annotations(
    image_path: str, size: tuple[int, int], objects: Sequence[Mapping[str, Any]], classes: Sequence[str]
) -> dict[str, Any]:
    """LabelMe's file of one image. Polygons of one object share a `group_id`.

    Args:
        image_path: the picture, relative to the folder that the file will be in.
        size: `(H, W)`.
        objects: records of its objects.
        classes: names by id.
    """
    shapes = [
        {
            "label": classes[found["label"]],
            "points": ring,
            "group_id": number if len(found["centres"]) > 1 else None,
            "description": f"score {found['score']:.3f}",
            "shape_type": "polygon",
            "flags": {},
            "mask": None,
        }
        for number, found in enumerate(objects, start=1)
        for ring in found["centres"]
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


def label_studio_task(
    url: str, size: tuple[int, int], objects: Sequence[Mapping[str, Any]], classes: Sequence[str]
) -> dict[str, Any]:
    """A task of Label Studio with predictions, for `label_studio_config`; coordinates are percent of width and height.

    Args:
        url: where Label Studio finds the picture.
        size: `(H, W)`.
        objects: records of its objects.
        classes: names by id.
    """
    results = []
    for number, found in enumerate(objects, start=1):
        for part, ring in enumerate(found["edges"], start=1):
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
                    "score": found["score"],
                    "value": {"points": points, "closed": True, "polygonlabels": [classes[found["label"]]]},
                }
            )
    scores = [found["score"] for found in objects]
    prediction = {"model_version": "moduseg", "score": sum(scores) / len(scores) if scores else 0.0, "result": results}
    return {"data": {TO_NAME: url}, "predictions": [prediction]}


def label_studio_config(classes: Sequence[str]) -> str:
    """The labelling configuration (XML) that the tasks refer to, in the colours of the label maps."""
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


def file_url(prefix: str, name: str) -> str:
    """The address of a picture, its name quoted but for slashes."""
    return prefix + quote(name)


def _components(label_map: np.ndarray, score_map: np.ndarray) -> list[FoundObject]:
    found = []
    for label in (int(v) for v in np.unique(label_map) if v not in (0, IGNORE_INDEX)):
        count, numbers = cv2.connectedComponents((label_map == label).astype(np.uint8), connectivity=8)
        for number in range(1, count):
            mask = numbers == number
            found.append(FoundObject(label, float(score_map[mask].mean()), mask))
    return found
