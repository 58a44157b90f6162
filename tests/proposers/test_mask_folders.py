"""Folders of one PNG a mask, as SAM's command line writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moduseg.errors import DataError
from moduseg.proposers.mask_folders import TABLE, read_mask_folder
from moduseg.proposers.sa1b import read_proposals
from moduseg.tools.convert import convert_folder

SIZE = (20, 30)
HEADER = "id,area,bbox_x0,bbox_y0,bbox_w,bbox_h,point_input_x,point_input_y,predicted_iou,stability_score"


def _masks() -> np.ndarray:
    """Two overlapping masks."""
    masks = np.zeros((2, *SIZE), bool)
    masks[0, 2:12, 3:20] = True
    masks[1, 8:18, 10:28] = True
    return masks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "masks" / "trip" / "p0"
    path.mkdir(parents=True)
    rows = [HEADER]
    for number, mask in enumerate(_masks()):
        Image.fromarray(mask.astype(np.uint8) * 255).save(path / f"{number}.png")
        rows.append(f"{number},{mask.sum()},0,0,1,1,5,5,0.{9 - number},0.95")
    (path / TABLE).write_text("\n".join(rows))
    return path


def test_masks_and_scores_are_read(folder: Path) -> None:
    proposals = read_mask_folder(folder)
    assert torch.equal(proposals.masks, torch.from_numpy(_masks()))
    assert proposals.predicted_iou.tolist() == pytest.approx([0.9, 0.8])
    assert proposals.stability_score.tolist() == pytest.approx([0.95, 0.95])


def test_a_folder_becomes_one_file(folder: Path, tmp_path: Path) -> None:
    Image.fromarray(np.eye(20, dtype=np.uint8)).save(tmp_path / "masks" / "map.png")
    done = convert_folder(tmp_path / "masks", tmp_path / "out")
    assert (done.written, done.failed) == (2, {})
    assert torch.equal(read_proposals(tmp_path / "out" / "trip" / "p0.json", SIZE).masks, torch.from_numpy(_masks()))
    assert convert_folder(tmp_path / "masks", tmp_path / "out").kept == 2


def _save(name: str, array: np.ndarray) -> Callable[[Path], object]:
    return lambda folder: Image.fromarray(array).save(folder / name)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(lambda f: (f / "1.png").unlink(), "no such file", id="absent"),
        pytest.param(lambda f: (f / "1.png").write_bytes(b"x"), "not readable as a PNG", id="damaged"),
        pytest.param(_save("1.png", np.zeros(SIZE, np.uint8)), "has 0 pixels, metadata.csv says 180", id="empty"),
        pytest.param(_save("1.png", np.zeros((9, 9), np.uint8)), "is 9 x 9", id="another size"),
        pytest.param(_save("1.png", np.indices(SIZE, np.uint8).sum(0, np.uint8)), "several values", id="ids"),
        pytest.param(lambda f: (f / TABLE).write_text("a,b\n1,2\n"), "not SAM's table", id="another table"),
        pytest.param(lambda f: (f / TABLE).write_text(HEADER), "got no masks", id="no row"),
        pytest.param(
            lambda f: (f / TABLE).write_text(f"{HEADER}\n0,170,0,0,1,1,5,5,nan,1"), "out of range", id="no number"
        ),
    ],
)
def test_damage_is_one_line(folder: Path, damage: Callable[[Path], object], words: str) -> None:
    damage(folder)
    with pytest.raises(DataError, match=words) as caught:
        read_mask_folder(folder)
    assert "\n" not in str(caught.value)
