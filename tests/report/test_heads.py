"""Where heads look, as a picture."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from moduseg.report.heads import draw_heads


def test_a_row_for_each_block_and_a_column_for_each_head() -> None:
    image = np.full((40, 60, 3), 120, np.uint8)
    attention = torch.zeros(2, 3, 4, 6)
    attention[:, :, 1, 4] = 1.0
    is_open = torch.ones(2, 3, dtype=torch.bool)
    picture = np.asarray(Image.open(io.BytesIO(draw_heads(image, attention, is_open))))
    assert picture.shape[0] == 2 * (26 + 133 + 8)
    # The image and three heads of 200 pixels, with gaps.
    assert picture.shape[1] == 4 * 200 + 5 * 8
    first_head = picture[26 : 26 + 133, 216:416].astype(int)
    bright = first_head.sum(2)
    row, column = np.unravel_index(bright.argmax(), bright.shape)
    # The brightest pixel lies in the cell that the head looks at: the second row and fifth column of cells.
    assert 133 // 4 <= row < 133 // 2
    assert 4 * 200 // 6 <= column < 5 * 200 // 6


def test_closed_heads_are_called_so() -> None:
    image = np.full((40, 40, 3), 120, np.uint8)
    attention = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    open_picture = draw_heads(image, attention, torch.tensor([[True, True]]))
    closed = draw_heads(image, attention, torch.tensor([[True, False]]))
    pictures = [np.asarray(Image.open(io.BytesIO(data))) for data in (open_picture, closed)]
    # The title alone differs: the second head's map is drawn all the same.
    differing = (pictures[0] != pictures[1]).any(2)
    assert differing[:26].any()
    assert not differing[26:].any()
