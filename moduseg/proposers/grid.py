"""Automatic mask generation: a grid of points is put over an image, and what a promptable model gives is filtered.

The masks are those of `segment_anything.SamAutomaticMaskGenerator` (Kirillov et al., Segment Anything, ICCV 2023,
appendix B), with less work: predicted IoU filters before a mask is decoded, stability roughly before it is enlarged,
enlarging is one matrix product a side, of a mask at full size no more than a box is kept until NMS has chosen, and
only what it chooses is measured exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.errors import DataError
from moduseg.proposers.grid_options import GridOptions
from moduseg.structures import Proposals, Sample

CHUNK_PIXELS = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Pixels of full-size logits that are held at once, by device, 4 bytes each: what caches hold, or a share of a GPU."""
EDGE = 20.0
"""A mask whose box comes this near to the border of a crop, in pixels, is cut off by it and goes."""
MOST_UNSTABLE_ROUNDS = 10
"""So often what NMS keeps may turn out unstable before all that is left is measured at once."""
_GROUP_BYTES = 1024
"""128 words of eight bytes, each at most 128 once they are added."""


@dataclass(frozen=True)
class Embedded:
    """An image, or a crop of one, as a promptable model has seen it.

    Attributes:
        features: what the model's decoder wants.
        size: `(H, W)` of the image in pixels.
        input_size: `(H', W')` of the image at the model's input, padding apart.
        padded_size: `(H, W)` of the padded input that mask logits cover, where they are cut back to `input_size` before
            they get the image's size; `None` where they cover the image itself.
    """

    features: Any
    size: tuple[int, int]
    input_size: tuple[int, int]
    padded_size: tuple[int, int] | None


@dataclass(frozen=True)
class Decoded:
    """Masks that points gave, those of low predicted IoU left out.

    Attributes:
        logits: `[N, h, w]` float32 at the decoder's resolution, above `Promptable.threshold` inside the mask.
        scores: `[N]` float32, predicted IoU.
    """

    logits: Tensor
    scores: Tensor


