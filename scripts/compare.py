"""Compare two results: `python scripts/compare.py <folder> <folder> [dataset=<name> key=value ...]`.

Each folder is one of results (of infer or evaluate), or of PNGs named <id>.png, which are scored on `dataset` first.
"""

from moduseg.cli.main import main_compare

if __name__ == "__main__":
    main_compare()
