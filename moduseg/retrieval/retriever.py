"""A bank and the rules of its retrieval, ready for queries: what `infer` and the Python interface share."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from moduseg.config import RetrievalConfig
from moduseg.retrieval import indices
from moduseg.retrieval.balance import ClassIndex, balanced, class_spreads, smallest_class
from moduseg.retrieval.majority import assemble_majority
from moduseg.retrieval.pipeline import assemble_proposals, label_proposals
from moduseg.retrieval.selection import NEAREST, assemble_selected, margins, similarity_certainty, worth
from moduseg.retrieval.suppress import descending
from moduseg.retrieval.vote import vote
from moduseg.structures import Proposals


class Retriever:
    """Labels proposals and assembles label maps under any of the options of `retrieval`.

    Args:
        vectors: `[B, C]` float, centred (if at all) and L2-normalised.
        labels: `[B]` int64, 0 background.
        centre: `[C]` float that is subtracted from queries, or `None`.
        settings: the rules; `engine` and `storage` hold for the search of the whole bank, neighbours that are looked
            for class by class are exact.
    """

    def __init__(self, vectors: Tensor, labels: Tensor, centre: Tensor | None, settings: RetrievalConfig) -> None:
        self._vectors, self._labels, self._centre, self._settings = vectors, labels, centre, settings
        self._index = indices.build(vectors, settings.engine, settings.storage)

    @cached_property
    def top_k(self) -> int:
        """Neighbours that vote: `retrieval.top_k`, with `cap_top_k` at most the vectors of the smallest class."""
        wanted = self._settings.top_k
        return min(wanted, smallest_class(self._labels)) if self._settings.cap_top_k else wanted

    def label(self, pooled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Labels, scores, neighbours and similarities of proposals; see `label_proposals`.

        With `vote_balance=distance` neighbours are in the order of that distance.
        """
        settings = self._settings
        if settings.vote_balance == "none":
            return label_proposals(
                pooled, self._centre, self._index, self._labels, self.top_k, settings.vote_temperature
            )
        # Shapes are checked there, and proposals without a vector get what they always get.
        labels, scores, neighbours, similarities = label_proposals(
            pooled, self._centre, self._vectors[:0], self._labels[:0], 1
        )
        found = (pooled != 0).any(1).nonzero()[:, 0]
        if len(found) and len(self._vectors):
            candidates = self._classes.nearest(self._queries(pooled[found]), self.top_k)
            near, which = balanced(candidates, self.top_k, settings.vote_balance, self._spreads)
            neighbours = neighbours.new_full((len(pooled), near.shape[1]), -1)
            similarities = similarities.new_zeros((len(pooled), near.shape[1]))
            neighbours[found], similarities[found] = which, near
            labels[found], scores[found] = vote(self._labels[which], near, settings.vote_temperature)
        return labels, scores, neighbours, similarities

    def assemble(self, proposals: Proposals, pooled: Tensor, labels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The label map of labelled proposals; see `moduseg.retrieval.pipeline.assemble`.

        Args:
            proposals: `N` of them, on any device. Their quality is of no effect with `selection=nms`; with
                `nms_quality` they are suppressed and painted by `score * quality`.
            pooled: `[N, C]` float, as for `label`.
            labels: `[N]` int64.
            scores: `[N]` float.
        """
        if self._settings.selection in ("nms", "nms_quality"):
            ranks = scores if self._settings.selection == "nms" else scores * proposals.quality.to(scores.device)
            return assemble_proposals(proposals, labels, ranks, self._settings.nms_iou)
        if self._settings.selection == "majority":
            if proposals.id_map is not None:  # disjoint: each decides alone
                return assemble_proposals(proposals, labels, scores, self._settings.nms_iou)
            return assemble_majority(proposals.masks.to(labels.device), labels, scores), descending(scores)
        certainty = similarity_certainty(scores)
        if self._settings.selection == "margin":
            certainty = self._margins(pooled, labels)
        masks = proposals.masks.to(labels.device)
        return assemble_selected(masks, labels, scores, worth(certainty, proposals.quality))

    def _margins(self, pooled: Tensor, labels: Tensor) -> Tensor:
        """`[N]` float64: see `margins`; 0 for a proposal without a vector."""
        found = (pooled != 0).any(1).nonzero()[:, 0]
        candidates = self._classes.nearest(self._queries(pooled[found]), NEAREST)
        sure = margins(candidates, labels[found])
        return torch.zeros(len(pooled), dtype=sure.dtype, device=sure.device).index_put((found,), sure)

    def _queries(self, pooled: Tensor) -> Tensor:
        return pooled if self._centre is None else pooled - self._centre

    @cached_property
    def _classes(self) -> ClassIndex:
        return ClassIndex(self._vectors, self._labels)

    @cached_property
    def _spreads(self) -> Tensor:
        return class_spreads(self._vectors, self._labels)
