"""Ground truth as pseudo masks: the upper bound of every generator."""

from __future__ import annotations

from moduseg.devices import Device
from moduseg.errors import DataError
from moduseg.pseudo_masks.base import PseudoMaskGenerator
from moduseg.pseudo_masks.files import to_one_hot
from moduseg.structures import Proposals, Sample, ScoreMaps


class GroundTruthPseudoMasks(PseudoMaskGenerator):
    """The annotated masks, as one-hot scores with a background (the paper's upper-bound row).

    Args:
        device: where the scores are put.
        filter_labels: pixels of classes outside the image-level labels become background.
    """

    needs_truth = True

    def __init__(self, device: Device, filter_labels: bool = True) -> None:
        self._device, self._filter = device, filter_labels

    def generate(self, sample: Sample, labels: tuple[int, ...], proposals: Proposals | None = None) -> ScoreMaps:
        """Return one-hot scores of `sample.semantic`; 255 is ignored.

        Raises:
            DataError: the image has no ground truth.
        """
        if sample.semantic is None:
            raise DataError(
                f"{sample.id}: no ground truth, which pseudo_masks=ground_truth needs; try pseudo_masks=cam"
            )
        return to_one_hot(sample.semantic, labels if self._filter else None, self._device)
