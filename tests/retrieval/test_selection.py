from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moduseg.masks.cells import Cells
from moduseg.retrieval import selection
from moduseg.retrieval.balance import find_class_candidates
from moduseg.retrieval.rasterize import rasterize
from moduseg.retrieval.selection import (
    assemble_selected,
    compute_certainty,
    compute_margins,
    compute_worths,
    find_heaviest_in_forest,
    find_heaviest_set,
    select_masks,
)
from moduseg.structures import Proposals
from tests import reference
from tests.support.retrieval import make_retriever
from tests.support.trees import random_tree

UNIT = 1 << 20


def strip(*spans: tuple[int, int], width: int = 20) -> torch.Tensor:
    """Masks of one row of pixels, `[N, 1, width]`."""
    masks = torch.zeros(len(spans), 1, width, dtype=torch.bool)
    for mask, (start, end) in zip(masks, spans, strict=True):
        mask[:, start:end] = True
    return masks


@pytest.mark.parametrize(
    ("spans", "labels", "worths", "kept"),
    [
        pytest.param([(0, 10), (0, 4), (5, 9)], [1, 2, 3], [0.5, 0.6, 0.6], [0], id="a parent worth more than parts"),
        pytest.param([(0, 10), (0, 4), (5, 9)], [1, 2, 3], [0.5, 0.7, 0.7], [1, 2], id="parts worth more together"),
        pytest.param([(0, 10), (0, 5), (5, 10)], [1, 2, 3], [0.5, 0.5, 0.5], [1, 2], id="equal: the parts"),
        pytest.param([(0, 16), (0, 8), (0, 4)], [1, 2, 3], [0.4, 0.7, 0.9], [0], id="a chain of three"),
        pytest.param([(0, 16), (0, 8), (0, 4), (4, 8)], [1, 2, 3, 3], [0.3, 0.5, 0.58, 0.58], [0], id="grandchildren"),
        pytest.param([(0, 10), (6, 16)], [1, 2], [0.5, 0.6], [0, 1], id="less than half in common: both"),
        pytest.param([(0, 10), (4, 14)], [1, 2], [0.5, 0.6], [1], id="more than half in common: one"),
        pytest.param([(0, 10), (5, 15)], [1, 2], [0.5, 0.6], [0, 1], id="just half in common: both"),
        pytest.param([(0, 20), (2, 6)], [0, 3], [0.5, 0.6], [1], id="surer than the background around it"),
        pytest.param([(0, 20), (2, 6)], [0, 3], [0.6, 0.5], [], id="the background is surer"),
        pytest.param([(0, 20), (0, 8), (2, 6)], [0, 3, 4], [0.3, 0.4, 0.7], [2], id="what is worth counts from there"),
        pytest.param([(2, 6), (2, 6)], [0, 3], [0.5, 0.5], [], id="as sure as the background: nothing"),
        pytest.param([(0, 4), (8, 12)], [0, 0], [0.9, 0.9], [], id="background is never kept"),
        pytest.param([(0, 4), (3, 3)], [1, 1], [0.9, 0.9], [0], id="an empty mask is worth nothing"),
        pytest.param([], [], [], [], id="no masks"),
    ],
)  # fmt: skip
def test_by_hand(spans: list[tuple[int, int]], labels: list[int], worths: list[float], kept: list[int]) -> None:
    whole = np.array([round(w * UNIT) for w in worths], dtype=np.int64)
    assert select_masks(Cells.of(strip(*spans)), np.array(labels, dtype=np.int64), whole).tolist() == kept


def subsets(weights: np.ndarray, conflicts: np.ndarray) -> int:
    """The largest weight of all sets without a conflict, by trying each."""
    best = 0
    for size in range(len(weights) + 1):
        for chosen in itertools.combinations(range(len(weights)), size):
            if not conflicts[np.ix_(chosen, chosen)].any():
                best = max(best, int(weights[list(chosen)].sum()))
    return best


@pytest.mark.parametrize("density", [0.0, 0.1, 0.3, 0.7, 1.0])
def test_no_set_is_heavier(density: float, rng: np.random.Generator) -> None:
    for count in (1, 5, 11):
        upper = np.triu(rng.random((count, count)) < density, 1)
        conflicts, weights = upper | upper.T, rng.integers(1, 50, count)
        chosen = find_heaviest_set(weights, conflicts)
        assert not conflicts[np.ix_(chosen, chosen)].any()
        assert int(weights[chosen].sum()) == subsets(weights, conflicts)


