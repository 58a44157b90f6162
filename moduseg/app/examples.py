"""Pictures to begin with: scenes of the embedded world, or free photographs that scikit-image carries."""

from __future__ import annotations

from pathlib import Path

from moduseg.datasets.io import write_rgb_png
from moduseg.files import write_atomic
from moduseg.miniature.world.scenes import CLASSES, WorldConfig, render_scene

PHOTOGRAPHS = ("coffee", "chelsea", "rocket")
"""Functions of `skimage.data` whose files are part of the package; CC0, or of NASA and SpaceX."""
_SCENES = (3, 5, 8)


def write_examples(classes: tuple[str, ...], folder: Path) -> list[Path]:
    """Write example pictures into a folder and return their files.

    Args:
        classes: of the bank; scenes suit one that knows a class of the embedded world, photographs the others.
        folder: where they are written.
    """
    if set(classes) & set(CLASSES[1:]):
        world = WorldConfig()
        pictures = {f"scene_{index}": render_scene(0, "val", index, world).image for index in _SCENES}
    else:
        from skimage import data

        pictures = {name: getattr(data, name)() for name in PHOTOGRAPHS}
    files = []
    for name, image in pictures.items():
        files.append(folder / f"{name}.png")
        write_atomic(files[-1], write_rgb_png(image))
    return files
