"""Check a data set: `python scripts/check_data.py dataset=voc [key=value ...]`; exit code 1 where it is broken."""

from moduseg.cli.main import main

if __name__ == "__main__":
    main("check_data")
