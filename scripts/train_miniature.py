"""Train a miniature model, or print the quality of the shipped ones; see `configs/train_miniature.yaml` for the keys.

python scripts/train_miniature.py model=vit|sam|clip [key=value ...]
python scripts/train_miniature.py model=all quality_only=true
"""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from moduseg.config import config_dir
from moduseg.errors import ModusegError


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train_miniature")
def main(cfg: DictConfig) -> None:
    """Exit code 2 after one line on standard error where the settings cannot be used."""
    from moduseg.miniature.training.train import run

    try:
        run(cfg)
    except ModusegError as error:
        print(f"train_miniature: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
