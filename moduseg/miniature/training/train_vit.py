"""Training of the miniature ViT from image-level tags.

The objective sees which classes a picture holds and nothing else: a linear layer gives every patch one logit per tag,
a log-sum-exp over the patches turns them into one logit per picture. The tags of an object are its class name and
that name's two words, "red disc", "red" and "disc": most classes differ from another one in hue alone or in shape
alone, and the words say which.

Three kinds of pictures are mixed: whole scenes, close-ups of one object, and tiles that one object nearly fills; the
small ones share an input, 4 or 16 to a mosaic, each with its own tags. A picture of one object has one tag of each
kind, so its loss is a softmax cross-entropy over the classes, the hues and the shapes; a scene's is a binary cross-
entropy. From whole scenes alone the model learns far more slowly: with five objects in a picture a tag says little
about any one patch. The share of whole scenes grows as the training goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from moduseg.miniature.models.vit import VIT_MEAN, VIT_STD, build_miniature_vit
from moduseg.miniature.models.weights import save_weights
from moduseg.miniature.training.pool import (
    MODEL_SIZE,
    ScenePool,
    Schedule,
    TrainingLog,
    augment,
    draw_side,
    make_pools,
    mosaic,
    parameter_groups,
    split_mosaic,
)
from moduseg.miniature.training.quality import quality_scenes, region_knn_accuracy, vit_tokens
from moduseg.miniature.world.scenes import CLASSES, HUES, PRETRAIN_SEED, SHAPES

TAG_NAMES: tuple[str, ...] = (*CLASSES[1:], *HUES, *SHAPES)
TAGS = torch.tensor([[float(tag == name or tag in name.split()) for tag in TAG_NAMES] for name in CLASSES])
"""`[13, 24]` float32: which tags an object of each class id gives its picture."""
_KINDS = (slice(0, 12), slice(12, 18), slice(18, 24))
"""Where classes, hues and shapes stand in `TAG_NAMES`."""
SIZES = (32, 64, 128)
"""Sides of tiles, close-ups and scenes in pixels."""


@dataclass
class VitTraining:
    """Settings of the training; the miniature README has those of the shipped weights.

    Args:
        steps, minutes: length, see `Schedule`.
        batch: inputs of 128 pixels in a step: scenes, or mosaics of 4 close-ups or 16 tiles.
        learning_rate, weight_decay: of AdamW.
        tiles, close_ups, scenes: pictures drawn before the training.
        first_shares, last_shares: shares of steps on tiles, close-ups and scenes, at the start and at the end.
        world_seed: of the pictures, see `make_pools`.
        seed: of the weights and the order.
        device: where the training runs.
        bfloat16: mixed precision.
        check_every: steps between two measurements of quality, each followed by a save.
        check_scenes: scenes of each split in a measurement.
        mean_weight: weight, beside the log-sum-exp's, of the loss of logits averaged over the patches of tiles and
            close-ups: it asks every patch of an object for the class, not only the most telling one.
        start: weights to start from; random ones, with filters in the first layer, where left out.
        head_steps: first steps in which only the head learns; for a model that starts from weights.
    """

    steps: int = 5_000
    minutes: float | None = None
    batch: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    tiles: int = 30_000
    close_ups: int = 12_000
    scenes: int = 4_000
    first_shares: tuple[float, float, float] = (0.6, 0.25, 0.15)
    last_shares: tuple[float, float, float] = (0.3, 0.3, 0.4)
    world_seed: int = PRETRAIN_SEED
    seed: int = 0
    device: str = "cpu"
    bfloat16: bool = True
    check_every: int = 200
    check_scenes: int = 80
    mean_weight: float = 0.0
    start: str | None = None
    head_steps: int = 0


def gabor_filters(count: int, size: int) -> torch.Tensor:
    """Oriented waves of three wavelengths and two phases, and blobs and edges of opponent colours.

    The first layer of every network trained on pictures ends up with such filters; starting from them saves the steps
    in which a small network finds them.

    Args:
        count: filters, 64 or more; those beyond the bank are small noise.
        size: side of a filter in pixels, odd.

    Returns:
        `[count, 3, size, size]` float32, each filter of standard deviation 0.05.
    """
    axis = torch.arange(size) - (size - 1) / 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    grey = torch.full((3, 1, 1), 3**-0.5)
    opponents = [torch.tensor(c).view(3, 1, 1) for c in ((0.7, -0.7, 0.0), (0.4, 0.4, -0.8))]
    filters = []
    for wavelength in (3.2, 5.0, 8.0):
        window = torch.exp(-(x**2 + y**2) / (2 * (0.42 * wavelength + 0.6) ** 2))
        for turn in range(8):
            along = x * math.cos(math.pi * turn / 8) + y * math.sin(math.pi * turn / 8)
            for phase in (0.0, math.pi / 2):
                filters.append(grey * window * torch.cos(2 * math.pi * along / wavelength + phase))
    blob = torch.exp(-(x**2 + y**2) / (2 * 1.5**2))
    filters += [sign * colour * blob for colour in opponents for sign in (1.0, -1.0)]
    for turn in range(4):
        along = x * math.cos(math.pi * turn / 4) + y * math.sin(math.pi * turn / 4)
        filters += [colour * blob * torch.sin(2 * math.pi * along / 6) for colour in opponents]
    bank = torch.stack(filters)
    rest = 0.1 * torch.randn(max(count - len(bank), 0), 3, size, size)
    bank = torch.cat([bank, rest])[:count]
    return 0.05 * bank / bank.flatten(1).std(1).view(-1, 1, 1, 1)


class TagHead(nn.Module):
    """Logits of the tags of a picture: those of its patches, by log-sum-exp.

    For scenes a bias is added that starts where patches without information give every tag about its prior probability.
    A wrong start would be mended by the features, whose common direction moves faster than a bias, and they would lose
    what tells them apart.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, len(TAG_NAMES))
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        words = len(HUES) + len(SHAPES)
        self.scene_bias = nn.Parameter(torch.tensor([-6.9] * (len(TAG_NAMES) - words) + [-6.1] * words))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, N, C]` tokens to `[B, 24]` logits, without the bias of scenes: by log-sum-exp, and by the mean."""
        logits = self.linear(tokens).float()
        return logits.logsumexp(dim=1), logits.mean(dim=1)

    def loss(self, logits: torch.Tensor, tags: torch.Tensor, scenes: bool) -> torch.Tensor:
        """Scalar loss of `[B, 24]` logits against `[B, 24]` tags in {0, 1}."""
        if scenes:
            return 4.0 * F.binary_cross_entropy_with_logits(logits + self.scene_bias, tags)
        groups = (len(TAG_NAMES) - len(HUES) - len(SHAPES), len(HUES), len(SHAPES))
        parts = zip(logits.split(groups, dim=1), tags.split(groups, dim=1), strict=True)
        return 0.5 * torch.stack([F.cross_entropy(each, truth) for each, truth in parts]).sum()


def train_vit(settings: VitTraining, output: Path, pools: dict[int, ScenePool] | None = None) -> Path:
    """Train the ViT and write its weights.

    Args:
        settings: what to do.
        output: safetensors file, written at every check and at the end; the log lies beside it (`.jsonl`).
        pools: see `make_pools`; drawn from the settings where left out.

    Returns:
        `output`.
    """
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    pools = pools or make_pools(settings.world_seed, settings.tiles, settings.close_ups, settings.scenes)
    bank, queries = (quality_scenes(split, settings.check_scenes) for split in ("train", "val"))
    device = torch.device(settings.device)
    model = build_miniature_vit(None if settings.start is None else Path(settings.start)).to(device)
    if settings.start is None:
        stem = model.patch_embed.backbone.conv.weight
        with torch.no_grad():
            stem.copy_(gabor_filters(stem.shape[0], stem.shape[-1]))
    head = TagHead(model.embed_dim).to(device)
    groups = parameter_groups(nn.ModuleList([model, head.linear]), settings.weight_decay)
    groups.append({"params": [head.scene_bias], "weight_decay": 0.0})
    optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99))
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (VIT_MEAN, VIT_STD))
    log = TrainingLog(output.with_suffix(".jsonl"))
    schedule = Schedule(settings.steps, settings.minutes)
    running: dict[str, float] = {}

    def check(step: int) -> None:
        model.eval()
        accuracy = region_knn_accuracy(vit_tokens(model, settings.device), bank, queries)
        log.write(step=step, region_knn=accuracy, **running, seconds=schedule.seconds)
        save_weights(model.state_dict(), output)
        model.train()

    for step, progress, factor in schedule:
        if step % settings.check_every == 0:
            check(step)
        for parameters in optimiser.param_groups:
            parameters["lr"] = settings.learning_rate * factor
        optimiser.param_groups[-1]["lr"] *= 10.0
        model.requires_grad_(step >= settings.head_steps)
        side = draw_side(rng, settings.first_shares, settings.last_shares, progress)
        per_input = (MODEL_SIZE // side) ** 2
        group, index = pools[side].batch(rng, settings.batch * per_input)
        images, _ = augment(group.images[index], (), rng)
        tags = torch.stack([TAGS[list(group.scenes[number][0])].amax(0) for number in index]).to(device)
        pixels = (images if per_input == 1 else mosaic(images)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
            tokens = model.forward_features((pixels - mean) / std)[:, model.num_prefix_tokens :]
            logits, mean_logits = head(tokens if per_input == 1 else split_mosaic(tokens, side))
        loss = head.loss(logits, tags, scenes=per_input == 1)
        if settings.mean_weight and per_input > 1:
            loss = loss + settings.mean_weight * head.loss(mean_logits, tags, scenes=False)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        value = float(loss.detach())
        running[f"loss_{side}"] = 0.98 * running.get(f"loss_{side}", value) + 0.02 * value
    check(step + 1)
    log.close()
    return output
