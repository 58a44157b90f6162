"""Run the stage `pseudo_masks`: `python scripts/pseudo_masks.py [key=value ...]`; see `configs/` for the keys."""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("pseudo_masks")
