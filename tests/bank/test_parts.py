"""Proposals that lie in one class of a pseudo mask are regions of that class."""

from __future__ import annotations

import pytest
import torch

from moduseg.bank.parts import MIN_AREA, find_parts


def make_mask(top: int, bottom: int, left: int = 0, right: int = 40) -> torch.Tensor:
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def test_what_lies_in_one_class_is_a_part(device: torch.device) -> None:
    label_map = torch.zeros(40, 40, dtype=torch.uint8)
    label_map[20:], label_map[36:] = 7, 255
    masks = torch.stack(
        [
            make_mask(20, 32),  # of class 7
            make_mask(0, 12),  # background
            make_mask(18, 30),  # 10 of 12 rows of class 7: 83 %
            make_mask(16, 28),  # 8 of 12 rows
            make_mask(20, 27),  # below MIN_AREA
            make_mask(28, 40),  # ignored pixels count against it: 8 of 12 rows
        ]
    )
    assert masks[4].sum() < MIN_AREA <= masks[0].sum()
    labels, parts = find_parts(label_map.to(device), masks.to(device))
    assert labels.tolist() == [7, 0, 7]
    assert labels.dtype == torch.int64
    assert torch.equal(parts.cpu(), masks[:3])


@pytest.mark.parametrize(
    ("value", "count"), [pytest.param(255, 3, id="all ignored"), pytest.param(0, 0, id="no proposals")]
)
def test_nothing_gives_no_parts(value: int, count: int) -> None:
    labels, parts = find_parts(torch.full((40, 40), value, dtype=torch.uint8), make_mask(0, 40).expand(count, 40, 40))
    assert len(labels) == len(parts) == 0


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"find_parts: got masks \(40, 40\)"):
        find_parts(torch.zeros(20, 40, dtype=torch.uint8), make_mask(0, 9)[None])
