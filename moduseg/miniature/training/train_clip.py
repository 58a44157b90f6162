"""Training of the miniature CLIP from images and their captions.

Two contrasts share the projections. The usual one sets images against whole captions (softmax in both directions).
The other sets images against the phrases that captions are made of: an object ("red disc"), its hue, its shape, and
the texture behind it ("grass"). An image's answer to a phrase is the log-sum-exp of its patches' scaled cosine
similarities, taken from the model's output and from the values of its last block. As in the training of the ViT,
whole scenes are mixed with mosaics of close-ups and tiles that hold one object: there the phrases of a kind compete
(softmax), in a scene each is judged by itself (sigmoid). Nothing tells a patch what it shows.

The image encoder also learns to predict the patch tokens of the miniature ViT, itself trained from tags alone: CLIP
cuts its patches from the pixels, and so small a model would need far more pictures to see shapes in them. The
prediction is made from what enters the last block; the ViT is not needed afterwards.
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

from moduseg.miniature.models.clip import (
    CLIP_MEAN,
    CLIP_STD,
    PROMPT_TEMPLATES,
    build_miniature_clip,
    build_tokenizer,
    last_block_input,
    project,
    save_clip,
    text_embeddings,
)
from moduseg.miniature.models.inputs import normalize_pixels
from moduseg.miniature.models.vit import VIT_ARGS
from moduseg.miniature.models.weights import load_weights
from moduseg.miniature.training.loop import TrainingLoop, parameter_groups
from moduseg.miniature.training.pool import (
    MosaicBatch,
    MosaicSettings,
    SceneFacts,
    ScenePool,
    draw_mosaics,
    make_pools,
)
from moduseg.miniature.training.quality import dense_text_accuracy, quality_scenes
from moduseg.miniature.training.teacher import TeacherSettings, load_teacher, prediction_loss
from moduseg.miniature.world.drawing import STUFF
from moduseg.miniature.world.scenes import CLASSES, HUES, PRETRAIN_SEED, SHAPES, describe

if TYPE_CHECKING:
    from transformers import CLIPModel

PHRASES: tuple[str, ...] = (*CLASSES[1:], *HUES, *SHAPES, *STUFF)
"""Phrases of captions: objects, hues, shapes, textures."""
KINDS: tuple[int, ...] = (len(CLASSES) - 1, len(HUES), len(SHAPES), len(STUFF))
"""Number of phrases of each kind, in the order of `PHRASES`."""
HUE_TEMPLATES: tuple[str, ...] = ("{}", "a {} object", "{} objects", "the {} object")


@dataclass
class ClipTraining(MosaicSettings, TeacherSettings):
    """Settings of the training of the CLIP; `start` is a directory.

    Args:
        caption_weight: weight of the contrast with whole captions, beside that with phrases.
    """

    steps: int = 4_000
    tiles: int = 20_000
    close_ups: int = 10_000
    first_shares: tuple[float, float, float] = (0.5, 0.3, 0.2)
    last_shares: tuple[float, float, float] = (0.2, 0.3, 0.5)
    world_seed: int = PRETRAIN_SEED + 10
    check_every: int = 500
    check_scenes: int = 60
    teacher: str | None = "vit"
    caption_weight: float = 0.1


class PhraseScore(nn.Module):
    """Answers of images to phrases: scaled cosine similarity, log-sum-exp over the patches.

    The bias of scenes starts where patches without information give every phrase about its prior probability. The
    class `TagHead` of the ViT's training says why.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(3.0))
        start = [value for value, count in zip((-6.9, -6.1, -6.1, -7.0), KINDS, strict=True) for _ in range(count)]
        self.scene_bias = nn.Parameter(torch.tensor(start))

    def forward(self, patches: torch.Tensor, phrases: torch.Tensor) -> torch.Tensor:
        """Map `[B, N, D]` and `[P, D]`, both L2-normalised, to `[B, P]` logits without the bias of scenes."""
        return (self.log_scale.exp() * patches @ phrases.T).logsumexp(dim=1)

    def loss(self, answers: torch.Tensor, held: torch.Tensor, scenes: bool) -> torch.Tensor:
        """Return the scalar loss of `[B, P]` answers against `[B, P]` in {0, 1}: which phrases the captions hold."""
        if scenes:
            return 4.0 * F.binary_cross_entropy_with_logits(answers + self.scene_bias, held)
        parts = zip(answers.split(KINDS, dim=1), held.split(KINDS, dim=1), strict=True)
        each = [F.cross_entropy(answer, truth / truth.sum(1, keepdim=True)) for answer, truth in parts]
        return 0.5 * torch.stack(each).sum()


