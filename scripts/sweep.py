"""Sweep retrieval over a grid, from caches: `python scripts/sweep.py retrieval.top_k=1,5,9 [key=a,b ...] [key=value]`.

With `select=<split>` (or `select=<key>=<value>` for another run) the best setting is chosen there, not on what is
reported. No model runs once the bank and the queries of the split are there.
"""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("sweep")
