"""The archive for the VOC 2012 evaluation server: `results/VOC2012/Segmentation/comp6_test_cls/<id>.png`."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable

NAME = "results.tgz"
COMPETITION = "comp6"
"""The server's name for segmentation that uses other data than VOC's, such as a backbone's pretraining data."""


def archive_path(split: str, image_id: str) -> str:
    """Return the path of an image in the archive."""
    return f"results/VOC2012/Segmentation/{COMPETITION}_{split}_cls/{image_id}.png"


def pack(files: Iterable[tuple[str, bytes]]) -> bytes:
    """Pack `(path, content)` pairs into a gzipped tar, in ascending order of path.

    Times, owners and permissions are fixed, so that the same files give the same bytes.
    """
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for path, content in sorted(files):
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode, entry.mtime = len(content), 0o644, 0
            archive.addfile(entry, io.BytesIO(content))
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as stream:
        stream.write(tar.getvalue())
    return packed.getvalue()
