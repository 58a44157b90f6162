"""Proposals on disk: one JSON an image, in the annotation format of SA-1B.

    {"image": {"image_id": str, "width": W, "height": H, "file_name": str},
     "annotations": [{"id": int, "segmentation": {"size": [H, W], "counts": str}, "area": int, "bbox": [x, y, w, h],
                      "predicted_iou": float, "stability_score": float, "parent": int or null}, ...]}

`parent` is written only where the proposer knows of a tree of masks: the position in `annotations`, from 0, of the
smallest mask of the same tree that contains this one, null for a root.

Files from elsewhere may omit the scores, may be the bare list of annotations that the SAM tools write, and may
hold uncompressed run lengths, polygons or a matrix of 0 and 1. They are not trusted: `moduseg.masks.rle` decodes and
checks the run lengths, because the decoder of pycocotools believes whatever the string says, beyond the end of its
buffers. A mask that contradicts the `area` its annotation states is refused.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moduseg.errors import DataError
from moduseg.masks import encoded as encoding
from moduseg.masks.bits import PackedMasks
from moduseg.masks.encoded import EncodedProposals, WaitingProposals
from moduseg.masks.rle import encode_masks, encode_polygons, read_runs
from moduseg.structures import Proposals, check_parents

MAX_PIXELS = 100_000_000
"""Largest image, in pixels, whose masks are read if the caller does not know its size."""
MAX_MASK_PIXELS = 1 << 31
"""Most pixels in all the masks of one file together, a byte each in memory."""


def to_annotations(proposals: Proposals, image_id: str) -> dict[str, Any]:
    """Return the JSON object of one image's proposals.

    Args:
        proposals: masks `[N, H, W]` bool on any device; scores are written so that they read back exactly.
        image_id: id of the image, also written as `file_name`.
    """
    _, height, width = proposals.masks.shape
    packed = PackedMasks.of(proposals.masks.cpu())
    annotations = [
        {
            "id": index,
            "segmentation": {"size": [height, width], "counts": counts},
            "area": area,
            "bbox": [left, top, right - left, bottom - top] if area else [0.0] * 4,
            "predicted_iou": predicted_iou,
            "stability_score": stability_score,
        }
        for index, (counts, area, (top, bottom, left, right), predicted_iou, stability_score) in enumerate(
            zip(
                encode_masks(packed),
                packed.areas.tolist(),
                packed.boxes().astype(float).tolist(),
                _to_shortest(proposals.predicted_iou),
                _to_shortest(proposals.stability_score),
                strict=True,
            ),
            start=1,
        )
    ]
    if proposals.parents is not None:
        for annotation, parent in zip(annotations, proposals.parents.tolist(), strict=True):
            annotation["parent"] = parent if parent >= 0 else None
    image = {"image_id": image_id, "width": width, "height": height, "file_name": image_id}
    return {"image": image, "annotations": annotations}


def dump(data: dict[str, Any]) -> bytes:
    """Encode the object of `to_annotations` as bytes; equal objects give equal bytes.

    Raises:
        ValueError: a score is not finite.
    """
    return (json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n").encode()


def encode_proposals(proposals: Proposals, image_id: str) -> bytes:
    """Return one image's proposals as the bytes of their file; arguments as those of `to_annotations`.

    Raises:
        ValueError: a score is not finite.
    """
    return dump(to_annotations(proposals, image_id))


def read_proposals(path: Path, expected_size: tuple[int, int] | None = None) -> Proposals:
    """Return the proposals in a file; arguments and errors as those of `read_encoded`.

    Returns:
        Masks in the order of the file, empty ones included; scores are 1 if the file has none, and there are parents if
        an annotation has the field `parent`.
    """
    return read_encoded(path, expected_size).decode()


def read_encoded(path: Path, expected_size: tuple[int, int] | None = None) -> EncodedProposals:
    """Return the proposals in a file, checked but not decoded.

    Args:
        path: a JSON file in the SA-1B format, or a bare list of its annotations.
        expected_size: `(H, W)` of the image, or `None` to take the size that the file states.

    Raises:
        DataError: no such file, not JSON, or content that does not describe masks of the expected size.
    """
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); write its proposals again") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({_one_line(error)}); write its proposals again") from error
    return encode_annotations(data, expected_size, str(path))


def read_waiting(path: Path, expected_size: tuple[int, int]) -> WaitingProposals:
    """Return the proposals in a file for an image that waits for its turn: large ones are not decoded yet (`decode`).

    Arguments and errors as those of `read_encoded`.
    """
    encoded = read_encoded(path, expected_size)
    return encoded if encoded.num_pixels > encoding.MAX_WAITING_PIXELS else encoded.decode()


def from_annotations(data: Any, expected_size: tuple[int, int] | None, where: str) -> Proposals:
    """Make proposals on the CPU from an object in the SA-1B format; arguments and errors as of `encode_annotations`.

    Returns:
        Masks in the order of the file, empty ones included; scores are 1 if the file has none, and there are parents if
        an annotation has the field `parent`.
    """
    return encode_annotations(data, expected_size, where).decode()


def encode_annotations(data: Any, expected_size: tuple[int, int] | None, where: str) -> EncodedProposals:
    """Return the checked run lengths of an object in the SA-1B format, or of a bare list of its annotations.

    Args:
        data: the parsed JSON; nothing about it is assumed.
        expected_size: `(H, W)` of the image, or `None` to take the size that the file states.
        where: the file, for messages.

    Raises:
        DataError: anything missing, malformed or of another size; one line that names the file and the annotation.
    """
    image, annotations = _split(data, where)
    size = _check_image_size(image, annotations, expected_size, where)
    pixels = size[0] * size[1]
    if pixels * len(annotations) > MAX_MASK_PIXELS:
        raise DataError(
            f"{where}: {len(annotations)} masks of {size[0]} x {size[1]} pixels are more than the {MAX_MASK_PIXELS} "
            "pixels that fit in memory; keep fewer proposals or a smaller image"
        )
    runs, scores, stability = [], [], []
    for index, annotation in enumerate(annotations):
        at = f"{where}: annotation {index}"
        runs.append(_read_runs(annotation.get("segmentation"), size, at))
        _check_area(annotation, int(runs[-1][1::2].sum()), at)
        scores.append(_read_score(annotation, "predicted_iou", at))
        stability.append(_read_score(annotation, "stability_score", at))
    predicted_iou, stability_score = (torch.tensor(values, dtype=torch.float32) for values in (scores, stability))
    return EncodedProposals(runs, size, predicted_iou, stability_score, _read_parents(annotations, where))


def _split(data: Any, where: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the `image` object (empty if absent) and the annotations."""
    image: Any = {}
    annotations = data
    if isinstance(data, dict):
        image, annotations = data.get("image", {}), data.get("annotations")
    if not isinstance(image, dict):
        raise DataError(f"{where}: 'image' is {_kind(image)}, expected an object; write its proposals again")
    if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
        raise DataError(
            f"{where}: 'annotations' is {_kind(annotations)}, expected a list of objects in the SA-1B format; "
            "write its proposals again"
        )
    return image, annotations


