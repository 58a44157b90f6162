"""What the miniature latent diffusion model paints, and whether the miniature CLIP recognises it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from moduseg.miniature.models.clip import CLIP_MEAN, CLIP_STD, project, text_embeddings
from moduseg.miniature.models.inputs import normalize_pixels

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer


@torch.no_grad()
def generate_pictures(pipeline: Any, captions: Sequence[str], seed: int = 0) -> np.ndarray:
    """Generate one picture a caption, `[N, 128, 128, 3]` uint8.

    Args:
        pipeline: a `StableDiffusionPipeline`.
        captions: texts.
        seed: seed of the noise; a picture depends on its place among the captions too.
    """
    pictures = []
    for start in range(0, len(captions), 10):
        generator = torch.Generator().manual_seed(seed + start)
        texts = list(captions[start : start + 10])
        made = pipeline(texts, num_inference_steps=25, guidance_scale=3.0, generator=generator, output_type="np")
        pictures.append(np.round(made.images * 255.0).astype(np.uint8))
    return np.concatenate(pictures)


@torch.no_grad()
def caption_retrieval(
    clip: CLIPModel, tokenizer: CLIPTokenizer, pictures: np.ndarray, captions: Sequence[str]
) -> float:
    """Return for how many pictures their own caption is the most similar one of all, in percent.

    Args:
        clip: the miniature CLIP.
        tokenizer: its tokenizer.
        pictures: `[N, 128, 128, 3]` uint8.
        captions: `N` texts.
    """
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255.0
    images = clip.vision_model(normalize_pixels(pixels, CLIP_MEAN, CLIP_STD)).last_hidden_state[:, 0]
    similarity = project(clip, images) @ text_embeddings(clip, tokenizer, captions).T
    return 100.0 * float((similarity.argmax(1) == torch.arange(len(captions))).float().mean())
