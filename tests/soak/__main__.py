"""`make soak`, or `python -m tests.soak --minutes 30 --seed 7 --folder build/soak`."""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from tests.soak.night import Night


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long accidents go on")
    parser.add_argument("--seed", type=int, default=None, help="of the accidents; drawn if omitted, and printed")
    parser.add_argument("--folder", type=Path, default=Path("build/soak"), help="emptied first; the log is kept in it")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    with Night(options.folder.resolve(), seed) as night:
        return night.run(60 * options.minutes)


if __name__ == "__main__":
    sys.exit(main())
