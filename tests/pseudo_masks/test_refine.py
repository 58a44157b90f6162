"""Pixel-adaptive refinement: what it must leave alone, what it must draw to an edge, and a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moduseg.pseudo_masks.refine import DILATIONS, compute_pamr_affinity, compute_par_affinity, pamr, par

BOTH = pytest.mark.parametrize(("refine", "affinity"), [(pamr, compute_pamr_affinity), (par, compute_par_affinity)])
Refine = Callable[..., torch.Tensor]


def picture(device: torch.device, height: int = 12, width: int = 17) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(1)).to(device)


@BOTH
def test_rows_sum_to_one(refine: Refine, affinity: Refine, device: torch.device) -> None:
    for image in (picture(device), torch.full((3, 12, 17), 0.3, device=device), picture(device, 1, 1)):
        weights = affinity(image)
        assert weights.shape == (8 * len(DILATIONS), *image.shape[1:])
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(0), torch.ones(image.shape[1:], device=device))


@BOTH
def test_constants_stay(refine: Refine, affinity: Refine, device: torch.device) -> None:
    """Constant scores under any image; any scores keep their mean order of magnitude under a constant image."""
    constant = torch.tensor([0.2, 0.7, 0.1], device=device)[:, None, None].expand(3, 12, 17)
    torch.testing.assert_close(refine(constant, picture(device)), constant)
    scores = picture(device)
    smooth = refine(scores, torch.full((3, 12, 17), 0.3, device=device))
    assert smooth.amin() >= scores.amin()
    assert smooth.amax() <= scores.amax()
    assert smooth.std() < scores.std()
    assert torch.equal(refine(scores, picture(device), iterations=0), scores)


@BOTH
def test_sums_stay(refine: Refine, affinity: Refine, device: torch.device) -> None:
    scores = picture(device).softmax(0)
    torch.testing.assert_close(refine(scores, picture(device)).sum(0), torch.ones(12, 17, device=device))


@BOTH
def test_edges_attract(refine: Refine, affinity: Refine, device: torch.device) -> None:
    """A label that reaches over the object's edge, and one that falls short of it, end at the edge."""
    image = torch.full((3, 32, 32), 0.2, device=device)
    image[:, :, 16:] = 0.8
    image += 0.01 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    truth = torch.arange(32, device=device).expand(32, -1) >= 16
    for start in (12, 20):
        scores = (torch.arange(32, device=device).expand(32, -1) >= start).float()
        refined = refine(torch.stack([1 - scores, scores]), image, (1, 2, 4), 20).argmax(0).bool()
        before, after = ((x.bool() == truth).float().mean() for x in (scores, refined))
        assert after > before
        assert after > 0.97


@BOTH
def test_one_step_by_a_plain_loop(refine: Refine, affinity: Refine, device: torch.device) -> None:
    image, scores, dilations = picture(device, 6, 5), picture(device, 6, 5)[:2], (1, 3)
    refined = refine(scores, image, dilations, 1)
    steps = [(d * y, d * x) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]
    distance = np.array([np.hypot(*s) for s in steps])
    proximity = np.exp(-((distance / (0.3 * distance.std(ddof=1))) ** 2))
    pixels, values = image.cpu().double().numpy(), scores.cpu().double().numpy()
    for y in range(6):
        for x in range(5):
            neighbours = [(min(max(y + a, 0), 5), min(max(x + b, 0), 4)) for a, b in steps]
            around = np.stack([pixels[:, p, q] for p, q in neighbours])
            centre = pixels[:, y, x]
            deviation = np.concatenate([around, centre[None]]).std(0, ddof=1)
            if refine is pamr:
                weights = np.exp(-(np.abs(around - centre) / (0.1 * deviation)).mean(1))
                weights /= weights.sum()
            else:
                weights = np.exp(-(((around - centre) / (0.3 * deviation)) ** 2).mean(1))
                weights = (weights / weights.sum() + 0.01 * proximity / proximity.sum()) / 1.01
            expected = sum(w * values[:, p, q] for w, (p, q) in zip(weights, neighbours, strict=True))
            np.testing.assert_allclose(refined[:, y, x].cpu().numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 4), torch.zeros(3, 4, 3)), r"image: got \(3, 4, 3\)"),
        ((torch.zeros(2, 3, 4), torch.zeros(3, 3, 4), ()), r"dilations: got \[\]"),
        ((torch.zeros(2, 3, 4), torch.zeros(3, 3, 4), (1, 0)), r"dilations: got \[1, 0\]"),
        ((torch.zeros(2, 3, 4), torch.zeros(3, 3, 4), (1,), -1), r"iterations: got -1"),
    ],
)
def test_mistakes(arguments: tuple[Any, ...], message: str) -> None:
    for refine in (pamr, par):
        with pytest.raises(ValueError, match=message):
            refine(*arguments)