def train_clip(settings: ClipTraining, output: Path, pools: dict[int, ScenePool] | None = None) -> Path:
    """Train the CLIP and write its directory.

    Args:
        settings: settings of the training.
        output: directory for `from_pretrained`; the weights are written at every check and at the end, the log is
            beside it (`.jsonl`).
        pools: pictures from `make_pools`; drawn from the settings if omitted.

    Returns:
        `output`.
    """
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    pools = pools or make_pools(settings.world_seed, settings.tiles, settings.close_ups, settings.scenes)
    unseen = quality_scenes("val", settings.check_scenes)
    device = torch.device(settings.device)
    tokenizer = build_tokenizer(output)
    model = build_miniature_clip(tokenizer).to(device)
    if settings.start is not None:
        load_weights(model, Path(settings.start) / "model.safetensors")
    score = PhraseScore().to(device)
    teacher = load_teacher(settings.teacher, device)
    predict = nn.Linear(model.config.vision_config.hidden_size, VIT_ARGS["embed_dim"]).to(device)
    groups = parameter_groups(nn.ModuleList([model, predict]), settings.weight_decay)
    groups.append({"params": list(score.parameters()), "weight_decay": 0.0})
    loop = TrainingLoop(
        settings,
        model,
        groups,
        log_path=output.with_suffix(".jsonl"),
        measure=lambda: dense_text_accuracy(model, tokenizer, unseen),
        save=lambda: save_clip(model, output),
        last_group_rate=10.0,
    )
    for _, progress in loop:
        batch = draw_mosaics(pools, settings, progress, rng)
        captions = _write_captions(batch, rng)
        pixels = batch.pixels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
            texts = text_embeddings(model, tokenizer, [*captions, *_word_phrases(rng)])
            hidden = last_block_input(model, normalize_pixels(pixels, CLIP_MEAN, CLIP_STD))
            image, *patches = image_features(model, hidden)
            teacher_loss = prediction_loss(predict(hidden[:, 1:]), teacher, pixels)
        caption_loss = _contrast(model.logit_scale, image, texts[: len(captions)])
        held = held_phrases(batch.scenes).to(device)
        answers = [score(batch.split_tokens(each), texts[len(captions) :]) for each in patches]
        losses = [score.loss(answer, held, scenes=batch.per_input == 1) for answer in answers]
        phrase_loss = torch.stack(losses).mean()
        loss = phrase_loss + settings.caption_weight * caption_loss + settings.teacher_weight * teacher_loss
        loop.update(loss, {f"loss_{batch.side}": phrase_loss, "captions": caption_loss, "teacher": teacher_loss})
    return output


def _contrast(logit_scale: torch.Tensor, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """Return the contrast of `[B, D]` images with their `[B, D]` captions, both ways; 0 where there is no caption."""
    if not len(texts):
        return texts.new_zeros(())
    similarity = logit_scale.exp().clamp(max=100.0) * images @ texts.T
    matches = torch.arange(len(texts), device=texts.device)
    return 0.5 * (F.cross_entropy(similarity, matches) + F.cross_entropy(similarity.T, matches))


def _write_captions(batch: MosaicBatch, rng: np.random.Generator) -> list[str]:
    """Write a caption of every input; none for mosaics of tiles, because no caption holds sixteen objects."""
    size = batch.per_input
    starts = range(0, len(batch.scenes), size) if size <= 4 else ()
    return [_describe_pictures(batch.scenes[start : start + size], rng) for start in starts]


def _describe_pictures(pictures: Sequence[SceneFacts], rng: np.random.Generator) -> str:
    """Write one caption of an input: all objects and the distinct textures of its pictures."""
    classes = [label for labels, _ in pictures for label in labels]
    stuff = list(dict.fromkeys(name for _, names in pictures for name in names))
    return describe(classes, stuff, rng) + ("." if rng.random() < 0.5 else "")


def _word_phrases(rng: np.random.Generator) -> list[str]:
    """Return every phrase of `PHRASES` in a wording drawn from the templates."""
    chosen = []
    for name in PHRASES:
        templates = HUE_TEMPLATES if name in HUES else PROMPT_TEMPLATES
        chosen.append(templates[int(rng.integers(len(templates)))].format(name))
    return chosen


def held_phrases(pictures: Sequence[SceneFacts]) -> torch.Tensor:
    """Return which phrases the captions of pictures hold: `[len(pictures), len(PHRASES)]` float32 in {0, 1}.

    Args:
        pictures: what each picture shows.
    """
    held = torch.zeros(len(pictures), len(PHRASES))
    for row, (classes, stuff) in enumerate(pictures):
        words = {word for label in classes for word in (CLASSES[label], *CLASSES[label].split())} | set(stuff)
        held[row, [PHRASES.index(word) for word in words]] = 1.0
    return held


def image_features(model: CLIPModel, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return features of images and of their patches, L2-normalised in the space of the texts.

    Args:
        model: a CLIP.
        hidden: `[B, 1 + N, C]`, what enters the last block.

    Returns:
        `[B, D]` of the class token, `[B, N, D]` of the last block's output, `[B, N, D]` of its values.
    """
    layer = model.vision_model.encoder.layers[-1]
    out = project(model, layer(hidden, attention_mask=None))
    values = layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(hidden[:, 1:])))
    return out[:, 0], out[:, 1:], project(model, values)
