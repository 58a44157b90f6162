"""Prepare a data set once: `python scripts/prepare_data.py dataset=coco2014 [key=value ...]`; see `data/README.md`."""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("prepare_data")