def random_forest(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Parents of random trees, `[N]`, in random order, and which pairs are ancestor and descendant, `[N, N]` bool."""
    order = rng.permutation(count)
    parents = np.full(count, -1)
    for place in range(1, count):
        if rng.random() < 0.85:
            parents[order[place]] = order[rng.integers(place)]
    related = np.zeros((count, count), bool)
    for index in range(count):
        ancestor = parents[index]
        while ancestor >= 0:
            related[index, ancestor] = related[ancestor, index] = True
            ancestor = parents[ancestor]
    return parents, related


def test_a_forest_is_solved_as_by_trying_all_sets(rng: np.random.Generator) -> None:
    for _ in range(60):
        count = int(rng.integers(1, 11))
        parents, related = random_forest(rng, count)
        weights = rng.integers(-20, 50, count)
        chosen = find_heaviest_in_forest(weights, parents)
        assert not related[np.ix_(chosen, chosen)].any()
        assert chosen.tolist() == sorted(chosen.tolist())
        assert int(weights[chosen].sum()) == subsets(weights, related)


def test_a_tree_is_chosen_from_as_its_masks_are(rng: np.random.Generator) -> None:
    """With and without its parents: the same masks, where no two sets are worth the same."""
    num_chosen = 0
    for _ in range(25):
        masks, parents = random_tree(rng, 20, (3, 200))
        labels, worths = rng.integers(0, 4, 39), rng.integers(1, UNIT, 39)
        cells = Cells.of(masks)
        chosen = select_masks(cells, labels, worths, parents.numpy())
        assert chosen.tolist() == select_masks(cells, labels, worths).tolist()
        num_chosen += len(chosen)
    assert num_chosen > 50


def test_masks_that_are_not_nested_are_searched(rng: np.random.Generator) -> None:
    """Two trees over the same pixels: parents alone would take masks of both."""
    first, second = random_tree(rng, 8, (2, 60)), random_tree(rng, 9, (2, 60))
    masks = torch.cat((first[0], second[0]))
    parents = torch.cat((first[1], torch.where(second[1] >= 0, second[1] + len(first[0]), -1))).numpy()
    labels, worths = rng.integers(1, 4, len(masks)), rng.integers(1, UNIT, len(masks))
    chosen = select_masks(Cells.of(masks), labels, worths, parents)
    assert chosen.tolist() == select_masks(Cells.of(masks), labels, worths).tolist()


@pytest.mark.parametrize("shape", ["chain", "star", "binary"])
def test_a_forest_of_any_depth_takes_a_step_a_mask(shape: str) -> None:
    """Two hundred thousand masks, far deeper than Python may recurse, in seconds of processor time."""
    count = 200_000
    parents = {"chain": np.arange(-1, count - 1), "star": np.r_[-1, np.zeros(count - 1, int)]}.get(
        shape, (np.arange(count) - 1) // 2
    )
    parents[0] = -1
    begin = time.process_time()
    chosen = find_heaviest_in_forest(np.ones(count, dtype=np.int64), parents)
    assert time.process_time() - begin < 5
    assert len(chosen) == {"chain": 1, "star": count - 1}.get(shape, count // 2)


@pytest.mark.parametrize("rule", ["margin", "similarity", "majority"])
def test_a_tree_is_predicted_as_its_masks_are(rule: str, device: torch.device, rng: np.random.Generator) -> None:
    masks, parents = random_tree(rng, 20, (12, 200))
    bank = F.normalize(torch.from_numpy(rng.normal(size=(30, 5)).astype(np.float32)).to(device), dim=1)
    labels = torch.arange(30, device=device) % 4
    pooled = torch.from_numpy(rng.normal(size=(39, 5)).astype(np.float32)).to(device)
    flat = Proposals(masks.to(device), torch.linspace(0.5, 1, 39, device=device))
    tree = replace(flat, parents=parents.to(device))
    # Small masks are filtered, which makes their children those of their grandparents.
    retriever = make_retriever(bank, labels, top_k=3, selection=rule, min_area=60)
    first, second = retriever.predict(flat, pooled), retriever.predict(tree, pooled)
    assert 5 < len(first.labels) < 39
    assert first.kept.tolist() == second.kept.tolist()
    assert np.array_equal(first.label_map, second.label_map)
    assert len(np.unique(first.label_map)) > 1


def test_a_deep_forest_is_solved_exactly_and_soon(rng: np.random.Generator) -> None:
    """400 nested masks, ten to a parent: as many steps as parents, and the bottom-up rule's answer."""
    parent = np.array([-1] + [(i - 1) // 10 for i in range(1, 400)])
    conflicts = np.zeros((400, 400), bool)
    for i in range(400):
        above = parent[i]
        while above >= 0:
            conflicts[i, above] = conflicts[above, i] = True
            above = parent[above]
    weights = rng.integers(1, 30, 400)
    weights[0] = 10
    best = weights.copy()
    for i in range(399, -1, -1):
        parts = int(best[parent == i].sum())
        best[i] = max(int(weights[i]), parts)
    assert int(weights[find_heaviest_set(weights, conflicts)].sum()) == int(best[0])


def test_a_knot_beyond_all_patience_is_still_a_set(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    upper = np.triu(rng.random((60, 60)) < 0.2, 1)
    conflicts, weights = upper | upper.T, rng.integers(1, 50, 60)
    exact = int(weights[find_heaviest_set(weights, conflicts)].sum())
    monkeypatch.setattr(selection, "_BRANCHINGS", 3)
    chosen = find_heaviest_set(weights, conflicts)
    assert not conflicts[np.ix_(chosen, chosen)].any()
    assert 0.5 * exact < int(weights[chosen].sum()) <= exact
    chain = np.eye(900, k=1, dtype=bool) | np.eye(900, k=-1, dtype=bool)
    monkeypatch.setattr(selection, "_BRANCHINGS", 5000)
    assert 449 <= len(find_heaviest_set(np.ones(900, dtype=np.int64), chain)) <= 450


def test_margins_by_hand(device: torch.device) -> None:
    """Distances of 0.2 to the own class and 0.8 to the other: three quarters; nearer to the other: none."""

    def at(cosine: float) -> list[float]:
        return [cosine, (1 - cosine**2) ** 0.5]

    bank = torch.tensor([at(0.8), at(0.2), at(0.1), at(0.0), at(-1.0)], device=device)
    labels = torch.tensor([1, 2, 2, 2, 2], device=device)
    candidates = find_class_candidates(torch.tensor([[1.0, 0.0]], device=device), bank, labels, 3)
    mean = (0.8 + 0.9 + 1.0) / 3
    for label, expected in ((1, 1 - 0.2 / mean), (2, 0.0), (5, 0.0)):
        assert compute_margins(candidates, torch.tensor([label], device=device)).tolist() == pytest.approx([expected])
    alone = find_class_candidates(torch.tensor([[1.0, 0.0]], device=device), bank[1:], labels[1:], 3)
    assert compute_margins(alone, torch.tensor([2], device=device)).tolist() == [1.0]
    left_out = torch.tensor([[True, False, True, True]], device=device)
    assert compute_margins(candidates, torch.tensor([1], device=device), left_out).tolist() == pytest.approx(
        [1 - 0.2 / 0.95]
    )
    same = find_class_candidates(bank[:1], bank[:1].repeat(2, 1), torch.tensor([1, 2], device=device), 3)
    assert compute_margins(same, torch.tensor([1], device=device)).tolist() == [0.0]


def test_worth_is_whole_and_within_bounds(device: torch.device) -> None:
    certainty = torch.tensor([0.5, 1.0, 2.0, 0.5], device=device)
    quality = torch.tensor([0.5, 1.2, 0.5, -1.0], device=device)
    assert compute_worths(certainty, quality).tolist() == [UNIT // 4, UNIT, UNIT, 0]
    assert compute_certainty(torch.tensor([0.5, -0.5, 1.0], device=device)).tolist() == [0.03125, 0, 1]


@pytest.mark.parametrize("rule", ["margin", "similarity"])
def test_disjoint_masks_surer_than_nothing_are_all_kept(
    rule: str, device: torch.device, rng: np.random.Generator
) -> None:
    """Where nothing overlaps there is nothing to choose: the label map is that of NMS."""
    ids = torch.from_numpy(rng.integers(0, 12, (6, 8))).to(device)
    masks = torch.arange(12, device=device)[:, None, None] == ids
    classes = np.arange(30) % 4
    vectors = 2 * np.eye(5)[classes] + rng.normal(scale=0.1, size=(30, 5))
    bank = F.normalize(torch.from_numpy(vectors.astype(np.float32)).to(device), dim=1)
    labels = torch.from_numpy(classes).to(device)
    pooled = bank[:12] + 0.01

    chosen, suppressed = (
        make_retriever(bank, labels, top_k=1, selection=selection).predict(Proposals(masks), pooled)
        for selection in (rule, "nms")
    )
    assert np.array_equal(chosen.label_map, suppressed.label_map)
    assert set(chosen.kept.tolist()) <= set(suppressed.kept.tolist())


def test_suppressed_and_painted_by_score_and_quality(device: torch.device) -> None:
    """Two outlines of one thing: by score the first stays, with the proposer's opinion the second."""
    masks = strip((0, 10), (0, 8)).to(device)
    bank, labels = torch.eye(2, device=device), torch.tensor([1, 2], device=device)
    pooled = torch.tensor([[1.0, 0.1], [1.0, 0.3]], device=device)
    kept = []
    for rule in ("nms", "nms_quality"):
        proposals = Proposals(masks, torch.tensor([0.5, 1.0], device=device), torch.tensor([1.0, 0.9], device=device))
        prediction = make_retriever(bank, labels, top_k=1, selection=rule).predict(proposals, pooled)
        assert prediction.scores[0] > prediction.scores[1]
        kept.append(prediction.kept.tolist())
    assert kept == [[0], [1]]


def test_painted_are_the_selected_in_descending_score(device: torch.device, rng: np.random.Generator) -> None:
    masks = torch.from_numpy(reference.random_masks(rng, 25, 30, 40)).to(device)
    labels = torch.from_numpy(rng.integers(0, 4, 25)).to(device)
    scores = torch.from_numpy(rng.random(25).astype(np.float32)).to(device)
    worths = rng.integers(0, UNIT, 25)
    label_map, kept = assemble_selected(masks, labels, scores, worths)
    chosen = select_masks(Cells.of(masks), labels.cpu().numpy(), worths)
    assert sorted(kept.tolist()) == chosen.tolist()
    assert len(kept) > 1
    assert (scores[kept].diff() <= 0).all()
    assert torch.equal(label_map, rasterize(masks[kept], labels[kept], scores[kept]))
    flat = masks[kept].flatten(1).float()
    shared, areas = flat @ flat.T, flat.sum(1)
    assert (2 * shared - torch.minimum(areas[:, None], areas)).fill_diagonal_(0).amax() <= 0


@pytest.mark.parametrize("count", [0, 1, 7, 80])
@pytest.mark.parametrize("split", [False, True])
def test_cells_know_what_masks_know(count: int, split: bool, device: torch.device, rng: np.random.Generator) -> None:
    masks = reference.random_masks(rng, count, 30, 40)
    values = rng.integers(0, 3, (30, 40))
    given = torch.from_numpy(values).to(device) if split else None
    cells = Cells.of(torch.from_numpy(masks).to(device), given)
    flat = masks.reshape(count, 30 * 40).astype(np.int64)
    np.testing.assert_array_equal(cells.shared, flat @ flat.T)
    assert cells.sizes.sum() == 30 * 40
    assert len(np.unique(np.c_[cells.cover, cells.values], axis=0)) == len(cells.sizes)
    if split:
        assert np.bincount(cells.values, cells.sizes).tolist() == np.bincount(values.ravel()).tolist()
    labels, order = rng.integers(0, 4, count), rng.permutation(count)
    painted = cells.paint(order, labels)
    scores = torch.empty(count)
    scores[torch.from_numpy(order)] = torch.arange(count, 0, -1).float()
    expected = rasterize(torch.from_numpy(masks), torch.from_numpy(labels), scores).numpy()
    for label in range(4):
        for value in range(3) if split else [0]:
            where = (cells.values == value) & (painted == label)
            inside = (expected == label) & ((values == value) if split else True)
            assert cells.sizes[where].sum() == inside.sum()


def test_bad_masks() -> None:
    with pytest.raises(ValueError, match=r"masks: got \(2, 3\)"):
        Cells.of(torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"values: got \(2, 2\)"):
        Cells.of(torch.zeros(1, 3, 3, dtype=torch.bool), torch.zeros(2, 2))
