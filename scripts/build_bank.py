"""Run the stage `build_bank`: `python scripts/build_bank.py [key=value ...]`; see `configs/` for the keys."""

from moduseg.cli.main import main

if __name__ == "__main__":
    main("build_bank")
