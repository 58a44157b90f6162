"""Pictures of a bank's regions: where they are looked for, and which of them may be shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moduseg.bank import edit
from moduseg.bank.store import Bank
from moduseg.datasets.io import write_rgb_png
from moduseg.report.bank_regions import RegionPictures, draw_region
from moduseg.stages import extend_bank
from tests.support.tagged_world import image_id, scene, write_folder


def test_pictures_of_regions_are_looked_for_through_the_folders(bank: Path, tmp_path: Path) -> None:
    """Those of a bank made of banks too; where an image is gone there is none."""
    more = write_folder(tmp_path / "more", [30])
    options = extend_bank.AddOptions(str(bank), (str(more),), out=str(tmp_path / "new"))
    extend_bank.run(options, [f"runtime.outputs={tmp_path / 'o'}"])
    stored = Bank.load(tmp_path / "new")
    pictures = RegionPictures(tmp_path / "new", stored, size=100, picture_folders=[more])
    for row in range(len(stored)):
        name, label = stored.image_ids[int(stored.image_index[row])], stored.classes[int(stored.labels[row])]
        assert pictures.draw(name, label) is not None
    first = stored.image_ids[int(stored.image_index[1])]
    label = stored.classes[int(stored.labels[1])]
    outlined, whole = pictures.draw(first, label), pictures.draw(first, "no such class")
    assert outlined is not None
    assert whole is not None
    assert not np.array_equal(outlined, whole)
    (more / "images" / f"{image_id(30)}.png").unlink()
    assert RegionPictures(tmp_path / "new", stored).draw(image_id(30), label) is None
    assert RegionPictures(tmp_path / "new", stored).draw("nobody", label) is None


def name_picture(bank: Bank, image: str, file: str) -> Bank:
    """The bank with a file named for one of its images, as somebody who writes a bank.json by hand can."""
    return edit.append_files(bank, {image: file})


def test_a_foreign_bank_shows_no_file_outside_its_images(
    bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bank)
    stored, shown = Bank.load(bank), write_rgb_png(scene(20).image)
    first = stored.image_ids[0]
    folder, private = tmp_path / "foreign", tmp_path / "private.png"
    (folder / "images").mkdir(parents=True)
    private.write_bytes(shown)
    (folder / "images" / "own.png").write_bytes(shown)
    (folder / "images" / "link.png").symlink_to(private)
    for file, is_shown in {
        str(folder / "images" / "own.png"): True,
        str(private): False,
        str(folder / "images" / ".." / ".." / "private.png"): False,
        str(folder / "images" / "link.png"): False,
        "pictures\0.png": False,
    }.items():
        pictures = RegionPictures(folder, name_picture(stored, first, file))
        assert (pictures.find_image(first) is not None) == is_shown, file
    allowed = RegionPictures(folder, name_picture(stored, first, str(private)), picture_folders=[tmp_path])
    assert allowed.find_image(first) is not None
    monkeypatch.chdir(tmp_path)
    assert RegionPictures(folder, name_picture(stored, first, str(private))).find_image(first) is not None
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RegionPictures(folder, name_picture(stored, first, str(private))).find_image(first) is None
    for outside in ("../images/" + first, str(tmp_path / "private"), "a\0b"):
        pictures = RegionPictures(folder, stored)
        assert pictures.find_image(outside) is None
        assert pictures.find_label_map(outside) is None


def test_a_public_page_shows_no_training_image_outside_the_bank(bank: Path) -> None:
    stored = Bank.load(bank)
    first = stored.image_ids[0]
    root = Path(stored.info["config"]["dataset"]["root"])
    assert RegionPictures(bank, stored).find_image(first) is not None
    assert RegionPictures(bank, stored, is_public=True).find_image(first) is None
    assert RegionPictures(bank, stored, picture_folders=[root], is_public=True).find_image(first) is not None


def test_a_region_is_cut_out_and_the_rest_dimmed() -> None:
    image = np.full((40, 60, 3), 200, np.uint8)
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:20, 10:30] = True
    picture = draw_region(image, mask, 112)
    assert picture.shape == (72, 112, 3)  # 18 x 28 pixels of the image
    assert picture[36, 56].tolist() == [200, 200, 200]
    assert picture[2, 2].tolist() == [90, 90, 90]
    assert (picture == 255).all(2).any()
    assert draw_region(image, None, 30).shape == (20, 30, 3)
