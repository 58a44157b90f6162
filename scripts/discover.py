"""Run the stage `discover`: `python scripts/discover.py [key=value ...]`; see `configs/` for the keys."""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("discover")
