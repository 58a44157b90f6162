"""Score a run: `python scripts/evaluate.py [key=value ...]`; see `configs/` for the keys.

With `predictions=<folder>` the PNGs there (<folder>/<id>.png, by whatever tool) are scored on `dataset` instead.
"""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("evaluate")
