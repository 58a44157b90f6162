"""Run the command `tag`: `python scripts/tag.py [key=value ...]`; see `configs/` for the keys."""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("tag")
