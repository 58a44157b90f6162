"""Write the data set coco150 from a COCO 2017 download with panoptic annotations.

python scripts/make_coco150.py <coco> data/coco150
"""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("make_coco150")