def _check_image_size(
    image: dict[str, Any],
    annotations: list[dict[str, Any]],
    expected: tuple[int, int] | None,
    where: str,
) -> tuple[int, int]:
    """Return `(H, W)` as expected, else as the file states it, checked."""
    stated: Any = None
    if "height" in image or "width" in image:
        stated = [image.get("height"), image.get("width")]
    elif annotations and isinstance(annotations[0].get("segmentation"), dict):
        stated = annotations[0]["segmentation"].get("size")
    if stated is None and expected is not None:
        return expected
    if not _is_size(stated):
        raise DataError(
            f"{where}: the image size is {_short(stated)}, expected height and width as whole numbers from 1; "
            "write its proposals again"
        )
    if expected is not None and tuple(stated) != tuple(expected):
        raise DataError(
            f"{where}: masks are {stated[0]} x {stated[1]} (height x width), the image is {expected[0]} x "
            f"{expected[1]}; make the proposals from the same file as the image"
        )
    if expected is None and stated[0] * stated[1] > MAX_PIXELS:
        raise DataError(
            f"{where}: the image is {stated[0]} x {stated[1]}, expected {MAX_PIXELS} pixels at most; "
            "make proposals from a smaller image"
        )
    return stated[0], stated[1]


def _read_runs(segmentation: Any, size: tuple[int, int], at: str) -> np.ndarray:
    """Return the run lengths of one mask, `[R]` int64, which sum to the pixels of the image."""
    if isinstance(segmentation, list) and segmentation and _is_matrix(segmentation, size):
        return _read_matrix(segmentation, at)
    if isinstance(segmentation, list):
        return _read_polygons(segmentation, size, at)
    if not isinstance(segmentation, dict) or "counts" not in segmentation:
        raise DataError(
            f"{at}: 'segmentation' is {_kind(segmentation)}, expected an object with 'size' and 'counts'; "
            "write the proposals again"
        )
    stated: Any = segmentation.get("size")
    counts = segmentation["counts"]
    if not _is_size(stated) or tuple(stated) != size:
        raise DataError(
            f"{at}: the mask is {_short(stated)}, the image {list(size)} (height, width); "
            "make the proposals from the same file as the image"
        )
    pixels = size[0] * size[1]
    try:
        runs = read_runs(counts.decode("latin-1") if isinstance(counts, bytes) else counts, pixels)
    except ValueError as error:
        raise DataError(f"{at}: broken run-length encoding, it has {error}; write the proposals again") from error
    return runs


