"""Training of the autoencoder of the miniature latent diffusion model, from crops of scenes.

The encoder's weights are set, not trained (`fit_autoencoder`); the decoder learns to undo it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from moduseg.miniature.models.diffusion import build_autoencoder
from moduseg.miniature.training.fit_autoencoder import fit_decoder, fit_encoder
from moduseg.miniature.training.loop import TrainingLoop, TrainingSettings, parameter_groups
from moduseg.miniature.training.pool import ScenePool, augment, make_pool
from moduseg.miniature.training.quality import quality_scenes
from moduseg.miniature.world.scenes import PRETRAIN_SEED, Scene, render_scene

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass
class AutoencoderTraining(TrainingSettings):
    """Settings of the training of the decoder; `batch` is in crops.

    Args:
        crop: side of the square crops of scenes, in pixels, a multiple of 8, 96 at most.
        edge_weight: weight of the differences of neighbouring pixels, beside the pixels themselves.
        fit_scenes: scenes of which the encoder takes the principal components.
        world_seed: seed of the scenes.
    """

    steps: int = 400
    batch: int = 12
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    scenes: int = 1_200
    crop: int = 64
    edge_weight: float = 0.5
    fit_scenes: int = 200
    world_seed: int = PRETRAIN_SEED + 80
    check_every: int = 100
    check_scenes: int = 16


def train_autoencoder(settings: AutoencoderTraining, folder: Path) -> AutoencoderKL:
    """Fit the encoder and train the decoder, or go on with a training that was interrupted.

    Args:
        settings: settings of the training.
        folder: gets the state of the training and its log; made if absent.

    Returns:
        The autoencoder, in evaluation mode, with the scaling factor that gives its latents unit variance.
    """
    torch.manual_seed(settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(settings.device)
    model = fit_autoencoder(settings).to(device)
    pool = make_pool(settings.world_seed, settings.scenes)
    unseen = crop_scenes(quality_scenes("val", settings.check_scenes)).to(device)
    decoder = nn.ModuleList([model.decoder, model.post_quant_conv])
    loop = TrainingLoop(
        settings,
        decoder,
        parameter_groups(decoder, settings.weight_decay),
        log_path=folder / "autoencoder.jsonl",
        measure=lambda: {"peak_signal_to_noise": measure_reconstruction(model, unseen)},
        save=lambda: None,
    ).keep_state(folder / "autoencoder.pt")
    for step, _ in loop:
        rng = np.random.default_rng([settings.seed, step])
        pixels = _draw_crops(pool, settings, rng).to(device)
        with torch.no_grad():
            latents = model.encode(pixels).latent_dist.sample(torch.Generator(device).manual_seed(step))
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
            decoded = model.decode(latents).sample
        errors = decoded.float() - pixels
        pixel_loss, edge_loss = errors.abs().mean(), _edge_loss(errors)
        loop.update(pixel_loss + settings.edge_weight * edge_loss, {"pixels": pixel_loss, "edges": edge_loss})
    return model.eval().requires_grad_(False)


def fit_autoencoder(settings: AutoencoderTraining) -> AutoencoderKL:
    """Return an autoencoder with a fitted encoder, which is frozen, and a decoder that paints smooth colours."""
    model = build_autoencoder()
    pixels = crop_scenes([render_scene(settings.world_seed, "train", i) for i in range(settings.fit_scenes)])
    fit_encoder(model, pixels)
    fit_decoder(model, pixels)
    for module in (model.encoder, model.quant_conv):
        module.requires_grad_(False)
    with torch.no_grad():
        deviation = float(model.encode(pixels).latent_dist.mode().std())
    model.register_to_config(scaling_factor=1.0 / deviation)
    return model


def crop_scenes(scenes: Sequence[Scene]) -> torch.Tensor:
    """Return the top left 96 x 96 pixels of scenes, which all have them: `[N, 3, 96, 96]` float32 in [-1, 1]."""
    crops = np.stack([scene.image[:96, :96] for scene in scenes])
    return torch.from_numpy(crops).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def _draw_crops(pool: ScenePool, settings: AutoencoderTraining, rng: np.random.Generator) -> torch.Tensor:
    """Return crops of one step, `[batch, 3, crop, crop]` float32 in [-1, 1]."""
    group, index = pool.draw_batch(rng, settings.batch)
    height, width = group.images.shape[1:3]
    side = settings.crop
    rows = rng.integers(height - side + 1, size=settings.batch)
    columns = rng.integers(width - side + 1, size=settings.batch)
    crops = [
        group.images[i, top : top + side, left : left + side] for i, top, left in zip(index, rows, columns, strict=True)
    ]
    return 2.0 * augment(np.stack(crops), (), rng)[0] - 1.0


def _edge_loss(errors: torch.Tensor) -> torch.Tensor:
    """Return the mean absolute difference of neighbouring `errors` `[B, 3, H, W]`, along both axes."""
    return 0.5 * (errors.diff(dim=-1).abs().mean() + errors.diff(dim=-2).abs().mean())


@torch.no_grad()
def measure_reconstruction(model: AutoencoderKL, pixels: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio, in decibels, of `[N, 3, H, W]` in [-1, 1] encoded and decoded."""
    decoded = model.decode(model.encode(pixels).latent_dist.mode()).sample.clamp(-1.0, 1.0)
    return float(-10.0 * (F.mse_loss(decoded.float(), pixels) / 4.0).log10())
