"""Train one miniature model, or print the quality of the shipped ones (`scripts/train_miniature.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from moduseg.errors import ConfigError
from moduseg.miniature.models.diffusion import DiffusionParts, build_unet, load_diffusion
from moduseg.miniature.models.sam import build_miniature_sam
from moduseg.miniature.models.vit import build_miniature_vit
from moduseg.miniature.models.weights import WEIGHTS, weights_path
from moduseg.miniature.training.generation import caption_retrieval, generate_pictures
from moduseg.miniature.training.pointing import PointingCheck
from moduseg.miniature.training.quality import (
    dense_text_accuracy,
    quality_scenes,
    region_knn_accuracy,
    sam_recall,
    vit_tokens,
)
from moduseg.miniature.training.train_autoencoder import crop_scenes, measure_reconstruction
from moduseg.miniature.training.train_clip import ClipTraining, train_clip
from moduseg.miniature.training.train_diffusion import DiffusionTraining, train_diffusion
from moduseg.miniature.training.train_sam import SamTraining, train_sam
from moduseg.miniature.training.train_vit import VitTraining, train_vit
from moduseg.miniature.world.scenes import Scene

TRAININGS: dict[str, tuple[type, Any]] = {
    "vit": (VitTraining, train_vit),
    "sam": (SamTraining, train_sam),
    "clip": (ClipTraining, train_clip),
    "diffusion": (DiffusionTraining, train_diffusion),
}


NUM_CAPTIONS = 50
"""Captions among which a generated picture has to find its own."""


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
        name: `"vit"`, `"sam"`, `"clip"` or `"diffusion"`.
        path: the weights as shipped.
        scenes: number of scenes (of each split, if two are used).
        device: device of the model.

    Returns:
        `vit`: `region_knn` and `region_knn_random` (the same architecture with random weights, mean of three), percent.
        `sam`: the values of `sam_recall`. `clip`: percent for each way to run the last block.
        `diffusion`: percent of the (scene, class) pairs whose words point at an object of the class (`pointing`;
        `pointing_random` with random weights of the denoiser), percent of 50 generated pictures that the miniature CLIP
        gives their caption (`retrieval`), and decibels of the autoencoder (`peak_signal_to_noise`).
    """
    queries = quality_scenes("val", scenes)
    if name == "sam":
        return sam_recall(build_miniature_sam(path).to(device), queries)
    if name == "clip":
        from transformers import CLIPModel, CLIPTokenizer

        model = CLIPModel.from_pretrained(path).float().eval().to(device)
        return dense_text_accuracy(model, CLIPTokenizer.from_pretrained(path), queries)
    if name == "diffusion":
        return _measure_diffusion(path, queries, device)
    bank = quality_scenes("train", scenes)
    random = []
    for seed in range(3):
        torch.manual_seed(seed)
        tokens = vit_tokens(build_miniature_vit().to(device), device)
        random.append(region_knn_accuracy(tokens, bank, queries))
    trained = region_knn_accuracy(vit_tokens(build_miniature_vit(path).to(device), device), bank, queries)
    return {"region_knn": trained, "region_knn_random": sum(random) / len(random)}


def _measure_diffusion(path: Path, queries: list[Scene], device: str) -> dict[str, float]:
    """Return how well the words of a latent diffusion model point, and how well its pictures show their captions."""
    from transformers import CLIPModel, CLIPTokenizer

    pipeline = load_diffusion(path).to(device)
    parts = DiffusionParts(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.scheduler)
    check = PointingCheck(queries, parts)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    captions = [scene.caption(rng) for scene in quality_scenes("test", NUM_CAPTIONS)]
    clip = CLIPModel.from_pretrained(weights_path("clip")).float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(weights_path("clip"))
    pictures = generate_pictures(pipeline, captions)
    return {
        "pointing": check(pipeline.unet),
        "pointing_random": check(build_unet().eval().to(device)),
        "retrieval": caption_retrieval(clip, tokenizer, pictures, captions),
        "peak_signal_to_noise": measure_reconstruction(parts.autoencoder, crop_scenes(queries).to(device)),
    }