class Promptable(ABC):
    """A model that turns an image into an embedding, and an embedding with points into masks."""

    threshold: float = 0.0

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model is."""

    @abstractmethod
    def embed(self, image: np.ndarray) -> Embedded:
        """The embedding of an image, `[H, W, 3]` uint8 RGB."""

    def embed_batch(self, images: Sequence[np.ndarray]) -> list[Embedded]:
        """The embeddings of several images, which may differ in size; models that batch override it."""
        return [self.embed(image) for image in images]

    @abstractmethod
    def decode(self, embedded: Embedded, points: Tensor, least: float) -> Decoded:
        """The masks that foreground points give, in the order of the points, several a point.

        Args:
            embedded: the image.
            points: `[P, 2]` float32, x and y in pixels of the model's input.
            least: only masks whose predicted IoU is greater are returned; all of them where 0.
        """


@dataclass(frozen=True)
class _Candidates:
    """Masks that passed the filters of one crop, one row each.

    Attributes:
        logits: `[N, h, w]` float32, at the decoder's resolution.
        scores, stability: `[N]` float32.
        boxes: `[N, 4]` float32, x0, y0, x1, y1 of the outermost pixels, in the crop's frame.
    """

    logits: Tensor
    scores: Tensor
    stability: Tensor
    boxes: Tensor

    def select(self, keep: Tensor) -> _Candidates:
        """The rows that `keep` (`[N]` bool or indices) names."""
        return _Candidates(self.logits[keep], self.scores[keep], self.stability[keep], self.boxes[keep])


@dataclass(frozen=True)
class _Crop:
    """A crop `x0, y0, x1, y1`, its sizes (the features are let go) and the masks found in it."""

    box: tuple[int, int, int, int]
    embedded: Embedded
    found: _Candidates

    @property
    def area(self) -> int:
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


def check_thickness(sample: Sample, side: int) -> None:
    """Nothing, for an image of which something is left once its longest side has `side` pixels.

    Raises:
        DataError: nothing is left of it.
    """
    height, width = sample.size
    if min(height, width) * side / max(height, width) < 0.5:
        raise DataError(
            f"{sample.id}: {height} x {width} pixels are too thin for SAM's {side} pixel input; crop the image, "
            "or try proposer=superpixels"
        )


def generate(model: Promptable, image: np.ndarray, options: GridOptions) -> Proposals:
    """All masks of an image: `generate_batch` of one, its crops one after the other."""
    return generate_batch(model, [image], options)[0]


@torch.no_grad()
def generate_batch(
    model: Promptable, images: Sequence[np.ndarray], options: GridOptions, images_per_batch: int = 1
) -> list[Proposals]:
    """All masks of several images.

    Args:
        model: the promptable model.
        images: `[H, W, 3]` uint8 RGB each.
        options: grid, crops and filters.
        images_per_batch: images, or crops of them, that the model embeds together.

    Returns:
        For each image, non-empty masks on the CPU in descending predicted IoU (ties: those of smaller crops first).
    """
    from segment_anything.utils.amg import build_all_layer_point_grids, generate_crop_boxes

    grids = build_all_layer_point_grids(
        options.points_per_side, options.crop_n_layers, options.crop_n_points_downscale_factor
    )
    todo = [
        (index, (x0, y0, x1, y1), layer)
        for index, image in enumerate(images)
        for (x0, y0, x1, y1), layer in zip(
            *generate_crop_boxes(image.shape[:2], options.crop_n_layers, options.crop_overlap_ratio), strict=True
        )
    ]
    crops: list[_Crop] = []
    results: list[Proposals] = []
    for start in range(0, len(todo), images_per_batch):
        part = todo[start : start + images_per_batch]
        views = [np.ascontiguousarray(images[index][y0:y1, x0:x1]) for index, (x0, y0, x1, y1), _ in part]
        for (index, box, layer), embedded in zip(part, model.embed_batch(views), strict=True):
            if index > len(results):
                results.append(_assembled(model, images[index - 1].shape[:2], crops, options))
                crops = []
            found = _candidates(model, embedded, grids[layer], box, images[index].shape[:2], options)
            crops.append(_Crop(box, replace(embedded, features=None), found))
    if images:
        results.append(_assembled(model, images[-1].shape[:2], crops, options))
    return results


def _assembled(model: Promptable, size: tuple[int, int], crops: list[_Crop], options: GridOptions) -> Proposals:
    """The masks of one image, given those of its crops."""
    height, width = size
    crops = _between_crops(crops, options.crop_nms_thresh)
    scores = torch.cat([crop.found.scores for crop in crops])
    stability = torch.cat([crop.found.stability for crop in crops])
    masks = torch.zeros(len(scores), height, width, dtype=torch.bool, device=model.device)
    row = 0
    for crop in crops:
        x0, y0, x1, y1 = crop.box
        for logits in enlarge(crop.found.logits, crop.embedded):
            masks[row : row + len(logits), y0:y1, x0:x1] = logits > model.threshold
            row += len(logits)
    proposals = Proposals(masks, scores, stability).to(torch.device("cpu"))
    if options.min_mask_region_area > 0 and len(proposals):
        proposals = _without_small_regions(
            proposals, options.min_mask_region_area, max(options.box_nms_thresh, options.crop_nms_thresh)
        )
    return proposals.select(torch.argsort(proposals.scores, descending=True, stable=True))


def enlarge(logits: Tensor, embedded: Embedded) -> Iterator[Tensor]:
    """Mask logits at the size of the image, a few masks at a time.

    SAM enlarges twice, to the padded input and from there, cut back, to the image. Both steps are linear and separable,
    so that together they are one matrix a side, and the padded input is never filled in.

    Args:
        logits: `[N, h, w]` float32.
        embedded: the image that they are of.

    Yields:
        `[n, H, W]` float32, in the order of `logits`.
    """
    height, width = embedded.size
    target = _only_target(logits, embedded)
    if target is not None:
        yield from _enlarge_once(logits, target, embedded.size)
        return
    padded = embedded.padded_size or (None, None)
    rows = resize_matrix(logits.shape[1], padded[0], embedded.input_size[0], height, logits.device)
    columns = resize_matrix(logits.shape[2], padded[1], embedded.input_size[1], width, logits.device)
    at_once = max(1, CHUNK_PIXELS.get(logits.device.type, CHUNK_PIXELS["cpu"]) // (height * width))
    for chunk in logits.split(at_once):
        yield rows @ (chunk @ columns.T)


def _only_target(logits: Tensor, embedded: Embedded) -> tuple[int, int] | None:
    """On the CPU, the size that one bilinear step leads to, where one does all: the image is as large as the input."""
    if logits.device.type != "cpu" or not (embedded.padded_size is None or embedded.input_size == embedded.size):
        return None
    return embedded.padded_size or embedded.size


def _enlarge_once(logits: Tensor, target: tuple[int, int], size: tuple[int, int]) -> Iterator[Tensor]:
    """`enlarge` on the CPU where it is one bilinear step to `target`, cut to `size`.

    OpenCV takes a fifth of the time of matrix products for it.
    """
    at_once = max(1, CHUNK_PIXELS["cpu"] // (target[0] * target[1]))
    for chunk in logits.split(at_once):
        room = np.empty((len(chunk), *target), dtype=np.float32)
        for source, large in zip(chunk.numpy(), room, strict=True):
            cv2.resize(source, (target[1], target[0]), dst=large, interpolation=cv2.INTER_LINEAR)
        yield torch.from_numpy(room[:, : size[0], : size[1]])


def resize_matrix(source: int, padded: int | None, inner: int, target: int, device: torch.device) -> Tensor:
    """`[target, source]` float32: bilinear resizing of one side to `padded`, cut back to `inner`, then to `target`.

    Args:
        source: cells that are resized.
        padded: side of the padded input; `None` where there is one step, from `source` to `target`.
        inner: how much of the padded input is image.
        target: pixels of the result.
        device: where the matrix is put.
    """
    steps = torch.eye(source, device=device)[None]
    if padded is not None:
        steps = F.interpolate(steps, size=padded, mode="linear", align_corners=False)[..., :inner]
    return F.interpolate(steps, size=target, mode="linear", align_corners=False)[0].T.contiguous()


def _candidates(
    model: Promptable,
    embedded: Embedded,
    grid: np.ndarray,
    crop: tuple[int, int, int, int],
    image_size: tuple[int, int],
    options: GridOptions,
) -> _Candidates:
    """The masks of one crop that pass its filters and NMS, best predicted IoU first."""
    scale = np.array([embedded.input_size[1], embedded.input_size[0]])
    points = torch.from_numpy((grid * scale).astype(np.float32)).to(model.device)
    logits, scores, boxes = [], [], []
    for batch in points.split(options.points_per_batch):
        decoded = model.decode(embedded, batch, options.pred_iou_thresh)
        rows = _hopeful(decoded.logits, embedded, model.threshold, options)
        corners, filled = _boxes(decoded.logits, rows, embedded, model.threshold)
        keep = filled & ~_cut_off(corners, crop, image_size)
        rows = rows[keep]
        logits.append(decoded.logits[rows])
        scores.append(decoded.scores[rows])
        boxes.append(corners[keep])
    return _best_stable(_joined(logits), _joined(scores), _joined(boxes), embedded, model.threshold, options)


def _joined(parts: list[Tensor]) -> Tensor:
    """One after the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _best_stable(
    logits: Tensor, scores: Tensor, boxes: Tensor, embedded: Embedded, threshold: float, options: GridOptions
) -> _Candidates:
    """NMS between the stable ones of the masks, best predicted IoU first.

    Of many masks one is kept, and whether the others were stable makes no difference. So NMS goes first and what it
    keeps is measured; where some of that is unstable and goes, NMS is done again without it.
    """
    from torchvision.ops import nms

    stability = scores.new_full((len(scores),), torch.nan)
    left = torch.arange(len(scores), device=scores.device)
    unstable_rounds = 0
    while True:
        keep = left[nms(boxes[left], scores[left], options.box_nms_thresh)]
        wanted = left if unstable_rounds == MOST_UNSTABLE_ROUNDS else keep
        wanted = wanted[stability[wanted].isnan()]
        stability[wanted] = _stability(logits[wanted], embedded, threshold, options)
        gone = stability < options.stability_score_thresh  # false where not measured
        if options.stability_score_thresh <= 0 or not gone[keep].any():
            return _Candidates(logits[keep], scores[keep], stability[keep], boxes[keep])
        left = left[~gone[left]]
        unstable_rounds += 1


