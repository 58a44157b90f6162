"""Proposals made elsewhere, one file an image.

A file is SA-1B JSON, as the SAM tools and the `propose` stage write it, or a map of ids, as EntitySeg and CorrCLIP
users have them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from moduseg.errors import DataError, MissingError
from moduseg.proposers.base import Proposer
from moduseg.proposers.id_maps import SUFFIXES, read_id_map
from moduseg.proposers.sa1b import read_proposals
from moduseg.structures import Proposals, Sample


class FileProposer(Proposer):
    """Proposals read from one file an image; masks without a pixel are dropped, everything else is taken as it is.

    Args:
        folder: directory of the files (`~` allowed).
        pattern: path of an image's file inside the folder, with `{id}` for the image's id, which may hold sub-folders;
            the suffix is the format: `.npz` and `.png` are maps of ids, everything else is JSON.

    Raises:
        ValueError: the pattern has no `{id}`.
        MissingError: there is no such folder.
    """

    sees_image_alone = False

    def __init__(self, folder: str, pattern: str = "{id}.json") -> None:
        if "{id}" not in pattern:
            raise ValueError(f"pattern: got {pattern!r}, expected a path with {{id}} in it; try '{{id}}.json'")
        self.folder = Path(folder).expanduser()
        self.pattern = pattern
        if not self.folder.is_dir():
            raise MissingError(
                f"proposer.folder: got {folder!r}, no such folder; set proposer.folder=<folder of proposal files>, "
                "made as docs/proposals.md says"
            )

    @property
    def digest(self) -> str:
        """The sha256 over the names and sizes of the folder's files, looked up again at each call."""
        suffix = Path(self.pattern).suffix
        names_and_sizes = sorted(
            (path.relative_to(self.folder).as_posix(), path.stat().st_size)
            for path in self.folder.rglob(f"*{suffix}")
            if path.is_file()
        )
        digest = hashlib.sha256()
        for name, size in names_and_sizes:
            digest.update(f"{name}\0{size}\n".encode())
        return digest.hexdigest()

    def propose(self, sample: Sample) -> Proposals:
        """Return the proposals of the image's file.

        Raises:
            DataError: no file for this image, or one that does not describe masks of the image's size.
        """
        path = self.folder / self.pattern.replace("{id}", sample.id)
        if not path.is_file():
            raise DataError(
                f"{path}: no proposal file for image {sample.id!r}; write it, or set proposer.pattern (now "
                f"{self.pattern!r}) to how the files are named"
            )
        if path.suffix in SUFFIXES:
            return read_id_map(path, sample.size)
        proposals = read_proposals(path, sample.size)
        return proposals.select(proposals.areas > 0)
