"""The region that a person means who draws a box or a point where no proposal fits.

A proposer that can be asked is asked: a promptable model (the SAM family) with points, one that grows trees of regions
with all of their nodes. For the others, superpixels are merged into a tree of the photograph.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch

from moduseg.errors import ConfigError
from moduseg.proposers.base import PromptBox, Proposer
from moduseg.proposers.mask_generation import Promptable
from moduseg.proposers.mask_upsampling import enlarge
from moduseg.proposers.superpixels import SuperpixelOptions, SuperpixelProposer
from moduseg.structures import Sample

MIN_FIT = 0.6
"""A region whose bounding box has a smaller IoU with the box that was drawn is not what was meant."""
_POINTS = 5
"""So many points a side are put into a box."""
_TREE_SIDE = 320
"""Longer side at which superpixels are merged for this purpose: every region of the tree is drawn there."""


def find_region(proposer: Proposer, sample: Sample, box: PromptBox) -> np.ndarray:
    """Return the region that fits a box or a point best, `[H, W]` bool; never empty.

    Args:
        proposer: asked first (`Proposer.find_region`); else a tree of superpixels is.
        sample: the photograph.
        box: `(x0, y0, x1, y1)` in pixels, in any order of its corners; a point has no size.

    Returns:
        Of a box, the region whose bounding box fits it, weighed with the proposer's opinion of its outline, or the
        box itself where none does. Of a point, the region that the proposer trusts most there, or the most salient one.

    Raises:
        ConfigError: outside the photograph.
    """
    ordered = order_corners(box, sample.size)
    region = proposer.find_region(sample, ordered)
    if region is None or not region.any():
        region = _find_in_superpixels(sample, ordered)
    if region is None or not region.any():
        region = np.zeros(sample.size, dtype=bool)
        x0, y0, x1, y1 = (int(side) for side in ordered)
        region[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)] = True
    return region


def order_corners(box: PromptBox, size: tuple[int, int]) -> PromptBox:
    """Return a box with its upper left corner first, cut to a photograph of `(H, W)`.

    Raises:
        ConfigError: it lies outside.
    """
    height, width = size
    x0, x1 = sorted((box[0], box[2]))
    y0, y1 = sorted((box[1], box[3]))
    if not (x0 < width and y0 < height and x1 >= 0 and y1 >= 0):
        raise ConfigError(
            f"box: got {tuple(round(side) for side in box)}, expected one inside the picture of {width} x {height} "
            "pixels; draw inside it"
        )
    return max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))


def is_point(box: PromptBox) -> bool:
    """Return whether a box has no size."""
    return box[2] - box[0] < 1 and box[3] - box[1] < 1


def measure_fit(boxes: np.ndarray, box: PromptBox) -> np.ndarray:
    """Return the IoU of bounding boxes `[N, 4]` (x0, y0, x1, y1, the last two past the end) with a box, `[N]`."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    shared = (high - low).clip(min=0).prod(1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (box[2] - box[0]) * (box[3] - box[1])
    return shared / np.maximum(area - shared, 1e-9)


def choose_fitting(boxes: np.ndarray, quality: np.ndarray, box: PromptBox) -> int | None:
    """Return the region whose bounding box fits a box best, weighed with its quality; `None` where none fits.

    Args:
        boxes: `[N, 4]`, see `measure_fit`.
        quality: `[N]`, of the outlines; of equals, the first.
        box: that was drawn.
    """
    fit = measure_fit(boxes, box)
    if not (fit >= MIN_FIT).any():
        return None
    return int(np.where(fit >= MIN_FIT, fit * quality.clip(0.05, 1), -1).argmax())


