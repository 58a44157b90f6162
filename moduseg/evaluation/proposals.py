"""Quality of proposals: recall of the objects at an IoU, and mean best IoU."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

from moduseg.structures import IGNORE_INDEX

_CHUNK = 256
"""Number of proposals compared at once, because their float copies would fill the memory otherwise."""


def find_objects(
    semantic: np.ndarray, min_area: int = 100, instances: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the objects of one image.

    Args:
        semantic: `[H, W]` uint8 label map; 0 and 255 hold no object.
        min_area: smaller objects are dropped, in pixels.
        instances: `[H, W]` object ids, 0 none; `None` takes the connected components of each class, pixels being
            neighbours across corners too (8-connectivity).

    Returns:
        `class_ids` `[M]` int64 ascending (an instance has the class of most of its pixels, the smaller of equals), and
        `masks` `[M, H, W]` bool.

    Raises:
        ValueError: maps of different sizes.
    """
    if instances is not None and instances.shape != semantic.shape:
        raise ValueError(f"instances: got {instances.shape}, expected the label map's {semantic.shape}")
    objects: list[tuple[int, np.ndarray]] = []
    if instances is not None:
        for instance in np.unique(instances[instances > 0]):
            mask = instances == instance
            votes = np.bincount(semantic[mask], minlength=256)
            votes[[0, IGNORE_INDEX]] = 0
            if votes.any() and int(mask.sum()) >= min_area:
                objects.append((int(votes.argmax()), mask))
    else:
        for class_id in np.unique(semantic[(semantic > 0) & (semantic != IGNORE_INDEX)]):
            mask = (semantic == class_id).astype(np.uint8)
            num_components, components, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
            objects += [
                (int(class_id), components == i)
                for i in range(1, num_components)
                if stats[i, cv2.CC_STAT_AREA] >= min_area
            ]
    objects.sort(key=lambda entry: entry[0])
    masks = np.stack([mask for _, mask in objects]) if objects else np.zeros((0, *semantic.shape), dtype=bool)
    return np.array([class_id for class_id, _ in objects], dtype=np.int64), masks


def measure_ious(objects: Tensor, proposals: Tensor, ignore: Tensor | None = None) -> Tensor:
    """Return the IoU of each object with each proposal.

    Args:
        objects: `[M, H, W]` bool.
        proposals: `[N, H, W]` bool, on the same device.
        ignore: `[H, W]` bool, pixels that count for neither, or `None`.

    Returns:
        `[M, N]` float32 in [0, 1].

    Raises:
        ValueError: masks of different sizes.
    """
    if objects.shape[1:] != proposals.shape[1:]:
        raise ValueError(f"proposals: got masks {tuple(proposals.shape[1:])}, expected {tuple(objects.shape[1:])}")
    ious = torch.zeros(len(objects), len(proposals), dtype=torch.float32, device=objects.device)
    if len(objects) == 0 or len(proposals) == 0:
        return ious
    is_counted = torch.ones_like(objects[:1]) if ignore is None else ~ignore[None]
    # float32 counts pixels exactly up to 2^24, far above the size of one object. The last row counts whole proposals.
    rows = torch.cat((objects & is_counted, is_counted)).flatten(1).float()
    object_areas = rows[:-1].sum(1)
    for columns, chunk in zip(ious.split(_CHUNK, dim=1), proposals.split(_CHUNK), strict=True):
        products = rows @ chunk.flatten(1).float().T
        intersections, proposal_areas = products[:-1], products[-1]
        unions = object_areas[:, None] + proposal_areas[None] - intersections
        columns.copy_(intersections / unions.clamp(min=1))
    return ious


def best_ious(objects: Tensor, proposals: Tensor, ignore: Tensor | None = None) -> Tensor:
    """Return for each object the IoU of the proposal that fits it best; arguments as `measure_ious`.

    Returns:
        `[M]` float32 in [0, 1]; 0 where there is no proposal.

    Raises:
        ValueError: masks of different sizes.
    """
    ious = measure_ious(objects, proposals, ignore)
    return ious.amax(1) if len(proposals) else ious.new_zeros(len(objects))


class ProposalQuality:
    """Collects how well proposals cover the objects of many images.

    Args:
        threshold: an object is found from this IoU on.
        min_area: smaller objects are dropped, in pixels.
    """

    def __init__(self, threshold: float = 0.5, min_area: int = 100) -> None:
        if not 0 < threshold <= 1 or min_area < 1:
            raise ValueError(f"threshold, min_area: got {threshold}, {min_area}, expected in (0, 1] and >= 1")
        self.threshold = threshold
        self.min_area = min_area
        self.num_images = 0
        self.num_proposals = 0
        self._best: list[Tensor] = []
        self._classes: list[np.ndarray] = []

    def update(self, semantic: np.ndarray, proposals: Tensor, instances: np.ndarray | None = None) -> Tensor:
        """Add one image; arguments as `find_objects` and `best_ious`, pixels of 255 ignored.

        Returns:
            `[M]` float32, the best IoU of each object.
        """
        class_ids, masks = find_objects(semantic, self.min_area, instances)
        device = proposals.device
        ignore = torch.from_numpy(semantic == IGNORE_INDEX).to(device)
        best = best_ious(torch.from_numpy(masks).to(device), proposals, ignore)
        self.num_images += 1
        self.num_proposals += len(proposals)
        self._best.append(best)
        self._classes.append(class_ids)
        return best

    def summary(self) -> dict[str, float | int | None]:
        """Return `recall` and `mean_best_iou` in percent (`None` without objects), counts, and the settings."""
        best = torch.cat([b.cpu() for b in self._best]) if self._best else torch.empty(0)
        has_objects = best.numel() > 0
        return {
            "recall": 100.0 * float((best >= self.threshold).double().mean()) if has_objects else None,
            "mean_best_iou": 100.0 * float(best.double().mean()) if has_objects else None,
            "objects": best.numel(),
            "images": self.num_images,
            "proposals_per_image": self.num_proposals / self.num_images if self.num_images else 0.0,
            "threshold": self.threshold,
            "min_area": self.min_area,
        }

    def recall_per_class(self) -> dict[int, float]:
        """Return the recall in percent of each class that has an object, by ascending class id."""
        if not self._best:
            return {}
        is_found = torch.cat([b.cpu() for b in self._best]).numpy() >= self.threshold
        classes = np.concatenate(self._classes)
        return {int(c): 100.0 * float(is_found[classes == c].mean()) for c in np.unique(classes)}
