"""Training of the miniature SAM from exact instance masks and single points.

A point on an object asks for that object's visible pixels, a point on the background for the texture it lies on.
Three of the decoder's four outputs compete: the one closest to the truth is trained (binary cross-entropy and dice),
which leaves the others free to answer the point differently; the fourth, SAM's single-mask output, is trained always.
The quality head learns the IoU that each output reaches, because the automatic generator filters by it.

What the image encoder's last block gives, before the neck, may also learn to predict the patch tokens of the miniature
ViT, itself trained from tags alone. Like CLIP, SAM cuts its patches from the pixels, and masks alone are slow to teach
it textures and shapes. The ViT is not needed afterwards.
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

from moduseg.miniature.models.sam import SAM_PATCH, SAM_SIZE, SAM_WIDTH, build_miniature_sam
from moduseg.miniature.models.vit import VIT_ARGS
from moduseg.miniature.models.weights import save_weights
from moduseg.miniature.training.loop import TrainingLoop, parameter_groups
from moduseg.miniature.training.pool import ScenePool, augment, make_pool
from moduseg.miniature.training.quality import quality_scenes, sam_recall
from moduseg.miniature.training.teacher import TeacherSettings, load_teacher, prediction_loss
from moduseg.miniature.world.scenes import PRETRAIN_SEED

if TYPE_CHECKING:
    from segment_anything.modeling import Sam


@dataclass
class SamTraining(TeacherSettings):
    """Settings of the training of the SAM; `batch` counts scenes, and `seed` is that of the scenes too.

    Args:
        points: points per scene, each a prompt of its own.
        background_points: share of points that ask for a background texture.
        quality_weight: weight of the IoU regression.
    """

    steps: int = 8_000
    batch: int = 8
    weight_decay: float = 0.02
    scenes: int = 14_000
    seed: int = PRETRAIN_SEED + 1
    check_every: int = 1_000
    check_scenes: int = 24
    points: int = 8
    background_points: float = 0.3
    quality_weight: float = 1.0


def train_sam(settings: SamTraining, output: Path, pool: ScenePool | None = None) -> Path:
    """Train the SAM and write its weights.

    Args:
        settings: settings of the training.
        output: safetensors file, written at every check and at the end; the log is beside it (`.jsonl`).
        pool: training scenes; drawn from the settings if omitted.

    Returns:
        `output`.
    """
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    pool = pool or make_pool(settings.seed, settings.scenes)
    scenes = quality_scenes("val", settings.check_scenes)
    device = torch.device(settings.device)
    sam = build_miniature_sam(None if settings.start is None else Path(settings.start)).to(device)
    teacher = load_teacher(settings.teacher, device)
    predict = nn.Linear(SAM_WIDTH, VIT_ARGS["embed_dim"]).to(device)
    hidden: list[torch.Tensor] = []
    if teacher is not None:
        sam.image_encoder.blocks[-1].register_forward_hook(lambda *call: hidden.append(call[-1]))
    loop = TrainingLoop(
        settings,
        sam,
        parameter_groups(nn.ModuleList([sam, predict]), settings.weight_decay),
        log_path=output.with_suffix(".jsonl"),
        measure=lambda: sam_recall(sam, scenes),
        save=lambda: save_weights(sam.state_dict(), output),
    )
    for _ in loop:
        group, index = pool.draw_batch(rng, settings.batch)
        images, (instances, stuff) = augment(
            group.images[index], (group.instances[index], group.stuff_maps[index]), rng
        )
        points, targets = draw_points(instances, stuff, settings.points, settings.background_points, rng)
        hidden.clear()  # drop the outputs of earlier steps and of the measurement
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
            embeddings = sam.image_encoder(sam.preprocess(255.0 * images.to(device)))
            logits, quality = decode(sam, embeddings, points.to(device))
            teacher_loss = torch.zeros((), device=device)
            if teacher is not None:
                # Padding has no tokens to predict.
                h, w = (side // SAM_PATCH for side in images.shape[-2:])
                predicted = predict(hidden[0][:, :h, :w]).flatten(1, 2)
                teacher_loss = prediction_loss(predicted, teacher, images.to(device))
        mask_loss = sam_loss(
            logits.float(), quality.float(), targets.to(device), images.shape[-2:], settings.quality_weight
        )
        loop.update(mask_loss + settings.teacher_weight * teacher_loss, {"loss": mask_loss})
    return output


def draw_points(
    instances: np.ndarray, stuff: np.ndarray, count: int, background: float, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw points and the masks that they ask for.

    Args:
        instances: `[B, H, W]` uint8 object ids, `0` background.
        stuff: `[B, H, W]` uint8 background texture of each pixel.
        count: points per image.
        background: probability of a point on the background; the others fall on objects, each equally likely.

    Returns:
        points `[B, count, 2]` float32, x and y in pixels; targets `[B, count, H, W]` float32 in {0, 1}.
    """
    size, h, w = instances.shape
    points = np.zeros((size, count, 2), np.float32)
    targets = np.zeros((size, count, h, w), np.float32)
    for row in range(size):
        ids = instances[row]
        order = np.argsort(ids, axis=None, kind="stable")
        starts = np.searchsorted(ids.ravel()[order], np.arange(int(ids.max()) + 2))
        present = [i for i in range(1, len(starts) - 1) if starts[i + 1] > starts[i]]
        for column in range(count):
            on_background = (rng.random() < background or not present) and starts[1] > 0
            chosen = 0 if on_background else present[int(rng.integers(len(present)))]
            y, x = divmod(int(order[int(rng.integers(starts[chosen], starts[chosen + 1]))]), w)
            points[row, column] = (x, y)
            mask = ids == chosen
            targets[row, column] = mask if chosen else mask & (stuff[row] == stuff[row, y, x])
    points += rng.uniform(-0.5, 0.5, points.shape).astype(np.float32)
    return torch.from_numpy(points), torch.from_numpy(targets)


