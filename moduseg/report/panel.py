"""Draw panels: photograph, proposals, labels, truth and errors of one image side by side, with titles and a legend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from moduseg.datasets.io import write_rgb_png
from moduseg.masks.palette import voc_palette
from moduseg.report.overlay import (
    ERROR_LEGEND,
    overlay_labels,
    overlay_proposals,
    paint_errors,
    resize_image,
    resize_labels,
)
from moduseg.report.pictures import shrink_masks
from moduseg.structures import IGNORE_INDEX

ENLARGED_SIDE = 384
"""Pictures grow by a whole factor while their longer side stays within so many pixels."""
MAX_SIDE = 640
"""Longer side of a picture in a panel, in pixels: larger photographs shrink to it, others have their own size."""
_GAP, _TITLE, _ROW, _FONT_SIZE = 8, 26, 24, 15
_PAPER, _INK = (255, 255, 255), (30, 30, 30)

Colour = tuple[int, int, int]


def choose_display_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return the `(H, W)` at which an image of `size` is shown in a panel: its own, unless it is small or large.

    A small image is enlarged by a whole factor (`ENLARGED_SIDE`); a large one shrinks to `MAX_SIDE`.
    """
    longest = max(size)
    if longest <= MAX_SIDE:
        factor = max(1, ENLARGED_SIDE // longest)
        return size[0] * factor, size[1] * factor
    return max(1, round(size[0] * MAX_SIDE / longest)), max(1, round(size[1] * MAX_SIDE / longest))


def make_class_legend(
    classes: Sequence[str], *label_maps: np.ndarray | None, colours: np.ndarray | None = None
) -> list[tuple[str, Colour]]:
    """Return name and colour of the classes that occur in any of the maps, ascending by id; 255 is `ignored`.

    Args:
        classes: names by id, background first, which has no entry.
        label_maps: integers 0..255 of any shape; `None` is skipped.
        colours: `[256, 3]` uint8, row = label id; VOC's palette if omitted.
    """
    present = sorted({int(v) for labels in label_maps if labels is not None for v in np.unique(labels)} - {0})
    palette = voc_palette() if colours is None else colours
    legend: list[tuple[str, Colour]] = []
    for label in present:
        name = "ignored" if label == IGNORE_INDEX else classes[label] if label < len(classes) else f"id {label}"
        red, green, blue = (int(v) for v in palette[label])
        legend.append((name, (red, green, blue)))
    return legend


def draw_panel(columns: Sequence[tuple[str, np.ndarray]], legend: Sequence[tuple[str, Colour | None]] = ()) -> bytes:
    """Draw pictures side by side under their titles, above a legend; equal input gives equal bytes.

    Args:
        columns: title and `[H, W, 3]` uint8 picture; small ones are enlarged by a whole factor, pixel by pixel.
        legend: name and colour of each entry; one without a colour is a heading that begins a row.

    Returns:
        A PNG file.

    Raises:
        ValueError: no column.
    """
    return write_rgb_png(draw_panel_picture(columns, legend), compress_level=1)


def stack_panels(rows: Sequence[Sequence[tuple[str, np.ndarray]]]) -> bytes:
    """Draw several rows of pictures under their titles, one below the other; see `draw_panel`.

    Args:
        rows: columns of each row, as `draw_panel` takes them, at the size at which they are shown.

    Returns:
        A PNG file.

    Raises:
        ValueError: no row, or one without a column.
    """
    if not rows:
        raise ValueError("panels: got no row, expected one or more")
    sheets = [draw_panel_picture(columns, ()) for columns in rows]
    stacked = np.full((sum(map(len, sheets)), max(sheet.shape[1] for sheet in sheets), 3), _PAPER, np.uint8)
    top = 0
    for sheet in sheets:
        stacked[top : top + len(sheet), : sheet.shape[1]] = sheet
        top += len(sheet)
    return write_rgb_png(stacked, compress_level=1)


def draw_legend(legend: Sequence[tuple[str, Colour]], width: int = ENLARGED_SIDE) -> np.ndarray:
    """Draw a legend as a picture of its own, to be laid beside overlays.

    Args:
        legend: name and colour of each entry, as `make_class_legend` gives them.
        width: of the picture, in pixels; a name that is longer makes it wider.

    Returns:
        `[H, W, 3]` uint8, dark on white.
    """
    font = load_font()
    longest = max((22 + int(font.getlength(name)) for name, _ in legend), default=0)
    width = max(width, longest + 4 * _GAP)
    rows = _break_legend(legend, width)
    sheet = Image.new("RGB", (width, _ROW * len(rows) + _GAP), _PAPER)
    _draw_legend_rows(ImageDraw.Draw(sheet), rows, _GAP // 2)
    return np.asarray(sheet)


def _draw_legend_rows(
    draw: ImageDraw.ImageDraw, rows: Sequence[Sequence[tuple[int, str, Colour | None]]], top: int
) -> None:
    font = load_font()
    for i, row in enumerate(rows):
        y = top + i * _ROW
        for left, name, colour in row:
            if colour is not None:
                draw.rectangle((left, y + 2, left + 16, y + 18), fill=colour, outline=_INK)
            draw.text((left + (0 if colour is None else 22), y + 1), name, fill=_INK, font=font)


def draw_panel_picture(
    columns: Sequence[tuple[str, np.ndarray]], legend: Sequence[tuple[str, Colour | None]] = ()
) -> np.ndarray:
    """Return the picture `[H, W, 3]` uint8 of a panel; arguments and errors as those of `draw_panel`."""
    if not columns:
        raise ValueError("panel: got no column, expected one or more")
    pictures = [_enlarge(picture) if max(picture.shape[:2]) * 2 <= ENLARGED_SIDE else picture for _, picture in columns]
    font = load_font()
    # A column is at least as wide as its title.
    widths = [max(p.shape[1], int(font.getlength(title)) + 4) for (title, _), p in zip(columns, pictures, strict=True)]
    width = sum(widths) + _GAP * (len(widths) + 1)
    rows = _break_legend(legend, width)
    pictures_end = _TITLE + max(p.shape[0] for p in pictures)
    height = pictures_end + _GAP + _ROW * len(rows) + (_GAP // 2 if rows else 0)
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    x = _GAP
    for (title, _), picture, column in zip(columns, pictures, widths, strict=True):
        draw.text((x + 2, 4), title, fill=_INK, font=font)
        sheet.paste(Image.fromarray(picture), (x, _TITLE))
        x += column + _GAP
    _draw_legend_rows(draw, rows, pictures_end + _GAP)
    return np.asarray(sheet)


def _enlarge(picture: np.ndarray) -> np.ndarray:
    """Enlarge a picture to its display size by nearest neighbour, which keeps its colours."""
    height, width = choose_display_size((picture.shape[0], picture.shape[1]))
    rows = np.arange(height) * picture.shape[0] // height
    return picture[rows[:, None], np.arange(width) * picture.shape[1] // width]


def draw_image_panel(
    image: np.ndarray,
    classes: Sequence[str],
    *,
    proposals: np.ndarray | Tensor | None = None,
    labels: np.ndarray | None = None,
    truth: np.ndarray | None = None,
    titles: tuple[str, str] = ("photograph", "prediction"),
    colours: np.ndarray | None = None,
) -> bytes:
    """Draw the panel of one image, without what is `None`; errors are shown if there are labels and truth.

    Pictures have the photograph's own size, see `choose_display_size`.

    Args:
        image: `[H, W, 3]` uint8.
        classes: names by id, background first.
        proposals: `[N, H, W]` bool.
        labels: `[H, W]` label map, a prediction or a pseudo mask.
        truth: `[H, W]` label map, 255 where ignored.
        titles: of the photograph's column and that of the labels.
        colours: `[256, 3]` uint8 of the classes, row = label id; VOC's palette if omitted.

    Returns:
        A PNG file; equal input gives equal bytes.

    Raises:
        ValueError: maps of another size than the image.
    """
    for name, array in (("labels", labels), ("truth", truth)):
        if array is not None and array.shape != image.shape[:2]:
            raise ValueError(f"{name}: got {array.shape}, expected the image's {image.shape[:2]}")
    size = choose_display_size((image.shape[0], image.shape[1]))
    # Everything is resized first, so that outlines drawn afterwards stay one pixel wide.
    photograph = resize_image(image, size)
    columns = [(titles[0], photograph)]
    if proposals is not None:
        stack = proposals.cpu().numpy() if isinstance(proposals, Tensor) else np.asarray(proposals)
        if stack.shape[1:] != image.shape[:2]:
            raise ValueError(f"proposals: got masks {stack.shape[1:]}, expected the image's {image.shape[:2]}")
        shown = shrink_masks(stack.astype(bool, copy=False), size)
        columns.append((f"{len(stack)} proposal{'' if len(stack) == 1 else 's'}", overlay_proposals(photograph, shown)))
    shown_labels = None if labels is None else resize_labels(labels.astype(np.uint8), size)
    shown_truth = None if truth is None else resize_labels(truth.astype(np.uint8), size)
    if shown_labels is not None:
        columns.append((titles[1], overlay_labels(photograph, shown_labels, colours)))
    if shown_truth is not None:
        columns.append(("truth", overlay_labels(photograph, shown_truth, colours)))
    legend: list[tuple[str, Colour | None]] = [*make_class_legend(classes, labels, truth, colours=colours)]
    if shown_labels is not None and shown_truth is not None:
        columns.append(("errors", paint_errors(shown_truth, shown_labels, photograph)))
        legend += [("errors:", None), *ERROR_LEGEND]
    return draw_panel(columns, legend)


@lru_cache(maxsize=32)
def load_font(size: int = _FONT_SIZE) -> ImageFont.FreeTypeFont:
    """Return the font of all pictures; Matplotlib ships it, so that they look alike on every machine."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _break_legend(
    legend: Sequence[tuple[str, Colour | None]], width: int
) -> list[list[tuple[int, str, Colour | None]]]:
    """Break a legend into rows that fit `width`; an entry is its left edge, name and colour."""
    rows: list[list[tuple[int, str, Colour | None]]] = []
    x = width
    for name, colour in legend:
        needed = (0 if colour is None else 22) + int(load_font().getlength(name)) + 2 * _GAP
        if not rows or colour is None or x + needed > width - _GAP:
            rows.append([])
            x = _GAP + 2
        rows[-1].append((x, name, colour))
        x += needed
    return rows
