"""Pack predictions for the VOC 2012 server: `python scripts/voc_package.py dataset=voc dataset.val_split=test [...]`.

With `predictions=<folder>` the PNGs there are packed, else the run's own, which `infer` makes first.
"""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("voc_package")
