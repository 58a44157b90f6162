"""Image files by id, from folders and single files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moduseg.datasets.io import IMAGE_SUFFIXES
from moduseg.errors import DataError, MissingError


def find_images(paths: Sequence[str | Path]) -> dict[str, Path]:
    """Return image files by id, in the order of ids.

    Args:
        paths: folders, as `walk_images` reads them, and single files, whose id is their name without suffix.

    Raises:
        MissingError: a path that does not exist, or no image in any.
        DataError: two files of one id, or a single file that is no image by its name.
    """
    files = index_images(pair for path in paths for pair in _images_at(Path(path).expanduser()))
    if not files:
        raise MissingError(
            f"images: got {', '.join(str(p) for p in paths) or 'nothing'}, which holds no image; expected files that "
            f"end in {', '.join(IMAGE_SUFFIXES)}"
        )
    return files


def walk_images(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield id and file of every image below a folder, in the order of names; links to folders are followed.

    The id is the path below the folder without suffix. Names that begin with a dot are skipped.
    """
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for path in (Path(parent) / name for name in sorted(names) if not name.startswith(".")):
            if path.suffix.lower() in IMAGE_SUFFIXES:
                yield path.relative_to(folder).as_posix().removesuffix(path.suffix), path


def index_images(pairs: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Return pairs of id and file as a dictionary in the order of ids.

    Raises:
        DataError: two files of one id.
    """
    files: dict[str, Path] = {}
    for image_id, path in pairs:
        if files.setdefault(image_id, path) != path:
            raise DataError(
                f"{path}: got image id {image_id!r} twice (also {files[image_id]}), expected each once; rename one"
            )
    return dict(sorted(files.items()))


def _images_at(path: Path) -> Iterator[tuple[str, Path]]:
    if path.is_dir():
        yield from walk_images(path)
    elif not path.is_file():
        raise MissingError(f"images: got '{path}', no such file or folder; name images or a folder of them")
    elif path.suffix.lower() not in IMAGE_SUFFIXES:
        raise DataError(f"images: got {path}, expected a file that ends in {', '.join(IMAGE_SUFFIXES)}")
    else:
        yield path.stem, path
