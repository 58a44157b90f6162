"""Which proposal a person means who points at a pixel."""

from __future__ import annotations

import cv2
import numpy as np
import torch

from moduseg.structures import Prediction


def find_region_at(prediction: Prediction, x: float, y: float, *, is_majority: bool = False) -> int | None:
    """Return the proposal that a person means at a pixel.

    It is the best-scored one of those that cover the pixel and have the label that is seen there. Where proposals vote
    together for each pixel, many of them do: it is the one that fits the visible region of that label best (by IoU).
    Where background is seen, nothing is painted, and it is the one whose outline its proposer trusts most; of equal
    ones the smallest.

    Args:
        prediction: of one image.
        x, y: in pixels; `(0, 0)` is the top left corner.
        is_majority: whether each pixel has the label of most proposals that cover it (`retrieval.selection`).

    Returns:
        The index of the proposal; `None` outside the image and where no proposal is.
    """
    height, width = prediction.label_map.shape
    column, row = int(np.floor(x)), int(np.floor(y))
    if not (0 <= column < width and 0 <= row < height):
        return None
    masks = prediction.proposals.masks
    covering = masks[:, row, column].nonzero()[:, 0].cpu()
    if not len(covering):
        return None
    label = int(prediction.label_map[row, column])
    agreeing = covering[prediction.labels[covering] == label]
    if label and len(agreeing):
        if is_majority:
            visible = torch.from_numpy(_find_component(prediction.label_map == label, column, row)).to(masks.device)
            # One mask at a time: all of them, of a large photograph, would take gigabytes.
            shared = torch.stack([(masks[index] & visible).sum() for index in agreeing.tolist()]).cpu()
            union = prediction.proposals.areas.cpu()[agreeing] + int(visible.sum()) - shared
            return int(agreeing[int((shared / union).argmax())])
        # Proposals are kept, and painted, in descending score: the first one is visible.
        visible_first = prediction.kept[torch.isin(prediction.kept, agreeing)]
        return int(visible_first[0] if len(visible_first) else agreeing[int(prediction.scores[agreeing].argmax())])
    candidates = agreeing if len(agreeing) else covering
    areas, quality = prediction.proposals.areas.cpu(), prediction.proposals.quality.cpu()
    return min(candidates.tolist(), key=lambda index: (-float(quality[index]), int(areas[index]), index))


def _find_component(region: np.ndarray, column: int, row: int) -> np.ndarray:
    """Return the connected part of a `[H, W]` bool region that holds a pixel."""
    _, numbers = cv2.connectedComponents(region.astype(np.uint8), connectivity=8)
    return np.asarray(numbers == numbers[row, column])
