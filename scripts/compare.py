"""Compare two results: `python scripts/compare.py <folder> <folder> [dataset=<name> key=value ...]`.

Each folder is one of results (of infer or evaluate), or of PNGs named <id>.png, which are scored on `dataset` first.
"""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("compare")
