"""Write the data set coco150 from a COCO 2017 download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moduseg.config.command_keys import Coco150Options
from moduseg.datasets.coco150 import make_coco150


def main(options: Coco150Options, overrides: Sequence[str] = ()) -> int:
    """Write the data set."""
    print(f"coco150 is in {make_coco150(Path(options.coco), Path(options.out))}")
    return 0
