"""The figure that the training of the latent diffusion model watches: do words point at their objects?

A class's map is the attention that the words of its name get, read from one pass at a time step of little noise and
completed by the attention among cells, as the methods read it. It points if its maximum lies on an object of the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from moduseg.diffusion.capture import RunningMean, capture
from moduseg.diffusion.layers import MapRequest, choose_heads, list_layers
from moduseg.miniature.models.clip import MAX_TOKENS
from moduseg.miniature.models.diffusion import DiffusionParts
from moduseg.miniature.training.pool import MODEL_SIZE
from moduseg.miniature.world.scenes import CLASSES, Scene

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

READ_STEP = 100
"""Time step, of 1000, at which attention is read."""


MAPS = (MapRequest(kind="cross", side=16), MapRequest(kind="cross", side=8), MapRequest(kind="self", side=16))
"""What is read: the words of both sizes, and which cells belong together."""


@dataclass(frozen=True)
class PointingQuestion:
    """A scene, squashed to a square, with a prompt that names its classes.

    Attributes:
        image: `[128, 128, 3]` uint8.
        semantic: `[128, 128]` uint8 class ids.
        tokens: `[T]` int64, the prompt's.
        spans: for each class id the positions of its name's tokens.
    """

    image: np.ndarray
    semantic: np.ndarray
    tokens: torch.Tensor
    spans: dict[int, list[int]]


def make_questions(scenes: Sequence[Scene], tokenizer: CLIPTokenizer) -> list[PointingQuestion]:
    """Ask for every class of every scene: `"a photo of a red disc and a blue ring"`."""
    questions = []
    size = (MODEL_SIZE, MODEL_SIZE)
    for scene in scenes:
        names = [CLASSES[number] for number in scene.labels]
        prompt = "a photo of " + " and ".join(f"a {name}" for name in names)
        tokens = tokenizer(prompt, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids[0]
        # Every word of the world is one token: "a photo of" is 3, the start 1, each class "a", its two words, "and".
        spans = {number: [5 + 4 * place, 6 + 4 * place] for place, number in enumerate(scene.labels)}
        questions.append(
            PointingQuestion(
                image=cv2.resize(scene.image, size, interpolation=cv2.INTER_LINEAR),
                semantic=cv2.resize(scene.semantic, size, interpolation=cv2.INTER_NEAREST),
                tokens=tokens,
                spans=spans,
            )
        )
    return questions


@torch.no_grad()
def class_maps(
    unet: Any,
    scheduler: Any,
    latents: torch.Tensor,
    states: torch.Tensor,
    questions: Sequence[PointingQuestion],
) -> list[dict[int, torch.Tensor]]:
    """Return the map of each class of each question, `[16, 16]` float32.

    Args:
        unet: the denoiser.
        scheduler: its scheduler.
        latents: `[B, 8, 16, 16]` of the questions' images.
        states: `[B, T, C]` of their prompts.
        questions: `B` questions.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape[1:], generator=generator).expand_as(latents).to(latents.device)
    steps = torch.full((len(latents),), READ_STEP, dtype=torch.int64, device=latents.device)
    side = latents.shape[-1]
    layers = list_layers(unet, side)
    means = [RunningMean(choose_heads(layers, request, "pointing")) for request in MAPS]
    with capture(unet, means):
        unet(scheduler.add_noise(latents, noise, steps), steps, encoder_hidden_states=states)
    fine, coarse, cells = (mean.compute() for mean in means)
    coarse = coarse.transpose(1, 2).unflatten(2, (side // 2, side // 2))
    coarse = F.interpolate(coarse, (side, side), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    completed = cells @ (cells @ (fine + coarse))
    return [
        {number: completed[row][:, span].mean(1).view(side, side) for number, span in question.spans.items()}
        for row, question in enumerate(questions)
    ]


def measure_pointing(maps: Sequence[dict[int, torch.Tensor]], questions: Sequence[PointingQuestion]) -> float:
    """Return how often the maximum of a class's map, brought to the image, lies on an object of it, in percent."""
    hits = []
    for answer, question in zip(maps, questions, strict=True):
        for number, values in answer.items():
            full = F.interpolate(values[None, None], question.semantic.shape, mode="bilinear", align_corners=False)
            row, column = divmod(int(full.argmax()), question.semantic.shape[1])
            hits.append(question.semantic[row, column] == number)
    return 100.0 * float(np.mean(hits))


class PointingCheck:
    """Measures how well a denoiser points, on images that are encoded once.

    Args:
        scenes: unseen scenes.
        parts: the model without the denoiser.
    """

    def __init__(self, scenes: Sequence[Scene], parts: DiffusionParts) -> None:
        self.questions = make_questions(scenes, parts.tokenizer)
        self.scheduler = parts.scheduler
        device = parts.autoencoder.device
        with torch.no_grad():
            pixels = torch.from_numpy(np.stack([q.image for q in self.questions])).to(device).permute(0, 3, 1, 2)
            encoded = [parts.autoencoder.encode(p.float() / 127.5 - 1.0).latent_dist.mode() for p in pixels.split(16)]
            self.latents = torch.cat(encoded) * parts.autoencoder.config.scaling_factor
            tokens = torch.stack([q.tokens for q in self.questions]).to(device)
            self.states = parts.text_encoder(input_ids=tokens).last_hidden_state

    def __call__(self, unet: Any) -> float:
        """Return the share of classes that `unet` points at, in percent."""
        maps = []
        for start in range(0, len(self.questions), 16):
            part = slice(start, start + 16)
            maps += class_maps(unet, self.scheduler, self.latents[part], self.states[part], self.questions[part])
        return measure_pointing(maps, self.questions)
