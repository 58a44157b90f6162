"""Automatic mask generation: a grid of points is put over an image, and the masks of a promptable model are filtered.

The masks are those of `segment_anything.SamAutomaticMaskGenerator` (Kirillov et al., Segment Anything, ICCV 2023,
appendix B), with less work: predicted IoU filters before a mask is decoded, stability roughly before it is enlarged,
enlarging is one matrix product a side, no more than a box of a full-size mask is kept until NMS has chosen, and only
the chosen masks are measured exactly.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
"""A mask whose box is at most this far from the border of its crop, in pixels, is cut off by it and dropped."""
Result = TypeVar("Result")
Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels."""
_MAX_CALLS_WAITING = 3
"""Calls to the filters that may be waiting while the model goes on."""
_MAX_PENDING_LOGITS = 1 << 28
"""Logits, 4 bytes each, that a GPU holds before they are filtered. The host waits for each filter, so that the masks of
many points are filtered together; a CPU filters the masks of some points while the model is at the next ones."""
MAX_UNSTABLE_ROUNDS = 10
"""After so many rounds in which NMS kept an unstable mask, all masks that are left are measured at once."""


@dataclass(frozen=True)
class Decoded:
    """Masks that points gave, without those of low predicted IoU.

    Attributes:
        logits: `[N, h, w]` float32 at the decoder's resolution, above `Promptable.threshold` inside the mask.
        predicted_iou: `[N]` float32.
    """

    logits: Tensor
    predicted_iou: Tensor


class Promptable(ABC):
    """A model that turns an image into an embedding, and an embedding with points into masks."""

    threshold: float = 0.0

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the model."""

    @abstractmethod
    def embed(self, image: np.ndarray) -> Embedded:
        """Return the embedding of an image, `[H, W, 3]` uint8 RGB."""

    def embed_batch(self, images: Sequence[np.ndarray]) -> list[Embedded]:
        """Return the embeddings of several images, which may differ in size; models that batch override this."""
        return [self.embed(image) for image in images]

    @abstractmethod
    def decode(self, embedded: Embedded, points: Tensor, min_iou: float) -> Decoded:
        """Return the masks that foreground points give, in the order of the points, several a point.

        Args:
            embedded: the image.
            points: `[P, 2]` float32, x and y in pixels of the model's input.
            min_iou: only masks whose predicted IoU is greater are returned; all of them if 0.
        """


@dataclass(frozen=True)
class _Masks:
    """Masks of one crop that passed its first filters. All but the logits are on the CPU, where NMS is done.

    Attributes:
        logits: `[N, h, w]` float32, at the decoder's resolution, on the model's device.
        predicted_iou: `[N]` float32.
        boxes: `[N, 4]` float32, x0, y0, x1, y1 of the outermost pixels, in the crop's frame.
        stability_score: `[N]` float32, NaN if not measured.
    """

    logits: Tensor
    predicted_iou: Tensor
    boxes: Tensor
    stability_score: Tensor

    def select(self, keep: Tensor) -> _Masks:
        """Return the rows that `keep` (`[N]` bool or indices, on the CPU) names."""
        rows = keep.nonzero()[:, 0] if keep.dtype == torch.bool else keep
        logits = self.logits[rows.to(self.logits.device)]
        return _Masks(logits, self.predicted_iou[rows], self.boxes[rows], self.stability_score[rows])


@dataclass(frozen=True)
class _Crop:
    """A part of an image that the model looks at; the image itself is the first.

    Attributes:
        box: the part, in the image.
        image_size: `(height, width)` of the image.
        embedded: its sizes, without features.
    """

    box: Box
    image_size: tuple[int, int]
    embedded: Embedded

    @property
    def area(self) -> int:
        """Pixels of the crop."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


def check_thickness(sample: Sample, side: int) -> None:
    """Check that an image has at least one pixel a side once its longest side has `side` pixels.

    Raises:
        DataError: the image is too thin.
    """
    height, width = sample.size
    if min(height, width) * side / max(height, width) < 0.5:
        raise DataError(
            f"{sample.id}: {height} x {width} pixels are too thin for SAM's {side} pixel input; crop the image, "
            "or try proposer=superpixels"
        )


def generate(model: Promptable, image: np.ndarray, options: GridOptions) -> Proposals:
    """Return all masks of an image, embedding its crops one by one; see `generate_batch`."""
    return generate_batch(model, [image], options)[0]


