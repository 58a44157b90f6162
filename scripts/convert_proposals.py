"""Convert proposals that are maps of ids (.npz with instance_mask, 16-bit PNG) into SA-1B JSON files.

python scripts/convert_proposals.py <folder of maps> <folder of JSON files>
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from moduseg.errors import ModusegError
from moduseg.tools.convert import convert_folder


def main() -> int:
    """Exit code 0; 1 where maps were left out, after a line for each; 2 where nothing could be done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="holds <id>.npz or <id>.png, sub-folders included")
    parser.add_argument("out", type=Path, help="folder to write <id>.json to")
    arguments = parser.parse_args()
    try:
        done = convert_folder(arguments.source, arguments.out)
    except ModusegError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for message in done.failed.values():
        print(f"left out: {message}", file=sys.stderr)
    print(f"{done.written} written, {done.kept} kept, {len(done.failed)} left out; proposals are in {arguments.out}")
    return 1 if done.failed else 0


if __name__ == "__main__":
    sys.exit(main())
