"""Choose fewer training images after the bank is stored: what a smaller set would give, without running a model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def choose_rows(
    labels: Tensor, image_index: Tensor, image_ids: Sequence[str], images_per_class: int, seed: int
) -> Tensor:
    """Return the rows of the bank that come from `images_per_class` images of each class (an ablation of the paper).

    The seed orders all images; each foreground class takes the first images in that order that gave the bank a vector
    of this class. All vectors of a chosen image stay, as in a training set of these images: its other classes and its
    background too, so a class that often comes with others has more. A larger number keeps every image of a smaller
    one. The order hashes seed and id, so it depends on no other image and no library's random numbers.

    Args:
        labels: `[B]` int64, 0 background.
        image_index: `[B]` int64, into `image_ids`.
        image_ids: the training images.
        images_per_class: at least 1; a class with fewer images keeps all.
        seed: seed of the order.

    Returns:
        `[M]` int64, ascending. Empty where the bank has no foreground.

    Raises:
        ValueError: fewer than 1 image.
    """
    if images_per_class < 1:
        raise ValueError(f"images_per_class: got {images_per_class}, expected 1 or more; null keeps all")
    digests = [hashlib.sha256(f"{seed}:{image_id}".encode()).digest() for image_id in image_ids]
    rank = torch.empty(len(image_ids), dtype=torch.int64)
    rank[sorted(range(len(image_ids)), key=digests.__getitem__)] = torch.arange(len(image_ids))
    rank = rank.to(labels.device)
    is_chosen = torch.zeros(len(image_ids), dtype=torch.bool, device=labels.device)
    for label in labels.unique().tolist():
        if label:
            images = image_index[labels == label].unique()
            is_chosen[images[rank[images].argsort()[:images_per_class]]] = True
    return torch.nonzero(is_chosen[image_index]).flatten()
