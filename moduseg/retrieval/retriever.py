"""The one path from proposals and their vectors to a prediction, which stages, API, app and report share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moduseg.config import RetrievalConfig
from moduseg.masks.bits import PACKED, PackedMasks
from moduseg.masks.tidy import tidy_label_map
from moduseg.retrieval import indices
from moduseg.retrieval.assemble import assemble_packed, assemble_proposals
from moduseg.retrieval.balance import ClassIndex, balance_neighbours, count_smallest_class, measure_class_spreads
from moduseg.retrieval.confidence import measure_vote_shares, paint_confidence
from moduseg.retrieval.majority import assemble_majority
from moduseg.retrieval.ranking import Ranking, rank_masks
from moduseg.retrieval.search import search
from moduseg.retrieval.selection import NEAREST, assemble_selected, compute_certainty, compute_margins, compute_worths
from moduseg.retrieval.shares import DividedVotes, assemble_shares, divide_votes, measure_share_confidence
from moduseg.retrieval.suppress import descending
from moduseg.retrieval.trust import TrustedAnswer, TrustedVectors, order_trusted_last, paint_named
from moduseg.retrieval.vote import vote
from moduseg.retrieval.word_answer import answer_by_words
from moduseg.structures import Prediction, Proposals, SearchBank, WordFeatures


@dataclass(frozen=True)
class VoteResult:
    """The label of each of `N` queries, and the `k` neighbours that voted for it.

    Attributes:
        labels: `[N]` int64, 0 background.
        scores: `[N]` float64 (float32 on MPS), mean cosine similarity of the winning label's neighbours; masks are
            ordered by it, and predictions hold it in float32. With `answer=words` the probability of the best word,
            with `selection=learnt` the share of the proposal that has the label.
        neighbours: `[N, k]` int64, positions in the searched bank, nearest first; where a trusted vector decided, it
            and no other.
        similarities: `[N, k]` float32.
        is_named: `[N]` bool, queries that are regions which a person named; `None` if the bank has none.
        is_decided: `[N]` bool, queries that a region which a person named decides; `None` likewise.
        certainty: `[N]` float64, what a pixel is worth where the ranking says so (`selection=learnt`); else `None`.
    """

    labels: Tensor
    scores: Tensor
    neighbours: Tensor
    similarities: Tensor
    is_named: Tensor | None = None
    is_decided: Tensor | None = None
    certainty: Tensor | None = None


class Retriever:
    """Predicts label maps with a bank, under any of the options of `retrieval` (docs/method.md, steps 6 to 8).

    Args:
        bank: what queries are compared with; the search runs on its device.
        settings: the options. `engine` and `storage` hold for the search of the whole bank; neighbours that are
            searched class by class are exact.
        words: what regions are compared with, if `answer` is `words`.
        ranking: what proposals are labelled and chosen by, if `selection` is `learnt`; its classes are the bank's.

    Raises:
        ValueError: `answer` is `words`, and there are none, or the bank has no word values (`Bank.check_words_fit`); or
            `selection` is `learnt`, and there is no ranking.
        ArtefactError: a ranking that was fitted to other vectors.
    """

    def __init__(
        self,
        bank: SearchBank,
        settings: RetrievalConfig,
        words: WordFeatures | None = None,
        ranking: Ranking | None = None,
    ) -> None:
        # Trusted vectors do not vote, so that the vectors before them are searched.
        self.bank, self._num_voting = order_trusted_last(bank)
        self.settings = settings
        self._words = None
        if settings.answer == "words":
            if words is None or bank.word_values is None:
                raise ValueError("retrieval: got no words or no word values, expected both with answer=words")
            self._words = words.to(bank.vectors.device)
        self._ranking = None
        if settings.selection == "learnt":
            if ranking is None:
                raise ValueError("retrieval: got no ranking, expected one with selection=learnt")
            ranking.check_fits(bank.vectors.shape[1], is_centred=bank.centre is not None)
            self._ranking = ranking
        self._index = indices.build(self.bank.vectors[: self._num_voting], settings.engine, settings.storage)

    @cached_property
    def top_k(self) -> int:
        """Neighbours that vote: `retrieval.top_k`, with `cap_top_k` at most the vectors of the smallest class."""
        top_k = self.settings.top_k
        labels = self.bank.labels[: self._num_voting]
        return min(top_k, count_smallest_class(labels)) if self.settings.cap_top_k else top_k

    def is_searched(self, proposals: Proposals) -> Tensor:
        """Return `[N]` bool: the proposals that `min_area` and `min_predicted_iou` let through."""
        return self._passes(proposals.areas, proposals.predicted_iou)

    def _passes(self, areas: Tensor, predicted_iou: Tensor) -> Tensor:
        """Return `[N]` bool: which areas and predicted IoUs, `[N]` each, are large enough to be searched for."""
        return (areas >= self.settings.min_area) & (predicted_iou >= self.settings.min_predicted_iou)

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
        packed = self._pack(proposals)
        areas = proposals.areas if packed is None else torch.from_numpy(packed.areas)
        keep = self._passes(areas, proposals.predicted_iou)
        if not bool(keep.all()):
            packed = None if packed is None else packed.select(keep.nonzero()[:, 0].numpy())
            proposals, pooled = proposals.select(keep, copy=False), pooled[keep.to(pooled.device)]
            word_values = None if word_values is None else word_values[keep.to(word_values.device)]
        pooled = pooled.to(self.bank.vectors.device)
        votes = self.vote(pooled, None if word_values is None else word_values.to(pooled.device))
        if self._ranking is not None:
            votes = self._label_by_ranking(self._ranking, votes, pooled, proposals)
        if packed is None:
            painted, kept = self._assemble(proposals, pooled, votes)
        else:
            ranks = self._rank(proposals, votes)
            painted, kept = assemble_packed(packed, votes.labels, ranks, self.settings.nms_iou)
        label_map = tidy_label_map(painted.cpu().numpy(), **self.settings.tidying)
        if votes.is_named is not None:
            label_map = paint_named(label_map, proposals, votes.labels, votes.is_named)
            named = votes.is_named.nonzero()[:, 0]
            kept = torch.cat((named, kept[~torch.isin(kept, named)]))
        rows, row_labels = self._rows_of(votes.neighbours)
        confidence = None
        if self.settings.confidence:
            confidence = self._measure_confidence(proposals, votes, row_labels, label_map)
        answers = (votes.labels, votes.scores.float(), kept, rows, row_labels, votes.similarities)
        labels, scores, kept, rows, row_labels, similarities = (tensor.cpu() for tensor in answers)
        is_named = None if votes.is_named is None else votes.is_named.cpu()
        return Prediction(
            label_map, proposals, labels, scores, kept, rows, row_labels, similarities, confidence, is_named
        )

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
        queries = self._queries(pooled[with_vector])
        similarities, neighbours = self._search(queries)
        labels, scores = self._answer(
            None if word_values is None else word_values[with_vector], neighbours, similarities
        )
        votes = VoteResult(labels, scores, neighbours, similarities)
        if self._trusted is not None:
            votes = _follow_trusted(votes, self._trusted.answer(queries))
        shape = (len(pooled), votes.neighbours.shape[1])
        named, decided = votes.is_named, votes.is_decided
        return VoteResult(
            labels.new_zeros(len(pooled)).index_copy(0, with_vector, votes.labels),
            scores.new_zeros(len(pooled)).index_copy(0, with_vector, votes.scores),
            neighbours.new_full(shape, -1).index_copy(0, with_vector, votes.neighbours),
            similarities.new_zeros(shape).index_copy(0, with_vector, votes.similarities),
            None if named is None else named.new_zeros(len(pooled)).index_copy(0, with_vector, named),
            None if decided is None else decided.new_zeros(len(pooled)).index_copy(0, with_vector, decided),
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
        are_all_voting = settings.selection in ("majority", "shares")
        # Each pixel of disjoint proposals has one vote, so that a majority has nothing to decide.
        if settings.selection in ("nms", "nms_quality") or (are_all_voting and proposals.id_map is not None):
            return assemble_proposals(proposals, labels, self._rank(proposals, votes), settings.nms_iou)
        masks = proposals.masks.to(labels.device)
        if settings.selection == "majority":
            return assemble_majority(masks, labels, scores, proposals.parents), descending(scores)
        if settings.selection == "shares":
            _, row_labels = self._rows_of(votes.neighbours)
            divided = self._divide(proposals, row_labels, votes.similarities)
            return assemble_shares(masks, divided, proposals.parents), descending(scores)
        if votes.certainty is not None:
            certainty = votes.certainty
        else:
            certainty = self._margins(pooled, labels) if settings.selection == "margin" else compute_certainty(scores)
        worths = compute_worths(certainty, proposals.quality)
        return assemble_selected(masks, labels, scores, worths, proposals.parents)

    def _pack(self, proposals: Proposals) -> PackedMasks | None:
        """Return the masks as bits if that is how they are suppressed and painted: then areas are counted in bits too.

        So masks are read once, and those that are too small are left out without a copy of the others.
        """
        if proposals.id_map is not None or self.settings.selection not in ("nms", "nms_quality"):
            return None
        devices = proposals.masks.device.type, self.bank.vectors.device.type
        return PackedMasks.of(proposals.masks) if all(device in PACKED for device in devices) else None

    def _rank(self, proposals: Proposals, votes: VoteResult) -> Tensor:
        """Return `[N]`, what orders masks under NMS."""
        if self.settings.selection == "nms_quality":
            return votes.scores * proposals.quality.to(votes.scores.device)
        return votes.scores

    @torch.inference_mode()
    def measure_confidence(self, prediction: Prediction) -> np.ndarray:
        """Return how sure each pixel's label is, `[H, W]` uint8, of a prediction that this retriever made."""
        votes = VoteResult(prediction.labels, prediction.scores, prediction.neighbours, prediction.similarities)
        return self._measure_confidence(prediction.proposals, votes, prediction.neighbour_labels, prediction.label_map)

    def _divide(self, proposals: Proposals, row_labels: Tensor, similarities: Tensor) -> DividedVotes:
        """Return how proposals divide their votes among their neighbours' labels `[N, k]`, -1 for none."""
        areas = proposals.areas.to(similarities.device)
        return divide_votes(areas, row_labels, similarities, self.settings.vote_temperature)

    def _measure_confidence(
        self, proposals: Proposals, votes: VoteResult, row_labels: Tensor, label_map: np.ndarray
    ) -> np.ndarray:
        """Return how sure each pixel's label is, `[H, W]` uint8.

        Args:
            proposals: `N` of them.
            votes: on them.
            row_labels: `[N, k]` int64, the labels that the neighbours voted for, -1 for none.
            label_map: `[H, W]` uint8.
        """
        settings, device = self.settings, votes.labels.device
        if settings.selection == "shares" and proposals.id_map is None:
            divided = self._divide(proposals, row_labels, votes.similarities)
            painted = torch.from_numpy(label_map).to(device)
            return measure_share_confidence(proposals.masks.to(device), divided, painted)
        if settings.selection == "learnt":
            # Labels are no vote's: a proposal is as sure as its label's share of it.
            shares = votes.scores
        else:
            shares = measure_vote_shares(votes.labels, row_labels, votes.similarities, settings.vote_temperature)
        return paint_confidence(
            proposals.masks.to(device),
            votes.labels,
            votes.scores,
            shares,
            torch.from_numpy(label_map).to(device),
            is_majority=settings.selection == "majority",
        )

    def _label_by_ranking(
        self, ranking: Ranking, votes: VoteResult, pooled: Tensor, proposals: Proposals
    ) -> VoteResult:
        """Return the votes with the ranking's labels, shares and worths; what a person named stays as it is."""
        with_vector = (pooled != 0).any(1).nonzero()[:, 0]
        masks = proposals.masks.cpu().numpy()[with_vector.cpu().numpy()]
        queries = self._queries(pooled[with_vector])
        labels, shares, certainty = rank_masks(ranking, queries, masks, self._classes)
        labels = votes.labels.index_copy(0, with_vector, labels)
        scores = votes.scores.index_copy(0, with_vector, shares.to(votes.scores.dtype))
        worths = votes.scores.new_zeros(len(pooled)).index_copy(0, with_vector, certainty.to(votes.scores.dtype))
        if votes.is_decided is not None:
            labels = torch.where(votes.is_decided, votes.labels, labels)
            scores = torch.where(votes.is_decided, votes.scores, scores)
            worths = torch.where(votes.is_decided, torch.ones_like(worths), worths)
        return replace(votes, labels=labels, scores=scores, certainty=worths)

    def _margins(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """Return `[N]` float64: the margin of each query (`compute_margins`), 0 for a proposal without a vector."""
        with_vector = (pooled != 0).any(1).nonzero()[:, 0]
        candidates = self._classes.nearest(self._queries(pooled[with_vector]), NEAREST)
        certainty = compute_margins(candidates, labels[with_vector])
        return certainty.new_zeros(len(pooled)).index_copy(0, with_vector, certainty)

    def _queries(self, pooled: Tensor) -> Tensor:
        return pooled if self.bank.centre is None else pooled - self.bank.centre

    @cached_property
    def _trusted(self) -> TrustedVectors | None:
        count = self._num_voting
        return TrustedVectors(self.bank, count) if count < len(self.bank.vectors) else None

    @cached_property
    def _classes(self) -> ClassIndex:
        return ClassIndex(self.bank.vectors[: self._num_voting], self.bank.labels[: self._num_voting])

    @cached_property
    def _spreads(self) -> Tensor:
        return measure_class_spreads(self.bank.vectors[: self._num_voting], self.bank.labels[: self._num_voting])


def _follow_trusted(votes: VoteResult, answer: TrustedAnswer) -> VoteResult:
    """Return what a vote becomes where trusted vectors decide; neighbours `[F, max(k, 1)]`."""
    neighbours, similarities, decides = votes.neighbours, votes.similarities, answer.decides
    missing = max(1 - neighbours.shape[1], 0)
    neighbours = functional.pad(neighbours, (0, missing), value=-1)
    similarities = functional.pad(similarities, (0, missing))
    alone, alone_similar = torch.full_like(neighbours, -1), torch.zeros_like(similarities)
    alone[:, 0], alone_similar[:, 0] = answer.positions, answer.similarities
    return VoteResult(
        torch.where(decides, answer.labels, votes.labels),
        torch.where(decides, answer.similarities.to(votes.scores.dtype), votes.scores),
        torch.where(decides[:, None], alone, neighbours),
        torch.where(decides[:, None], alone_similar, similarities),
        decides & answer.is_same,
        decides,
    )
