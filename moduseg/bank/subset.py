"""Fewer training images, chosen after the bank is stored: what a smaller set would have given, and no model runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def rows_of_images_per_class(
    labels: Tensor, image_index: Tensor, image_ids: Sequence[str], images_per_class: int, seed: int
) -> Tensor:
    """Rows of the bank that come from `images_per_class` images of each class (paper, ablation of images per class).

    The seed puts all images into one order; each foreground class takes the first images of it that gave the bank a
    vector of this class. Chosen images count whole, as a training set of these images would: their other classes and
    their background stay, so a class that often comes with others has more. A larger number keeps every image of a
    smaller one. The order hashes seed and id, so it depends on no other image and no library's random numbers.

    Args:
        labels: `[B]` int64, 0 background.
        image_index: `[B]` int64, into `image_ids`.
        image_ids: the training images.
        images_per_class: at least 1; a class with fewer images keeps all.
        seed: of the order.

    Returns:
        `[M]` int64, ascending. Empty where the bank has no foreground.

    Raises:
        ValueError: fewer than 1 image.
    """
    if images_per_class < 1:
        raise ValueError(f"images_per_class: got {images_per_class}, expected 1 or more; null keeps all")
    places = [hashlib.sha256(f"{seed}:{image_id}".encode()).digest() for image_id in image_ids]
    rank = torch.empty(len(image_ids), dtype=torch.int64)
    rank[sorted(range(len(image_ids)), key=places.__getitem__)] = torch.arange(len(image_ids))
    rank = rank.to(labels.device)
    chosen = torch.zeros(len(image_ids), dtype=torch.bool, device=labels.device)
    for label in labels.unique().tolist():
        if label:
            images = image_index[labels == label].unique()
            chosen[images[rank[images].argsort()[:images_per_class]]] = True
    return torch.nonzero(chosen[image_index]).flatten()
