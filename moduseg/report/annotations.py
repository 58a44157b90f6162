"""Convert predicted objects to the formats that annotation tools import: COCO, LabelMe, Label Studio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import cv2
import numpy as np
import torch

from moduseg.config import RetrievalConfig
from moduseg.masks.palette import format_colour, voc_palette
from moduseg.masks.polygons import Convention, find_polygons
from moduseg.masks.tidy import tidy_label_map
from moduseg.retrieval.majority import assemble_majority
from moduseg.retrieval.rasterize import rasterize
from moduseg.retrieval.shares import assemble_shares, divide_votes
from moduseg.retrieval.trust import paint_named
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
    prediction: Prediction,
    min_score: float | None = None,
    components: bool = False,
    *,
    settings: RetrievalConfig | None = None,
) -> tuple[np.ndarray, list[PredictedObject]]:
    """Split a prediction into objects, and mark pixels of low score as unknown.

    Proposals whose score is below `min_score` are uncertain, whatever their label. Their pixels become 255 unless a
    certain proposal covers them too.

    Args:
        prediction: of one image.
        min_score: `None` for no limit.
        components: whether an object is a connected region of one class; else it is the visible part of one proposal.
        settings: that the prediction was made with, needed with `min_score`; the defaults if omitted.

    Returns:
        The label map, `[H, W]` uint8 with ids 0..C and 255, and the objects: by proposal in descending score, or by
        class and then from top to bottom.
    """
    scores = prediction.scores.numpy()
    is_certain = np.full(len(scores), True) if min_score is None else scores >= min_score
    label_map = prediction.label_map.copy()
    if min_score is not None:
        label_map = _label_certain(prediction, is_certain, settings or RetrievalConfig())
    order = [i for i in prediction.kept.tolist() if is_certain[i] and prediction.labels[i] > 0]
    owner = _find_owners(prediction, order, label_map)
    if components:
        score_map = np.where(owner >= 0, scores[owner], 0.0) if len(scores) else np.zeros(owner.shape)
        return label_map, _find_components(label_map, score_map)
    visible = [(i, owner == i) for i in order]
    labels = prediction.labels.tolist()
    return label_map, [PredictedObject(labels[i], float(scores[i]), mask) for i, mask in visible if mask.any()]


def _label_certain(prediction: Prediction, is_certain: np.ndarray, settings: RetrievalConfig) -> np.ndarray:
    """Return the label map of the certain proposals alone, with 255 where only uncertain ones are.

    Args:
        prediction: of one image.
        is_certain: `[N]` bool.
        settings: how masks are chosen, and the label map is tidied.
    """
    masks, labels = prediction.proposals.masks.cpu(), prediction.labels
    kept = prediction.kept[torch.from_numpy(is_certain)[prediction.kept]]
    # Each pixel of disjoint proposals has one vote, and their kept order says which.
    voting = settings.selection if prediction.proposals.id_map is None else "none"
    if voting == "majority":
        painted = assemble_majority(masks[kept], labels[kept], prediction.scores[kept])
    elif voting == "shares":
        areas = prediction.proposals.areas.cpu()
        neighbours = prediction.neighbour_labels, prediction.similarities
        votes = divide_votes(areas, *neighbours, settings.vote_temperature)
        painted = assemble_shares(masks[kept], votes.select(kept))
    else:
        # Ranks in place of scores, since masks are not always kept in the order of their scores.
        painted = rasterize(masks[kept], labels[kept], torch.arange(len(kept), 0, -1).float())
    covering = kept
    if settings.selection in ("margin", "similarity", "learnt"):
        # These keep no background, and it is known all the same.
        is_background = torch.from_numpy(is_certain) & (labels == 0)
        covering = torch.cat((kept, is_background.nonzero()[:, 0]))
    is_unknown = masks[torch.from_numpy(~is_certain)].any(0) & ~masks[covering].any(0)
    painted[is_unknown] = IGNORE_INDEX
    tidied = tidy_label_map(painted.numpy(), **settings.tidying)
    if prediction.is_named is None:
        return tidied
    is_named = prediction.is_named & torch.from_numpy(is_certain)
    return paint_named(tidied, prediction.proposals, labels, is_named)


def _find_owners(prediction: Prediction, order: Sequence[int], label_map: np.ndarray) -> np.ndarray:
    """Return the proposal of each object's pixel, `[H, W]` int64, -1 for pixels without an object.

    Args:
        prediction: of one image.
        order: foreground proposals, best first: a pixel is the first one's that covers it and has its label.
        label_map: `[H, W]` uint8. A pixel that no proposal of its label covers, as tidying leaves them, is that of the
            nearest pixel of its class.
    """
    masks, labels = prediction.proposals.masks.cpu().numpy(), prediction.labels.tolist()
    owner = np.full(label_map.shape, -1, dtype=np.int64)
    for label in {labels[i] for i in order}:
        is_label = label_map == label
        covering = np.full(label_map.shape, -1, dtype=np.int64)
        for i in reversed(order):
            if labels[i] == label:
                covering[masks[i]] = i
        if (is_label & (covering < 0)).any() and (covering >= 0).any():
            # The transform numbers the pixels of distance 0; a table leads from there to their proposals.
            outside = (covering < 0).astype(np.uint8)
            kind = cv2.DIST_LABEL_PIXEL
            _, nearest = cv2.distanceTransformWithLabels(outside, cv2.DIST_L2, cv2.DIST_MASK_5, labelType=kind)
            proposal_of = np.zeros(int(nearest.max()) + 1, dtype=np.int64)
            proposal_of[nearest[outside == 0]] = covering[outside == 0]
            covering = proposal_of[nearest]
        owner[is_label] = covering[is_label]
    return owner


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


def to_label_studio_config(classes: Sequence[str], colours: np.ndarray | None = None) -> str:
    """Return the labelling configuration (XML) that the tasks refer to.

    Args:
        classes: names by id, background first.
        colours: `[256, 3]` uint8 of the classes, row = label id; VOC's palette if omitted.
    """
    palette = voc_palette() if colours is None else colours
    labels = "\n".join(
        f'    <Label value={quoteattr(name)} background="{format_colour(palette[label])}"/>'
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
