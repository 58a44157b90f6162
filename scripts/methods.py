"""All methods side by side: `python scripts/methods.py [dataset=voc] [worlds=3] [methods=[CAM,iSeg]] [key=value ...]`.

Each as masks, after the proposals' vote, after retrieval, and as a student; the table is in `configs/methods/`.
"""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("methods")
