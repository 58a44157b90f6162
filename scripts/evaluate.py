"""Score a run: `python scripts/evaluate.py [key=value ...]`; see `configs/` for the keys.

With `predictions=<folder>` the PNGs there (<folder>/<id>.png, by whatever tool) are scored on `dataset` instead.
"""

from moduseg.cli.main import main

if __name__ == "__main__":
    main("evaluate")
