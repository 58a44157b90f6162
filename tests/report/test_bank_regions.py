"""Where the pictures of a bank's regions come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moduseg.bank.store import Bank
from moduseg.config import compose
from moduseg.datasets.folder import FolderDataset
from moduseg.report.bank_regions import RegionPictures
from tests.support.tagged_world import CLASSES, image_id, scene, settings, write_folder


def test_images_are_what_the_data_set_is_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set that cuts pictures out of images has label maps of these."""
    root = write_folder(tmp_path / "own", range(2))
    config = compose(settings(root, tmp_path / "outputs")).as_dict()
    none = torch.zeros(1, dtype=torch.int64)
    info = {"config": config, "split": "train"}
    bank = Bank(torch.ones(1, 4), none, none, none, (image_id(0),), CLASSES, info)
    whole = RegionPictures(tmp_path, bank).find_image(image_id(0))
    assert whole is not None
    assert np.array_equal(whole, scene(0).image)
    monkeypatch.setattr(FolderDataset, "prepare_image", lambda _, image: image[8:40, 4:36])
    part = RegionPictures(tmp_path, bank).find_image(image_id(0))
    assert part is not None
    assert np.array_equal(part, scene(0).image[8:40, 4:36])