def decode(sam: Sam, embeddings: torch.Tensor, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all outputs of the mask decoder for a batch of images with equally many points.

    `MaskDecoder.forward` takes one image at a time; this runs the same modules on all of them at once.

    Args:
        sam: the model.
        embeddings: `[B, C, h, w]` of the image encoder.
        points: `[B, P, 2]` foreground points, x and y in pixels of the model's input.

    Returns:
        logits `[B * P, 4, 4h, 4w]` and predicted IoU `[B * P, 4]`; output 0 is SAM's single mask.
    """
    decoder = sam.mask_decoder
    prompts = points.flatten(0, 1)[:, None]
    sparse, dense = sam.prompt_encoder(
        points=(prompts, torch.ones(prompts.shape[:2], device=prompts.device)), boxes=None, masks=None
    )
    source = embeddings.repeat_interleave(points.shape[1], dim=0) + dense
    count, channels, h, w = source.shape
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).expand(count, -1, -1)
    position = sam.prompt_encoder.get_dense_pe().expand(count, -1, -1, -1)
    tokens, source = decoder.transformer(source, position, torch.cat([outputs, sparse], dim=1))
    upscaled = decoder.output_upscaling(source.transpose(1, 2).reshape(count, channels, h, w))
    mask_tokens = tokens[:, 1 : 1 + decoder.num_mask_tokens]
    weights = [mlp(mask_tokens[:, i]) for i, mlp in enumerate(decoder.output_hypernetworks_mlps)]
    logits = (torch.stack(weights, dim=1) @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
    return logits, decoder.iou_prediction_head(tokens[:, 0])


def sam_loss(
    logits: torch.Tensor,
    quality: torch.Tensor,
    targets: torch.Tensor,
    shape: Sequence[int],
    quality_weight: float = 1.0,
) -> torch.Tensor:
    """Sum the best-of-three mask loss, the single-mask loss and the IoU regression.

    Args:
        logits: `[N, 4, h, w]` at the decoder's resolution, for the padded square.
        quality: `[N, 4]` predicted IoU.
        targets: `[B, P, H, W]` in {0, 1} with `B * P = N`, for the image without padding.
        shape: `(H, W)`.
        quality_weight: weight of the IoU regression.

    Returns:
        Scalar.
    """
    h, w = shape
    step = SAM_SIZE // logits.shape[-1]
    truth = F.avg_pool2d(targets.flatten(0, 1)[:, None], step)
    logits = logits[..., : h // step, : w // step]
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth.expand_as(logits), reduction="none").mean((2, 3))
    probability = logits.sigmoid()
    overlap = (probability * truth).sum((2, 3))
    dice = 1.0 - (2.0 * overlap + 1.0) / (probability.sum((2, 3)) + truth.sum((2, 3)) + 1.0)
    cost = 2.0 * cross_entropy + dice
    with torch.no_grad():
        predicted, expected = logits > 0, truth > 0.5
        union = (predicted | expected).sum((2, 3)).clamp_min(1)
        iou = (predicted & expected).sum((2, 3)) / union
    best = cost[:, 1:].min(dim=1).values
    return best.mean() + 0.3 * cost[:, 0].mean() + quality_weight * F.mse_loss(quality, iou)