def _is_matrix(segmentation: list[Any], size: tuple[int, int]) -> bool:
    """Return whether a mask is given as rows of 0 and 1, as `SamAutomaticMaskGenerator` holds them, not as polygons."""
    rows = [row for row in segmentation if isinstance(row, list)]
    has_shape = len(rows) == len(segmentation) == size[0] and all(len(row) == size[1] for row in rows)
    return has_shape and all(value in (0, 1) for row in rows for value in row if isinstance(value, int | float))


def _read_matrix(rows: list[list[Any]], at: str) -> np.ndarray:
    """Return the run lengths of one mask given as rows of 0 and 1."""
    if not all(isinstance(value, int) for row in rows for value in row):
        raise DataError(f"{at}: 'segmentation' holds other values than 0 and 1; write the proposals again")
    values = np.asarray(rows, dtype=np.uint8).T.ravel()
    ends = np.flatnonzero(values[1:] != values[:-1]) + 1
    runs = np.diff(ends, prepend=0, append=len(values))
    # The first run is of zeros, even if there is none.
    return np.concatenate([np.zeros(int(values[0]), np.int64), runs]).astype(np.int64)


def _check_area(annotation: dict[str, Any], area: int, at: str) -> None:
    """Refuse a mask that has another number of pixels than its annotation says.

    Polygons are drawn in slightly different ways, so a tenth of the area, or a few pixels, may be missing.
    """
    stated: Any = annotation.get("area")
    is_outline = isinstance(annotation.get("segmentation"), list)
    if not _is_number(stated) or stated == area:
        return
    if is_outline and abs(stated - area) <= max(0.1 * area, 32):
        return
    raise DataError(f"{at}: the mask has {area} pixels, 'area' says {_short(stated)}; write the proposals again")


def _read_polygons(polygons: list[Any], size: tuple[int, int], at: str) -> np.ndarray:
    """Return the run lengths of one mask given as polygons."""
    try:
        return encode_polygons(polygons, size)
    except ValueError as error:
        raise DataError(f"{at}: {error}; write the proposals again") from error


def _read_score(annotation: dict[str, Any], key: str, at: str) -> float:
    value = annotation.get(key, 1.0)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not _is_number(value) or abs(value) > 1e6:
        raise DataError(f"{at}: {key!r} is {_short(value)}, expected a number; remove it or write the proposals again")
    return float(value)


def _read_parents(annotations: list[dict[str, Any]], where: str) -> torch.Tensor | None:
    """Return the parent of each annotation, `[N]` int64 with -1 for a root; `None` if no annotation has the field."""
    if not any("parent" in annotation for annotation in annotations):
        return None
    parents = []
    for index, annotation in enumerate(annotations):
        parent: Any = annotation.get("parent")
        if parent is not None and not (type(parent) is int and 0 <= parent < len(annotations)):
            raise DataError(
                f"{where}: annotation {index}: 'parent' is {_short(parent)}, expected null or the position of one of "
                f"the {len(annotations)} annotations, from 0; remove the field or write the proposals again"
            )
        parents.append(-1 if parent is None else parent)
    tensor = torch.tensor(parents, dtype=torch.int64)
    try:
        check_parents(tensor, len(parents))
    except ValueError as error:
        raise DataError(f"{where}: {error}; remove the field 'parent' or write the proposals again") from error
    return tensor


def _to_shortest(values: torch.Tensor) -> list[float]:
    """Return floats whose decimal form is the shortest that reads back as the same float32."""
    return [float(str(v)) for v in values.float().cpu().numpy()]


def _is_number(value: Any) -> bool:
    return (type(value) is int and abs(value) < 1 << 62) or (type(value) is float and math.isfinite(value))


def _is_size(value: Any) -> bool:
    return (
        isinstance(value, list | tuple) and len(value) == 2 and all(type(v) is int and 1 <= v < 1 << 31 for v in value)
    )


def _kind(value: Any) -> str:
    return {type(None): "missing", dict: "an object without the right keys", list: "a list of other things"}.get(
        type(value), type(value).__name__
    )


def _short(value: Any) -> str:
    text = _one_line(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(value: object) -> str:
    return " ".join(str(value).split())
