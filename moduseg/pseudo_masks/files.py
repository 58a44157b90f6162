"""Pseudo masks that exist already: one label PNG for each image."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch

from moduseg.datasets.io import read_label_png
from moduseg.devices import Device
from moduseg.errors import ArtefactError, DataError, MissingError
from moduseg.files import file_digest
from moduseg.pseudo_masks.base import PseudoMaskGenerator
from moduseg.structures import IGNORE_INDEX, Proposals, Sample, ScoreMaps
from moduseg.weights.sources import ADDRESSES, find_weights

KEY = "pseudo_masks.generator.folder"
_MAX_BYTES_PER_PIXEL = 8
"""Four channels of 16 bits, not compressed."""
_MAX_METADATA_BYTES = 1 << 20


class FilePseudoMasks(PseudoMaskGenerator):
    """Label maps from a folder or a zip archive, as one-hot scores with a background.

    Args:
        folder: where the files are: a folder (`~` allowed), a `.zip`, or the address of a `.zip` as
            `moduseg.weights.sources.find_weights` takes it (`hf://datasets/<owner>/<name>/<file>.zip`), fetched on
            first use.
        device: where the scores are put.
        classes: class names, background first; ids beyond them are an error.
        pattern: name of an image's file inside `folder`; `{id}` is the image's id, `{name}` the last part of an id that
            has folders. `**/` in front finds the file in any folder.
        filter_labels: pixels of classes outside the image-level labels become background (docs/method.md, step 1).

    Raises:
        ValueError: a pattern without `{id}` or `{name}`.
    """

    def __init__(
        self,
        folder: str,
        device: Device,
        classes: Sequence[str],
        pattern: str = "{id}.png",
        filter_labels: bool = True,
    ) -> None:
        if "{id}" not in pattern and "{name}" not in pattern:
            raise ValueError(f"pattern: got {pattern!r}, expected a file name with {{id}}; try {{id}}.png")
        self._folder, self._device, self._classes = folder, device, tuple(classes)
        self._pattern, self._filter = pattern, filter_labels

    @property
    def digest(self) -> str:
        """sha256 over names and contents of the folder's files of this pattern's suffix, or of the archive.

        Raises:
            MissingError: there is no such folder or archive.
        """
        if self._root.is_file():
            return file_digest(self._root)
        total = hashlib.sha256()
        for path in sorted(self._root.rglob("*" + Path(self._pattern).suffix)):
            if path.is_file():
                total.update(f"{path.relative_to(self._root).as_posix()}:{file_digest(path)}\n".encode())
        return total.hexdigest()

    def generate(self, sample: Sample, labels: tuple[int, ...], proposals: Proposals | None = None) -> ScoreMaps:
        """Return one-hot scores of the image's file.

        Returns:
            Maps of the classes in `labels`; with `filter_labels=false`, of those in the file.

        Raises:
            MissingError: there is no such folder or archive.
            DataError: no file for this image, or one that is damaged, not a label map, of another size or with ids
                that are no class.
            ArtefactError: the archive is damaged.
        """
        name = self._find_name(self._pattern.replace("{id}", sample.id).replace("{name}", sample.id.split("/")[-1]))
        where = self._root / name
        array = read_label_map(self._read(name, sample.size), str(where), len(self._classes) - 1)
        if array.shape != sample.size:
            raise DataError(f"{where}: got {array.shape} pixels, expected the image's {sample.size}; make it again")
        return to_one_hot(array, labels if self._filter else None, self._device)

    @cached_property
    def _root(self) -> Path:
        """The folder or the archive."""
        address = self._folder.startswith(ADDRESSES)
        root = find_weights(self._folder, KEY) if address else Path(self._folder).expanduser()
        if not root.is_dir() and not (root.suffix == ".zip" and root.is_file()):
            raise MissingError(
                f"{KEY}: got {self._folder!r}, no such folder or .zip; set {KEY}=<folder or .zip of label PNGs>"
            )
        return root

    def _find_name(self, name: str) -> str:
        """Return the name of a file inside the folder or archive, which may lie in any folder if `**/` asks for it."""
        searched = name.removeprefix("**/")
        if searched == name:
            return name
        same_end = self._names_by_end.get(searched.split("/")[-1], [])
        names = [inside for inside in same_end if f"/{inside}".endswith(f"/{searched}")]
        if len(names) > 1:
            raise DataError(
                f"{self._root}: got {len(names)} files {searched} ({names[0]}, {names[1]}), expected one; name the "
                "folder in pseudo_masks.generator.pattern"
            )
        return names[0] if names else searched

    @cached_property
    def _names_by_end(self) -> dict[str, list[str]]:
        """The files inside the folder or archive by the last part of their names."""
        if self._archive is not None:
            names = sorted(self._archive.namelist())
        else:
            paths = self._root.rglob("*" + Path(self._pattern).suffix)
            names = sorted(path.relative_to(self._root).as_posix() for path in paths)
        by_end: dict[str, list[str]] = {}
        for name in names:
            by_end.setdefault(name.split("/")[-1], []).append(name)
        return by_end

    @cached_property
    def _archive(self) -> ZipFile | None:
        if not self._root.is_file():
            return None
        try:
            return ZipFile(self._root)
        except (BadZipFile, OSError) as error:
            raise ArtefactError(
                f"{self._root}: not readable as a zip archive ({error}); remove it and fetch it again"
            ) from error

    def _read(self, name: str, size: tuple[int, int]) -> bytes:
        """Return the content of a file of the folder or archive, if it is no larger than one of this size can be."""
        where = self._root / name
        max_bytes = _MAX_BYTES_PER_PIXEL * size[0] * size[1] + _MAX_METADATA_BYTES
        try:
            num_bytes = where.stat().st_size if self._archive is None else self._archive.getinfo(name).file_size
            if num_bytes > max_bytes:
                raise DataError(
                    f"{where}: got {num_bytes} bytes, expected at most {max_bytes} for a label map of {size[0]} x "
                    f"{size[1]} pixels; make it again"
                )
            return where.read_bytes() if self._archive is None else self._archive.read(name)
        except (FileNotFoundError, KeyError) as error:
            raise DataError(
                f"{where}: no such file; make the label map, take the image out of the list, or set "
                f"pseudo_masks.generator.pattern (now {self._pattern!r}) to how the files are named"
            ) from error
        except (OSError, ValueError, RuntimeError, EOFError, BadZipFile, zlib.error) as error:
            # An archive raises RuntimeError for a password, and NotImplementedError for a compression it does not know.
            raise DataError(f"{where}: cannot be read ({error}); make it again") from error


def read_label_map(content: bytes, name: str, num_classes: int) -> np.ndarray:
    """Return the `[H, W]` uint8 class ids of a label map in any form that `read_label_png` reads.

    Args:
        content: bytes of the file.
        name: name of the file, for messages.
        num_classes: number of foreground classes.

    Raises:
        DataError: damaged, of another kind, or an id other than 0..num_classes and 255.
    """
    label_map = read_label_png(Path(name), content)
    wrong = sorted({int(v) for v in np.unique(label_map)} - set(range(num_classes + 1)) - {IGNORE_INDEX})
    if wrong:
        raise DataError(f"{name}: got class ids {wrong[:5]}, expected 0..{num_classes} or 255; check the class list")
    return label_map


def to_one_hot(array: np.ndarray, labels: tuple[int, ...] | None, device: Device) -> ScoreMaps:
    """Return scores 0 and 1 of an `[H, W]` uint8 label map, with a background; 255 is ignored.

    Args:
        array: class ids.
        labels: ascending ids to keep, the others become background; `None` keeps all ids of the map.
        device: where the scores are put.
    """
    label_map = torch.from_numpy(np.array(array, order="C")).to(device.torch_device)
    ignore = label_map == IGNORE_INDEX
    if labels is None:
        labels = tuple(int(c) for c in np.unique(array) if c not in (0, IGNORE_INDEX))
    ids = torch.tensor(labels, dtype=torch.uint8, device=label_map.device)
    scores = (label_map == ids[:, None, None]).float()
    background = (~scores.any(0) & ~ignore).float()
    return ScoreMaps(labels, scores, background, ignore)
