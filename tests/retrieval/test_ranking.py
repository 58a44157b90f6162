"""The learnt ranking: what it fits, what it answers, and what is said where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moduseg.config import RetrievalConfig
from moduseg.errors import ArtefactError
from moduseg.masks.cells import Cells
from moduseg.masks.shapes import SHAPES, describe_shapes
from moduseg.retrieval.ranking import (
    BACKGROUND_OFFSET,
    PENALTY,
    RANKING_FILE,
    SHAPE_SCALE,
    Examples,
    Ranking,
    find_possible,
    find_ranking,
    fit_ranking,
    label_shares,
)
from moduseg.retrieval.rasterize import rasterize
from moduseg.retrieval.retriever import Retriever
from moduseg.retrieval.selection import compute_worths, select_masks
from moduseg.structures import Proposals, SearchBank
from tests import reference
from tests.support.retrieval import make_retriever

CLASSES = ("background", "disc", "star")
SHAPE = np.zeros(len(SHAPES))


def make_examples(rng: np.random.Generator, count: int = 90, dim: int = 6) -> Examples:
    """Proposals whose vectors point to the axis of their class, every third one half background."""
    labels = rng.integers(0, 3, count)
    queries = np.eye(dim)[labels] + rng.normal(scale=0.15, size=(count, dim))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    shares = np.eye(3)[labels]
    shares[::3] = 0.5 * shares[::3] + 0.5 * np.eye(3)[0]
    return Examples(queries.astype(np.float32), rng.normal(size=(count, len(SHAPES))), shares.astype(np.float32))


@pytest.fixture
def ranking(rng: np.random.Generator) -> Ranking:
    return fit_ranking(make_examples(rng), CLASSES, is_centred=False)


def test_equal_examples_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        examples = make_examples(np.random.default_rng(3))
        fit_ranking(examples, CLASSES, is_centred=True).save(tmp_path / name)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_the_fit_is_where_the_loss_is_smallest(rng: np.random.Generator) -> None:
    """Against the loss written down once more with torch: its gradient vanishes."""
    examples = make_examples(rng, 300)
    fitted = fit_ranking(examples, CLASSES, is_centred=False)
    standardised = ((examples.shapes - fitted.mean) / fitted.scale).clip(-3, 3)
    inputs = np.c_[F.normalize(torch.from_numpy(examples.queries).double(), dim=1), SHAPE_SCALE * standardised]
    weights = torch.from_numpy(fitted.weights).requires_grad_()
    logits = torch.from_numpy(np.c_[inputs, np.ones(len(inputs))]) @ weights
    loss = F.cross_entropy(logits, torch.from_numpy(examples.shares).double())
    (loss + PENALTY * (weights[:-1] ** 2).sum()).backward()  # type: ignore[no-untyped-call]
    assert weights.grad is not None
    assert float(weights.grad.abs().max()) < 1e-3
    assert float(weights.detach().abs().max()) > 1


def test_shares_are_those_of_the_examples(ranking: Ranking) -> None:
    shares = ranking.estimate_shares(7 * np.eye(6)[:3], np.tile(SHAPE, (3, 1)), np.ones(3, bool))
    np.testing.assert_allclose(shares.sum(1), 1)
    assert shares.argmax(1).tolist() == [0, 1, 2]


def test_the_shape_decides_between_equal_vectors(rng: np.random.Generator) -> None:
    examples = make_examples(rng)
    queries = np.tile(np.eye(6, dtype=np.float32)[:1], (90, 1))
    shapes = np.zeros((90, len(SHAPES)))
    shapes[:, SHAPES.index("hole")] = examples.shares[:, 2]
    fitted = fit_ranking(
        Examples(queries, shapes, np.eye(3)[(examples.shares[:, 2] > 0) + 1]), CLASSES, is_centred=True
    )
    shares = fitted.estimate_shares(queries[:2], np.stack([shapes.min(0), shapes.max(0)]), np.ones(3, bool))
    assert shares.argmax(1).tolist() == [1, 2]


def test_labels_without_a_vector_are_not_given(ranking: Ranking) -> None:
    is_possible = find_possible(torch.tensor([0, 1, 1]), 3)
    assert is_possible.tolist() == [True, True, False]
    shares = ranking.estimate_shares(np.eye(6)[2:3], SHAPE[None], is_possible)
    assert shares[0, 2] == 0
    assert shares.sum() == pytest.approx(1)
    assert find_possible(torch.empty(0, dtype=torch.int64), 3).all()


def test_background_is_held_back(ranking: Ranking) -> None:
    """Its odds are divided by e to the offset, whatever else is there."""
    query, possible = np.ones((1, 6)), np.ones(3, bool)
    before = np.exp(
        np.r_[
            F.normalize(torch.ones(6).double(), dim=0), -SHAPE_SCALE * np.clip(ranking.mean / ranking.scale, -3, 3), 1
        ]
        @ ranking.weights
    )
    after = ranking.estimate_shares(query, SHAPE[None], possible)[0]
    assert after[0] / after[1] == pytest.approx(before[0] / before[1] / np.exp(BACKGROUND_OFFSET), rel=1e-6)
    assert after[2] / after[1] == pytest.approx(before[2] / before[1], rel=1e-6)


def test_worths_by_hand() -> None:
    shares = np.array([[0.2, 0.7, 0.1], [0.8, 0.1, 0.1], [0.4, 0.3, 0.3], [0.0, 0.5, 0.5]])
    labels, best, certainty = label_shares(shares)
    assert labels.tolist() == [1, 0, 0, 1]
    assert best.tolist() == [0.7, 0.8, 0.4, 0.5]
    assert certainty.tolist() == pytest.approx([0.5, 0.6, 0.0, 0.5])
    assert [len(part) for part in label_shares(np.zeros((0, 3)))] == [0, 0, 0]


def test_masks_are_chosen_as_by_any_rule_of_these_worths(
    ranking: Ranking, device: torch.device, rng: np.random.Generator
) -> None:
    """Labels and worths are the ranking's; the set is the one that `select_masks` finds for equal worths."""
    masks = torch.from_numpy(reference.random_masks(rng, 25, 30, 40)).to(device)
    pooled = torch.from_numpy(rng.normal(size=(25, 6)).astype(np.float32)).to(device)
    pooled[4] = 0
    quality = torch.from_numpy(rng.random(25).astype(np.float32)).to(device)
    bank, labels = torch.eye(6, device=device)[:3], torch.arange(3, device=device)
    rows = torch.arange(3, device=device)
    settings = RetrievalConfig(top_k=1, min_area=0, selection="learnt", confidence=True)
    prediction = Retriever(SearchBank(bank, labels, rows), settings, ranking=ranking).predict(
        Proposals(masks, quality), pooled
    )
    shares = ranking.estimate_shares(pooled.cpu().numpy(), describe_shapes(masks.cpu().numpy()), np.ones(3, bool))
    expected, best, certainty = label_shares(shares)
    cosines = F.normalize(pooled, dim=1)[:, :3].double().cpu().numpy()
    certainty *= cosines[np.arange(25), expected].clip(0, 1) ** 2
    expected[4], best[4], certainty[4] = 0, 0, 0
    assert prediction.labels.tolist() == expected.tolist()
    np.testing.assert_allclose(prediction.scores, best, atol=1e-6)
    worths = compute_worths(torch.from_numpy(certainty), quality)
    chosen = select_masks(Cells.of(masks), expected, worths)
    assert sorted(prediction.kept.tolist()) == chosen.tolist()
    assert len(chosen) > 1
    kept = prediction.kept.to(device)
    painted = rasterize(
        masks[kept], torch.from_numpy(expected).to(device)[kept], torch.from_numpy(best).to(device)[kept]
    )
    assert np.array_equal(prediction.label_map, painted.cpu().numpy())
    assert prediction.confidence is not None
    assert (prediction.confidence > 0).sum() >= (prediction.label_map > 0).sum()


