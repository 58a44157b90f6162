"""Measure the quality of the miniature models on scenes that none of them was trained on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from moduseg.miniature.models.clip import (
    CLIP_MEAN,
    CLIP_STD,
    DENSE_MODES,
    PROMPT_TEMPLATES,
    dense_features,
    last_block_input,
    text_embeddings,
)
from moduseg.miniature.models.inputs import normalize_pixels, to_pixels
from moduseg.miniature.models.sam import SAM_GENERATOR
from moduseg.miniature.models.vit import VIT_MEAN, VIT_STD
from moduseg.miniature.world.scenes import CLASSES, QUALITY_SEED, Scene, WorldConfig, render_scene

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

MIN_REGION_AREA = 100
"""Regions of at most this many visible pixels are skipped by every measure."""


def quality_scenes(split: str, count: int, config: WorldConfig | None = None) -> list[Scene]:
    """Draw the first `count` scenes of a split of the quality seed."""
    return [render_scene(QUALITY_SEED, split, index, config) for index in range(count)]


def object_regions(scene: Scene, min_area: int = MIN_REGION_AREA) -> tuple[np.ndarray, np.ndarray]:
    """Return the ground-truth regions: the connected pieces of each object.

    Args:
        scene: the scene.
        min_area: pieces of at most this many pixels are skipped.

    Returns:
        masks `[N, H, W]` bool and class ids `[N]` int64.
    """
    masks, labels = [], []
    for number, class_id in enumerate(scene.instance_classes, start=1):
        count, pieces = cv2.connectedComponents((scene.instances == number).astype(np.uint8))
        for piece in range(1, count):
            mask = pieces == piece
            if mask.sum() > min_area:
                masks.append(mask)
                labels.append(class_id)
    stacked = np.stack(masks) if masks else np.zeros((0, *scene.semantic.shape), bool)
    return stacked, np.array(labels, np.int64)


def pool_regions(tokens: torch.Tensor, masks: np.ndarray) -> torch.Tensor:
    """Pool tokens, weighted by the fraction of their patch that a region covers.

    Args:
        tokens: `[h, w, C]` float32.
        masks: `[N, H, W]` bool, where `H`, `W` are the same multiple of `h`, `w`.

    Returns:
        `[N, C]` float32, L2-normalised.
    """
    h, w, channels = tokens.shape
    if len(masks) == 0:
        return torch.zeros(0, channels)
    weights = F.adaptive_avg_pool2d(torch.from_numpy(masks).float()[:, None], (h, w)).flatten(1)
    return F.normalize(weights.to(tokens) @ tokens.reshape(-1, channels), dim=1)


def vit_tokens(model: Any, device: str = "cpu") -> Callable[[np.ndarray], torch.Tensor]:
    """Return a function from an image `[H, W, 3]` uint8 to the patch tokens `[h, w, C]` of a timm ViT's final norm."""

    @torch.inference_mode()
    def tokens(image: np.ndarray) -> torch.Tensor:
        pixels = normalize_pixels(to_pixels(image, device), VIT_MEAN, VIT_STD)
        features = model.forward_features(pixels)[0, model.num_prefix_tokens :]
        h, w = (side // model.patch_embed.feat_ratio() for side in image.shape[:2])
        return features.float().reshape(h, w, -1)

    return tokens


def region_knn_accuracy(
    tokens: Callable[[np.ndarray], torch.Tensor], bank: Sequence[Scene], queries: Sequence[Scene], k: int = 5
) -> float:
    """Return the share of object regions whose class is that of most of their nearest neighbours.

    Args:
        tokens: image `[H, W, 3]` uint8 to patch tokens `[h, w, C]`.
        bank: scenes whose regions are the labelled vectors.
        queries: scenes whose regions are classified.
        k: neighbours by cosine similarity; a tie goes to the larger sum of similarities.

    Returns:
        Accuracy in percent.
    """
    vectors, labels = _pool_scenes(tokens, bank)
    query_vectors, truth = _pool_scenes(tokens, queries)
    similarity, index = (query_vectors @ vectors.T).topk(min(k, len(vectors)), dim=1)
    votes = F.one_hot(labels[index], len(CLASSES)).double()
    # Similarities lie in [-1, 1], so a thousandth of their sum decides ties and nothing else.
    score = votes.sum(1) + 1e-3 * (votes * (similarity.double()[..., None] + 1.0)).sum(1)
    return 100.0 * float((score.argmax(1) == truth).float().mean())


def _pool_scenes(
    tokens: Callable[[np.ndarray], torch.Tensor], scenes: Sequence[Scene]
) -> tuple[torch.Tensor, torch.Tensor]:
    vectors, labels = [], []
    for scene in scenes:
        masks, classes = object_regions(scene)
        vectors.append(pool_regions(tokens(scene.image).cpu(), masks))
        labels.append(torch.from_numpy(classes))
    return torch.cat(vectors), torch.cat(labels)


def sam_recall(sam: torch.nn.Module, scenes: Sequence[Scene], **options: Any) -> dict[str, float]:
    """Measure how well the automatic mask generator finds the objects.

    Args:
        sam: a `segment_anything` model.
        scenes: scenes to segment.
        options: options of `SamAutomaticMaskGenerator` that replace those of `SAM_GENERATOR`.

    Returns:
        `found`: percent of objects with more than `MIN_REGION_AREA` visible pixels that some mask meets at IoU 0.5 or
        more; `best_iou`: mean over these objects of the best IoU; `stuff_iou`: the same mean over the background
        textures; `masks` and `image_seconds` per image.
    """
    from segment_anything import SamAutomaticMaskGenerator

    generator = SamAutomaticMaskGenerator(sam, **{**SAM_GENERATOR, **options})
    objects: list[float] = []
    stuff: list[float] = []
    masks, seconds = 0, 0.0
    for scene in scenes:
        started = time.perf_counter()
        proposals = [record["segmentation"] for record in generator.generate(scene.image)]
        seconds += time.perf_counter() - started
        masks += len(proposals)
        stacked = np.stack(proposals) if proposals else np.zeros((1, *scene.semantic.shape), bool)
        object_masks = (scene.instances == n for n in range(1, len(scene.instance_classes) + 1))
        objects += [_best_iou(stacked, m) for m in object_masks if m.sum() > MIN_REGION_AREA]
        stuff_masks = ((scene.instances == 0) & (scene.stuff_map == n) for n in range(len(scene.stuff)))
        stuff += [_best_iou(stacked, m) for m in stuff_masks if m.sum() > MIN_REGION_AREA]
    return {
        "found": 100.0 * float(np.mean(np.array(objects) >= 0.5)),
        "best_iou": float(np.mean(objects)),
        "stuff_iou": float(np.mean(stuff)),
        "masks": masks / len(scenes),
        "image_seconds": seconds / len(scenes),
    }


def _best_iou(masks: np.ndarray, truth: np.ndarray) -> float:
    intersections = (masks & truth).sum((1, 2))
    return float((intersections / (masks | truth).sum((1, 2))).max())


@torch.inference_mode()
def dense_text_accuracy(
    model: CLIPModel, tokenizer: CLIPTokenizer, scenes: Sequence[Scene], modes: Sequence[str] = DENSE_MODES
) -> dict[str, float]:
    """Return the share of object regions whose pooled patch features are most similar to their class's name.

    Args:
        model: a CLIP.
        tokenizer: its tokenizer.
        scenes: scenes whose regions are classified among the twelve foreground classes.
        modes: ways to run the last block, those of `dense_features`.

    Returns:
        Percent for each mode.
    """
    device = model.logit_scale.device
    names = text_embeddings(
        model, tokenizer, [template.format(name) for name in CLASSES[1:] for template in PROMPT_TEMPLATES]
    )
    names = F.normalize(names.unflatten(0, (len(CLASSES) - 1, -1)).mean(1), dim=-1).cpu()
    right: dict[str, list[torch.Tensor]] = {mode: [] for mode in modes}
    for scene in scenes:
        masks, classes = object_regions(scene)
        hidden = last_block_input(model, normalize_pixels(to_pixels(scene.image, device), CLIP_MEAN, CLIP_STD))
        size = model.config.vision_config.patch_size
        grid = (scene.image.shape[0] // size, scene.image.shape[1] // size)
        for mode in modes:
            pooled = pool_regions(dense_features(model, hidden, grid, mode)[0].cpu(), masks)
            right[mode].append((pooled @ names.T).argmax(1) + 1 == torch.from_numpy(classes))
    return {mode: 100.0 * float(torch.cat(values).float().mean()) for mode, values in right.items()}
