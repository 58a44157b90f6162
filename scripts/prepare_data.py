"""Prepare a data set once: `python scripts/prepare_data.py dataset=coco2014 [key=value ...]`; see `data/README.md`."""

from moduseg.cli.main import main

if __name__ == "__main__":
    main("prepare_data")
