"""Score maps aligned with the edges of the image: PAMR (Araslanov & Roth, CVPR 2020) and PAR (Ru et al., CVPR 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

DILATIONS = (1, 2, 4, 8, 12, 24)
"""Distances of the eight neighbours that a pixel has at each dilation, in pixels, as both papers use them."""
_TINY = 1e-8


def pamr(maps: Tensor, image: Tensor, dilations: Sequence[int] = DILATIONS, iterations: int = 10) -> Tensor:
    """Refine score maps by pixel-adaptive mask refinement.

    Args:
        maps: `[S, H, W]` float, the scores of each label, background among them.
        image: `[3, H, W]` float, of any range: differences are measured in local deviations.
        dilations: of the neighbourhood.
        iterations: how often every pixel takes the mean of its neighbours.

    Returns:
        `[S, H, W]`, convex combinations of `maps`.

    Raises:
        ValueError: another size of image, no dilation or one below 1, or a negative number of iterations.
    """
    _check_arguments(maps, image, dilations, iterations)
    return _diffuse(maps, compute_pamr_affinity(image, dilations), dilations, iterations)


def par(maps: Tensor, image: Tensor, dilations: Sequence[int] = DILATIONS, iterations: int = 10) -> Tensor:
    """Refine score maps by pixel-adaptive refinement, whose weights count positions as well.

    Arguments, result and errors are those of `pamr`.
    """
    _check_arguments(maps, image, dilations, iterations)
    return _diffuse(maps, compute_par_affinity(image, dilations), dilations, iterations)


def compute_pamr_affinity(image: Tensor, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """Return weights of each pixel's neighbours, `[8 * len(dilations), H, W]`, which sum to 1.

    The softmax over neighbours `j` of the mean over channels of `-|I_i - I_j| / (0.1 std_i)`, `std_i` the deviation
    of the channel in the neighbourhood (the factor 0.1 is that of the published code).
    """
    deviation = _measure_deviation(image, dilations)
    logits = [-((image - n).abs() / (0.1 * deviation + _TINY)).mean(0) for n in _shift_to_neighbours(image, dilations)]
    return torch.stack(logits).softmax(0)


def compute_par_affinity(
    image: Tensor,
    dilations: Sequence[int] = DILATIONS,
    *,
    colour_scale: float = 0.3,
    position_scale: float = 0.3,
    position_weight: float = 0.01,
) -> Tensor:
    """Return weights of each pixel's neighbours, `[8 * len(dilations), H, W]`, which sum to 1.

    `softmax(-(|I_i - I_j| / (colour_scale * std_i))^2) + position_weight * softmax(-(|P_i - P_j| / (position_scale *
    std_P))^2)`, `I` the intensities and `P` the positions, divided by `1 + position_weight`, which changes no label.
    """
    deviation = _measure_deviation(image, dilations)
    squares = [
        ((image - n) / (colour_scale * deviation + _TINY)).square().mean(0)
        for n in _shift_to_neighbours(image, dilations)
    ]
    steps = torch.tensor(_list_offsets(dilations), dtype=image.dtype, device=image.device)
    distance = steps.square().sum(1).sqrt()
    # One dilation alone has two distances; a single deviation serves all pixels.
    position_affinity = (-(distance / (position_scale * distance.std() + _TINY)).square()).softmax(0)
    colour_affinity = (-torch.stack(squares)).softmax(0)
    return (colour_affinity + position_weight * position_affinity[:, None, None]) / (1 + position_weight)


def _diffuse(maps: Tensor, weights: Tensor, dilations: Sequence[int], iterations: int) -> Tensor:
    """Replace every pixel by the weighted mean of its neighbours, several times."""
    for _ in range(iterations):
        total = torch.zeros_like(maps)
        # One neighbour at a time over all pixels: memory stays that of the maps.
        for weight, neighbour in zip(weights, _shift_to_neighbours(maps, dilations), strict=True):
            total.addcmul_(weight.to(maps.dtype), neighbour)
        maps = total
    return maps


def _measure_deviation(image: Tensor, dilations: Sequence[int]) -> Tensor:
    """Return the standard deviation `[C, H, W]` of each pixel and its neighbours."""
    count = 1 + 8 * len(dilations)
    mean = image / count
    for neighbour in _shift_to_neighbours(image, dilations):
        mean = mean + neighbour / count
    squares = (image - mean).square()
    for neighbour in _shift_to_neighbours(image, dilations):
        squares = squares + (neighbour - mean).square()
    return (squares / (count - 1)).sqrt()


def _list_offsets(dilations: Sequence[int]) -> list[tuple[int, int]]:
    """Return the `(y, x)` offsets of a pixel's neighbours."""
    return [(d * y, d * x) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]


def _shift_to_neighbours(maps: Tensor, dilations: Sequence[int]) -> list[Tensor]:
    """Return `maps` `[C, H, W]` shifted to each neighbour, the border repeated; views of one tensor."""
    reach, (height, width) = max(dilations), maps.shape[1:]
    padded = F.pad(maps[None], (reach,) * 4, mode="replicate")[0]
    return [padded[:, reach + y :, reach + x :][:, :height, :width] for y, x in _list_offsets(dilations)]


def _check_arguments(maps: Tensor, image: Tensor, dilations: Sequence[int], iterations: int) -> None:
    """Raise `ValueError` for arguments that `pamr` and `par` do not accept."""
    if maps.ndim != 3 or image.ndim != 3 or maps.shape[1:] != image.shape[1:]:
        raise ValueError(f"image: got {tuple(image.shape)}, expected [C, H, W] of the maps' {tuple(maps.shape)}")
    if not dilations or min(dilations) < 1:
        raise ValueError(f"dilations: got {list(dilations)}, expected numbers >= 1; try {list(DILATIONS)}")
    if iterations < 0:
        raise ValueError(f"iterations: got {iterations}, expected 0 or more; the papers use 10")
