"""Numbers: confusion matrix, IoU, intervals, quality of proposals, tables beside published rows."""

from __future__ import annotations

from moduseg.evaluation.confusion import ConfusionMatrix, frequency_weighted_iou, iou, miou, pixel_accuracy

__all__ = ["ConfusionMatrix", "frequency_weighted_iou", "iou", "miou", "pixel_accuracy"]
