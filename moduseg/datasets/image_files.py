"""Image files by id, from folders and single files."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from moduseg.datasets.io import HEIF_SUFFIXES, IMAGE_SUFFIXES
from moduseg.datasets.labels import compose_unicode
from moduseg.errors import DataError, MissingError

log = logging.getLogger("moduseg")
_SIDECARS = (".csv", ".db", ".htm", ".html", ".ini", ".json", ".md", ".txt", ".xml", ".yaml", ".yml")
"""Endings, in lower case, of what lies beside photographs and is none."""
_MASK_NAME = re.compile(
    r"(.*/)?(?:mask_)?([^/]+?)(?:[_-](?:mask|masks|seg|segmentation|label|labels|gt))?\.png", re.IGNORECASE
)
"""Names that tools give to the label map of an image, folder and name of the image as groups."""
_MAX_NAMED = 3
"""A warning names at most this many files."""


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

    The id is the path below the folder without suffix, in composed Unicode. Names that begin with a dot are skipped,
    and so is a link to a folder that it lies in. Other files that are not read are counted and named in a warning.
    """
    unread: list[str] = []
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(
            name for name in subfolders if not name.startswith(".") and not _is_loop(folder, Path(parent) / name)
        )
        for path in (Path(parent) / name for name in sorted(names) if not name.startswith(".")):
            suffix = path.suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                yield compose_unicode(path.relative_to(folder).as_posix().removesuffix(path.suffix)), path
            elif suffix not in _SIDECARS:
                unread.append(path.relative_to(folder).as_posix())
    if unread:
        warn_once(_describe_unread(folder, unread))


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


def match_masks(folder: Path, ids: Collection[str]) -> dict[str, Path]:
    """Return the label maps below a folder by the id of their image.

    `<id>.png` is the name of a label map; where there is none, `<id>_mask.png` and its like stand for it. Files that
    fit no image are counted and named in a warning.

    Args:
        folder: it need not exist.
        ids: the images.
    """
    masks: dict[str, Path] = {}
    others: dict[str, Path] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        name = compose_unicode(path.relative_to(folder).as_posix())
        is_mask = name.endswith(".png") and name[:-4] in ids
        (masks if is_mask else others)[name[:-4] if is_mask else name] = path
    unmatched = []
    for name, path in others.items():
        match = _MASK_NAME.fullmatch(name)
        image_id = f"{match[1] or ''}{match[2]}" if match else ""
        if image_id in ids and image_id not in masks:
            masks[image_id] = path
        elif path.suffix.lower() not in _SIDECARS:
            unmatched.append(name)
    if unmatched:
        more = ", ..." if len(unmatched) > _MAX_NAMED else ""
        warn_once(
            f"{folder}: {len(unmatched)} of {len(masks) + len(unmatched)} files fit no image: "
            f"{', '.join(unmatched[:_MAX_NAMED])}{more}; expected <id>.png, where the image is <id>.jpg"
        )
    return masks


def _images_at(path: Path) -> Iterator[tuple[str, Path]]:
    if path.is_dir():
        yield from walk_images(path)
    elif not path.is_file():
        raise MissingError(f"images: got '{path}', no such file or folder; name images or a folder of them")
    elif path.suffix.lower() not in IMAGE_SUFFIXES:
        raise DataError(
            f"images: got {path}, expected a file that ends in {', '.join(IMAGE_SUFFIXES)}; "
            f"{_unread_remedy(path.suffix.lower())}"
        )
    else:
        yield compose_unicode(path.stem), path


def _is_loop(folder: Path, path: Path) -> bool:
    """Return whether a sub-folder is a link to one of the folders on the way to it."""
    if not path.is_symlink():
        return False
    on_the_way = [parent for parent in path.parents if parent == folder or folder in parent.parents]
    target = path.resolve()
    return any(parent.resolve() == target for parent in on_the_way)


def _describe_unread(folder: Path, names: Sequence[str]) -> str:
    counts = Counter(Path(name).suffix.lower() or "no ending" for name in names)
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(counts.items()))
    more = ", ..." if len(names) > _MAX_NAMED else ""
    verb = "file is" if len(names) == 1 else "files are"
    remedies = list(dict.fromkeys(_unread_remedy(suffix) for suffix in sorted(counts)))
    return f"{folder}: {len(names)} {verb} not read ({kinds}): {', '.join(names[:_MAX_NAMED])}{more}; {remedies[-1]}"


def _unread_remedy(suffix: str) -> str:
    if suffix in HEIF_SUFFIXES:
        return "pip install 'moduseg[heif]' reads HEIC, or convert them to JPEG"
    return "convert photographs among them to JPEG or PNG"


@lru_cache(maxsize=256)
def warn_once(message: str) -> None:
    """Log a warning unless it was logged before: both splits of a data set walk through one folder."""
    log.warning("%s", message)
