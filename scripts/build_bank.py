"""Run the stage `build_bank`: `python scripts/build_bank.py [key=value ...]`; see `configs/` for the keys."""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("build_bank")
