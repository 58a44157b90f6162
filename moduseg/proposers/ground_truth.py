"""The oracle: ground-truth masks as proposals (METHOD, upper bounds; 95.7 mIoU on VOC val in the paper)."""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
import torch

from moduseg.errors import DataError
from moduseg.proposers.base import Proposer
from moduseg.structures import IGNORE_INDEX, Proposals, Sample


class GroundTruthProposer(Proposer):
    """One proposal for each ground-truth object, and one for the background. Pixels to ignore are in none.

    Args:
        source: `instances` takes the objects as annotated, `semantic` the connected components (8 neighbours) of each
            class, `auto` the instances of an image that has them and else the components.
        min_component_area: smallest object in pixels; smaller ones are left out.
        background: whether the background region is a proposal as well.

    Raises:
        ValueError: an unknown source or a minimum below 1.
    """

    needs_truth = True

    def __init__(
        self,
        source: Literal["auto", "instances", "semantic"] = "auto",
        min_component_area: int = 1,
        background: bool = True,
    ) -> None:
        if source not in ("auto", "instances", "semantic"):
            raise ValueError(f"source: got {source!r}, expected auto, instances or semantic; try 'auto'")
        if min_component_area < 1:
            raise ValueError(f"min_component_area: got {min_component_area}, expected 1 or more pixels; try 1")
        self.source = source
        self.min_component_area = min_component_area
        self.background = background

    def propose(self, sample: Sample) -> Proposals:
        """The objects in ascending id (or class, then position), the background last.

        Raises:
            DataError: the image lacks the ground truth that `source` asks for.
        """
        objects = self._objects(sample)
        if sample.semantic is not None:
            objects = np.where(sample.semantic == IGNORE_INDEX, 0, objects)
            empty = sample.semantic == 0
        else:
            empty = objects == 0
        ids, areas = np.unique(objects[objects > 0], return_counts=True)
        ids = ids[areas >= self.min_component_area]
        masks = [objects == i for i in ids]
        if self.background and np.count_nonzero(empty) >= self.min_component_area:
            masks.append(empty)
        if not masks:
            return Proposals(torch.zeros((0, *sample.size), dtype=torch.bool))
        return Proposals(torch.from_numpy(np.stack(masks)))

    def _objects(self, sample: Sample) -> np.ndarray:
        """`[H, W]` int, 0 where there is no object."""
        if sample.instances is not None and self.source != "semantic":
            return sample.instances
        if sample.semantic is None or self.source == "instances":
            wanted = "instance" if self.source == "instances" else "ground-truth"
            raise DataError(
                f"image {sample.id!r}: got no {wanted} masks, expected them for the ground_truth proposer "
                f"(source={self.source}); try a split with masks or another proposer"
            )
        objects = np.zeros(sample.size, dtype=np.int32)
        taken = 0
        for class_id in np.unique(sample.semantic):
            if class_id in (0, IGNORE_INDEX):
                continue
            count, components = cv2.connectedComponents((sample.semantic == class_id).astype(np.uint8), connectivity=8)
            objects += np.where(components > 0, components + taken, 0).astype(np.int32)
            taken += count - 1
        return objects