@torch.no_grad()
def prompt_model(model: Promptable, image: np.ndarray, box: PromptBox) -> np.ndarray | None:
    """Ask a promptable model, `[H, W]` bool; `None` where none of its masks fits.

    A box is asked for with a grid of points inside it, since every promptable model takes points here.

    Args:
        model: the model.
        image: `[H, W, 3]` uint8 RGB.
        box: with ordered corners.
    """
    embedded = model.embed(image)
    xs, ys = (
        [box[axis]] if is_point(box) else np.linspace(box[axis], box[axis + 2], _POINTS + 2)[1:-1] for axis in (0, 1)
    )
    scale = np.array([embedded.input_size[1] / image.shape[1], embedded.input_size[0] / image.shape[0]])
    points = np.array([(x, y) for y in ys for x in xs]) * scale
    decoded = model.decode(embedded, torch.from_numpy(points.astype(np.float32)).to(model.device), 0.0)
    inside = (decoded.logits > model.threshold).cpu().numpy()
    quality = decoded.predicted_iou.float().cpu().numpy()
    # Masks are compared at the decoder's resolution, which covers the padded input.
    covered = np.array((embedded.padded_size or embedded.input_size)[::-1])
    to_mask = np.tile(scale * np.array(inside.shape[:0:-1]) / covered, 2)
    x0, y0, x1, y1 = np.array(box) * to_mask
    row = _choose_mask(inside, quality, (x0, y0, x1, y1), is_a_point=is_point(box))
    if row is None:
        return None
    (full_size,) = enlarge(decoded.logits[row, None], embedded)
    return np.asarray((full_size[0] > model.threshold).cpu())


def _choose_mask(masks: np.ndarray, quality: np.ndarray, box: PromptBox, *, is_a_point: bool) -> int | None:
    """Return which of `[N, h, w]` bool masks was meant."""
    if not is_a_point:
        return choose_fitting(find_boxes(masks), quality, box)
    x, y = min(int(box[0]), masks.shape[2] - 1), min(int(box[1]), masks.shape[1] - 1)
    covers = masks[:, y, x]
    return int(np.where(covers, quality, -np.inf).argmax()) if covers.any() else None


def find_boxes(masks: np.ndarray) -> np.ndarray:
    """Return the bounding boxes of `[N, H, W]` bool masks, `[N, 4]` as in `measure_fit`; zeros for an empty one."""
    boxes = np.zeros((len(masks), 4))
    for row, mask in enumerate(masks):
        x, y, width, height = cv2.boundingRect(np.ascontiguousarray(mask).view(np.uint8))
        boxes[row] = x, y, x + width, y + height
    return boxes


def _find_in_superpixels(sample: Sample, box: PromptBox) -> np.ndarray | None:
    """Return the region of a tree of superpixels that was meant, `[H, W]` bool; `None` where none fits."""
    height, width = sample.size
    shrink = min(1.0, _TREE_SIDE / max(height, width))
    small = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    image = cv2.resize(sample.image, small, interpolation=cv2.INTER_AREA) if shrink < 1 else sample.image
    # What surrounds an object is often more salient than the object, but no point means most of the picture.
    max_area = 0.3 if is_point(box) else 0.9
    options = SuperpixelOptions(scales=(15.0,), min_area=1, max_area=max_area, max_iou=1.0, max_proposals=1000)
    masks = SuperpixelProposer(options).propose(Sample(sample.id, image)).masks.numpy()
    if not len(masks):
        return None
    x0, y0, x1, y1 = (side * shrink for side in box)
    # The most salient come first, and one of these is meant by a point. A box is drawn around what fills it, not around
    # a rim.
    quality = -np.arange(len(masks), dtype=float)
    if not is_point(box):
        boxes = find_boxes(masks)
        quality = masks.reshape(len(masks), -1).sum(1) / np.maximum((boxes[:, 2:] - boxes[:, :2]).prod(1), 1)
    row = _choose_mask(masks, quality, (x0, y0, x1, y1), is_a_point=is_point(box))
    if row is None:
        return None
    # The plain nearest pixel is that of a corner, half a pixel away from what the averaged image shows.
    return cv2.resize(masks[row].view(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST_EXACT).astype(bool)
