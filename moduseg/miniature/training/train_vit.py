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

from moduseg.miniature.models.inputs import normalize_pixels
from moduseg.miniature.models.vit import VIT_MEAN, VIT_STD, build_miniature_vit
from moduseg.miniature.models.weights import save_weights
from moduseg.miniature.training.loop import TrainingLoop, parameter_groups
from moduseg.miniature.training.pool import MosaicSettings, ScenePool, draw_mosaics, make_pools
from moduseg.miniature.training.quality import quality_scenes, region_knn_accuracy, vit_tokens
from moduseg.miniature.world.scenes import CLASSES, HUES, SHAPES

TAG_NAMES: tuple[str, ...] = (*CLASSES[1:], *HUES, *SHAPES)
TAGS = torch.tensor([[float(tag == name or tag in name.split()) for tag in TAG_NAMES] for name in CLASSES])
"""`[13, 24]` float32: which tags an object of each class id gives its picture."""


@dataclass
class VitTraining(MosaicSettings):
    """Settings of the training of the ViT; a model without `start` begins with filters in its first layer.

    Args:
        mean_weight: weight, beside the log-sum-exp's, of the loss of logits averaged over the patches of tiles and
            close-ups: it asks every patch of an object for the class, not only the most telling one.
        head_steps: first steps in which only the head learns; for a model that starts from weights.
    """

    mean_weight: float = 0.0
    head_steps: int = 0


def gabor_filters(count: int, size: int) -> torch.Tensor:
    """Return oriented waves of three wavelengths and two phases, and blobs and edges of opponent colours.

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
    """Logits of the tags of a picture: the log-sum-exp of those of its patches.

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
        """Map `[B, N, C]` tokens to `[B, 24]` logits without the bias of scenes: by log-sum-exp, and by the mean."""
        logits = self.linear(tokens).float()
        return logits.logsumexp(dim=1), logits.mean(dim=1)

    def loss(self, logits: torch.Tensor, tags: torch.Tensor, scenes: bool) -> torch.Tensor:
        """Return the scalar loss of `[B, 24]` logits against `[B, 24]` tags in {0, 1}."""
        if scenes:
            return 4.0 * F.binary_cross_entropy_with_logits(logits + self.scene_bias, tags)
        groups = (len(TAG_NAMES) - len(HUES) - len(SHAPES), len(HUES), len(SHAPES))
        parts = zip(logits.split(groups, dim=1), tags.split(groups, dim=1), strict=True)
        return 0.5 * torch.stack([F.cross_entropy(each, truth) for each, truth in parts]).sum()


def train_vit(settings: VitTraining, output: Path, pools: dict[int, ScenePool] | None = None) -> Path:
    """Train the ViT and write its weights.

    Args:
        settings: settings of the training.
        output: safetensors file, written at every check and at the end; the log is beside it (`.jsonl`).
        pools: pictures from `make_pools`; drawn from the settings if omitted.

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
    loop = TrainingLoop(
        settings,
        model,
        groups,
        log_path=output.with_suffix(".jsonl"),
        measure=lambda: {"region_knn": region_knn_accuracy(vit_tokens(model, settings.device), bank, queries)},
        save=lambda: save_weights(model.state_dict(), output),
        last_group_rate=10.0,
    )
    for step, progress in loop:
        model.requires_grad_(step >= settings.head_steps)
        batch = draw_mosaics(pools, settings, progress, rng)
        is_scene = batch.per_input == 1
        tags = torch.stack([TAGS[list(classes)].amax(0) for classes, _ in batch.scenes]).to(device)
        pixels = normalize_pixels(batch.pixels.to(device), VIT_MEAN, VIT_STD)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
            tokens = model.forward_features(pixels)[:, model.num_prefix_tokens :]
            logits, mean_logits = head(batch.split_tokens(tokens))
        loss = head.loss(logits, tags, scenes=is_scene)
        if settings.mean_weight and not is_scene:
            loss = loss + settings.mean_weight * head.loss(mean_logits, tags, scenes=False)
        loop.update(loss, {f"loss_{batch.side}": loss})
    return output
