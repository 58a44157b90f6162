"""Train a miniature model, or print the quality of the shipped ones; see `configs/train_miniature.yaml` for the keys.

python scripts/train_miniature.py model=vit|sam|clip|diffusion [key=value ...]
python scripts/train_miniature.py model=all quality_only=true
"""

from moduseg.cli import run_script

if __name__ == "__main__":
    run_script("train_miniature")
