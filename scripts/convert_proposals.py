"""Convert proposals that are maps of ids (.npz with instance_mask, 16-bit PNG) into SA-1B JSON files.

python scripts/convert_proposals.py <folder of maps> <folder of JSON files>
"""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("convert_proposals")
