"""Sweep retrieval over a grid, from caches: `python scripts/sweep.py retrieval.top_k=1,5,9 [key=a,b ...] [key=value]`.

With `select=<split>` (or `select=<key>=<value>` for another run) the best setting is chosen there, not on what is
reported. No model runs once the bank and the queries of the split are there.
"""

from moduseg.cli.main import main_sweep

if __name__ == "__main__":
    main_sweep()
