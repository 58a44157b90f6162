"""Withhold a class from the bank, then add it from a few tagged images: what it costs and what it gains (docs/bank.md).

python scripts/new_class.py [class=<names>] [images=5] [key=value ...]
"""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("new_class")
