"""Paint label maps, proposals and errors over a photograph. Pictures are `[H, W, 3]` uint8 RGB arrays."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np
from torch import Tensor

from moduseg.masks.palette import voc_palette
from moduseg.structures import IGNORE_INDEX

CORRECT, MISSED, EXTRA, CONFUSED, IGNORED = (
    (46, 160, 67), (230, 60, 50), (240, 170, 0), (168, 85, 247), (138, 143, 152),
)  # fmt: skip
ERROR_LEGEND: tuple[tuple[str, tuple[int, int, int]], ...] = (
    ("correct", CORRECT),
    ("missed", MISSED),
    ("extra", EXTRA),
    ("confused", CONFUSED),
    ("ignored", IGNORED),
)
"""Names and colours of the cases of `paint_errors`: an object's pixel with its label, with label 0, background with an
object's label, an object's pixel with another object's label, a pixel that is not scored. `static/lib/paint.js`, of the
report's page, has the same."""

_OUTLINE_BRIGHTNESS = 0.55
"""Share of its brightness that the colour of a class has in outlines."""


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a photograph to `(H, W)`: area averages when it shrinks, cubic when it grows."""
    if image.shape[:2] == size:
        return image
    # By the area, since one side of a strip may stay as it is.
    is_smaller = size[0] * size[1] < image.shape[0] * image.shape[1]
    interpolation = cv2.INTER_AREA if is_smaller else cv2.INTER_CUBIC
    return cv2.resize(image, (size[1], size[0]), interpolation=interpolation)


def resize_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a label map or mask (`[H, W]`, uint8 or bool) to `(H, W)`: each pixel has the id at its centre."""
    if labels.shape == size:
        return labels
    # The plain nearest pixel is that of a corner, up to half a pixel away from what `resize_image` shows.
    resized = cv2.resize(labels.view(np.uint8), (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT)
    return resized.view(labels.dtype)


def find_outlines(regions: np.ndarray, thickness: int = 1) -> np.ndarray:
    """Return pixels whose right or lower neighbour has another id, `[H, W]` bool; the border of the image is none."""
    edge = np.zeros(regions.shape, dtype=bool)
    edge[:, :-1] |= regions[:, :-1] != regions[:, 1:]
    edge[:-1] |= regions[:-1] != regions[1:]
    if thickness > 1:
        edge = cv2.dilate(edge.astype(np.uint8), np.ones((thickness, thickness), np.uint8)).astype(bool)
    return edge


def make_distinct_colours(count: int) -> np.ndarray:
    """Return `[count, 3]` uint8 colours, always the same; neighbours in the list differ strongly in hue."""
    colours = [
        colorsys.hsv_to_rgb(
            (0.13 + i * 0.618033988749895) % 1.0, (0.85, 0.6, 0.95)[i % 3], (1.0, 0.85, 0.7)[i // 3 % 3]
        )
        for i in range(count)
    ]
    return np.round(np.array(colours).reshape(count, 3) * 255).astype(np.uint8)


def overlay_labels(
    image: np.ndarray,
    label_map: np.ndarray,
    colours: np.ndarray | None = None,
    *,
    alpha: float = 0.55,
    outline: int | bool = True,
) -> np.ndarray:
    """Paint classes over a photograph: colour inside, a darker outline; the background stays as it is.

    The photograph is grey below the colours, since mixed with its hues they would not match the legend.

    Args:
        image: `[H, W, 3]` uint8.
        label_map: `[H, W]` integers 0..255.
        colours: `[256, 3]` uint8, row = label id (`moduseg.datasets.colours`); VOC's palette if omitted.
        alpha: share of the colour, in [0, 1].
        outline: width of the outline in pixels, which lies inside a region; `True` for one that suits the picture's
            size (`choose_outline_width`), `False` or 0 for none.

    Returns:
        `[H, W, 3]` uint8; pixels of label 0 are those of `image`.

    Raises:
        ValueError: sizes differ, a share outside [0, 1], or a negative width.
    """
    _check_size(image, label_map)
    if not 0 <= alpha <= 1:
        raise ValueError(f"overlay: got alpha={alpha}, expected a share of 0 to 1; try alpha=0.55")
    if int(outline) < 0:
        raise ValueError(f"overlay: got outline={outline}, expected pixels, 0 or more; try outline=True")
    palette = voc_palette() if colours is None else colours
    labels = label_map.astype(np.uint8)
    is_background = labels == 0
    painted = _blend(_to_grey(image), palette[labels], alpha)
    width = choose_outline_width(image.shape[:2]) if outline is True else int(outline)
    if width:
        rim = find_rims(labels, width) & ~is_background
        painted[rim] = (palette[labels[rim]] * _OUTLINE_BRIGHTNESS).astype(np.uint8)
    painted[is_background] = image[is_background]
    return painted


def choose_outline_width(size: Sequence[int]) -> int:
    """Return the width in pixels of outlines in a picture of `(H, W)`: 1 up to 320 pixels, one more for each 320."""
    return 1 + (max(size) - 1) // 320


def find_rims(regions: np.ndarray, width: int = 1) -> np.ndarray:
    """Return the pixels within `width` of another id, on both sides, `[H, W]` bool; the image's border is none."""
    ids = np.ascontiguousarray(regions, dtype=np.uint8)
    kernel = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    rims: np.ndarray = cv2.dilate(ids, kernel) != cv2.erode(ids, kernel)
    return rims


def overlay_proposals(image: np.ndarray, masks: np.ndarray | Tensor, width: int | None = None) -> np.ndarray:
    """Draw proposals as outlines in distinct colours, large ones first so that nested ones stay visible.

    Args:
        image: `[H, W, 3]` uint8.
        masks: `[N, H, W]` bool, which may overlap; `N` may be 0.
        width: of an outline in pixels, which lies inside its mask; one that suits the picture's size if omitted.

    Returns:
        `[H, W, 3]` uint8; the photograph is unchanged between the outlines.

    Raises:
        ValueError: sizes differ.
    """
    stack = np.ascontiguousarray(masks.cpu().numpy() if isinstance(masks, Tensor) else masks, dtype=bool)
    if stack.shape[1:] != image.shape[:2]:
        raise ValueError(f"proposals: got masks {stack.shape[1:]}, expected the image's {image.shape[:2]}")
    painted = image.copy()
    # Proposals are many and nested: half as wide as the outlines of labels.
    thickness = width or max(1, choose_outline_width(image.shape[:2]) // 2)
    kernel = np.ones((2 * thickness + 1, 2 * thickness + 1), np.uint8)
    colours = make_distinct_colours(len(stack))
    order = np.argsort(-stack.reshape(len(stack), image.shape[0] * image.shape[1]).sum(1), kind="stable")
    for rank, index in enumerate(order.tolist()):
        mask = stack[index]
        left, upper, columns, rows = cv2.boundingRect(mask.view(np.uint8))
        if not columns:
            continue  # a small mask may vanish when the picture is shrunk
        window = (slice(upper, upper + rows), slice(left, left + columns))
        inside = np.ascontiguousarray(mask[window]).view(np.uint8)
        # The rim lies inside the mask, so that a neighbour drawn later cannot cover half of it.
        core = cv2.erode(inside, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
        painted[window][(inside > 0) & (core == 0)] = colours[rank]
    return painted


def overlay_heat(image: np.ndarray, heat: np.ndarray, alpha: float = 0.6) -> np.ndarray:
    """Paint a map of scores over a photograph in grey, from dark (0) over red to bright yellow (1).

    Args:
        image: `[H, W, 3]` uint8.
        heat: `[H, W]` float in [0, 1].
        alpha: share of the map's colours.

    Returns:
        `[H, W, 3]` uint8.

    Raises:
        ValueError: a map of another size than the image.
    """
    _check_size(image, heat)
    levels = np.rint(heat.clip(0, 1) * 255).astype(np.uint8)
    colours = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    return _blend(_to_grey(image), colours, alpha)


def paint_errors(truth: np.ndarray, prediction: np.ndarray, image: np.ndarray | None = None) -> np.ndarray:
    """Paint right and wrong pixels in the colours of `ERROR_LEGEND`; correct background shows the photograph.

    Args:
        truth: `[H, W]` integers, 255 where ignored.
        prediction: `[H, W]` integers.
        image: `[H, W, 3]` uint8, the photograph below; `None` for black.

    Raises:
        ValueError: sizes differ.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"error map: got prediction {prediction.shape}, expected the truth's {truth.shape}")
    base = np.zeros((*truth.shape, 3), np.uint8) if image is None else image
    _check_size(base, truth)
    grey = _to_grey(base)
    painted = base.copy()
    counted = truth != IGNORE_INDEX
    cases = (
        (counted & (truth == prediction) & (truth > 0), CORRECT, 0.55),
        (counted & (truth > 0) & (prediction == 0), MISSED, 0.8),
        (counted & (truth == 0) & (prediction > 0), EXTRA, 0.8),
        (counted & (truth > 0) & (prediction > 0) & (truth != prediction), CONFUSED, 0.8),
        (~counted, IGNORED, 0.8),
    )
    for where, colour, alpha in cases:
        painted[where] = (grey[where] * (1 - alpha) + np.array(colour) * alpha).astype(np.uint8)
    return painted


def _to_grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def dim(image: np.ndarray, brightness: float) -> np.ndarray:
    """Multiply a uint8 picture by `brightness`, rounded down; a table is ten times as fast as multiplying pixels."""
    return cv2.LUT(image, (np.arange(256) * brightness).astype(np.uint8))


def _blend(image: np.ndarray, colours: np.ndarray, alpha: float) -> np.ndarray:
    return cv2.addWeighted(image, 1.0 - alpha, np.ascontiguousarray(colours), alpha, 0.0)


def _check_size(image: np.ndarray, label_map: np.ndarray) -> None:
    if label_map.shape != image.shape[:2]:
        raise ValueError(f"label map: got {label_map.shape}, expected the image's {image.shape[:2]}")
