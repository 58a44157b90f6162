"""Train an ARM, a module that sharpens the features of every CLIP host; `configs/train_arm.yaml` has the keys.

python scripts/train_arm.py [key=value ...]
"""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("train_arm")
