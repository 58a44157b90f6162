"""Write a run's report, a page that opens from disk: `python scripts/report.py run=<folder> [key=value ...]`.

`predictions=<folder of PNGs> dataset=<name>` in place of `run` reports on another tool's label maps; `compare=<folder>`
adds a second run, image by image.
"""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("report")
