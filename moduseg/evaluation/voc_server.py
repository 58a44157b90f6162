"""The archive that the VOC 2012 evaluation server takes: `results/VOC2012/Segmentation/comp6_test_cls/<id>.png`."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable

NAME = "results.tgz"
COMPETITION = "comp6"
"""Segmentation learned with data beside VOC's own, which a backbone's pretraining is."""


def member(split: str, image_id: str) -> str:
    """The path of an image in the archive."""
    return f"results/VOC2012/Segmentation/{COMPETITION}_{split}_cls/{image_id}.png"


def pack(files: Iterable[tuple[str, bytes]]) -> bytes:
    """A gzipped tar of `(path, content)`, in ascending path.

    Times, owners and permissions are fixed, so that the same files give the same bytes.
    """
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for path, content in sorted(files):
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode, entry.mtime = len(content), 0o644, 0
            archive.addfile(entry, io.BytesIO(content))
    packed = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=0) as stream:
        stream.write(plain.getvalue())
    return packed.getvalue()
