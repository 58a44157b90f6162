"""Make a table: `python scripts/ablate.py table=coco150 [key=value ...]`; tables are in `configs/table/`."""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("ablate")
