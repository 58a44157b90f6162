"""Write the data set coco150 from a COCO 2017 download with panoptic annotations.

python scripts/make_coco150.py <coco> data/coco150
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moduseg.datasets.coco150 import make_coco150
from moduseg.errors import ModusegError


def main() -> int:
    """Exit code 0, or 2 with one line on standard error."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("coco", type=Path, help="holds train2017/, val2017/ and annotations/ with panoptic_*")
    parser.add_argument("out", type=Path, nargs="?", default=Path("data/coco150"), help="folder to write to")
    arguments = parser.parse_args()
    try:
        out = make_coco150(arguments.coco, arguments.out)
    except ModusegError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"coco150 is in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
