"""Proposals as one folder an image with a PNG a mask, as SAM's command line writes them.

<image>/metadata.csv        id,area,...,predicted_iou,stability_score,...
<image>/<id>.png            0 outside the mask
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import torch

from moduseg.errors import DataError
from moduseg.proposers.id_maps import MAX_UNCHECKED_MASK_PIXELS, read_png
from moduseg.structures import Proposals

TABLE = "metadata.csv"
"""File that marks such a folder."""
_COLUMNS = ("id", "area", "predicted_iou", "stability_score")


def read_mask_folder(folder: Path) -> Proposals:
    """Return the masks of one folder, in the order of its table.

    Raises:
        DataError: the table or a mask is absent, damaged or of another size, or a mask contradicts its area.
    """
    table = folder / TABLE
    try:
        rows = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8-sig"))))
        numbers = [[float(row[name]) for name in _COLUMNS] for row in rows]
        # NaN is unequal to itself, and the ids are names of files.
        is_valid = all(0 <= n[0] == int(n[0]) and all(abs(value) <= 1e9 for value in n) for n in numbers)
    except (OSError, csv.Error, KeyError, TypeError, ValueError, OverflowError) as error:
        why = " ".join(str(error).split())
        raise DataError(f"{table}: not SAM's table ({why}), expected {', '.join(_COLUMNS)}; write it again") from error
    if not numbers or not is_valid:
        raise DataError(f"{table}: got no masks or numbers out of range, expected a row for each mask; write it again")
    masks: list[np.ndarray] = []
    for number, area, _, _ in numbers:
        path = folder / f"{int(number)}.png"
        mask = _read_mask(path, masks[0].shape if masks else None)
        if len(numbers) * mask.size > MAX_UNCHECKED_MASK_PIXELS:
            raise DataError(
                f"{folder}: {len(numbers)} masks of {mask.shape[0]} x {mask.shape[1]} pixels are more than the "
                f"{MAX_UNCHECKED_MASK_PIXELS} pixels that fit in memory; keep fewer masks or a smaller image"
            )
        if int(mask.sum()) != area:
            raise DataError(f"{path}: the mask has {int(mask.sum())} pixels, {TABLE} says {area:g}; write it again")
        masks.append(mask)
    scores = torch.tensor(numbers, dtype=torch.float32)
    return Proposals(torch.from_numpy(np.stack(masks)), scores[:, 2].clone(), scores[:, 3].clone())


def _read_mask(path: Path, expected_size: tuple[int, ...] | None) -> np.ndarray:
    """Return one mask, `[H, W]` bool."""
    values = read_png(path, None if expected_size is None else (expected_size[0], expected_size[1]))
    if len(np.unique(values[values > 0])) > 1:
        raise DataError(f"{path}: got several values above 0, expected a mask of one; write it again")
    mask: np.ndarray = values > 0
    return mask
