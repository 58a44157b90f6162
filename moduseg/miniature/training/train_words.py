"""Training of the text encoder of the miniature latent diffusion model: word states that hold their own phrase.

A denoiser learns where a word belongs from what the word's state tells it. In the miniature CLIP's text encoder, every
state is a mixture of the whole caption, the end of the text most of all, so that a denoiser learns from the mixtures
and binds no word. Here the first layers of that encoder learn, from text alone, that the state of a shape's word
names its object ("red disc": the class, its hue and its shape), the state of any other word that word, and those of
the start and the end of the text nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from moduseg.miniature.models.clip import MAX_TOKENS
from moduseg.miniature.models.diffusion import build_text_encoder
from moduseg.miniature.training.captions import draw_objects, write_prompt
from moduseg.miniature.training.loop import TrainingLoop, TrainingSettings, parameter_groups
from moduseg.miniature.world.scenes import CLASSES, HUES, PLURALS, SHAPES

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


@dataclass
class WordTraining(TrainingSettings):
    """Settings of the training of the word states; `batch` is in captions."""

    steps: int = 600
    batch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    check_every: int = 200
    bfloat16: bool = False


class PhraseHead(nn.Module):
    """Names what the state of a token stands for, by cosine similarity with learnt prototypes.

    Args:
        width: channels of the states.
        num_words: entries of the vocabulary.
    """

    def __init__(self, width: int, num_words: int) -> None:
        super().__init__()
        self.labels = nn.Parameter(torch.randn(num_words + len(CLASSES), width))
        self.hues = nn.Parameter(torch.randn(len(HUES), width))
        self.shapes = nn.Parameter(torch.randn(len(SHAPES), width))

    def forward(self, states: torch.Tensor, prototypes: torch.Tensor) -> torch.Tensor:
        """Return `[..., P]` logits, 16 times the cosine of `[..., C]` states and `[P, C]` prototypes."""
        return 16.0 * F.normalize(states, dim=-1) @ F.normalize(prototypes, dim=-1).T


class TokenLabels:
    """Tells what every token of a caption is to stand for.

    Args:
        tokenizer: tokenizer in which every word of the world is one token.
    """

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        def numbers(words: list[str]) -> list[int]:
            return [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]

        size = len(tokenizer)
        self.hue_of = torch.full((size,), -1)
        self.hue_of[numbers(list(HUES))] = torch.arange(len(HUES))
        self.shape_of = torch.full((size,), -1)
        for names in (list(SHAPES), list(PLURALS.values())):
            self.shape_of[numbers(names)] = torch.arange(len(SHAPES))
        self.class_of = torch.full((len(HUES), len(SHAPES)), -1)
        for number, name in enumerate(CLASSES[1:], start=1):
            hue, shape = name.split()
            self.class_of[HUES.index(hue), SHAPES.index(shape)] = number
        self.num_words, self.end = size, tokenizer.eos_token_id

    def __call__(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the labels of `[B, T]` tokens and which of them name an object, both `[B, T]`.

        A label is the number of a token or, for the shape's word of an object, the size of the vocabulary plus the
        class id.
        """
        previous = torch.roll(tokens, 1, dims=1)
        hue, shape = self.hue_of[previous], self.shape_of[tokens]
        class_id = torch.where((hue >= 0) & (shape >= 0), self.class_of[hue.clamp(min=0), shape.clamp(min=0)], -1)
        return torch.where(class_id >= 0, self.num_words + class_id, tokens), class_id >= 0


def train_words(settings: WordTraining, folder: Path) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """Train the word states, or go on with a training that was interrupted.

    Args:
        settings: settings of the training.
        folder: gets the state of the training and its log; made if absent.

    Returns:
        The text encoder, in evaluation mode, and its tokenizer.
    """
    torch.manual_seed(settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(settings.device)
    model, tokenizer = build_text_encoder()
    model = model.to(device)
    head = PhraseHead(model.config.hidden_size, len(tokenizer)).to(device)
    both = nn.ModuleDict({"model": model, "head": head})
    name_tokens = TokenLabels(tokenizer)
    accuracy = {"objects_named": 0.0}
    loop = TrainingLoop(
        settings,
        both,
        parameter_groups(both, settings.weight_decay),
        log_path=folder / "words.jsonl",
        measure=lambda: accuracy,
        save=lambda: None,
    ).keep_state(folder / "words.pt")
    for step, _ in loop:
        rng = np.random.default_rng([settings.seed, step])
        captions = [write_prompt(draw_objects(rng), rng) for _ in range(settings.batch)]
        tokens = tokenize(tokenizer, captions)
        labels, names_object = name_tokens(tokens)
        states = model(input_ids=tokens.to(device)).last_hidden_state
        # The paddings are many and alike: one in eight of them is enough.
        counts = (tokens != name_tokens.end) | (torch.rand(tokens.shape) < 0.125)
        loss = F.cross_entropy(head(states[counts], head.labels), labels[counts].to(device))
        objects, ids = states[names_object], labels[names_object] - name_tokens.num_words
        words = [CLASSES[int(number)].split() for number in ids]
        hues = torch.tensor([HUES.index(hue) for hue, _ in words], device=device)
        shapes = torch.tensor([SHAPES.index(shape) for _, shape in words], device=device)
        hue_loss = F.cross_entropy(head(objects, head.hues), hues)
        shape_loss = F.cross_entropy(head(objects, head.shapes), shapes)
        with torch.no_grad():
            is_right = head(objects, head.labels).argmax(-1) == labels[names_object].to(device)
        accuracy["objects_named"] = 100.0 * float(is_right.float().mean())
        loop.update(loss + hue_loss + shape_loss, {"labels": loss, "hues": hue_loss, "shapes": shape_loss})
    return model.eval().requires_grad_(False), tokenizer


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Return the tokens of captions, padded as a pipeline pads them: `[B, 48]` int64."""
    return tokenizer(
        captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
    ).input_ids
