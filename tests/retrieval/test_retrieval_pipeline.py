from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moduseg.retrieval.pipeline import assemble, assemble_id_map, label_proposals
from tests import reference


@pytest.mark.parametrize("index", range(4))
def test_golden(index: int, device: torch.device) -> None:
    golden = reference.load_golden(f"retrieval_{index}")
    arrays = reference.tensors(golden, device)
    large = (arrays["masks"].flatten(1).sum(1) >= int(golden["min_area"])).nonzero()[:, 0]
    masks = arrays["masks"][large]
    labels, scores, _, _ = label_proposals(
        arrays["queries"][large], None, arrays["bank_vectors"], arrays["bank_labels"], int(golden["top_k"])
    )
    label_map, kept = assemble(masks, labels, scores, float(golden["nms_iou"]))
    assert torch.equal(large[kept], arrays["kept_proposals"])
    assert torch.equal(labels[kept], arrays["kept_labels"])
    torch.testing.assert_close(scores[kept], arrays["kept_scores"], atol=1e-5, rtol=0)
    assert torch.equal(label_map, arrays["label_map"])


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("top_k", [1, 5, 100])
def test_equals_plain_steps(centred: bool, top_k: int, device: torch.device, rng: np.random.Generator) -> None:
    masks = reference.random_masks(rng, 20, 40, 50)
    pooled = rng.normal(size=(20, 8)).astype(np.float32) + 0.5
    pooled[3] = 0
    centre = rng.normal(size=8).astype(np.float32) if centred else np.zeros(8, np.float32)
    bank, bank_labels = rng.normal(size=(60, 8)).astype(np.float32), rng.integers(0, 5, 60)
    expected = [
        (0, 0.0) if not vector.any() else vote_of(vector - centre, bank, bank_labels, top_k) for vector in pooled
    ]
    expected_labels, expected_scores = (np.array(values) for values in zip(*expected, strict=True))
    kept = reference.suppress(masks, expected_labels, expected_scores, 0.4)

    labels, scores, neighbours, similarities = label_proposals(
        torch.from_numpy(pooled).to(device),
        torch.from_numpy(centre).to(device) if centred else None,
        F.normalize(torch.from_numpy(bank).to(device), dim=1),
        torch.from_numpy(bank_labels).to(device),
        top_k,
    )
    assert neighbours.shape == similarities.shape == (20, min(top_k, 60))
    assert neighbours[3].unique().tolist() == [-1]
    assert not similarities[3].any()
    assert labels.tolist() == expected_labels.tolist()
    np.testing.assert_allclose(scores.cpu().numpy(), expected_scores, atol=1e-6)
    label_map, found = assemble(torch.from_numpy(masks).to(device), labels, scores, 0.4)
    assert found.tolist() == kept
    np.testing.assert_array_equal(
        label_map.cpu().numpy(), reference.rasterize(masks[kept], expected_labels[kept], expected_scores[kept])
    )


def vote_of(query: np.ndarray, bank: np.ndarray, bank_labels: np.ndarray, top_k: int) -> tuple[int, float]:
    similarities, ranked = reference.search(query, bank, top_k)
    return reference.vote(bank_labels[ranked].tolist(), similarities)


def test_without_a_vector_is_judged_before_centring(device: torch.device) -> None:
    pooled = torch.tensor([[0.0, 0.0], [2.0, 0.0]], device=device)  # no coverage; a vector equal to the centre
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device)
    labels, scores, neighbours, similarities = label_proposals(
        pooled, torch.tensor([2.0, 0.0], device=device), bank, torch.tensor([5, 6], device=device), 2
    )
    assert neighbours.tolist() == [[-1, -1], [0, 1]]
    assert labels.tolist() == [0, 5]
    assert scores.tolist() == [0, 0]
    assert similarities.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(("count", "bank_size"), [(3, 0), (0, 4), (0, 0)])
def test_nothing_to_search(count: int, bank_size: int, device: torch.device) -> None:
    labels, scores, neighbours, similarities = label_proposals(
        torch.ones((count, 2), device=device),
        torch.ones(2, device=device),
        torch.ones((bank_size, 2), device=device),
        torch.ones(bank_size, dtype=torch.int64, device=device),
        25,
    )
    assert labels.tolist() == [0] * count
    assert scores.tolist() == [0.0] * count
    assert neighbours.shape == similarities.shape == (count, bank_size)


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


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pooled": torch.ones(2, 4)}, "with the same C"),
        ({"bank_labels": torch.ones(4, dtype=torch.int64)}, "bank_labels: got"),
        ({"centre": torch.ones(2)}, "centre: got"),
        ({"top_k": 0}, "top_k: got 0"),
    ],
)
def test_bad_values(change: dict[str, object], match: str) -> None:
    arguments = {
        "pooled": torch.ones(2, 3),
        "centre": None,
        "bank_vectors": torch.ones(5, 3),
        "bank_labels": torch.ones(5, dtype=torch.int64),
        "top_k": 2,
    }
    with pytest.raises(ValueError, match=match):
        label_proposals(**(arguments | change))  # type: ignore[arg-type]


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


def test_assemble_checks_what_its_parts_check() -> None:
    masks, labels, scores = torch.ones((2, 3, 3), dtype=torch.bool), torch.tensor([1, 2]), torch.tensor([0.1, 0.2])
    for change, match in (
        ({"labels": labels + 254}, r"expected 0\.\.254"),
        ({"scores": scores[:1]}, r"scores: got \(1,\)"),
        ({"masks": masks.float()}, "masks: got"),
        ({"nms_iou": 1.5}, "iou_threshold: got 1.5"),
    ):
        with pytest.raises(ValueError, match=match):
            assemble(**{"masks": masks, "labels": labels, "scores": scores, "nms_iou": 0.4, **change})  # type: ignore[arg-type]
