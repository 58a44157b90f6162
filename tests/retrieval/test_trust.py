"""What a region that a person named decides, and what it leaves as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moduseg.bank import edit
from moduseg.bank.derived import digest_bank
from moduseg.bank.store import Bank
from moduseg.config import BankConfig, OutliersConfig, RetrievalConfig
from moduseg.errors import ConfigError
from moduseg.report.annotations import split_objects
from moduseg.retrieval.retriever import Retriever
from moduseg.structures import Prediction, Proposals

CLASSES = ("background", "dog", "cat")


@pytest.fixture
def bank(rng: np.random.Generator) -> Bank:
    """Forty regions: background, dogs and cats around three directions."""
    labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 10)
    pooled = 3 * torch.eye(3, 8)[labels] + 0.4 * torch.from_numpy(rng.normal(size=(40, 8))).float()
    images = torch.arange(40)
    return Bank(pooled, labels, images, torch.full((40,), 9), tuple(f"i{n}" for n in range(40)), CLASSES, {})


@pytest.fixture
def queries(rng: np.random.Generator) -> Tensor:
    """Of thirty regions of a new picture, which look like dogs, cats or neither."""
    return 3 * torch.eye(3, 8)[torch.arange(30) % 3] + torch.from_numpy(rng.normal(size=(30, 8))).float()


def predict(bank: Bank, queries: Tensor, cfg: BankConfig | None = None, **settings: object) -> Prediction:
    retrieval = RetrievalConfig(**{"min_area": 0, "top_k": 5, **settings})  # type: ignore[arg-type]
    proposals = Proposals(torch.ones((len(queries), 2, 2), dtype=torch.bool))
    return Retriever(bank.configured(cfg or BankConfig()), retrieval).predict(proposals, queries)


def find_changes(bank: Bank, centre: bool, query: Tensor, label: int, queries: Tensor) -> Tensor:
    """The definition, one region at a time: more similar to the named one than to all regions of other classes."""
    mean = bank.pooled.mean(0) if centre else torch.zeros(8)
    vectors, others = functional.normalize(bank.pooled - mean, dim=1), bank.labels != label
    unit, named = functional.normalize(queries - mean, dim=1), functional.normalize(query - mean, dim=0)
    return torch.stack([q @ named >= (vectors[others] @ q).max() for q in unit])


@pytest.mark.parametrize("top_k", [1, 5, 25])
@pytest.mark.parametrize("settings", [
    pytest.param({}, id="plain vote"),
    pytest.param({"vote_balance": "distance"}, id="balanced vote"),
    pytest.param({"cap_top_k": True, "selection": "majority"}, id="majority of masks"),
    pytest.param({"selection": "margin"}, id="margin"),
])  # fmt: skip
@pytest.mark.parametrize("cfg", [
    pytest.param(BankConfig(outliers=OutliersConfig(enabled=False)), id="no filter"),
    pytest.param(BankConfig(centre=True, outliers=OutliersConfig(drop_ratio=0.9, drop_ratio_background=0.9)),
                 id="hard filter, centred"),
    pytest.param(BankConfig(prototypes=1, outliers=OutliersConfig(enabled=False)), id="prototypes"),
])  # fmt: skip
def test_the_named_region_and_what_resembles_it_change(
    bank: Bank, queries: Tensor, cfg: BankConfig, settings: dict[str, object], top_k: int
) -> None:
    before = predict(bank, queries, cfg, top_k=top_k, **settings)
    clicked = 4
    for name in ("dog", "background", "bird"):
        corrected = edit.correct_region(bank, "shown", name, queries[clicked], 4)
        label = corrected.classes.index(name)
        after = predict(corrected, queries, cfg, top_k=top_k, **settings)
        assert int(after.labels[clicked]) == label
        assert int(after.neighbours[clicked, 0]) == 40
        assert float(after.scores[clicked]) == pytest.approx(1, abs=1e-5)
        searched = bank.configured(cfg)
        kept = Bank(bank.pooled[searched.rows], searched.labels, *(torch.zeros(len(searched.rows)).long(),) * 2, ("i",),
                    CLASSES, {})  # fmt: skip
        if cfg.prototypes is None and not cfg.centre:
            expected = find_changes(kept, False, queries[clicked], label, queries)
            assert torch.equal(after.labels[expected], torch.full((int(expected.sum()),), label))
            assert torch.equal(after.labels[~expected], before.labels[~expected])
            assert torch.equal(after.neighbours[~expected], before.neighbours[~expected])
        is_changed = after.neighbours[:, 0] == 40
        assert torch.equal(after.labels[~is_changed], before.labels[~is_changed])
        assert torch.equal(after.similarities[~is_changed], before.similarities[~is_changed])


def test_more_equal_vectors_than_neighbours_do_not_outvote_it(bank: Bank) -> None:
    query = bank.pooled[12]
    for _ in range(5):
        bank = edit.add_region(bank, "again", "dog", query, 9)
    corrected = edit.correct_region(bank, "shown", "cat", query, 9)
    assert predict(corrected, query[None], top_k=3).labels.tolist() == [2]


def test_the_last_name_of_a_region_counts(bank: Bank, queries: Tensor) -> None:
    once = edit.correct_region(bank, "shown", "cat", queries[0], 4)
    twice = edit.correct_region(once, "shown", "dog", queries[0], 4)
    assert len(twice) == len(once) == len(bank) + 1
    assert predict(twice, queries[:1]).labels.tolist() == [1]
    # As a copy by another program would leave it: both, the later one last.
    both = edit.merge([once, edit.prefix_images(edit.remove(twice, rows=range(40)), "b")])
    assert both.is_trusted is not None
    assert both.is_trusted.sum() == 2
    assert predict(both, queries[:1]).labels.tolist() == [1]


def test_named_regions_are_painted_over_all_others(bank: Bank) -> None:
    masks = torch.zeros((3, 6, 6), dtype=torch.bool)
    masks[0], masks[1, 1:5, 1:5], masks[2, 2:4, 2:4] = True, True, True
    pooled = bank.pooled[[12, 35, 3]]
    corrected = edit.correct_region(bank, "shown", "background", pooled[1], 16)
    for selection in ("nms", "nms_quality", "margin", "similarity", "majority"):
        retriever = Retriever(corrected.configured(BankConfig()), RetrievalConfig(min_area=0, selection=selection))
        prediction = retriever.predict(Proposals(masks), pooled)
        assert (prediction.label_map[masks[1].numpy()] == 0).all(), selection
        assert int(prediction.kept[0]) == 1
        # A part that is named after it lies above it.
        inner = edit.correct_region(corrected, "shown", "cat", pooled[2], 4)
        retriever = Retriever(inner.configured(BankConfig()), RetrievalConfig(min_area=0, selection=selection))
        label_map = retriever.predict(Proposals(masks), pooled).label_map
        assert (label_map[masks[2].numpy()] == 2).all(), selection
        assert label_map[1, 1] == 0


@pytest.mark.parametrize("selection", ["nms", "margin", "majority", "shares"])
def test_objects_above_a_score_keep_what_was_named(
    bank: Bank, selection: Literal["nms", "margin", "majority", "shares"]
) -> None:
    """Small masks of another class outvote the named one around them, but for its name."""
    masks = torch.zeros((3, 6, 6), dtype=torch.bool)
    masks[0], masks[1:, 1:5, 1:5] = True, True
    pooled = bank.pooled[[12, 13, 14]]
    named = edit.correct_region(bank, "shown", "cat", pooled[0], 36)
    settings = RetrievalConfig(min_area=0, top_k=5, selection=selection)
    prediction = Retriever(named.configured(BankConfig()), settings).predict(Proposals(masks), pooled)
    assert (prediction.label_map == 2).all()
    assert (split_objects(prediction, 0.0, settings=settings)[0] == 2).all()


def test_a_bank_of_named_regions_alone_is_searched(queries: Tensor) -> None:
    empty = Bank(torch.empty(0, 8), *(torch.empty(0, dtype=torch.int64),) * 3, (), ("background",), {})
    bank = edit.correct_region(empty, "shown", "dog", queries[0], 4)
    assert predict(bank, queries, BankConfig(centre=True)).labels.tolist() == [1] * 30
    bank = edit.correct_region(bank, "shown", "cat", queries[1], 4)
    assert set(predict(bank, queries).labels.tolist()) == {1, 2}
    zeros = predict(bank, torch.zeros(1, 8))
    assert (zeros.labels.tolist(), zeros.scores.tolist()) == ([0], [0])


def test_trust_is_stored_and_follows_its_rows(bank: Bank, queries: Tensor, tmp_path: Path) -> None:
    corrected = edit.correct_region(bank, "shown", "dog", queries[0], 4)
    corrected.save(tmp_path)
    stored = Bank.load(tmp_path)
    assert (
        digest_bank(stored)
        == digest_bank(corrected)
        != digest_bank(edit.add_region(bank, "shown", "dog", queries[0], 4))
    )
    fewer = edit.add_region(edit.remove(stored, rows=[0, 5]), "more", "cat", queries[1], 4)
    assert fewer.is_trusted is not None
    assert fewer.is_trusted.nonzero()[:, 0].tolist() == [38]
    search = fewer.configured(BankConfig(classes=("dog",)))
    assert search.is_trusted is not None
    assert search.rows[search.is_trusted].tolist() == [38]
    plain = tmp_path / "plain"
    plain.mkdir()
    bank.save(plain)
    assert b"is_trusted" not in (plain / "bank.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="got a vector of zeros"):
        edit.correct_region(bank, "shown", "dog", torch.zeros(8), 4)
