"""The 27 coarse classes of COCO-Stuff and of Cityscapes by which unsupervised segmentation is scored."""

from __future__ import annotations

import numpy as np

from moduseg.errors import LabelIdError
from moduseg.structures import IGNORE_INDEX

_COCO_STUFF27: dict[str, tuple[int, ...]] = {
    "electronic": tuple(range(71, 77)),
    "appliance": tuple(range(77, 83)),
    "food": tuple(range(51, 61)),
    "furniture": tuple(range(61, 71)),
    "indoor": tuple(range(83, 91)),
    "kitchen": tuple(range(43, 51)),
    "accessory": tuple(range(25, 33)),
    "animal": tuple(range(15, 25)),
    "outdoor": tuple(range(9, 15)),
    "person": (0,),
    "sports": tuple(range(33, 43)),
    "vehicle": tuple(range(1, 9)),
    "ceiling": (101, 102),
    "floor": (100, *range(113, 118)),
    "food stuff": (120, 121, 152, 169),
    "furniture stuff": (97, 106, 107, 109, 111, 122, 129, 132, 155, 160, 164),
    "raw material": (99, 131, 138, 142),
    "textile": (91, 92, 103, 104, 108, 130, 136, 140, 151, 166, 167),
    "wall": tuple(range(170, 177)),
    "window": (179, 180),
    "building": (94, 95, 127, 150, 157, 165),
    "ground": (110, 124, 125, 135, 139, 143, 144, 146, 148, 153, 158),
    "plant": (93, 96, 118, 123, 128, 133, 141, 162, 168),
    "sky": (105, 156),
    "solid": (126, 134, 149, 159, 161, 181),
    "structural": (98, 112, 137, 145, 163),
    "water": (119, 147, 154, 177, 178),
}
"""Ids 0..181 of COCO-Stuff's `stuffthingmaps` by coarse class (PiCIE, Cho et al., 2021)."""
COCO_STUFF27_CLASSES = tuple(_COCO_STUFF27)
CITYSCAPES27_CLASSES = (
    "road", "sidewalk", "parking", "rail track", "building", "wall", "fence", "guard rail", "bridge", "tunnel", "pole",
    "polegroup", "traffic light", "traffic sign", "vegetation", "terrain", "sky", "person", "rider", "car", "truck",
    "bus", "caravan", "trailer", "train", "motorcycle", "bicycle",
)  # fmt: skip
"""The labels 7..33 of Cityscapes' `labelIds`, in their order."""
_FIRST_CITYSCAPES = 7


def _make_table(ids_by_class: dict[int, tuple[int, ...]]) -> np.ndarray:
    """Return a table `[256]` uint8 from ids to classes, 255 for every other id."""
    table = np.full(256, IGNORE_INDEX, dtype=np.uint8)
    for label, ids in ids_by_class.items():
        table[list(ids)] = label
    return table


_COCO_STUFF_TABLE = _make_table(dict(enumerate(_COCO_STUFF27.values())))
_CITYSCAPES_TABLE = _make_table({label: (label + _FIRST_CITYSCAPES,) for label in range(len(CITYSCAPES27_CLASSES))})
_COCO_STUFF_IDS, _CITYSCAPES_IDS = (0, 181), (0, 33)


def to_coco_stuff27(ids: np.ndarray) -> np.ndarray:
    """Return the coarse classes of a map of COCO-Stuff.

    Args:
        ids: `[H, W]` uint8 as `stuffthingmaps` have them, 0..181, 255 unlabelled.

    Returns:
        `[H, W]` uint8, 0..26 in the order of `COCO_STUFF27_CLASSES`, 255 where ignored.

    Raises:
        LabelIdError: another id.
    """
    return _translate(ids, _COCO_STUFF_TABLE, _COCO_STUFF_IDS, "stuffthingmaps")


def to_cityscapes27(ids: np.ndarray) -> np.ndarray:
    """Return the coarse classes of a map of Cityscapes.

    Args:
        ids: `[H, W]` uint8 as `labelIds` have them, 0..33, 255 for id -1.

    Returns:
        `[H, W]` uint8, 0..26 in the order of `CITYSCAPES27_CLASSES`, 255 where ignored.

    Raises:
        LabelIdError: another id.
    """
    return _translate(ids, _CITYSCAPES_TABLE, _CITYSCAPES_IDS, "labelIds")


def _translate(ids: np.ndarray, table: np.ndarray, known: tuple[int, int], what: str) -> np.ndarray:
    """Return the classes of a map by a table, after checking its ids."""
    is_wrong = (ids > known[1]) & (ids != IGNORE_INDEX)
    if ids.dtype != np.uint8 or is_wrong.any():
        got = f"id {int(ids[is_wrong][0])}" if is_wrong.any() else str(ids.dtype)
        raise LabelIdError(
            f"label map: got {got}, expected uint8 ids {known[0]}..{known[1]} or {IGNORE_INDEX} as {what} has them; "
            "read the published PNG as it is"
        )
    return table[ids]
