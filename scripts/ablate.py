"""Make a table: `python scripts/ablate.py table=coco150 [key=value ...]`; tables are in `configs/table/`."""

from moduseg.cli.main import main_table

if __name__ == "__main__":
    main_table()
