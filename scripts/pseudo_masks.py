"""Run the stage `pseudo_masks`: `python scripts/pseudo_masks.py [key=value ...]`; see `configs/` for the keys."""

from moduseg.cli.main import main

if __name__ == "__main__":
    main("pseudo_masks")
