from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.masks import bits
from moduseg.retrieval import suppress as module
from moduseg.retrieval.suppress import suppress
from tests import reference


def bars(*spans: tuple[int, int], width: int = 20) -> torch.Tensor:
    """`[N, 3, width]` bool: one horizontal bar a mask, from the first to before the second column."""
    columns = torch.arange(width)
    return torch.stack([((columns >= a) & (columns < b)).expand(3, width) for a, b in spans])


@pytest.mark.parametrize(
    ("spans", "labels", "scores", "threshold", "kept"),
    [
        pytest.param([(0, 10), (0, 9)], [1, 1], [0.5, 0.9], 0.4, [1], id="the lower score goes"),
        pytest.param([(0, 10), (0, 9)], [1, 2], [0.5, 0.9], 0.4, [1, 0], id="labels do not meet"),
        pytest.param([(0, 10), (0, 9)], [0, 0], [0.5, 0.9], 0.4, [1], id="background is suppressed too"),
        pytest.param([(0, 10), (0, 4)], [1, 1], [0.9, 0.5], 0.4, [0, 1], id="IoU equal to the threshold stays"),
        pytest.param([(0, 10), (0, 5)], [1, 1], [0.9, 0.5], 0.4, [0], id="IoU above the threshold goes"),
        pytest.param([(0, 9), (0, 10)], [1, 1], [0.5, 0.5], 0.4, [0], id="equal scores by index"),
        pytest.param(
            [(6, 16), (3, 13), (0, 10)], [1, 1, 1], [0.1, 0.2, 0.3], 0.4, [2, 0], id="only kept masks suppress"
        ),
        pytest.param([(0, 5), (0, 5)], [1, 1], [0.9, 0.5], 1.0, [0, 1], id="threshold 1 keeps all"),
        pytest.param(
            [(0, 5), (4, 9), (9, 12)], [1, 1, 1], [0.9, 0.5, 0.7], 0.0, [0, 2], id="threshold 0 wants disjoint"
        ),
        pytest.param(
            [(3, 3), (3, 3), (0, 5)], [1, 1, 1], [0.2, 0.3, 0.1], 0.0, [1, 0, 2], id="empty masks meet nothing"
        ),
        pytest.param([(2, 7)], [3], [0.5], 0.4, [0], id="one"),
    ],
)
def test_by_hand(
    spans: list[tuple[int, int]],
    labels: list[int],
    scores: list[float],
    threshold: float,
    kept: list[int],
    device: torch.device,
) -> None:
    found = suppress(
        bars(*spans).to(device), torch.tensor(labels, device=device), torch.tensor(scores, device=device), threshold
    )
    assert found.dtype == torch.int64
    assert found.tolist() == kept


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize(("packed", "block"), [(True, 1 << 22), (True, 500), (False, 1 << 22), (False, 500)])
def test_equals_pairwise_loop(
    threshold: float,
    classes: int,
    packed: bool,
    block: int,
    device: torch.device,
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both ways on the CPU: as bits, and with the matrix products of the other devices."""
    monkeypatch.setattr(module, "_BLOCK", block)
    monkeypatch.setattr(bits, "_PAIR_WORDS", block)
    monkeypatch.setattr(module, "PACKED", ("cpu",) if packed else ())
    masks = reference.random_masks(rng, 40, 47, 61)
    masks[5], masks[11], masks[12] = False, masks[3], True
    labels, scores = rng.integers(0, classes, 40), rng.integers(0, 12, 40) / 12  # with equal scores
    found = suppress(*(torch.from_numpy(array).to(device) for array in (masks, labels, scores)), threshold)
    assert found.tolist() == reference.suppress(masks, labels, scores, threshold)


@pytest.mark.parametrize("turned", [False, True])
def test_boxes_that_meet_in_one_line(turned: bool, device: torch.device) -> None:
    masks = torch.zeros((4, 6, 9), dtype=torch.bool, device=device)
    masks[0, 0:3, 2], masks[1, 2:6, 2] = True, True  # one shared pixel of six
    masks[2, 5, 8], masks[3, 5, 8] = True, True  # the same pixel, in the corner
    if turned:
        masks = masks.permute(0, 2, 1)
    labels, scores = torch.ones(4, dtype=torch.int64, device=device), torch.arange(4, 0, -1, device=device) / 4
    assert suppress(masks, labels, scores, 0.1).tolist() == [0, 2]
    assert suppress(masks, labels, scores, 0.2).tolist() == [0, 1, 2]


def test_disjoint_masks_all_stay(device: torch.device) -> None:
    found = suppress(
        bars((0, 5), (5, 9), (9, 20)).to(device),
        torch.zeros(3, dtype=torch.int64, device=device),
        torch.tensor([0.1, 0.3, 0.2], device=device),
        0.0,
    )
    assert found.tolist() == [1, 2, 0]


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5)])
def test_without_masks_or_pixels(shape: tuple[int, int, int], device: torch.device) -> None:
    count = shape[0]
    masks = torch.zeros(shape, dtype=torch.bool, device=device)
    found = suppress(
        masks, torch.zeros(count, dtype=torch.int64, device=device), torch.zeros(count, device=device), 0.4
    )
    assert found.tolist() == list(range(count))


def test_bad_values() -> None:
    masks, labels, scores = bars((0, 5), (5, 9)), torch.tensor([1, 2]), torch.tensor([0.1, 0.2])
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="iou_threshold: got"):
            suppress(masks, labels, scores, threshold)
    with pytest.raises(ValueError, match="masks: got"):
        suppress(masks.float(), labels, scores, 0.4)
    with pytest.raises(ValueError, match=r"labels: got \(1,\)"):
        suppress(masks, labels[:1], scores, 0.4)
    with pytest.raises(ValueError, match=r"scores: got \(1,\)"):
        suppress(masks, labels, scores[:1], 0.4)
    with pytest.raises(ValueError, match="expected integers"):
        suppress(masks, labels.float(), scores, 0.4)
