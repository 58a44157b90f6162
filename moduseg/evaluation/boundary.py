"""Boundary IoU: IoU of the pixels near the contours (Cheng et al., CVPR 2021, arXiv 2103.16562), for label maps.

A pixel of a region is near its contour if the square of side `2 d + 1` around it holds a pixel outside the region or
outside the image. The IoU of a label is taken between the near-contour pixels of
its true and of its predicted region, pixels summed over the split.
"""

from __future__ import annotations

import cv2
import numpy as np

from moduseg.evaluation.confusion import EXACT_FLOAT32
from moduseg.structures import IGNORE_INDEX


def contour_width(shape: tuple[int, ...], share: float) -> int:
    """Return the width `d` of contours in pixels: `share` of the image's diagonal, rounded (half to even), 1 at least.

    Args:
        shape: `(H, W)`.
        share: of the diagonal; the paper uses 0.02.
    """
    return max(1, round(share * float(np.hypot(shape[0], shape[1]))))


def near_contour(labels: np.ndarray, width: int) -> np.ndarray:
    """Mark the pixels near the contour of their own region, all regions at once.

    A pixel is far from its contour where the smallest and the largest label of its window agree, which is each label's
    binary mask eroded, frame included, `width` times by 3 x 3.

    Args:
        labels: `[H, W]` uint8.
        width: `d` in pixels, 1 or more.

    Returns:
        `[H, W]` uint8, 255 where near, else 0.
    """
    kernel = np.ones((2 * width + 1, 2 * width + 1), dtype=np.uint8)
    lowest = cv2.erode(labels, kernel, borderType=cv2.BORDER_REPLICATE)
    highest = cv2.dilate(labels, kernel, borderType=cv2.BORDER_REPLICATE)
    is_near = cv2.compare(lowest, highest, cv2.CMP_NE)
    is_near[:width] = is_near[-width:] = 255
    is_near[:, :width] = is_near[:, -width:] = 255
    return is_near


def boundary_counts(truth: np.ndarray, prediction: np.ndarray, num_labels: int, width: int) -> np.ndarray:
    """Count the pixels near contours of each label of one image.

    Ignored pixels are no region of the prediction either: its contours run around them as the truth's do, and they are
    not counted.

    Args:
        truth: `[H, W]` uint8 in 0..num_labels-1, or 255 where ignored.
        prediction: `[H, W]` uint8 in 0..num_labels-1.
        num_labels: labels, background included.
        width: `d` in pixels.

    Returns:
        `[3, num_labels]` int64: in both, in the truth's, in the prediction's contours.
    """
    ignored = cv2.compare(truth, IGNORE_INDEX, cv2.CMP_EQ)
    scored = cv2.bitwise_or(prediction, ignored)
    true, predicted = near_contour(truth, width), near_contour(scored, width)
    both = true & predicted & cv2.compare(truth, scored, cv2.CMP_EQ)
    # What is ignored falls outside of the counts: `num_labels` is 255 at most.
    masked = ((truth, both), (truth, true), (scored, predicted))
    return np.stack([_histogram(labels, mask, num_labels) for labels, mask in masked])


def _histogram(labels: np.ndarray, mask: np.ndarray, num_labels: int) -> np.ndarray:
    """Return the pixels of each label, `[num_labels]` int64, where `mask` is not 0."""
    counts = np.zeros(num_labels, dtype=np.int64)
    rows = max(1, EXACT_FLOAT32 // labels.shape[1])
    for top in range(0, len(labels), rows):
        part = slice(top, top + rows)
        counts += cv2.calcHist([labels[part]], [0], mask[part], [num_labels], [0, num_labels]).ravel().astype(np.int64)
    return counts
