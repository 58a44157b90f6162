"""Where class tokens may start: at what the patches of their class look like, found from tags alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from moduseg.pseudo_masks.cam import Moments
from moduseg.pseudo_masks.class_token_model import MultiClassTokenViT

TaggedPixels = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Starts a pass over the training images: `[1, 3, H, W]` normalised pixels, and tags `[C]` bool."""
_RIDGE = 1.0


@torch.no_grad()
def find_prototypes(model: MultiClassTokenViT, images: TaggedPixels, share: float) -> Tensor:
    """Return the mean of each class's patches at the place where class tokens join them.

    Which patches are a class's follows from the tags: a ridge regression of the tags on the images' mean patches after
    the last block, as in a class activation map, gives each patch a score, and in every image that has the class the
    best ones count. A token that looks like a patch of its class attends to such patches before it has learned
    anything, since a transformer's patches attend to those that are like them.

    Args:
        model: in evaluation mode; its class tokens are not used.
        images: of the fit; two passes are made.
        share: of an image's patches that stand for a class, above 0 and up to 1.

    Returns:
        `[C, D]`; zeros for a class that no image has.
    """
    moments = Moments()
    for pixels, tags in images():
        patches = _encode(model, pixels)[1]
        moments.add(patches.mean(0, keepdim=True), tags[None].to(patches))
    weights, mean = moments.regress(_RIDGE), moments.mean
    sums, counts = mean.new_zeros(weights.shape), mean.new_zeros(len(weights))
    for pixels, tags in images():
        joined, patches = _encode(model, pixels)
        rows = tags.to(mean.device).nonzero()[:, 0]
        scores = (patches - mean.to(patches)) @ weights[rows].to(patches).T
        best = scores.topk(max(1, round(share * len(patches))), dim=0).indices
        sums[rows] += joined[best].mean(0).to(sums)
        counts[rows] += 1
    return (sums / counts.clamp(min=1)[:, None]).float()


def _encode(model: MultiClassTokenViT, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return an image's patches where class tokens join them, and after the last block, `[N, D]` float32 each."""
    joined, _ = model.embed_patches(pixels)
    patches = joined
    for block in model.blocks[model.settings.class_block :]:
        patches = block(patches)
    return joined[0].float(), F.layer_norm(patches[0].float(), patches.shape[2:])