@torch.no_grad()
def generate_batch(
    model: Promptable,
    images: Sequence[np.ndarray],
    options: GridOptions,
    images_per_batch: int = 1,
    *,
    skip_certain: float | None = None,
) -> list[Proposals]:
    """Return all masks of several images.

    Args:
        model: the promptable model.
        images: `[H, W, 3]` uint8 RGB each.
        options: grid, crops and filters.
        images_per_batch: images, or crops of them, that the model embeds together.
        skip_certain: least predicted IoU of masks inside which points are skipped, see `EncoderOptions`.

    Returns:
        For each image, non-empty masks on the CPU in descending predicted IoU (ties: those of smaller crops first).
    """
    from segment_anything.utils.amg import build_all_layer_point_grids, generate_crop_boxes

    grids = build_all_layer_point_grids(
        options.points_per_side, options.crop_n_layers, options.crop_n_points_downscale_factor
    )
    # Every crop of every image, in order of the images.
    crops = [
        (index, (x0, y0, x1, y1), layer)
        for index, image in enumerate(images)
        for (x0, y0, x1, y1), layer in zip(
            *generate_crop_boxes(image.shape[:2], options.crop_n_layers, options.crop_overlap_ratio), strict=True
        )
    ]
    filters = _Filters(model.threshold, options)
    masks: list[list[Future[tuple[_Crop, _Masks]]]] = [[] for _ in images]
    proposals: list[Future[Proposals]] = []
    with _FilterThread(model.device) as thread:
        for start in range(0, len(crops), images_per_batch):
            batch = crops[start : start + images_per_batch]
            views = [np.ascontiguousarray(images[index][y0:y1, x0:x1]) for index, (x0, y0, x1, y1), _ in batch]
            for (index, box, layer), embedded in zip(batch, model.embed_batch(views), strict=True):
                # The first crop of an image follows the last one of the image before.
                if index > len(proposals):
                    proposals.append(thread.submit(filters.assemble, masks[index - 1]))
                    masks[index - 1] = []
                crop = _Crop(box, (images[index].shape[0], images[index].shape[1]), replace(embedded, features=None))
                scale = np.array([embedded.input_size[1], embedded.input_size[0]])
                points = torch.from_numpy((grids[layer] * scale).astype(np.float32)).to(model.device)
                decoded = _decode_points(model, embedded, points, options, skip_certain)
                passed = [
                    thread.submit(filters.prefilter, joined, crop) for joined in _join_pending(decoded, model.device)
                ]
                masks[index].append(thread.submit(filters.choose, passed, crop))
        if images:
            proposals.append(thread.submit(filters.assemble, masks[-1]))
        return [future.result() for future in proposals]


def _decode_points(
    model: Promptable, embedded: Embedded, points: Tensor, options: GridOptions, skip_certain: float | None
) -> Iterator[Decoded]:
    """Yield the masks of a square grid of points, `[P, 2]` float32, some points at a time."""
    at_once = options.points_per_batch
    if skip_certain is None:
        yield from (model.decode(embedded, part, options.pred_iou_thresh) for part in points.split(at_once))
        return
    side = math.isqrt(len(points))
    is_even = torch.arange(side, device=points.device) % 2 == 0
    is_first = (is_even[:, None] & is_even).flatten()
    is_certain: Tensor | None = None
    for part in points[is_first].split(at_once):
        decoded = model.decode(embedded, part, options.pred_iou_thresh)
        is_certain_mask = decoded.predicted_iou >= skip_certain
        is_part_certain = mask_upsampling.find_certain_cells(decoded.logits, is_certain_mask, model.threshold, options)
        is_certain = is_part_certain if is_certain is None else is_certain | is_part_certain
        yield decoded
    rest = points[~is_first]
    if is_certain is not None:
        height, width = embedded.padded_size or embedded.input_size
        scale = rest.new_tensor([is_certain.shape[1] / width, is_certain.shape[0] / height])
        columns, rows = (rest * scale).long().T
        rest = rest[~is_certain[rows, columns]]
    yield from (model.decode(embedded, part, options.pred_iou_thresh) for part in rest.split(at_once) if len(part))


def _join_pending(decoded: Iterator[Decoded], device: torch.device) -> Iterator[Decoded]:
    """Join the masks of successive points, as many as the device holds before their filters are run."""
    max_logits = 0 if device.type == "cpu" else _MAX_PENDING_LOGITS
    pending: list[Decoded] = []
    for part in decoded:
        pending.append(part)
        if sum(waiting.logits.numel() for waiting in pending) >= max_logits:
            yield _join(pending)
            pending = []
    if pending:
        yield _join(pending)


