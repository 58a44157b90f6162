"""Run the stage `infer`: `python scripts/infer.py [key=value ...]`; see `configs/` for the keys."""

from moduseg.cli.main import main

if __name__ == "__main__":
    main("infer")
