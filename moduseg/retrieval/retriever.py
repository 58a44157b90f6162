"""The one path from proposals and their vectors to a prediction, which stages, API, app and report share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from moduseg.config import RetrievalConfig
from moduseg.masks.tidy import tidy_label_map
from moduseg.retrieval import indices
from moduseg.retrieval.assemble import assemble_proposals
from moduseg.retrieval.balance import ClassIndex, balance_neighbours, count_smallest_class, measure_class_spreads
from moduseg.retrieval.confidence import measure_vote_shares, paint_confidence
from moduseg.retrieval.majority import assemble_majority
from moduseg.retrieval.search import search
from moduseg.retrieval.selection import NEAREST, assemble_selected, compute_certainty, compute_margins, compute_worths
from moduseg.retrieval.suppress import descending
from moduseg.retrieval.vote import vote
from moduseg.retrieval.word_answer import answer_by_words
from moduseg.structures import Prediction, Proposals, SearchBank, WordFeatures


@dataclass(frozen=True)
class VoteResult:
    """The label of each of `N` queries, and the `k` neighbours that voted for it.

    Attributes:
        labels: `[N]` int64, 0 background.
        scores: `[N]` float64 (float32 on MPS), mean cosine similarity of the winning label's neighbours; masks are
            ordered by it, and predictions hold it in float32. With `answer=words` the probability of the best word.
        neighbours: `[N, k]` int64, positions in the searched bank, nearest first.
        similarities: `[N, k]` float32.
    """

    labels: Tensor
    scores: Tensor
    neighbours: Tensor
    similarities: Tensor


class Retriever:
    """Predicts label maps with a bank, under any of the options of `retrieval` (docs/method.md, steps 6 to 8).

    Args:
        bank: what queries are compared with; the search runs on its device.
        settings: the options. `engine` and `storage` hold for the search of the whole bank; neighbours that are
            searched class by class are exact.
        words: what regions are compared with, if `answer` is `words`.

    Raises:
        ValueError: `answer` is `words`, and there are none, or the bank has no word values (`Bank.check_words_fit`).
    """

    def __init__(self, bank: SearchBank, settings: RetrievalConfig, words: WordFeatures | None = None) -> None:
        self.bank, self.settings = bank, settings
        self._words = None
        if settings.answer == "words":
            if words is None or bank.word_values is None:
                raise ValueError("retrieval: got no words or no word values, expected both with answer=words")
            self._words = words.to(bank.vectors.device)
        self._index = indices.build(bank.vectors, settings.engine, settings.storage)

    @cached_property
    def top_k(self) -> int:
        """Neighbours that vote: `retrieval.top_k`, with `cap_top_k` at most the vectors of the smallest class."""
        top_k = self.settings.top_k
        return min(top_k, count_smallest_class(self.bank.labels)) if self.settings.cap_top_k else top_k

    def is_searched(self, proposals: Proposals) -> Tensor:
        """Return `[N]` bool: the proposals that `min_area` and `min_predicted_iou` let through."""
        settings = self.settings
        return (proposals.areas >= settings.min_area) & (proposals.predicted_iou >= settings.min_predicted_iou)

    @torch.inference_mode()
    def predict(self, proposals: Proposals, pooled: Tensor, word_values: Tensor | None = None) -> Prediction:
        """Label one image: filter its proposals, search, vote, choose among masks, paint, tidy the label map.

        Args:
            proposals: `N` of them, on any device.
            pooled: `[N, C]` float on any device, their vectors before centring and normalisation; an all-zero row is a
                proposal without a vector, which gets label 0, score 0 and no neighbours.
            word_values: `[N, D]` float on any device, the CLIP features of the proposals, if `answer` is `words`.

        Raises:
            ValueError: shapes that do not fit, or no CLIP features though `answer` is `words`.
        """
        if len(pooled) != len(proposals):
            raise ValueError(f"retrieval: got {len(pooled)} vectors for {len(proposals)} proposals, expected one each")
        keep = self.is_searched(proposals)
        if not bool(keep.all()):
            proposals, pooled = proposals.select(keep), pooled[keep.to(pooled.device)]
            word_values = None if word_values is None else word_values[keep.to(word_values.device)]
        pooled = pooled.to(self.bank.vectors.device)
        votes = self.vote(pooled, None if word_values is None else word_values.to(pooled.device))
        painted, kept = self._assemble(proposals, pooled, votes)
        label_map = tidy_label_map(painted.cpu().numpy(), **self.settings.tidying)
        rows, row_labels = self._rows_of(votes.neighbours)
        confidence = self._measure_confidence(proposals, votes, row_labels, label_map)
        answers = (votes.labels, votes.scores.float(), kept, rows, row_labels, votes.similarities)
        labels, scores, kept, rows, row_labels, similarities = (tensor.cpu() for tensor in answers)
        return Prediction(label_map, proposals, labels, scores, kept, rows, row_labels, similarities, confidence)

    def vote(self, pooled: Tensor, word_values: Tensor | None = None) -> VoteResult:
        """Search the bank for each query and let its neighbours vote, or compare words with them (`answer`).

        Args:
            pooled: `[N, C]` float on the bank's device, see `predict`.
            word_values: `[N, D]` float on the bank's device, see `predict`.

        Returns:
            Labels and neighbours. With `vote_balance=distance` neighbours are in the order of that distance. For a
            query without a vector, or any query of an empty bank: label 0, score 0, neighbours -1, similarities 0.

        Raises:
            ValueError: shapes that do not fit.
        """
        if pooled.ndim != 2 or pooled.shape[1:] != self.bank.vectors.shape[1:]:
            raise ValueError(
                f"retrieval: got proposals {tuple(pooled.shape)}, bank vectors {tuple(self.bank.vectors.shape)}; "
                "expected [N, C] and [B, C] with the same C; build the bank with this backbone"
            )
        # Decided before centring, which would turn "no vector" into the opposite of the mean.
        with_vector = (pooled != 0).any(1).nonzero()[:, 0]
        similarities, neighbours = self._search(self._queries(pooled[with_vector]))
        labels, scores = self._answer(
            None if word_values is None else word_values[with_vector], neighbours, similarities
        )
        shape = (len(pooled), neighbours.shape[1])
        return VoteResult(
            labels.new_zeros(len(pooled)).index_copy(0, with_vector, labels),
            scores.new_zeros(len(pooled)).index_copy(0, with_vector, scores),
            neighbours.new_full(shape, -1).index_copy(0, with_vector, neighbours),
            similarities.new_zeros(shape).index_copy(0, with_vector, similarities),
        )

    def nearest(self, pooled: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the bank's vectors that are most similar to queries, whether they vote or not.

        Args:
            pooled: `[N, C]` float on the bank's device, see `predict`; each row with a vector.
            count: neighbours wanted, 1 or more.

        Returns:
            Rows of the stored bank `[N, k]` int64 and cosine similarities `[N, k]` float32, nearest first, with
            `k = min(count, M)`; equal similarities rank by position in the searched bank.
        """
        similarities, neighbours = search(self._queries(pooled), self.bank.vectors, count)
        return self.bank.rows[neighbours], similarities

    def _answer(self, word_values: Tensor | None, neighbours: Tensor, similarities: Tensor) -> tuple[Tensor, Tensor]:
        """Return `labels [F]` and `scores [F]` of queries from their neighbours `[F, k]`."""
        if self._words is None:
            return vote(self.bank.labels[neighbours], similarities, self.settings.vote_temperature)
        if word_values is None or self.bank.word_values is None:
            raise ValueError(
                "retrieval: got no word values of the queries, expected [N, D] with retrieval.answer=words"
            )
        neighbour_values = self.bank.word_values[neighbours]
        return answer_by_words(word_values, neighbour_values, self._words, self.settings.neighbour_share)

    def _search(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Return `similarities [F, k]` and `neighbours [F, k]` of those that vote."""
        balance = self.settings.vote_balance
        if balance == "none":
            return search(queries, self._index, self.top_k)
        return balance_neighbours(
            self._classes.nearest(queries, self.top_k), self.top_k, balance, spreads=self._spreads
        )

    def _rows_of(self, neighbours: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows of the stored bank and labels of positions in the searched bank; -1 stays, all `[N, k]`."""
        if not len(self.bank.rows):
            return neighbours, neighbours
        is_missing, positions = neighbours < 0, neighbours.clamp(min=0)
        rows, labels = self.bank.rows[positions], self.bank.labels[positions]
        return rows.masked_fill(is_missing, -1), labels.masked_fill(is_missing, -1)

    def _assemble(self, proposals: Proposals, pooled: Tensor, votes: VoteResult) -> tuple[Tensor, Tensor]:
        """Choose among the labelled masks and paint: `label_map [H, W]` uint8 and `kept [K]`, in descending score.

        The proposer's opinion of its masks has no effect with `selection=nms`. With `nms_quality` they are suppressed
        and painted by `score * quality`.
        """
        settings, labels, scores = self.settings, votes.labels, votes.scores
        is_majority = settings.selection == "majority"
        # Each pixel of disjoint proposals has one vote, so that a majority has nothing to decide.
        if settings.selection in ("nms", "nms_quality") or (is_majority and proposals.id_map is not None):
            is_weighted = settings.selection == "nms_quality"
            ranks = scores * proposals.quality.to(scores.device) if is_weighted else scores
            return assemble_proposals(proposals, labels, ranks, settings.nms_iou)
        masks = proposals.masks.to(labels.device)
        if is_majority:
            return assemble_majority(masks, labels, scores, proposals.parents), descending(scores)
        certainty = self._margins(pooled, labels) if settings.selection == "margin" else compute_certainty(scores)
        worths = compute_worths(certainty, proposals.quality)
        return assemble_selected(masks, labels, scores, worths, proposals.parents)

    def _measure_confidence(
        self, proposals: Proposals, votes: VoteResult, row_labels: Tensor, label_map: np.ndarray
    ) -> np.ndarray | None:
        """Return how sure each pixel's label is, `[H, W]` uint8; `None` unless the settings ask for it.

        Args:
            proposals: `N` of them.
            votes: on them.
            row_labels: `[N, k]` int64, the labels that the neighbours voted for, -1 for none.
            label_map: `[H, W]` uint8.
        """
        settings, device = self.settings, votes.labels.device
        if not settings.confidence:
            return None
        shares = measure_vote_shares(votes.labels, row_labels, votes.similarities, settings.vote_temperature)
        return paint_confidence(
            proposals.masks.to(device),
            votes.labels,
            votes.scores,
            shares,
            torch.from_numpy(label_map).to(device),
            is_majority=settings.selection == "majority",
        )

    def _margins(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Return `[N]` float64: the margin of each query (`compute_margins`), 0 for a proposal without a vector."""
        with_vector = (pooled != 0).any(1).nonzero()[:, 0]
        candidates = self._classes.nearest(self._queries(pooled[with_vector]), NEAREST)
        certainty = compute_margins(candidates, labels[with_vector])
        return certainty.new_zeros(len(pooled)).index_copy(0, with_vector, certainty)

    def _queries(self, pooled: Tensor) -> Tensor:
        return pooled if self.bank.centre is None else pooled - self.bank.centre

    @cached_property
    def _classes(self) -> ClassIndex:
        return ClassIndex(self.bank.vectors, self.bank.labels)

    @cached_property
    def _spreads(self) -> Tensor:
        return measure_class_spreads(self.bank.vectors, self.bank.labels)
