"""Run the stage `propose`: `python scripts/propose.py [key=value ...]`; see `configs/` for the keys."""

from moduseg.cli.main import main

if __name__ == "__main__":
    main("propose")
