from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moduseg.masks.palette import voc_palette
from moduseg.report import overlay
from moduseg.report.panel import choose_display_size, draw_image_panel, draw_legend, draw_panel, make_class_legend

CLASSES = ("background", "dog", "cat")


@pytest.fixture
def scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Image, truth, prediction, proposals of 48 x 64 pixels."""
    image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    truth = np.zeros((48, 64), dtype=np.uint8)
    truth[8:30, 8:30], truth[20:40, 40:60], truth[:4] = 1, 2, 255
    prediction = np.roll(np.where(truth == 255, 0, truth), 4, axis=1)
    masks = np.stack([truth < 300, truth == 1, prediction == 2])
    return image, truth, prediction, masks


def test_panels_and_page_have_the_same_words_and_colours_for_errors() -> None:
    script = (Path(overlay.__file__).parent / "static" / "lib" / "paint.js").read_text(encoding="utf-8")
    page = re.findall(r'^    \["(\w+)", "#(\w{6})", "', script, re.MULTILINE)
    assert [(name, tuple(bytes.fromhex(colour))) for name, colour in page] == list(overlay.ERROR_LEGEND)


def _open(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture.convert("RGB"))


def _has(picture: np.ndarray, colour: tuple[int, ...]) -> bool:
    return bool((picture == np.array(colour, dtype=np.uint8)).all(-1).any())


def test_error_map_has_one_colour_for_each_case() -> None:
    truth = np.array([[0, 1, 1, 0, 1, 255, 255]])
    prediction = np.array([[0, 1, 0, 1, 2, 0, 1]])
    painted = overlay.paint_errors(truth, prediction)[0]
    expected = [None, overlay.CORRECT, overlay.MISSED, overlay.EXTRA, overlay.CONFUSED, *[overlay.IGNORED] * 2]
    for pixel, colour in zip(painted.astype(float), expected, strict=True):
        if colour is None:
            assert pixel.sum() == 0
        else:
            # Over black a colour keeps its direction.
            cosine = pixel @ np.array(colour) / np.linalg.norm(pixel) / np.linalg.norm(colour)
            assert cosine > 0.999


def test_label_colours_are_the_palettes() -> None:
    image = np.full((4, 6, 3), (200, 20, 20), dtype=np.uint8)
    labels = np.array([[0, 0, 1, 1, 2, 255]] * 4, dtype=np.uint8)
    painted = overlay.overlay_labels(image, labels, alpha=1.0, outline=False)
    np.testing.assert_array_equal(painted[0, 2:], voc_palette()[[1, 1, 2, 255]])
    colours = np.roll(voc_palette(), 1, axis=0)
    painted = overlay.overlay_labels(image, labels, colours, alpha=1.0, outline=False)
    np.testing.assert_array_equal(painted[0, 2:], colours[[1, 1, 2, 255]])
    half = overlay.overlay_labels(image, labels, alpha=0.5, outline=False)[0, 4].astype(int)
    assert half[0] == half[2]  # the photograph's red does not leak into the colour of the class


def test_overlays_leave_the_background_and_darken_outlines(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (600, 40, 3), dtype=np.uint8)
    labels = np.zeros((600, 40), dtype=np.uint8)
    labels[100:200, 5:30], labels[200:300, 5:30] = 1, 2
    painted = overlay.overlay_labels(image, labels, alpha=1.0)
    assert painted.shape == image.shape
    np.testing.assert_array_equal(painted[labels == 0], image[labels == 0])
    # The longer side has 600 pixels, so outlines are 2 pixels wide.
    assert [int(painted[y, 15, 0]) for y in (100, 101, 102, 197, 198, 199)] == [70, 70, 128, 128, 70, 70]
    assert [int(painted[y, 15, 1]) for y in (200, 201, 202)] == [70, 70, 128]
    assert (overlay.overlay_labels(image, labels, outline=False) != painted).any()


def test_nested_proposals_stay_visible_in_any_order() -> None:
    image = np.full((40, 40, 3), 128, dtype=np.uint8)
    masks = np.zeros((3, 40, 40), dtype=bool)
    masks[0, 14:26, 14:26], masks[1, 2:38, 2:38], masks[2, 8:32, 8:32] = True, True, True
    for order in ([0, 1, 2], [2, 1, 0]):
        painted = overlay.overlay_proposals(image, torch.from_numpy(masks[order]))
        inner, middle, outer = painted[14, 20], painted[8, 20], painted[2, 20]
        assert len({tuple(c) for c in (inner, middle, outer)}) == 3
        assert (painted[[0, 5, 11, 20], [0, 20, 20, 20]] == 128).all()  # the photograph between the outlines


def test_proposals_cut_off_at_the_border_or_absent() -> None:
    image = np.full((10, 12, 3), 100, dtype=np.uint8)
    for masks in (np.zeros((0, 10, 12), bool), np.zeros((2, 10, 12), bool), np.ones((1, 10, 12), bool)):
        assert overlay.overlay_proposals(image, masks).shape == image.shape


def test_colours_of_proposals_differ() -> None:
    colours = overlay.make_distinct_colours(60).astype(int)
    assert len({tuple(c) for c in colours}) == 60
    assert np.abs(np.diff(colours, axis=0)).sum(1).min() > 100
    assert overlay.make_distinct_colours(0).shape == (0, 3)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((128, 96), (384, 288)), ((384, 100), (384, 100)), ((480, 640), (480, 640)), ((1000, 10), (640, 6)),
     ((2000, 1), (640, 1)), ((200, 150), (200, 150)), ((960, 1280), (480, 640))],
)  # fmt: skip
def test_display_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert choose_display_size(size) == expected


def test_labels_grow_without_new_ids(rng: np.random.Generator) -> None:
    labels = rng.choice([0, 3, 255], (10, 14)).astype(np.uint8)
    np.testing.assert_array_equal(overlay.resize_labels(labels, (30, 42)), labels.repeat(3, 0).repeat(3, 1))
    mask = labels == 3
    assert overlay.resize_labels(mask, (5, 7)).dtype == bool


@pytest.mark.parametrize(("size", "shown"), [
    pytest.param((9, 15), (3, 5), id="a whole factor"),
    pytest.param((51, 101), (19, 38), id="any factor"),  # no centre lies between two pixels, where both are right
    pytest.param((5, 7), (13, 18), id="enlarged"),
])  # fmt: skip
def test_labels_are_those_at_the_centres_of_pixels(size: tuple[int, int], shown: tuple[int, int]) -> None:
    labels = np.arange(size[0] * size[1]).reshape(size) % 251
    rows, columns = (((np.arange(new) + 0.5) * old / new).astype(int) for old, new in zip(size, shown, strict=True))
    resized = overlay.resize_labels(labels.astype(np.uint8), shown)
    np.testing.assert_array_equal(resized, labels[rows[:, None], columns])


def test_a_strip_that_shrinks_holds_averages() -> None:
    stripes = np.tile(np.array([0, 0, 0, 255], np.uint8), 100)[None, :, None].repeat(3, 2)
    assert (abs(overlay.resize_image(stripes, (1, 100)).astype(int) - 64) <= 1).all()


def test_legend_names_what_occurs() -> None:
    legend = make_class_legend(CLASSES, np.array([[0, 2, 255]]), None, np.array([[1, 9]]))
    assert [name for name, _ in legend] == ["dog", "cat", "id 9", "ignored"]
    assert legend[0][1] == (128, 0, 0)
    colours = np.full((256, 3), 7, dtype=np.uint8)
    assert make_class_legend(CLASSES, np.array([1]), colours=colours) == [("dog", (7, 7, 7))]


def test_a_legend_is_a_picture_of_its_own() -> None:
    sheet = draw_legend([("dog", (1, 2, 3)), ("a name that is far too long for the width", (4, 5, 6))], width=100)
    assert _has(sheet, (1, 2, 3))
    assert _has(sheet, (4, 5, 6))
    assert (sheet[:, -2:] == 255).all()
    assert draw_legend([]).shape[2] == 3


def test_panel_is_a_deterministic_png(scene: tuple[np.ndarray, ...]) -> None:
    image, truth, prediction, masks = scene
    content = draw_image_panel(image, CLASSES, proposals=masks, labels=prediction, truth=truth)
    assert content == draw_image_panel(
        image, CLASSES, proposals=torch.from_numpy(masks), labels=prediction, truth=truth
    )
    sheet = _open(content)
    height, width = choose_display_size((48, 64))
    assert sheet.shape[1] == 5 * width + 6 * 8
    assert sheet.shape[0] > height
    below = sheet[26 + height :]
    for colour in ((128, 0, 0), (0, 128, 0), *(colour for _, colour in overlay.ERROR_LEGEND)):
        assert _has(below, colour)
    np.testing.assert_array_equal(sheet[26 : 26 + height, 8 : 8 + width], overlay.resize_image(image, (height, width)))


@pytest.mark.parametrize(
    ("given", "columns"),
    [((), 1), (("proposals",), 2), (("labels",), 2), (("truth",), 2), (("labels", "truth"), 4)],
)
def test_columns_are_those_given(scene: tuple[np.ndarray, ...], given: tuple[str, ...], columns: int) -> None:
    image, truth, prediction, masks = scene
    every = {"proposals": masks, "labels": prediction, "truth": truth}
    sheet = _open(draw_image_panel(image, CLASSES, **{name: every[name] for name in given}))  # type: ignore[arg-type]
    assert sheet.shape[1] == columns * choose_display_size((48, 64))[1] + (columns + 1) * 8


def test_long_legends_and_titles_stay_on_the_sheet() -> None:
    picture = np.zeros((400, 200, 3), dtype=np.uint8)
    legend = [(f"class number {i}", (i, 7, 9)) for i in range(30)]
    sheet = _open(draw_panel([("a title that is wider than its own little picture", picture)], legend))
    assert all(_has(sheet, (i, 7, 9)) for i in range(30))
    assert sheet.shape[1] > 300
    assert (sheet[:, -8:] == 255).all()


def test_tiny_and_huge_pictures() -> None:
    for size in ((1, 1), (3, 200), (900, 1400)):
        labels = np.ones(size, dtype=np.uint8)
        masks = np.zeros((2, *size), dtype=bool)
        masks[0, 0, 0] = True
        image = np.zeros((*size, 3), dtype=np.uint8)
        sheet = _open(draw_image_panel(image, CLASSES, proposals=masks, labels=labels, truth=labels))
        assert sheet.shape[1] < 6 * 660


def test_sizes_that_do_not_fit(scene: tuple[np.ndarray, ...]) -> None:
    image, truth, prediction, masks = scene
    for name, array in (("labels", prediction[1:]), ("truth", truth[1:]), ("proposals", masks[:, 1:])):
        with pytest.raises(ValueError, match=f"{name}: got"):
            draw_image_panel(image, CLASSES, **{name: array})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got no column"):
        draw_panel([])
    with pytest.raises(ValueError, match="label map: got"):
        overlay.overlay_labels(image, truth[1:])
    with pytest.raises(ValueError, match="error map: got"):
        overlay.paint_errors(truth, prediction[1:])
    with pytest.raises(ValueError, match="proposals: got"):
        overlay.overlay_proposals(image, masks[:, 1:])


def test_real_output_is_written(tmp_path: Path, scene: tuple[np.ndarray, ...]) -> None:
    path = tmp_path / "panel.png"
    path.write_bytes(draw_image_panel(scene[0], CLASSES, titles=("ids/with a longer name", "labels")))
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
