from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from moduseg.datasets.png import read_plain_png
from moduseg.masks.palette import voc_palette
from moduseg.report import pictures


@pytest.mark.parametrize(
    ("size", "longest", "expected"),
    [((100, 200), 50, (25, 50)), ((100, 200), 400, (100, 200)), ((3, 1000), 100, (1, 100)), ((1000, 1), 100, (100, 1))],
)
def test_pictures_are_never_enlarged(size: tuple[int, int], longest: int, expected: tuple[int, int]) -> None:
    assert pictures.fit_size(size, longest) == expected


def test_label_maps_are_palette_pngs_whose_rows_are_plain(tmp_path, rng: np.random.Generator) -> None:
    labels = rng.integers(0, 4, (9, 13), dtype=np.uint8)
    labels[0, 0] = 255
    data = pictures.encode_label_png(labels, labels.shape)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.mode == "P"
        np.testing.assert_array_equal(np.asarray(picture), labels)
        np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), voc_palette()[labels])
    (tmp_path / "labels.png").write_bytes(data)
    found = read_plain_png(tmp_path / "labels.png", 10**6)
    assert found is not None
    np.testing.assert_array_equal(found, labels)
    few = pictures.encode_label_png(np.minimum(labels, 3), labels.shape)
    assert len(few) < len(data) - 3 * 200  # no colour that is not used
    small = pictures.encode_label_png(labels, (3, 4))
    with Image.open(io.BytesIO(small)) as picture:
        assert set(np.unique(np.asarray(picture))) <= set(np.unique(labels))


@pytest.mark.parametrize(("scores", "size", "expected"), [
    pytest.param([[0.0, 1.0], [0.5, 0.2]], (2, 2), [[0, 255], [128, 51]], id="steps of 1/255"),
    pytest.param([[-1.0, 2.0], [0.0, 1.0]], (2, 2), [[0, 255], [0, 255]], id="values are cut off"),
    pytest.param([[0.0, 0.4], [0.4, 0.8]], (1, 1), [[102]], id="a smaller map holds averages"),
])  # fmt: skip
def test_scores_are_grey_pngs(scores: list[list[float]], size: tuple[int, int], expected: list[list[int]]) -> None:
    with Image.open(io.BytesIO(pictures.encode_heat_png(np.array(scores), size))) as opened:
        assert opened.mode == "P"
        assert np.asarray(opened).tolist() == expected
        assert opened.convert("L").getpixel((0, 0)) == expected[0][0]


def test_an_id_without_a_colour_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got id 3, expected 0\.\.2"):
        pictures.encode_index_png(np.full((2, 2), 3, np.uint8), voc_palette(3))


def test_layers_hold_every_mask_whole_and_none_twice(rng: np.random.Generator) -> None:
    masks = np.zeros((40, 30, 50), dtype=bool)
    for mask in masks[:-1]:
        y, x = rng.integers(0, 20), rng.integers(0, 40)
        mask[y : y + rng.integers(1, 12), x : x + rng.integers(1, 12)] = True
    packed = pictures.pack_layers(masks)
    layers, layer_of, code_of = packed.layers, packed.layer_of, packed.code_of
    assert 1 < len(layers) < 20
    assert len({pair for pair in zip(layer_of, code_of, strict=True) if pair[0] >= 0}) == 39
    for mask, layer, code in zip(masks[:-1], layer_of, code_of, strict=False):
        np.testing.assert_array_equal(layers[layer] == code, mask)
    assert (layer_of[-1], code_of[-1]) == (-1, 0)
    biggest = int(masks.reshape(40, -1).sum(1).argmax())
    assert (layer_of[biggest], code_of[biggest]) == (0, 1)


def test_disjoint_masks_need_one_layer_for_each_254() -> None:
    ids = np.arange(300).reshape(15, 20)
    packed = pictures.pack_layers(np.stack([ids == i for i in range(300)]))
    layers, layer_of, code_of = packed.layers, packed.layer_of, packed.code_of
    assert len(layers) == 2
    assert max(code_of) == pictures.MAX_CODES
    assert layer_of.count(1) == 300 - pictures.MAX_CODES
    assert pictures.pack_layers(np.zeros((0, 4, 4), bool)) == pictures.PackedMasks([], [], [])
    assert pictures.encode_layer_png(layers[0]).startswith(b"\x89PNG")


def test_a_crop_shows_the_region_and_its_surroundings() -> None:
    image = np.full((60, 200, 3), 90, np.uint8)
    image[20:30, 150:160] = (200, 40, 40)
    region = (image[:, :, 0] == 200).copy()
    crop = pictures.crop_region(image, region, 2, 64)
    assert crop.shape == (64, 64, 3)
    red = (crop == (200, 40, 40)).all(2)
    assert 0.15 < red.mean() < 0.6
    ys, xs = np.nonzero(red)
    assert abs(ys.mean() - 31.5) < 4
    assert abs(xs.mean() - 31.5) < 4
    assert (crop == pictures.choose_outline_colour(2)).all(2).any()


@pytest.mark.parametrize(
    "where", [(slice(0, 60), slice(0, 200)), (slice(0, 3), slice(0, 3)), (slice(0, 0), slice(0, 0))]
)
def test_crops_of_whole_images_corners_and_nothing(where: tuple[slice, slice]) -> None:
    region = np.zeros((60, 200), dtype=bool)
    region[where] = True
    crop = pictures.crop_region(np.full((60, 200, 3), 90, np.uint8), region, 1, 48)
    # A wide image is shown as it is, without bars that make it a square.
    assert crop.shape[:2] == ((48, 48) if 0 < region.sum() < 100 else (14, 48))
    assert (crop == 90).any()


def test_outlines_are_bright_enough_to_be_seen() -> None:
    for label in range(1, 81):
        red, green, blue = pictures.choose_outline_colour(label)
        assert 0.299 * red + 0.587 * green + 0.114 * blue > 145
        assert max(red, green, blue) <= 255


def test_the_training_image_says_what_purification_took() -> None:
    image = np.full((40, 60, 3), 200, np.uint8)
    labels = np.zeros((40, 60), np.uint8)
    labels[10:30, 20:50] = 1
    kept = np.full((40, 60), 255, np.uint8)
    kept[14:26, 24:46] = 1
    kept[:4] = 0
    shown = pictures.draw_purification(image, labels, kept, 60)
    assert shown.shape == (40, 60, 3)
    np.testing.assert_array_equal(shown[1, 30], (200, 200, 200))
    np.testing.assert_array_equal(shown[7, 30], (120, 120, 120))
    assert shown[20, 35, 0] > shown[20, 35, 2]  # class 1 is dark red
    assert pictures.draw_purification(image, labels, kept, 128).shape == (80, 120, 3)
    assert pictures.draw_purification(image, labels, kept, 30).shape == (20, 30, 3)
