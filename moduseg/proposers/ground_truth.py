"""Ground-truth masks as proposals: an upper bound (docs/method.md, published numbers), never a result."""

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
        min_component_area: smallest object in pixels; smaller ones are dropped.
        background: whether the background region is a proposal as well.

    Raises:
        ValueError: an unknown source or a minimum below 1.
    """

    needs_truth = True
    sees_image_alone = False

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
        """Return the objects in ascending id (or class, then position), the background last.

        Raises:
            DataError: the image lacks the ground truth that `source` asks for.
        """
        objects = self._number_objects(sample)
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

    def _number_objects(self, sample: Sample) -> np.ndarray:
        """Return the objects as ids, `[H, W]` int, 0 on pixels without an object."""
        if sample.instances is not None and self.source != "semantic":
            return sample.instances
        if sample.semantic is None or self.source == "instances":
            kind = "instance" if self.source == "instances" else "ground-truth"
            raise DataError(
                f"image {sample.id!r}: got no {kind} masks, expected them for the ground_truth proposer "
                f"(source={self.source}); try a split with masks or another proposer"
            )
        objects = np.zeros(sample.size, dtype=np.int32)
        num_objects = 0
        for class_id in np.unique(sample.semantic):
            if class_id in (0, IGNORE_INDEX):
                continue
            # `count` includes the pixels outside, component 0.
            count, components = cv2.connectedComponents((sample.semantic == class_id).astype(np.uint8), connectivity=8)
            objects += np.where(components > 0, components + num_objects, 0).astype(np.int32)
            num_objects += count - 1
        return objects
