"""Automatic mask generation: a grid of points is put over an image, and what a promptable model gives is filtered.

The masks are those of `segment_anything.SamAutomaticMaskGenerator` (Kirillov et al., Segment Anything, ICCV 2023,
appendix B), with less work: predicted IoU filters before a mask is decoded, stability roughly before it is enlarged,
enlarging is one matrix product a side, of a mask at full size no more than a box is kept until NMS has chosen, and
only what it chooses is measured exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from moduseg.errors import DataError
from moduseg.proposers import mask_upsampling
from moduseg.proposers.grid_options import GridOptions
from moduseg.proposers.mask_upsampling import Embedded
from moduseg.structures import Proposals, Sample

EDGE = 20.0
"""A mask whose box comes this near to the border of a crop, in pixels, is cut off by it and goes."""
Result = TypeVar("Result")
_CALLS_WAITING = 3
"""Calls that follow the model and may be under way while it goes on."""
MOST_UNSTABLE_ROUNDS = 10
"""So often what NMS keeps may turn out unstable before all that is left is measured at once."""


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
    crops: list[Future[_Crop]] = []
    results: list[Future[Proposals]] = []
    with _Behind(model.device) as behind:
        for start in range(0, len(todo), images_per_batch):
            part = todo[start : start + images_per_batch]
            views = [np.ascontiguousarray(images[index][y0:y1, x0:x1]) for index, (x0, y0, x1, y1), _ in part]
            for (index, box, layer), embedded in zip(part, model.embed_batch(views), strict=True):
                if index > len(results):
                    results.append(behind.do(_assembled, model, images[index - 1].shape[:2], crops, options))
                    crops = []
                crops.append(_crop(model, embedded, grids[layer], box, images[index].shape[:2], options, behind))
        if images:
            results.append(behind.do(_assembled, model, images[-1].shape[:2], crops, options))
        return [result.result() for result in results]


class _Behind:
    """What follows the model: on the CPU in a thread of its own, while the model is at the next points.

    Calls are made one after the other in the order in which they were asked for, so that a call may wait for the
    results of earlier ones. On other devices, which work behind the program anyway, they are made at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="filter") if device.type == "cpu" else None
        self._inference = torch.is_inference_mode_enabled()
        self._waiting: deque[Future[Any]] = deque()

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def do(self, call: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """The result of a call, to be waited for; a few may be under way, so that memory is bounded."""
        if self._thread is None:
            done: Future[Result] = Future()
            done.set_result(call(*arguments))
            return done
        while len(self._waiting) >= _CALLS_WAITING:
            self._waiting.popleft().result()
        future = self._thread.submit(self._called, call, arguments)
        self._waiting.append(future)
        return future

    def _called(self, call: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
        # Gradient and inference mode belong to a thread.
        with torch.inference_mode(self._inference), torch.no_grad():
            return call(*arguments)


def _assembled(model: Promptable, size: tuple[int, int], parts: list[Future[_Crop]], options: GridOptions) -> Proposals:
    """The masks of one image, given those of its crops."""
    height, width = size
    crops = _between_crops([part.result() for part in parts], options.crop_nms_thresh)
    scores = torch.cat([crop.found.scores for crop in crops])
    stability = torch.cat([crop.found.stability for crop in crops])
    masks = torch.zeros(len(scores), height, width, dtype=torch.bool, device=model.device)
    row = 0
    for crop in crops:
        x0, y0, x1, y1 = crop.box
        for logits in mask_upsampling.enlarge(crop.found.logits, crop.embedded):
            masks[row : row + len(logits), y0:y1, x0:x1] = logits > model.threshold
            row += len(logits)
    proposals = Proposals(masks, scores, stability).to(torch.device("cpu"))
    if options.min_mask_region_area > 0 and len(proposals):
        proposals = _without_small_regions(
            proposals, options.min_mask_region_area, max(options.box_nms_thresh, options.crop_nms_thresh)
        )
    return proposals.select(torch.argsort(proposals.predicted_iou, descending=True, stable=True))


def _crop(
    model: Promptable,
    embedded: Embedded,
    grid: np.ndarray,
    box: tuple[int, int, int, int],
    image_size: tuple[int, int],
    options: GridOptions,
    behind: _Behind,
) -> Future[_Crop]:
    """The masks of one crop that pass its filters and NMS, best predicted IoU first."""
    scale = np.array([embedded.input_size[1], embedded.input_size[0]])
    points = torch.from_numpy((grid * scale).astype(np.float32)).to(model.device)
    frame = replace(embedded, features=None)
    passed = [
        behind.do(
            _passed,
            model.decode(embedded, batch, options.pred_iou_thresh),
            frame,
            model.threshold,
            box,
            image_size,
            options,
        )
        for batch in points.split(options.points_per_batch)
    ]
    return behind.do(_chosen, passed, frame, model.threshold, box, options)


def _passed(
    decoded: Decoded,
    embedded: Embedded,
    threshold: float,
    crop: tuple[int, int, int, int],
    image_size: tuple[int, int],
    options: GridOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, scores and boxes of those masks that may be stable and are not cut off by the crop."""
    rows = mask_upsampling.hopeful(decoded.logits, embedded, threshold, options)
    corners, filled = mask_upsampling.boxes(decoded.logits, rows, embedded, threshold)
    keep = filled & ~_cut_off(corners, crop, image_size)
    rows = rows[keep]
    return decoded.logits[rows], decoded.scores[rows], corners[keep]


def _chosen(
    passed: list[Future[tuple[Tensor, Tensor, Tensor]]],
    embedded: Embedded,
    threshold: float,
    crop: tuple[int, int, int, int],
    options: GridOptions,
) -> _Crop:
    logits, scores, boxes = (_joined(list(parts)) for parts in zip(*(p.result() for p in passed), strict=True))
    return _Crop(crop, embedded, _best_stable(logits, scores, boxes, embedded, threshold, options))


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
        stability[wanted] = mask_upsampling.stability(logits[wanted], embedded, threshold, options)
        gone = stability < options.stability_score_thresh  # false where not measured
        if options.stability_score_thresh <= 0 or not gone[keep].any():
            return _Candidates(logits[keep], scores[keep], stability[keep], boxes[keep])
        left = left[~gone[left]]
        unstable_rounds += 1


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
    return Proposals(mended[keep], proposals.predicted_iou[keep], proposals.stability_score[keep])
