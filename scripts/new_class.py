"""Withhold a class from the bank, then add it from a few tagged images: what that takes and gives (docs/bank.md).

python scripts/new_class.py [class=<names>] [images=5] [key=value ...]
"""

from moduseg.cli.main import main_own

if __name__ == "__main__":
    main_own("new_class")
