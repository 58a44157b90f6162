"""The paper's tables: `python scripts/reproduce.py table=<name> [dataset=miniature] [row=<name>] [key=value ...]`.

Tables are in `configs/reproduce/`; `show` prints the command of each row instead of running it.
"""

from moduseg.cli.main import main_reproduce

if __name__ == "__main__":
    main_reproduce()
