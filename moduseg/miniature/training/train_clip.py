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
from moduseg.miniature.models.vit import VIT_ARGS
from moduseg.miniature.models.weights import load_weights
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
from moduseg.miniature.training.quality import dense_text_accuracy, quality_scenes
from moduseg.miniature.training.teacher import load_teacher, prediction_loss
from moduseg.miniature.world.drawing import STUFF
from moduseg.miniature.world.scenes import CLASSES, HUES, PRETRAIN_SEED, SHAPES, describe

if TYPE_CHECKING:
    from transformers import CLIPModel

PHRASES: tuple[str, ...] = (*CLASSES[1:], *HUES, *SHAPES, *STUFF)
"""What captions speak of: objects, hues, shapes, textures."""
KINDS: tuple[int, ...] = (len(CLASSES) - 1, len(HUES), len(SHAPES), len(STUFF))
"""Number of phrases of each kind, in the order of `PHRASES`."""
HUE_TEMPLATES: tuple[str, ...] = ("{}", "a {} object", "{} objects", "the {} object")


@dataclass
class ClipTraining:
    """Settings of the training; the miniature README has those of the shipped weights.

    Args:
        steps, minutes: length, see `Schedule`.
        batch: inputs of 128 pixels in a step: scenes, or mosaics of 4 close-ups or 16 tiles.
        learning_rate, weight_decay: of AdamW.
        caption_weight: weight of the contrast with whole captions beside that with phrases.
        teacher: weights of the miniature ViT whose tokens are predicted: a file, `"vit"` for the shipped ones, or
            nothing.
        teacher_weight: weight of that prediction.
        tiles, close_ups, scenes: pictures drawn before the training.
        first_shares, last_shares: shares of steps on tiles, close-ups and scenes, at the start and at the end.
        world_seed: of the pictures, see `make_pools`.
        seed: of the weights, the wording and the order.
        device: where the training runs.
        bfloat16: mixed precision.
        check_every: steps between two measurements of quality, each followed by a save.
        check_scenes: scenes in a measurement.
        start: directory of weights to start from; random ones where left out.
    """

    steps: int = 4_000
    minutes: float | None = None
    batch: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    caption_weight: float = 0.1
    teacher: str | None = "vit"
    teacher_weight: float = 1.0
    tiles: int = 20_000
    close_ups: int = 10_000
    scenes: int = 4_000
    first_shares: tuple[float, float, float] = (0.5, 0.3, 0.2)
    last_shares: tuple[float, float, float] = (0.2, 0.3, 0.5)
    world_seed: int = PRETRAIN_SEED + 10
    seed: int = 0
    device: str = "cpu"
    bfloat16: bool = True
    check_every: int = 500
    check_scenes: int = 60
    start: str | None = None


