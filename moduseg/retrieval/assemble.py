"""From labelled proposals to a label map: suppress duplicates, paint the rest (docs/method.md, step 8)."""

from __future__ import annotations

from torch import Tensor

from moduseg.masks.bits import PackedMasks
from moduseg.retrieval.rasterize import check_labels, rasterize, rasterize_id_map, rasterize_packed
from moduseg.retrieval.suppress import (
    PACKED,
    check_scored_masks,
    check_threshold,
    descending,
    suppress,
    suppress_packed,
)
from moduseg.structures import Proposals


def assemble(masks: Tensor, labels: Tensor, scores: Tensor, nms_iou: float) -> tuple[Tensor, Tensor]:
    """Suppress duplicate proposals and paint the rest.

    Args:
        masks: `[N, H, W]` bool.
        labels: `[N]` integers, 0..254.
        scores: `[N]` float.
        nms_iou: masks of one label whose IoU is greater are duplicates, in [0, 1].

    Returns:
        `label_map [H, W]` uint8 (all background if there are no proposals) and `kept [K]` int64, in descending score.

    Raises:
        ValueError: shapes that do not fit, a label outside 0..254 or a threshold outside [0, 1].
    """
    if masks.device.type not in PACKED:
        kept = suppress(masks, labels, scores, nms_iou)
        return rasterize(masks[kept], labels[kept], scores[kept]), kept
    check_scored_masks(masks, labels, scores)
    return assemble_packed(PackedMasks.of(masks), labels, scores, nms_iou)


def assemble_packed(packed: PackedMasks, labels: Tensor, scores: Tensor, nms_iou: float) -> tuple[Tensor, Tensor]:
    """Suppress and paint packed masks, with `labels` and `scores` on the CPU; as `assemble`.

    Raises:
        ValueError: a label outside 0..254 or a threshold outside [0, 1].
    """
    check_threshold(nms_iou)
    check_labels(labels)
    kept = suppress_packed(packed, labels, scores, nms_iou)
    return rasterize_packed(packed, labels, kept), kept


def assemble_proposals(proposals: Proposals, labels: Tensor, scores: Tensor, nms_iou: float) -> tuple[Tensor, Tensor]:
    """Suppress duplicate proposals and paint the rest; disjoint proposals are painted from their id map.

    Args:
        proposals: `N` of them; what is needed of them is moved to the device of the labels.
        labels: `[N]` integers, 0..254.
        scores: `[N]` float.
        nms_iou: masks of one label whose IoU is greater are duplicates, in [0, 1].

    Returns:
        `label_map [H, W]` uint8 and `kept [K]` int64, as `assemble` gives them for the masks.

    Raises:
        ValueError: shapes that do not fit, a label outside 0..254 or a threshold outside [0, 1].
    """
    if proposals.id_map is None:
        return assemble(proposals.masks.to(labels.device), labels, scores, nms_iou)
    check_threshold(nms_iou)
    return assemble_id_map(proposals.id_map.to(labels.device), labels, scores)


def assemble_id_map(id_map: Tensor, labels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Paint disjoint proposals from one map; none is suppressed, whatever the threshold.

    Args:
        id_map: `[H, W]` integers below `N`: the proposal of each pixel, negative for none.
        labels: `[N]` integers, 0..254.
        scores: `[N]` float.

    Returns:
        `label_map [H, W]` uint8 and `kept [N]` int64, in descending score.

    Raises:
        ValueError: a label outside 0..254, or numbers of labels and scores that differ.
    """
    if id_map.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(
            f"assemble: got a map {tuple(id_map.shape)}, labels {tuple(labels.shape)} and scores "
            f"{tuple(scores.shape)}, expected [H, W], [N] and [N]"
        )
    return rasterize_id_map(id_map, labels), descending(scores)
