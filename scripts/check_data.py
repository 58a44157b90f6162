"""Check a data set: `python scripts/check_data.py dataset=voc [key=value ...]`; exit code 1 if it is broken."""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("check_data")
