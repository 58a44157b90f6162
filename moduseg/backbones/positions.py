"""How a ViT's learned positions are resampled to another grid than the trained one.

timm always antialiases, as DINOv2 with registers was published; DINO and DINOv2 without registers were published
without. The two differ on every grid but the trained one, larger grids included: PyTorch's bicubic kernel has a = -0.5
with antialiasing and a = -0.75 without, and only with it is it widened where the grid shrinks. (Meta's own code also
adds a tenth of a patch to the size of the grid; transformers does not, and neither do we.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moduseg.errors import ConfigError


def check_positions(model: Any, name: str) -> None:
    """Raise an error unless a model has learned positions that `resample_positions` can change.

    Args:
        model: a timm model.
        name: of the model, for messages.

    Raises:
        ConfigError: it has none.
    """
    learned = isinstance(getattr(model, "pos_embed", None), nn.Parameter)
    if not (learned and hasattr(model, "no_embed_class") and hasattr(getattr(model, "patch_embed", None), "grid_size")):
        raise ConfigError(
            f"backbone.antialias: got a value for {name!r}, which has no learned table of positions that is resampled, "
            "expected none; try backbone.antialias=null"
        )


@contextmanager
def resample_positions(model: Any, grid: tuple[int, int], antialias: bool) -> Iterator[None]:
    """Give a timm ViT bicubically resampled positions for another grid while the context lasts.

    Args:
        model: one that `check_positions` accepts.
        grid: rows and columns of patches of the images to come.
        antialias: whether the kernel is widened where the grid shrinks; the module's docstring says who does it.
    """
    table, trained = model.pos_embed, tuple(model.patch_embed.grid_size)
    if grid == trained:
        yield
        return
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    positions = table[:, prefix:].float().unflatten(1, trained).permute(0, 3, 1, 2)
    positions = F.interpolate(positions, size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    resampled = torch.cat([table[:, :prefix], positions.flatten(2).mT.to(table.dtype)], dim=1)
    # timm does not resample positions that are on the grid of the images.
    model.pos_embed, model.patch_embed.grid_size = nn.Parameter(resampled, requires_grad=False), grid
    try:
        yield
    finally:
        model.pos_embed, model.patch_embed.grid_size = table, trained
