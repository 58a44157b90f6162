"""Write the data set coco150 from a COCO 2017 download."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moduseg.datasets.coco150 import make_coco150


@dataclass(frozen=True)
class Coco150Options:
    """Keys of the command `make_coco150`.

    Attributes:
        coco: folder of the download, with train2017/, val2017/ and annotations/ that has the files panoptic_*.
        out: folder to write to.
    """

    coco: str
    out: str = "data/coco150"


def main(options: Coco150Options, overrides: Sequence[str] = ()) -> int:
    """Write the data set."""
    print(f"coco150 is in {make_coco150(Path(options.coco), Path(options.out))}")
    return 0
