"""Scoring: confusion counts, the table of measures, intervals, quality of proposals, published rows."""

from __future__ import annotations

from moduseg.evaluation.confusion import ConfusionMatrix, label_counts
from moduseg.evaluation.measures import MEASURES, Measure

__all__ = ["MEASURES", "ConfusionMatrix", "Measure", "label_counts"]
