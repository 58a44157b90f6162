"""Stage 2 for one image whose proposals are pooled: label them, assemble the label map (METHOD, steps 6-8)."""

from __future__ import annotations

import torch
from torch import Tensor

from moduseg.masks.bits import PackedMasks
from moduseg.retrieval.rasterize import check_labels, rasterize, rasterize_id_map, rasterize_packed
from moduseg.retrieval.search import BankIndex, search
from moduseg.retrieval.suppress import (
    PACKED,
    check_scored_masks,
    check_threshold,
    descending,
    suppress,
    suppress_packed,
)
from moduseg.retrieval.vote import vote
from moduseg.structures import Proposals


def label_proposals(
    pooled: Tensor,
    centre: Tensor | None,
    bank_vectors: Tensor | BankIndex,
    bank_labels: Tensor,
    top_k: int,
    temperature: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Search the bank for each proposal and let the neighbours vote.

    Args:
        pooled: `[N, C]` float, pooled vectors before normalisation; an all-zero row is a proposal without a vector.
        centre: `[C]` float that is subtracted from them, as it was from the bank; `None` where the bank is not centred.
        bank_vectors: `[B, C]` float, centred (if at all) and L2-normalised; or an index of them (`indices.build`).
        bank_labels: `[B]` integers, 0 background, 1..C.
        top_k: neighbours wanted; `k = min(top_k, B)` are used.
        temperature: of the vote, see `vote`.

    Returns:
        `labels [N]` int64, `scores [N]` float32, `neighbours [N, k]` int64 (rows of the bank, nearest first) and
        `similarities [N, k]` float32. A proposal without a vector, or any when the bank is empty, takes no part in the
        search: label 0, score 0, neighbours -1, similarities 0.

    Raises:
        ValueError: shapes that do not fit, or `top_k < 1`.
    """
    bank = bank_vectors.vectors if isinstance(bank_vectors, BankIndex) else bank_vectors
    if pooled.ndim != 2 or bank.ndim != 2 or pooled.shape[1] != bank.shape[1]:
        raise ValueError(
            f"retrieval: got proposals {tuple(pooled.shape)}, bank vectors {tuple(bank.shape)}; expected "
            "[N, C] and [B, C] with the same C; build the bank with this backbone"
        )
    if bank_labels.shape != bank.shape[:1]:
        raise ValueError(f"bank_labels: got {tuple(bank_labels.shape)}, expected ({len(bank)},), one a vector")
    if centre is not None and centre.shape != pooled.shape[1:]:
        raise ValueError(f"centre: got {tuple(centre.shape)}, expected ({pooled.shape[1]},) like the vectors")
    if top_k < 1:
        raise ValueError(f"top_k: got {top_k}, expected 1 or more; try 25")
    count, k, device = len(pooled), min(top_k, len(bank)), pooled.device
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    scores = torch.zeros(count, device=device)
    neighbours = torch.full((count, k), -1, dtype=torch.int64, device=device)
    similarities = torch.zeros((count, k), device=device)
    # Judged before centring, which would turn "no vector" into the opposite of the mean.
    found = (pooled != 0).any(1).nonzero()[:, 0]
    if k and len(found):
        queries = pooled[found] if centre is None else pooled[found] - centre
        similarities[found], neighbours[found] = search(queries, bank_vectors, top_k)
        labels[found], scores[found] = vote(bank_labels[neighbours[found]], similarities[found], temperature)
    return labels, scores, neighbours, similarities


def assemble(masks: Tensor, labels: Tensor, scores: Tensor, nms_iou: float) -> tuple[Tensor, Tensor]:
    """Suppress duplicate proposals and paint the rest.

    Args:
        masks: `[N, H, W]` bool.
        labels: `[N]` integers, 0..254.
        scores: `[N]` float.
        nms_iou: masks of one label whose IoU is greater are duplicates, in [0, 1].

    Returns:
        `label_map [H, W]` uint8 (all background where there are no proposals) and `kept [K]` int64, in descending
        score.

    Raises:
        ValueError: shapes that do not fit, a label outside 0..254 or a threshold outside [0, 1].
    """
    if masks.device.type not in PACKED:
        kept = suppress(masks, labels, scores, nms_iou)
        return rasterize(masks[kept], labels[kept], scores[kept]), kept
    check_scored_masks(masks, labels, scores)
    check_threshold(nms_iou)
    check_labels(labels)
    packed = PackedMasks.of(masks)  # once for both
    kept = suppress_packed(packed, labels, scores, nms_iou)
    return rasterize_packed(packed.select(kept.numpy()), labels[kept], scores[kept]), kept


def assemble_proposals(proposals: Proposals, labels: Tensor, scores: Tensor, nms_iou: float) -> tuple[Tensor, Tensor]:
    """`assemble` of proposals; of disjoint ones from their map, with the same result.

    Args:
        proposals: `N` of them; what is needed of them is moved to the device of the labels.
        labels, scores, nms_iou: see `assemble`.

    Returns:
        See `assemble`.

    Raises:
        ValueError: see `assemble`.
    """
    if proposals.id_map is None:
        return assemble(proposals.masks.to(labels.device), labels, scores, nms_iou)
    check_threshold(nms_iou)
    return assemble_id_map(proposals.id_map.to(labels.device), labels, scores)


def assemble_id_map(id_map: Tensor, labels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """`assemble` of disjoint proposals given as one map: nothing is suppressed, whatever the threshold.

    Args:
        id_map: `[H, W]` integers below `N`: the proposal of each pixel, negative where there is none.
        labels: `[N]` integers, 0..254.
        scores: `[N]` float.

    Returns:
        `label_map [H, W]` uint8 and `kept [N]` int64, in descending score.

    Raises:
        ValueError: a label outside 0..254, or as many scores as there are no labels.
    """
    if id_map.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(
            f"assemble: got a map {tuple(id_map.shape)}, labels {tuple(labels.shape)} and scores "
            f"{tuple(scores.shape)}, expected [H, W], [N] and [N]"
        )
    return rasterize_id_map(id_map, labels), descending(scores)
