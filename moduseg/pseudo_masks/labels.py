"""From class scores to a label map: the background's score, and the vote of proposals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.errors import ConfigError
from moduseg.masks.bits import PACKED, PackedMasks
from moduseg.structures import IGNORE_INDEX, Proposals, ScoreMaps

BackgroundRule = Literal["constant", "power", "threshold", "given", "words", "probability", "margin"]
RULES = get_args(BackgroundRule)
_BLOCK = 1 << 25
"""Mask pixels turned into floats at once, which bounds the memory of the vote."""


def make_label_map(
    score_maps: ScoreMaps,
    rule: BackgroundRule | str,
    value: float = 0.5,
    low: float | None = None,
    refine: Callable[[Tensor], Tensor] | None = None,
    *,
    min_class_share: float = 0.0,
) -> Tensor:
    """Return every pixel's best class, background included.

    Args:
        score_maps: scores of the present classes, in [0, 1].
        rule: how the background competes. `constant`, `power`, `given`, `words`: as in `add_background`. `threshold`:
            classes win where they beat a background of `value`, the background wins where it beats them with `low`,
            pixels between the two are ignored (255), as AFA (Ru et al., 2022) makes its pseudo labels. `probability`:
            as `given`, if the generator supplies a background; besides, a pixel whose best score is below `value`
            is background (CorrCLIP's threshold). `margin`: as `probability`, but what is compared is the best score
            times the root of its lead over the second best, with `value ** 1.25` (ActiveSAM's rule).
        value: in [0, 1], but above 0 for `power`; unused for `given` and `words`.
        low: of `threshold`, at most `value`; `value` if omitted, which makes it `constant`.
        refine: changes the scores `[1 + R, H, W]`, background first, before they are compared.
        min_class_share: the scores of a class that wins no more than this share of all pixels that classes win become
            0, so that its pixels go to the next best (SCLIP's area threshold).

    Returns:
        `[H, W]` uint8 on the device of the scores: 0 background, class ids, 255 where `score_maps.ignore`. A tie goes
        to the background, then to the smaller id.

    Raises:
        ConfigError: an unknown rule, a value out of range, or `given` although the generator supplies no background.
    """
    if rule == "threshold":
        floor = value if low is None else low
        if not 0 <= floor <= value <= 1:
            raise ConfigError(
                f"pseudo_masks.background.low: got {floor} with value {value}, expected 0 <= low <= value <= 1; "
                "try low 0.35 and value 0.55"
            )
        strict, loose = (
            make_label_map(score_maps, "constant", v, refine=refine, min_class_share=min_class_share)
            for v in (value, floor)
        )
        return torch.where((strict == 0) & (loose != 0), IGNORE_INDEX, strict)
    stacked = add_background(score_maps, rule, value)
    if refine is not None:
        stacked = refine(stacked)
    if min_class_share:
        stacked = drop_small_classes(stacked, min_class_share)
    ids = torch.tensor((0, *score_maps.class_ids), dtype=torch.uint8, device=stacked.device)
    # The smallest of equal maxima; on a CPU a fraction of the time of argmax.
    best = stacked.amax(0)
    labels = torch.where(stacked == best, ids[:, None, None], IGNORE_INDEX).amin(0)
    if rule == "probability":
        labels = labels.masked_fill(best < value, 0)
    elif rule == "margin":
        labels = labels.masked_fill(best * _find_lead(stacked).sqrt() < value**1.25, 0)
    if score_maps.ignore is not None:
        labels = labels.masked_fill(score_maps.ignore, IGNORE_INDEX)
    return labels


def _find_lead(scores: Tensor) -> Tensor:
    """Return how much the best of the scores `[N, H, W]` is above the second best, `[H, W]`; of one score, itself."""
    if len(scores) == 1:
        return scores[0]
    best, second = scores.topk(2, 0).values
    return best - second


def drop_small_classes(scores: Tensor, min_class_share: float) -> Tensor:
    """Return scores `[1 + R, H, W]`, background first, without those of classes that win few pixels.

    Args:
        scores: of background and classes; the first of equal maxima wins a pixel.
        min_class_share: in [0, 1]; classes that win no more than this share of the pixels that classes win get 0.
    """
    winners = torch.arange(len(scores), device=scores.device)[:, None, None] == scores.argmax(0)
    num_pixels = winners[1:].sum((1, 2))
    is_large = num_pixels > min_class_share * num_pixels.sum()
    return torch.cat([scores[:1], scores[1:] * is_large[:, None, None]])


def spill_scores(score_maps: ScoreMaps, distance: int) -> ScoreMaps:
    """Return scores that spread over the borders of classes, as those of maps that are too coarse do.

    Args:
        score_maps: scores of the present classes; background and ignored pixels stay.
        distance: 0 or more pixels; each pixel gets its class's best score in the square of side `2 * distance + 1`
            around it, cut at the image's border.
    """
    scores = score_maps.scores
    if not distance or not len(scores):
        return score_maps
    side = 2 * distance + 1
    # Square windows are separable, which makes large ones cheap.
    wide = F.max_pool2d(scores[None], (1, side), stride=1, padding=(0, distance))
    spread = F.max_pool2d(wide, (side, 1), stride=1, padding=(distance, 0))[0]
    return ScoreMaps(score_maps.class_ids, spread, score_maps.background, score_maps.ignore)


def add_background(score_maps: ScoreMaps, rule: BackgroundRule | str, value: float = 0.5) -> Tensor:
    """Return the scores of the background and of the classes, `[1 + R, H, W]`.

    Args:
        score_maps: scores of the present classes, in [0, 1].
        rule: the background's score. `constant`: `value` everywhere. `power`: `(1 - m) ** value`, `m` the pixel's
            largest class score (IRN's and AFA's family of rules). `given`: what the generator supplies; `words`:
            what a generator supplies that has words for the background. `probability`, `margin`: what it supplies,
            else 0.
        value: in [0, 1], but above 0 for `power`; unused for `given` and `words`.

    Raises:
        ConfigError: as `make_label_map` does, and for `threshold`, which compares two backgrounds.
    """
    scores = score_maps.scores
    if rule == "constant" and 0 <= value <= 1:
        background = scores.new_full(scores.shape[1:], value)
    elif rule == "power" and value > 0:
        best = scores.amax(0) if len(scores) else scores.new_zeros(scores.shape[1:])
        background = (1 - best.clamp(0, 1)) ** value
    elif rule in ("given", "words"):
        if score_maps.background is None:
            raise ConfigError(
                f"pseudo_masks.background.rule: got {rule!r}, but this generator scores no background; "
                "try pseudo_masks.background.rule=constant"
            )
        background = score_maps.background.to(scores.dtype)
    elif rule in ("probability", "margin") and 0 <= value <= 1:
        supplied = score_maps.background
        background = scores.new_zeros(scores.shape[1:]) if supplied is None else supplied.to(scores.dtype)
    elif rule in ("constant", "power", "probability", "margin"):
        allowed = "a number above 0" if rule == "power" else "a number in [0, 1]"
        raise ConfigError(f"pseudo_masks.background.value: got {value}, expected {allowed} for {rule!r}; try 0.5")
    else:
        raise ConfigError(f"pseudo_masks.background.rule: got {rule!r}, expected one of {', '.join(RULES)}; try given")
    return torch.cat([background[None], scores])


def region_vote(labels: Tensor, proposals: Proposals, purity: float = 0.0) -> Tensor:
    """Give every proposal's region the label that most of its pixels have (the paper's refinement of pseudo masks).

    Disjoint proposals need no choice. If several hold a pixel, it follows the smallest one whose purity, the share of
    its pixels that have the winning label, is at least `purity`; if none is that pure, the smallest one of all. Equal
    areas: the first in the list. So nested masks refine each other from coarse to fine.

    Args:
        labels: `[H, W]` uint8; ignored pixels (255) neither vote nor change.
        proposals: masks of the same size, on the same device.
        purity: in [0, 1]; 0 lets the smallest proposal decide.

    Returns:
        `[H, W]` uint8. Pixels of no proposal keep their label; so do those of a proposal all of whose pixels are
        ignored. Equal votes go to the smallest id.

    Raises:
        ValueError: masks of another size, or `purity` outside [0, 1].
    """
    masks = proposals.masks
    if labels.ndim != 2 or masks.shape[1:] != labels.shape:
        raise ValueError(f"proposals: got {tuple(masks.shape[1:])} masks, expected the map's {tuple(labels.shape)}")
    if not 0 <= purity <= 1:
        raise ValueError(f"purity: got {purity}, expected 0..1; try 0")
    if not len(masks):
        return labels.clone()
    flat = labels.flatten()
    ids = flat.unique()
    ids = ids[ids != IGNORE_INDEX]
    if not len(ids):
        return labels.clone()
    packed = PackedMasks.of(masks) if masks.device.type in PACKED else None
    if packed is not None:
        classes = PackedMasks.of(labels == ids[:, None, None])
        votes = torch.from_numpy(packed.shared_with(classes)).float()
    else:
        votes = _count_votes(masks, flat, ids)
    best, winner = votes.max(1).values, votes.argmax(1)
    areas = proposals.areas
    is_pure = best >= purity * votes.sum(1).clamp(min=1)
    # The last to paint a pixel decides it: impure before pure, large before small, late before early.
    order = torch.arange(len(masks), device=masks.device).flip(0)
    order = order[areas[order].argsort(descending=True, stable=True)]
    order = order[is_pure[order].int().argsort(stable=True)]
    order = order[best[order] > 0]
    if packed is not None:
        # PackedMasks keeps what was painted first; labels count from 1, so that 0 is an unpainted pixel.
        order = order.flip(0)
        numbers = (winner[order] + 1).to(torch.uint8).numpy()
        painted = torch.from_numpy(packed.paint(numbers, order.numpy())).flatten()
        result = torch.where(painted == 0, flat, torch.cat((ids[:1], ids))[painted.long()])
    else:
        # Painting one proposal after the other would make the host wait for a GPU at each.
        ranks = torch.zeros(len(masks), dtype=torch.int32, device=masks.device)
        ranks[order] = torch.arange(1, len(order) + 1, dtype=torch.int32, device=masks.device)
        last = torch.zeros_like(flat, dtype=torch.int32)
        step = max(1, _BLOCK // flat.numel())
        for block, block_ranks in zip(masks.split(step), ranks.split(step), strict=True):
            last = torch.maximum(last, (block.flatten(1) * block_ranks[:, None]).amax(0))
        result = torch.where(last == 0, flat, torch.cat((ids[:1], ids[winner[order]]))[last.long()])
    return torch.where(flat == IGNORE_INDEX, flat, result).view_as(labels)


def _count_votes(masks: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
    """Return `[N, K]` float32, the pixels of each mask `[N, H, W]` whose label `[H * W]` is each of `ids` `[K]`."""
    # float32 counts pixels exactly up to 16 million.
    one_hot = (labels[:, None] == ids).float()
    step = max(1, _BLOCK // labels.numel())
    return torch.cat([block.flatten(1).float() @ one_hot for block in masks.split(step)])


def rank_labels(maps: Tensor, probabilities: Tensor) -> Tensor:
    """Return which class each cell belongs to, as token masking is published.

    From the least to the most probable class, the cells where a map is at least its own mean become the class's; a
    cell of none takes the label of the nearest cell that has one.

    Args:
        maps: `[R, h, w]`, one or more.
        probabilities: `[R]`.

    Returns:
        `[h, w]` int64, indices into `maps`; of equally near cells the first in reading order decides.
    """
    owners = torch.full(maps.shape[1:], -1, dtype=torch.long, device=maps.device)
    # The mean of equal values may be rounded to more than these.
    covers = maps >= torch.minimum(maps.mean((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True))
    order = probabilities.argsort(stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=maps.device)
    # The highest rank that covers a cell wins it.
    best = torch.where(covers, ranks[:, None, None], -1).amax(0)
    owners = torch.where(best >= 0, order[best.clamp(min=0)], owners)
    height, width = owners.shape
    rows, columns = torch.meshgrid(
        torch.arange(height, device=maps.device), torch.arange(width, device=maps.device), indexing="ij"
    )
    places = torch.stack((rows, columns), -1).flatten(0, 1).float()
    squared = (places[:, None] - places[None]).square().sum(2)
    squared = squared.masked_fill((owners.flatten() < 0)[None], float("inf"))
    return owners.flatten()[squared.argmin(1)].view(height, width)
