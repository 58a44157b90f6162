"""Train one miniature model, or print the quality of the shipped ones (`scripts/train_miniature.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from moduseg.errors import ConfigError
from moduseg.miniature.models.sam import build_miniature_sam
from moduseg.miniature.models.vit import build_miniature_vit
from moduseg.miniature.models.weights import WEIGHTS, weights_path
from moduseg.miniature.training.quality import (
    dense_text_accuracy,
    quality_scenes,
    region_knn_accuracy,
    sam_recall,
    vit_tokens,
)
from moduseg.miniature.training.train_clip import ClipTraining, train_clip
from moduseg.miniature.training.train_sam import SamTraining, train_sam
from moduseg.miniature.training.train_vit import VitTraining, train_vit

TRAININGS: dict[str, tuple[type, Any]] = {
    "vit": (VitTraining, train_vit),
    "sam": (SamTraining, train_sam),
    "clip": (ClipTraining, train_clip),
}


def main(cfg: DictConfig) -> int:
    """The command `train_miniature`: 0 if the model was trained or measured."""
    run(cfg)
    return 0


def run(cfg: DictConfig) -> list[Path]:
    """Train, unless `cfg.quality_only`, and print the quality of the result as one line of JSON per model.

    Args:
        cfg: `configs/train_miniature.yaml` with one of `configs/model/`.

    Returns:
        The weights that were measured.

    Raises:
        ConfigError: an unknown model, `model=all` without `quality_only`, or a device that is not there.
        MissingError: `quality_only` and no weights.
    """
    name = str(cfg.model.name)
    if name != "all" and name not in TRAININGS:
        raise ConfigError(f"model.name: got {name!r}, expected one of {[*TRAININGS, 'all']}; try model=vit")
    if name == "all" and (not cfg.quality_only or cfg.weights):
        raise ConfigError("model=all: got a training or weights of one model, expected one model; try model=vit")
    if str(cfg.device).startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device: got {cfg.device}, expected a device of this machine; try device=cpu")
    if cfg.threads:
        torch.set_num_threads(int(cfg.threads))
    measured = []
    for model in TRAININGS if name == "all" else (name,):
        if cfg.quality_only:
            path = Path(cfg.weights) if cfg.weights else weights_path(model)
        else:
            settings_class, train = TRAININGS[model]
            schema = OmegaConf.structured(settings_class)
            values = {key: value for key, value in cfg.model.items() if key != "name"}
            settings = OmegaConf.to_object(OmegaConf.merge(schema, values, {"device": str(cfg.device)}))
            path = train(settings, Path(cfg.output or Path("outputs/train_miniature") / WEIGHTS[model]))
        quality = measure(model, path, int(cfg.quality_scenes), str(cfg.device))
        rounded = {key: round(value, 3) for key, value in quality.items()}
        print(json.dumps({"model": model, "weights": str(path), "scenes": int(cfg.quality_scenes), **rounded}))
        measured.append(path)
    return measured


def measure(name: str, path: Path, scenes: int, device: str = "cpu") -> dict[str, float]:
    """Measure the quality of weights on scenes of `QUALITY_SEED`.

    Args:
        name: `"vit"`, `"sam"` or `"clip"`.
        path: the weights as shipped.
        scenes: number of scenes (of each split, if two are used).
        device: device of the model.

    Returns:
        `vit`: `region_knn` and `region_knn_random` (the same architecture with random weights, mean of three), percent.
        `sam`: the values of `sam_recall`. `clip`: percent for each way to run the last block.
    """
    queries = quality_scenes("val", scenes)
    if name == "sam":
        return sam_recall(build_miniature_sam(path).to(device), queries)
    if name == "clip":
        from transformers import CLIPModel, CLIPTokenizer

        model = CLIPModel.from_pretrained(path).float().eval().to(device)
        return dense_text_accuracy(model, CLIPTokenizer.from_pretrained(path), queries)
    bank = quality_scenes("train", scenes)
    random = []
    for seed in range(3):
        torch.manual_seed(seed)
        tokens = vit_tokens(build_miniature_vit().to(device), device)
        random.append(region_knn_accuracy(tokens, bank, queries))
    trained = region_knn_accuracy(vit_tokens(build_miniature_vit(path).to(device), device), bank, queries)
    return {"region_knn": trained, "region_knn_random": sum(random) / len(random)}