def _hopeful(logits: Tensor, embedded: Embedded, threshold: float, options: GridOptions) -> Tensor:
    """`[n]` int64, rows of the masks that are not far too unstable at the decoder's resolution.

    On trained and on random weights, images of 96 to 512 pixels, the two stabilities were never further apart than 0.05
    and 0.8 over the square root of the area in cells (that of the lower cut-off); the margin is twice that.
    """
    if options.stability_score_thresh <= 0:
        return torch.arange(len(logits), device=logits.device)
    cells = logits.shape[1:]
    padded = embedded.padded_size or embedded.input_size
    rows, columns = (
        min(count, -(-count * inner // outer) + 1)
        for count, inner, outer in zip(cells, embedded.input_size, padded, strict=True)
    )
    inner = logits[:, :rows, :columns]
    area = _count_above(inner, threshold - options.stability_score_offset)
    stability = _count_above(inner, threshold + options.stability_score_offset) / area
    return (stability + 0.1 + 1.6 / area.sqrt() >= options.stability_score_thresh).nonzero()[:, 0]


def _boxes(logits: Tensor, rows: Tensor, embedded: Embedded, threshold: float) -> tuple[Tensor, Tensor]:
    """Boxes of some masks at full size.

    Args:
        logits: `[N, h, w]` float32.
        rows: `[n]` int64, which.
        embedded, threshold: as everywhere.

    Returns:
        `[n, 4]` float32, x0, y0, x1, y1 of the outermost pixels, and `[n]` bool, whether there are pixels at all.
    """
    target = _only_target(logits, embedded)
    if target is not None:
        return _boxes_of_one_step(logits, rows, target, embedded.size, threshold)
    boxes, filled = [logits.new_zeros(0, 4)], [torch.zeros(0, dtype=torch.bool, device=logits.device)]
    for chunk in enlarge(logits[rows], embedded):
        across, down = chunk.amax(1) > threshold, chunk.amax(2) > threshold
        (left, right), (top, bottom) = _ends(across), _ends(down)
        boxes.append(torch.stack([left, top, right, bottom], dim=1).float())
        filled.append(down.any(1))
    return torch.cat(boxes), torch.cat(filled)


def _boxes_of_one_step(
    logits: Tensor, rows: Tensor, target: tuple[int, int], size: tuple[int, int], threshold: float
) -> tuple[Tensor, Tensor]:
    """`_boxes` on the CPU where one bilinear step leads to `target`: mask by mask, in blocks that stay in the cache."""
    large, above = np.empty(target, dtype=np.float32), np.empty(size, dtype=bool)
    level = np.float32(threshold)
    sources, found = logits.numpy(), np.zeros((len(rows), 4), dtype=np.float32)
    for box, row in zip(found, rows.tolist(), strict=True):
        cv2.resize(sources[row], (target[1], target[0]), dst=large, interpolation=cv2.INTER_LINEAR)
        np.greater(large[: size[0], : size[1]], level, out=above)
        box[:] = cv2.boundingRect(above.view(np.uint8))
    filled = found[:, 2] > 0
    found[filled, 2:] += found[filled, :2] - 1
    return torch.from_numpy(found), torch.from_numpy(filled)


def _stability(logits: Tensor, embedded: Embedded, threshold: float, options: GridOptions) -> Tensor:
    """`[N]` float32: IoU at full size between the masks at a higher and at a lower cut-off; of masks with pixels."""
    low, high = threshold - options.stability_score_offset, threshold + options.stability_score_offset
    parts = [logits.new_zeros(0)]
    parts += [_count_above(large, high) / _count_above(large, low) for large in enlarge(logits, embedded)]
    return torch.cat(parts)


def _count_above(logits: Tensor, level: float) -> Tensor:
    """`[N]` int64, how many of each mask's logits, `[N, H, W]` float32, are above `level`."""
    if logits.device.type != "cpu":
        return (logits > level).sum((1, 2))
    # NumPy compares and adds integers several times as fast as PyTorch does on a CPU: eight bytes in one addition, and
    # of no more words than a byte can count.
    count, pixels = len(logits), logits.shape[1] * logits.shape[2]
    groups = -(-pixels // _GROUP_BYTES)
    above = np.empty((count, groups * _GROUP_BYTES), dtype=np.uint8)
    above[:, pixels:] = 0
    np.greater(logits.numpy(), np.float32(level), out=above[:, :pixels].reshape(logits.shape).view(bool))
    words = above.view(np.uint64).reshape(count, groups, _GROUP_BYTES // 8)
    return torch.from_numpy(np.add.reduce(np.add.reduce(words, axis=2).view(np.uint8), axis=1, dtype=np.int64))


def _ends(hit: Tensor) -> tuple[Tensor, Tensor]:
    """First and last true position of each row of `[N, L]` bool, `[N]` each; every row has one."""
    hits = hit.to(torch.uint8)
    return hits.argmax(1), hit.shape[1] - 1 - hits.flip(1).argmax(1)


def _cut_off(boxes: Tensor, crop: tuple[int, int, int, int], image_size: tuple[int, int]) -> Tensor:
    """`[N]` bool, whether a box touches a border of the crop that is no border of the image."""
    height, width = image_size
    x0, y0, _, _ = crop
    frame = boxes + boxes.new_tensor([x0, y0, x0, y0])
    near_crop = (frame - boxes.new_tensor(crop)).abs() <= EDGE
    near_image = (frame - boxes.new_tensor([0, 0, width, height])).abs() <= EDGE
    return (near_crop & ~near_image).any(1)


def _between_crops(crops: list[_Crop], threshold: float) -> list[_Crop]:
    """NMS over the masks of all crops, those of smaller crops winning; the smallest crop comes first."""
    from torchvision.ops import nms

    if len(crops) == 1:
        return crops
    crops = sorted(crops, key=lambda crop: crop.area)
    offsets = [crop.found.boxes.new_tensor([*crop.box[:2], *crop.box[:2]]) for crop in crops]
    boxes = torch.cat([crop.found.boxes + offset for crop, offset in zip(crops, offsets, strict=True)])
    priority = torch.cat([crop.found.scores.new_full((len(crop.found.scores),), 1 / crop.area) for crop in crops])
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    keep[nms(boxes, priority, threshold)] = True
    chosen = keep.split([len(crop.found.scores) for crop in crops])
    return [_Crop(crop.box, crop.embedded, crop.found.select(kept)) for crop, kept in zip(crops, chosen, strict=True)]


def _without_small_regions(proposals: Proposals, least: int, threshold: float) -> Proposals:
    """Holes and islands under `least` pixels removed, then NMS in which masks that needed no mending win."""
    from segment_anything.utils.amg import batched_mask_to_box, remove_small_regions
    from torchvision.ops import nms

    masks, untouched = [], []
    for mask in proposals.masks.numpy():
        filled, holes = remove_small_regions(mask, least, mode="holes")
        whole, islands = remove_small_regions(filled, least, mode="islands")
        masks.append(torch.from_numpy(whole))
        untouched.append(float(not (holes or islands)))
    mended = torch.stack(masks)
    keep = nms(batched_mask_to_box(mended).float(), torch.tensor(untouched), threshold)
    return Proposals(mended[keep], proposals.scores[keep], proposals.stability[keep])