def _join(parts: list[Decoded]) -> Decoded:
    if len(parts) == 1:
        return parts[0]
    return Decoded(torch.cat([part.logits for part in parts]), torch.cat([part.predicted_iou for part in parts]))


class _FilterThread:
    """Runs the filters on the CPU in a thread of their own, while the model is at the next points.

    Calls are made one after the other in the order in which they were submitted, so that a call may wait for the
    results of earlier ones. Other devices work asynchronously anyway, so there a call is made at once.
    """

    def __init__(self, device: torch.device) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="filter") if device.type == "cpu" else None
        self._inference = torch.is_inference_mode_enabled()
        self._waiting: deque[Future[Any]] = deque()

    def __enter__(self) -> _FilterThread:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def submit(self, call: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Return the future result of a call; waits while too many are under way, so that memory is bounded."""
        if self._thread is None:
            done: Future[Result] = Future()
            done.set_result(call(*arguments))
            return done
        while len(self._waiting) >= _MAX_CALLS_WAITING:
            self._waiting.popleft().result()
        future = self._thread.submit(self._call, call, arguments)
        self._waiting.append(future)
        return future

    def _call(self, call: Callable[..., Result], arguments: tuple[Any, ...]) -> Result:
        # Gradient and inference mode belong to a thread.
        with torch.inference_mode(self._inference), torch.no_grad():
            return call(*arguments)


@dataclass(frozen=True)
class _Filters:
    """The filters between the model's masks and the proposals of an image.

    Attributes:
        threshold: logits above it are inside a mask.
        options: limits of the filters.
    """

    threshold: float
    options: GridOptions

    def prefilter(self, decoded: Decoded, crop: _Crop) -> _Masks:
        """Return those masks that may be stable, have pixels and are not cut off by the crop."""
        rows = mask_upsampling.find_possibly_stable(decoded.logits, crop.embedded, self.threshold, self.options)
        predicted_iou = decoded.predicted_iou[rows]
        if decoded.logits.device.type == "cpu":
            logits = decoded.logits
            boxes, has_pixels = mask_upsampling.measure_boxes(logits, rows, crop.embedded, self.threshold)
            stability_score = torch.full_like(predicted_iou, torch.nan)
        else:
            # Elsewhere masks are enlarged fast, and waiting is what takes the time: all that the filters need is
            # measured at once and copied once.
            logits, rows = decoded.logits[rows], torch.arange(len(rows))
            measured = mask_upsampling.measure_masks(logits, crop.embedded, self.threshold, self.options)
            table = torch.cat([measured, predicted_iou[:, None]], dim=1).cpu()
            boxes, has_pixels, stability_score, predicted_iou = table[:, :4], table[:, 4] > 0, table[:, 5], table[:, 6]
        keep = (has_pixels & ~_are_cut_off(boxes, crop)).nonzero()[:, 0]
        chosen = rows[keep].to(logits.device)
        return _Masks(logits[chosen], predicted_iou[keep], boxes[keep], stability_score[keep])

    def choose(self, passed: list[Future[_Masks]], crop: _Crop) -> tuple[_Crop, _Masks]:
        """Return the masks of one crop that pass all of its filters, best predicted IoU first."""
        parts = [future.result() for future in passed]
        if len(parts) == 1:
            return crop, self.choose_stable(parts[0], crop.embedded)
        masks = _Masks(
            torch.cat([part.logits for part in parts]),
            torch.cat([part.predicted_iou for part in parts]),
            torch.cat([part.boxes for part in parts]),
            torch.cat([part.stability_score for part in parts]),
        )
        return crop, self.choose_stable(masks, crop.embedded)

    def choose_stable(self, masks: _Masks, embedded: Embedded) -> _Masks:
        """Apply NMS to the stable ones of the masks, best predicted IoU first.

        NMS keeps few of many masks, and whether the others were stable makes no difference. So NMS goes first and the
        masks that it keeps are measured; if some of them are unstable, NMS is done again without these.
        """
        from torchvision.ops import nms

        options = self.options
        stability = masks.stability_score.clone()
        left = (~(stability < options.stability_score_thresh)).nonzero()[:, 0]  # true if not measured
        unstable_rounds = 0
        while True:
            keep = left[nms(masks.boxes[left], masks.predicted_iou[left], options.box_nms_thresh)]
            rows = left if unstable_rounds == MAX_UNSTABLE_ROUNDS else keep
            rows = rows[stability[rows].isnan()]
            if len(rows):
                logits = masks.logits[rows.to(masks.logits.device)]
                stability[rows] = mask_upsampling.measure_stability(logits, embedded, self.threshold, options).cpu()
            is_unstable = stability < options.stability_score_thresh  # false if not measured
            if options.stability_score_thresh <= 0 or not is_unstable[keep].any():
                return replace(masks, stability_score=stability).select(keep)
            left = left[~is_unstable[left]]
            unstable_rounds += 1

    def assemble(self, parts: list[Future[tuple[_Crop, _Masks]]]) -> Proposals:
        """Return the proposals of one image, given the masks of its crops."""
        options = self.options
        crops = _suppress_between_crops([part.result() for part in parts], options.crop_nms_thresh)
        height, width = crops[0][0].image_size
        predicted_iou = torch.cat([masks.predicted_iou for _, masks in crops])
        stability_score = torch.cat([masks.stability_score for _, masks in crops])
        device = crops[0][1].logits.device
        full_size = torch.zeros(len(predicted_iou), height, width, dtype=torch.bool, device=device)
        row = 0
        for crop, masks in crops:
            x0, y0, x1, y1 = crop.box
            for logits in mask_upsampling.enlarge(masks.logits, crop.embedded):
                full_size[row : row + len(logits), y0:y1, x0:x1] = logits > self.threshold
                row += len(logits)
        proposals = Proposals(full_size.cpu(), predicted_iou, stability_score)
        if options.min_mask_region_area > 0 and len(proposals):
            proposals = _remove_small_regions(
                proposals, options.min_mask_region_area, max(options.box_nms_thresh, options.crop_nms_thresh)
            )
        return proposals.select(torch.argsort(proposals.predicted_iou, descending=True, stable=True))


def _are_cut_off(boxes: Tensor, crop: _Crop) -> Tensor:
    """Return which boxes touch a border of the crop that is no border of the image, `[N]` bool."""
    height, width = crop.image_size
    x0, y0, _, _ = crop.box
    boxes_in_image = boxes + boxes.new_tensor([x0, y0, x0, y0])
    is_near_crop = (boxes_in_image - boxes.new_tensor(crop.box)).abs() <= EDGE
    is_near_image = (boxes_in_image - boxes.new_tensor([0, 0, width, height])).abs() <= EDGE
    return (is_near_crop & ~is_near_image).any(1)


def _suppress_between_crops(crops: list[tuple[_Crop, _Masks]], threshold: float) -> list[tuple[_Crop, _Masks]]:
    """Apply NMS to the masks of all crops, those of smaller crops winning; the smallest crop comes first."""
    from torchvision.ops import nms

    if len(crops) == 1:
        return crops
    crops = sorted(crops, key=lambda pair: pair[0].area)
    boxes = torch.cat([masks.boxes + masks.boxes.new_tensor([*crop.box[:2], *crop.box[:2]]) for crop, masks in crops])
    priority = torch.cat([torch.full_like(masks.predicted_iou, 1 / crop.area) for crop, masks in crops])
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    keep[nms(boxes, priority, threshold)] = True
    kept = keep.split([len(masks.predicted_iou) for _, masks in crops])
    return [(crop, masks.select(rows)) for (crop, masks), rows in zip(crops, kept, strict=True)]


def _remove_small_regions(proposals: Proposals, min_area: int, threshold: float) -> Proposals:
    """Remove holes and islands under `min_area` pixels, then apply NMS in which masks that had none win."""
    from segment_anything.utils.amg import batched_mask_to_box, remove_small_regions
    from torchvision.ops import nms

    masks, is_unchanged = [], []
    for mask in proposals.masks.numpy():
        filled, had_holes = remove_small_regions(mask, min_area, mode="holes")
        cleaned, had_islands = remove_small_regions(filled, min_area, mode="islands")
        masks.append(torch.from_numpy(cleaned))
        is_unchanged.append(float(not (had_holes or had_islands)))
    cleaned_masks = torch.stack(masks)
    keep = nms(batched_mask_to_box(cleaned_masks).float(), torch.tensor(is_unchanged), threshold)
    return Proposals(cleaned_masks[keep], proposals.predicted_iou[keep], proposals.stability_score[keep])
