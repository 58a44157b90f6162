"""Run the stage `segment`: `python scripts/segment.py [key=value ...]`; see `configs/` for the keys."""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("segment")
