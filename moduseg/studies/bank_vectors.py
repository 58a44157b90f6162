"""How near a bank's vectors are to those of true masks: what purification and soft masks are to improve."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F

from moduseg.bank.store import Bank
from moduseg.config import Config, compose
from moduseg.errors import ConfigError
from moduseg.evaluation.measures import Figure
from moduseg.pipeline.workspace import Workspace
from moduseg.stages.build_bank import BuildBank

VECTOR_FIGURES: dict[str, Figure] = {
    figure.column: figure
    for figure in (
        Figure(name="agreement", title="cosine to true masks' vectors", column="vector agreement"),
        Figure(name="kept", title="objects with a vector", column="vectors kept"),
    )
}
"""Columns of a bank's vectors, and where `measure_vectors` has them."""


def measure_vectors(cfg: Config, work: Workspace) -> dict[str, Any]:
    """Compare the foreground vectors of a run's bank with those of a bank of the annotated masks.

    The second one is built of the same images by the same backbone: soft masks, no purification, no minimum area. It is
    the same for all settings of pseudo masks, purification and aggregation, so that a table makes it once.

    Returns:
        `agreement`: mean cosine of both vectors of a (training image, class), in percent, over those that both banks
        have; `None` without any. `kept`: share of the true (image, class) pairs that have a vector, in percent.

    Raises:
        ConfigError: a finished bank, which other images may have made.
        DataError: the training split has no ground truth.
    """
    if cfg.bank.path is not None:
        raise ConfigError(
            f"bank.path: got {cfg.bank.path!r}, expected null, since the bank's vectors are compared with those of a "
            "bank of the same images; leave it out, or the columns of vectors"
        )
    truth = compose(["pseudo_masks=ground_truth"]).pseudo_masks
    purify = replace(cfg.bank.purify, enabled=False)
    settings = replace(cfg.bank, purify=purify, aggregation="soft", min_area=1)
    reference = Bank.load(BuildBank.run(replace(cfg, pseudo_masks=truth, bank=settings)))
    bank = Bank.load(BuildBank.run(cfg, work))
    row_of = _index_foreground(reference)
    pairs = [(row, row_of[key]) for key, row in _index_foreground(bank).items() if key in row_of]
    kept = 100 * len(pairs) / len(row_of) if row_of else None
    if not pairs:
        return {"agreement": None, "kept": kept}
    rows, true_rows = zip(*pairs, strict=True)
    cosines = F.cosine_similarity(bank.pooled[list(rows)], reference.pooled[list(true_rows)])
    return {"agreement": 100 * float(cosines.mean()), "kept": kept}


def _index_foreground(bank: Bank) -> dict[tuple[str, int], int]:
    """Return the row of each (image, class) of a bank, background apart; parts and mirror images follow the first."""
    names = [bank.image_ids[int(i)] for i in bank.image_index]
    rows: dict[tuple[str, int], int] = {}
    for row, (name, label) in enumerate(zip(names, bank.labels.tolist(), strict=True)):
        if label:
            rows.setdefault((name, label), row)
    return rows
