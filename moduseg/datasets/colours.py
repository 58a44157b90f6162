"""In which colours a class list is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moduseg.datasets.classes import VOC_CLASSES
from moduseg.masks.palette import choose_class_colours, voc_palette


def find_class_colours(
    classes: Sequence[str], named: Mapping[str, str] | None = None, scheme: str = "auto"
) -> np.ndarray:
    """Return the colours of a class list; PASCAL VOC's twenty are shown in VOC's, whose files people know.

    Args:
        classes: names by id, background first.
        named: colours of one's own, name -> `#rrggbb`.
        scheme: as in `choose_class_colours`; with `auto`, the first names decide whether the list is VOC's, so that it
            may have further classes.

    Returns:
        `[256, 3]` uint8, row = label id.

    Raises:
        ConfigError: no such scheme.
    """
    is_voc = tuple(classes[: len(VOC_CLASSES)]) == VOC_CLASSES
    if scheme != "auto" or not is_voc:
        return choose_class_colours(classes, named, scheme)
    palette = voc_palette()
    more = {name: colour for name, colour in (named or {}).items() if name in classes}
    if more:
        chosen = choose_class_colours(classes, more)
        for name in more:
            palette[classes.index(name)] = chosen[classes.index(name)]
    return palette
