"""The paper's tables: `python scripts/reproduce.py table=<name> [dataset=miniature] [row=<name>] [key=value ...]`.

Tables are in `configs/reproduce/`; `show` prints the command of each row instead of running it.
"""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("reproduce")