def test_what_a_person_named_stays(ranking: Ranking) -> None:
    """A trusted vector decides in spite of the ranking, which would call the region a disc."""
    vectors = torch.eye(6)[[0, 1, 1]]
    trusted = torch.tensor([False, False, True])
    bank = SearchBank(vectors, torch.tensor([0, 1, 2]), torch.arange(3), is_trusted=trusted)
    retriever = Retriever(bank, RetrievalConfig(top_k=1, min_area=0, selection="learnt"), ranking=ranking)
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, 2:6, 2:6] = True
    prediction = retriever.predict(Proposals(masks), torch.eye(6)[1:2])
    assert prediction.labels.tolist() == [2]
    assert (prediction.label_map[2:6, 2:6] == 2).all()


def test_a_file_says_what_was_saved(ranking: Ranking, tmp_path: Path) -> None:
    ranking.save(tmp_path / RANKING_FILE)
    loaded = find_ranking(tmp_path)
    assert (loaded.classes, loaded.is_centred) == (CLASSES, False)
    for name in ("weights", "mean", "scale"):
        assert np.array_equal(getattr(loaded, name), getattr(ranking, name))
    moved = loaded.align(("background", "star"))
    assert np.array_equal(moved.weights, ranking.weights[:, [0, 2]])


def test_a_bank_without_a_ranking_is_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, None):
        with pytest.raises(ArtefactError, match=r"retrieval\.selection: got learnt, .*run scripts/infer\.py") as caught:
            find_ranking(folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="got no ranking, expected one with selection=learnt"):
        make_retriever(torch.eye(3), torch.arange(3), selection="learnt")


def test_rankings_that_do_not_fit_are_refused(ranking: Ranking, tmp_path: Path) -> None:
    with pytest.raises(
        ArtefactError, match=r"ranking: fitted to vectors of 6 channels .* got 5 with bank\.centre=false"
    ):
        ranking.check_fits(5, is_centred=False)
    with pytest.raises(ArtefactError, match=r"bank\.centre=false, got 6 with bank\.centre=true"):
        ranking.check_fits(6, is_centred=True)
    with pytest.raises(ArtefactError, match=r"ranking: not fitted to the class 'moon' \(1 such\)"):
        ranking.align(("background", "disc", "moon"))
    with pytest.raises(ArtefactError, match=r"ranking: got .*expected 24 columns of shape"):
        Ranking(ranking.weights, ranking.mean[:3], ranking.scale, CLASSES, False)
    with pytest.raises(ArtefactError, match="no proposal of a training image"):
        fit_ranking(Examples(np.zeros((0, 6)), np.zeros((0, len(SHAPES))), np.zeros((0, 3))), CLASSES, is_centred=False)
    (tmp_path / RANKING_FILE).write_bytes(b"no tensors")
    with pytest.raises(ArtefactError, match="not readable as a ranking"):
        find_ranking(tmp_path)
