from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.retrieval.assemble import assemble, assemble_id_map


def test_no_proposals_is_background(device: torch.device) -> None:
    label_map, kept = assemble(
        torch.zeros((0, 4, 6), dtype=torch.bool, device=device),
        torch.zeros(0, dtype=torch.int64, device=device),
        torch.zeros(0, device=device),
        0.4,
    )
    assert label_map.shape == (4, 6)
    assert label_map.dtype == torch.uint8
    assert not label_map.any()
    assert kept.tolist() == []


def test_background_proposals_are_kept_but_paint_nothing(device: torch.device) -> None:
    masks = torch.ones((2, 3, 3), dtype=torch.bool, device=device)
    label_map, kept = assemble(masks, torch.tensor([0, 2], device=device), torch.tensor([0.9, 0.1], device=device), 0.4)
    assert kept.tolist() == [0, 1]
    assert (label_map == 2).all()


def test_disjoint_proposals_as_a_map_of_ids(device: torch.device, rng: np.random.Generator) -> None:
    ids = torch.from_numpy(np.kron(rng.integers(-1, 6, (8, 11)), np.ones((5, 4), int))).to(device)
    masks = ids == torch.arange(7, device=device)[:, None, None]  # the last is empty
    labels = torch.from_numpy(rng.integers(0, 4, 7)).to(device)
    scores = torch.tensor([0.5, 0.9, 0.5, 0.1, 0.9, 0.3, 0.2], device=device)
    for threshold in (0.0, 0.4):
        expected, kept = assemble(masks, labels, scores, threshold)
        label_map, order = assemble_id_map(ids, labels, scores)
        assert torch.equal(label_map, expected)
        assert order.tolist() == kept.tolist() == [1, 4, 0, 2, 5, 6, 3]
    with pytest.raises(ValueError, match=r"scores \(6,\), expected"):
        assemble_id_map(ids, labels, scores[:6])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"labels": torch.tensor([255, 256])}, r"expected 0\.\.254", id="labels"),
        pytest.param({"scores": torch.tensor([0.1])}, r"scores: got \(1,\)", id="scores"),
        pytest.param({"masks": torch.ones(2, 3, 3)}, "masks: got", id="masks"),
        pytest.param({"nms_iou": 1.5}, "iou_threshold: got 1.5", id="threshold"),
    ],
)
def test_assemble_checks_what_its_parts_check(change: dict[str, object], message: str) -> None:
    arguments = {
        "masks": torch.ones((2, 3, 3), dtype=torch.bool),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.1, 0.2]),
        "nms_iou": 0.4,
    }
    with pytest.raises(ValueError, match=message):
        assemble(**{**arguments, **change})  # type: ignore[arg-type]
