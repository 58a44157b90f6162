"""A tiny latent diffusion model with random weights, as options and as a directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from moduseg.devices import Device
from moduseg.diffusion.attention import AttentionSource
from moduseg.diffusion.model import DiffusionModel, DiffusionModelOptions
from tests.support.devices import CPU

IMAGE_SIDE = 128
LATENT_SIDE = 16
HEADS = 2
LENGTH = 24
"""Tokens that the text encoder takes."""


def tiny_diffusion(words: tuple[Path, int, int], **options: Any) -> dict[str, Any]:
    """Return options of a model with random weights: four levels, 16 cells on a side; `words` is the fixture's."""
    folder, num_tokens, end = words
    unet = {
        "sample_size": LATENT_SIDE,
        "block_out_channels": (32, 32, 32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 16,
        "attention_head_dim": HEADS,
    }
    vae = {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": IMAGE_SIDE,
    }
    text_encoder = {
        "vocab_size": num_tokens,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
        "bos_token_id": end - 1,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    config = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    return {
        "weights": "random",
        "config": config,
        "tokenizer": str(folder),
        "image_side": IMAGE_SIDE,
        **options,
    }


def tiny_source(words: tuple[Path, int, int], device: Device = CPU, **options: Any) -> AttentionSource:
    """Return an attention source on the tiny model."""
    return AttentionSource(DiffusionModelOptions(**tiny_diffusion(words, **options)), device)


_MODELS: dict[tuple[str, str], DiffusionModel] = {}


def share_model(source: AttentionSource) -> None:
    """Give a source on the tiny model the parts that another one on this device has made, which takes most of a test.

    The model reads neither `image_side` nor `latent`, in which the sources may differ.
    """
    key = (str(source.model.device.torch_device), str(source.options.tokenizer))
    source.model = _MODELS.setdefault(key, source.model)


def save_tiny_diffusion(words: tuple[Path, int, int], folder: Path) -> Path:
    """Write the tiny model as diffusers lays it out, and return the directory."""
    model = DiffusionModel(DiffusionModelOptions(**tiny_diffusion(words)), CPU, "diffusion.weights")
    for name in ("unet", "vae", "text_encoder", "scheduler"):
        getattr(model, name).save_pretrained(folder / name)
    shutil.copytree(words[0], folder / "tokenizer")
    return folder