class PhraseScore(nn.Module):
    """Answers of images to phrases: scaled cosine similarity, log-sum-exp over the patches.

    The bias of scenes starts where patches without information give every phrase about its prior probability; see
    `TagHead` of the ViT's training for the reason.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(3.0))
        start = [value for value, count in zip((-6.9, -6.1, -6.1, -7.0), KINDS, strict=True) for _ in range(count)]
        self.scene_bias = nn.Parameter(torch.tensor(start))

    def forward(self, patches: torch.Tensor, phrases: torch.Tensor) -> torch.Tensor:
        """`[B, N, D]` and `[P, D]`, both L2-normalised, to `[B, P]` logits without the bias of scenes."""
        return (self.log_scale.exp() * patches @ phrases.T).logsumexp(dim=1)

    def loss(self, answers: torch.Tensor, held: torch.Tensor, scenes: bool) -> torch.Tensor:
        """Scalar loss of `[B, P]` answers against `[B, P]` in {0, 1}: which phrases the captions hold."""
        if scenes:
            return 4.0 * F.binary_cross_entropy_with_logits(answers + self.scene_bias, held)
        parts = zip(answers.split(KINDS, dim=1), held.split(KINDS, dim=1), strict=True)
        each = [F.cross_entropy(answer, truth / truth.sum(1, keepdim=True)) for answer, truth in parts]
        return 0.5 * torch.stack(each).sum()


def train_clip(settings: ClipTraining, output: Path, pools: dict[int, ScenePool] | None = None) -> Path:
    """Train the CLIP and write its directory.

    Args:
        settings: what to do.
        output: directory for `from_pretrained`; the weights are written at every check and at the end, the log lies
            beside it (`.jsonl`).
        pools: see `make_pools`; drawn from the settings where left out.

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
    optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99))
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    log = TrainingLog(output.with_suffix(".jsonl"))
    schedule = Schedule(settings.steps, settings.minutes)
    running: dict[str, float] = {}

    def check(step: int) -> None:
        model.eval()
        accuracy = dense_text_accuracy(model, tokenizer, unseen)
        log.write(step=step, **accuracy, **running, seconds=schedule.seconds)
        save_clip(model, output)
        model.train()

    for step, progress, factor in schedule:
        if step % settings.check_every == 0:
            check(step)
        for parameters in optimiser.param_groups:
            parameters["lr"] = settings.learning_rate * factor
        optimiser.param_groups[-1]["lr"] *= 10.0
        side = draw_side(rng, settings.first_shares, settings.last_shares, progress)
        per_input = (MODEL_SIZE // side) ** 2
        group, index = pools[side].batch(rng, settings.batch * per_input)
        images, _ = augment(group.images[index], (), rng)
        facts = [group.scenes[number] for number in index]
        # Sixteen objects are more than a caption holds, so mosaics of tiles have none.
        starts = range(0, len(facts), per_input) if per_input <= 4 else ()
        captions = [_caption(facts[i : i + per_input], rng) for i in starts]
        pixels = (images if per_input == 1 else mosaic(images)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
            texts = text_embeddings(model, tokenizer, [*captions, *_word_phrases(rng)])
            hidden = last_block_input(model, (pixels - mean) / std)
            image, *patches = image_features(model, hidden)
            teacher_loss = prediction_loss(predict(hidden[:, 1:]), teacher, pixels)
        of_captions, of_phrases = texts[: len(captions)], texts[len(captions) :]
        caption_loss = texts.new_zeros(())
        if captions:
            similarity = model.logit_scale.exp().clamp(max=100.0) * image @ of_captions.T
            same = torch.arange(len(captions), device=device)
            caption_loss = 0.5 * (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same))
        if per_input > 1:
            patches = [split_mosaic(each, side) for each in patches]
        held = held_phrases(facts).to(device)
        answers = [score.loss(score(each, of_phrases), held, scenes=per_input == 1) for each in patches]
        phrase_loss = torch.stack(answers).mean()
        loss = phrase_loss + settings.caption_weight * caption_loss + settings.teacher_weight * teacher_loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        for name, part in ((f"loss_{side}", phrase_loss), ("captions", caption_loss), ("teacher", teacher_loss)):
            value = float(part.detach())
            running[name] = 0.98 * running.get(name, value) + 0.02 * value
    check(step + 1)
    log.close()
    return output


def _caption(pictures: Sequence[tuple[tuple[int, ...], tuple[str, ...]]], rng: np.random.Generator) -> str:
    """One caption of an input: all objects and the different textures of its pictures."""
    classes = [label for labels, _ in pictures for label in labels]
    stuff = list(dict.fromkeys(name for _, names in pictures for name in names))
    return describe(classes, stuff, rng) + ("." if rng.random() < 0.5 else "")


def _word_phrases(rng: np.random.Generator) -> list[str]:
    """Every phrase of `PHRASES` in a wording drawn from the templates."""
    chosen = []
    for name in PHRASES:
        templates = HUE_TEMPLATES if name in HUES else PROMPT_TEMPLATES
        chosen.append(templates[int(rng.integers(len(templates)))].format(name))
    return chosen


def held_phrases(pictures: Sequence[tuple[tuple[int, ...], tuple[str, ...]]]) -> torch.Tensor:
    """Which phrases the captions of pictures hold: `[len(pictures), len(PHRASES)]` float32 in {0, 1}.

    Args:
        pictures: classes of the objects and names of the textures of each.
    """
    held = torch.zeros(len(pictures), len(PHRASES))
    for row, (classes, stuff) in enumerate(pictures):
        words = {word for label in classes for word in (CLASSES[label], *CLASSES[label].split())} | set(stuff)
        held[row, [PHRASES.index(word) for word in words]] = 1.0
    return held


def image_features(model: CLIPModel, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of whole images and of patches, all L2-normalised in the space of the texts.

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
