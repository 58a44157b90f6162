"""Training of the miniature latent diffusion model from pictures and captions.

Three trainings, one after the other: the autoencoder, the word states, and the denoiser on latents that are encoded
once. The denoiser learns to predict the velocity of latents at a time step (v-prediction), given a caption. Two more
losses bind words to places early, and neither sees a mask:

- teacher: features before and after the middle predict the tokens of the miniature ViT, itself trained from tags, as
  in the trainings of the miniature SAM and CLIP. A denoiser that knows what a cell shows has only to find its word;
- contrast: the log-sum-exp over the cells of a class's attention logits tells the classes that the caption names from
  those that it does not, in every layer that looks at words.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from moduseg.errors import ConfigError
from moduseg.miniature.models.diffusion import DiffusionParts, build_scheduler, build_unet, save_diffusion
from moduseg.miniature.models.inputs import normalize_pixels
from moduseg.miniature.models.vit import VIT_MEAN, VIT_STD
from moduseg.miniature.training.captions import write_prompt
from moduseg.miniature.training.loop import TrainingLoop, parameter_groups
from moduseg.miniature.training.pointing import PointingCheck
from moduseg.miniature.training.pool import MODEL_SIZE, SceneFacts, mosaic, split_mosaic
from moduseg.miniature.training.quality import quality_scenes
from moduseg.miniature.training.teacher import TeacherSettings, load_teacher
from moduseg.miniature.training.train_autoencoder import AutoencoderTraining, train_autoencoder
from moduseg.miniature.training.train_words import WordTraining, tokenize, train_words
from moduseg.miniature.world.scenes import CLASSES, PRETRAIN_SEED, WorldConfig, render_scene
from moduseg.progress import track

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel


PICTURE = WorldConfig(
    size=64, detail=2.0, aspects=(1.0,), max_objects=2, radius=(0.13, 0.5), max_clutter=3, cluster=0.1
)
"""Pictures of one or two objects, drawn at the scale of scenes of 128 pixels: a quarter of a scene's cost a step."""


@dataclass
class DiffusionTraining(TeacherSettings):
    """Settings of the training of the denoiser; `batch` is in whole scenes, four times as many of the small pictures.

    Args:
        pictures: small pictures drawn before the training, beside the `scenes`; a multiple of four.
        first_share, last_share: share of steps on whole scenes, at the start and at the end; linear in between.
        dropout: share of captions that are empty, for guidance.
        read_share, read_steps: share of time steps that are drawn from this range, where attention is read; the others
            are uniform.
        contrast_weight: weight of the contrast of words' attention logits with the caption; 0 leaves it out.
        average: decay of the running average of the weights, which is what is measured and saved.
        world_seed: seed of the scenes; the pictures use the next one.
    """

    steps: int = 1_500
    batch: int = 12
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.01
    scenes: int = 2_400
    pictures: int = 8_000
    first_share: float = 0.1
    last_share: float = 0.6
    dropout: float = 0.1
    read_share: float = 0.5
    read_steps: tuple[int, int] = (20, 400)
    teacher: str | None = "vit"
    teacher_weight: float = 0.5
    contrast_weight: float = 0.0
    average: float = 0.995
    world_seed: int = PRETRAIN_SEED + 82
    check_every: int = 100
    check_scenes: int = 48
    bfloat16: bool = False
    autoencoder: AutoencoderTraining = field(default_factory=AutoencoderTraining)
    words: WordTraining = field(default_factory=WordTraining)


def train_diffusion(settings: DiffusionTraining, output: Path) -> Path:
    """Train the three parts in turn, or go on where a training of this output was interrupted, and write the folder.

    Args:
        settings: settings of the denoiser's training, which hold those of the other two.
        output: folder of a `StableDiffusionPipeline`; its weights are written at the end. The states of the trainings
            and their logs lie in a folder beside it, named after it: `<output>_state`.

    Returns:
        `output`.

    Raises:
        ConfigError: `start` is set.
    """
    if settings.start is not None:
        raise ConfigError(
            f"start: got {settings.start!r}, but this training goes on from {output}_state; try another output"
        )
    folder = output.with_name(f"{output.name}_state")
    autoencoder = train_autoencoder(replace(settings.autoencoder, device=settings.device), folder)
    text_encoder, tokenizer = train_words(replace(settings.words, device=settings.device), folder)
    parts = DiffusionParts(autoencoder, text_encoder, tokenizer, build_scheduler())
    save_diffusion(parts, train_denoiser(settings, parts, folder), output)
    return output


@dataclass
class LatentPool:
    """Pictures of one side, encoded once.

    Attributes:
        latents: `[N, 8, h, w]` float16, of unit variance.
        tokens: `[N, 128, h, w]` float16, the teacher's, of zero mean and unit variance each; `None` without a teacher.
        facts: what each picture shows.
    """

    latents: torch.Tensor
    tokens: torch.Tensor | None
    facts: list[SceneFacts]

    def select(self, index: np.ndarray) -> LatentPool:
        """Return the pictures of an index `[M]`, in its order."""
        tokens = None if self.tokens is None else self.tokens[index]
        return LatentPool(self.latents[index], tokens, [self.facts[i] for i in index])


def draw_squares(seed: int, count: int, config: WorldConfig | None = None) -> tuple[np.ndarray, list[SceneFacts]]:
    """Draw scenes and squash them to squares, as the methods do.

    Returns:
        `[N, S, S, 3]` uint8, and what the scenes show.
    """
    side = config.size if config else MODEL_SIZE
    images, facts = np.empty((count, side, side, 3), np.uint8), []
    for index in track(range(count), "drawing scenes", unit="scene"):
        scene = render_scene(seed, "train", index, config)
        images[index] = cv2.resize(scene.image, (side, side), interpolation=cv2.INTER_LINEAR)
        facts.append((scene.instance_classes, scene.stuff))
    return images, facts


@torch.no_grad()
def encode_squares(
    images: np.ndarray, facts: list[SceneFacts], autoencoder: AutoencoderKL, teacher: Any | None
) -> LatentPool:
    """Encode pictures `[N, S, S, 3]` uint8; the teacher sees those of 64 pixels four to an input."""
    latents, tokens = [], []
    side = images.shape[1]
    per_input = (MODEL_SIZE // side) ** 2
    device = autoencoder.device
    for start in track(range(0, len(images), 16), "encoding scenes", unit="batch"):
        pixels = torch.from_numpy(images[start : start + 16]).to(device).permute(0, 3, 1, 2).float() / 255.0
        encoded = autoencoder.encode(2.0 * pixels - 1.0).latent_dist.mode() * autoencoder.config.scaling_factor
        latents.append(encoded.half())
        if teacher is None:
            continue
        inputs = pixels if per_input == 1 else mosaic(pixels)
        out = teacher.forward_features(normalize_pixels(inputs, VIT_MEAN, VIT_STD))[:, teacher.num_prefix_tokens :]
        out = F.layer_norm(out, out.shape[-1:])
        out = out if per_input == 1 else split_mosaic(out, side)
        tokens.append(out.transpose(1, 2).unflatten(2, encoded.shape[-2:]).half())
    return LatentPool(torch.cat(latents), torch.cat(tokens) if tokens else None, facts)


class TokenHeads(nn.Module):
    """Predicts the teacher's tokens from features of the denoiser, before and after its middle.

    Args:
        unet: the denoiser.
        width: channels of the teacher's tokens.
    """

    def __init__(self, unet: UNet2DConditionModel, width: int = 128) -> None:
        super().__init__()
        _, coarse, _ = unet.config.block_out_channels
        self.early = nn.Conv2d(coarse, 4 * width, 1)
        self.late = nn.Conv2d(coarse, width, 1)
        self._features: dict[str, torch.Tensor] = {}
        unet.down_blocks[1].attentions[0].register_forward_hook(self._keep("early"))
        unet.up_blocks[1].register_forward_hook(self._keep("late"))

    def _keep(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            features = output if isinstance(output, torch.Tensor) else output[0]
            self._features[name] = features

        return hook

    def loss(self, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the mean squared distance to `tokens` `[B, C, h, w]` in the last pass, weighted by `[B]`."""
        predicted = (
            F.pixel_shuffle(self.early(self._features["early"]), 2),
            self.late(self._features["late"]),
        )
        errors = [(each.float() - tokens).square().mean(dim=(1, 2, 3)) for each in predicted]
        return 0.5 * (weights * (errors[0] + errors[1])).sum() / weights.sum()


class WordContrast(nn.Module):
    """Asks of every layer that looks at words: which classes does the caption name?

    A class's answer is the log-sum-exp of its logits over the cells, heads averaged, as in the miniature CLIP's
    contrast of patches and phrases.

    Args:
        unet: the denoiser.
        phrases: `[P, C]` states of the classes' phrases.
    """

    def __init__(self, unet: UNet2DConditionModel, phrases: torch.Tensor) -> None:
        from diffusers.models.attention_processor import Attention

        super().__init__()
        self.register_buffer("phrases", phrases)
        # The layers stay the denoiser's own: as modules of this one they would be stored twice.
        self._layers = [
            module for module in unet.modules() if isinstance(module, Attention) and module.is_cross_attention
        ]
        self._queries: list[torch.Tensor] = [phrases.new_empty(0)] * len(self._layers)
        self.biases = nn.Parameter(torch.full((len(self._layers),), -2.0))
        for number, layer in enumerate(self._layers):
            layer.to_q.register_forward_hook(partial(self._keep_query, number))

    def _keep_query(self, number: int, _module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        self._queries[number] = output

    def answer(self) -> torch.Tensor:
        """Return the logits of the phrases in the last pass, `[layers, B, P]` float32."""
        answers = []
        for layer, queries, bias in zip(self._layers, self._queries, self.biases, strict=True):
            # The mean over heads of their products is the product of all their channels, divided by their number.
            scale = layer.scale / layer.heads
            cells = scale * queries.float() @ layer.to_k(self.phrases).float().T
            answers.append(cells.logsumexp(dim=1) - math.log(cells.shape[1]) + bias)
        return torch.stack(answers)

    def loss(self, held: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return the binary cross-entropy of the last pass's answers with `[B, P]` truth, weighted by `[B]`."""
        answers = self.answer()
        each = F.binary_cross_entropy_with_logits(answers, held.expand_as(answers), reduction="none").mean(dim=(0, 2))
        return (weights * each).sum() / weights.sum()


def train_denoiser(settings: DiffusionTraining, parts: DiffusionParts, folder: Path) -> UNet2DConditionModel:
    """Train the denoiser, or go on with a training that was interrupted.

    Args:
        settings: settings of the training.
        parts: the trained rest of the model.
        folder: gets the state of the training, its log and the encoded pictures; made if absent.

    Returns:
        The denoiser of averaged weights, in evaluation mode.
    """
    torch.manual_seed(settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(settings.device)
    unet = build_unet().to(device)
    average = copy.deepcopy(unet).requires_grad_(False)
    heads = TokenHeads(unet).to(device)
    contrast = WordContrast(unet, class_phrases(parts)).to(device)
    scenes, pictures = load_latents(settings, parts, folder)
    point = PointingCheck(quality_scenes("val", settings.check_scenes), parts)
    modules = nn.ModuleDict({"unet": unet, "heads": heads, "contrast": contrast, "average": average})
    trained = nn.ModuleList([unet, heads, contrast])
    loop = TrainingLoop(
        settings,
        modules,
        parameter_groups(trained, settings.weight_decay),
        log_path=folder / "denoiser.jsonl",
        measure=lambda: {"pointing": point(average)},
        save=lambda: None,
    ).keep_state(folder / "denoiser.pt")
    for step, progress in loop:
        rng = np.random.default_rng([settings.seed, step])
        share = settings.first_share + (settings.last_share - settings.first_share) * progress
        is_scene = bool(rng.random() < share)
        pool = scenes if is_scene else pictures
        index = rng.integers(len(pool.facts), size=settings.batch if is_scene else 4 * settings.batch)
        losses = denoising_losses(settings, parts, pool.select(index), rng, (unet, heads, contrast))
        loss = losses["denoising"] + settings.teacher_weight * losses["teacher"]
        loss = loss + settings.contrast_weight * losses["contrast"]
        side = "scenes" if is_scene else "pictures"
        loop.update(loss, {f"{name}_{side}": value for name, value in losses.items()})
        # The average forgets its random start: its decay rises with the steps.
        decay = min(settings.average, (1.0 + step) / (10.0 + step))
        with torch.no_grad():
            for mean, value in zip(average.parameters(), unet.parameters(), strict=True):
                mean.lerp_(value, 1.0 - decay)
    return average.eval()


def denoising_losses(
    settings: DiffusionTraining,
    parts: DiffusionParts,
    batch: LatentPool,
    rng: np.random.Generator,
    modules: tuple[UNet2DConditionModel, TokenHeads, WordContrast],
) -> dict[str, torch.Tensor]:
    """Return the three losses of one batch: `denoising`, `teacher` and `contrast`, the last two 0 where left out."""
    unet, heads, contrast = modules
    device = unet.device
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    # What the denoiser gets: noisy latents, time steps, captions.
    latents = batch.latents.to(device).float()
    noise = torch.randn(latents.shape, generator=generator).to(device)
    low, high = settings.read_steps
    steps = np.where(
        rng.random(len(latents)) < settings.read_share,
        rng.integers(low, high, size=len(latents)),
        rng.integers(0, parts.scheduler.config.num_train_timesteps, size=len(latents)),
    )
    time_steps = torch.from_numpy(steps).to(device)
    captions = [write_prompt(facts, rng) if rng.random() >= settings.dropout else "" for facts in batch.facts]
    tokens = tokenize(parts.tokenizer, captions).to(device)
    with torch.no_grad():
        states = parts.text_encoder(input_ids=tokens).last_hidden_state
    noisy = parts.scheduler.add_noise(latents, noise, time_steps)
    target = parts.scheduler.get_velocity(latents, noise, time_steps)
    # What it makes of them.
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.bfloat16):
        predicted = unet(noisy, time_steps, encoder_hidden_states=states, return_dict=False)[0]
    losses = {"denoising": F.mse_loss(predicted.float(), target)}
    clearness = parts.scheduler.alphas_cumprod.to(device)[time_steps]
    zero = losses["denoising"].new_zeros(())
    losses["teacher"] = heads.loss(batch.tokens.to(device).float(), clearness) if batch.tokens is not None else zero
    held = held_classes(batch.facts).to(device)
    losses["contrast"] = contrast.loss(held, clearness) if settings.contrast_weight else zero
    return losses


def held_classes(facts: list[SceneFacts]) -> torch.Tensor:
    """Return which classes pictures hold, `[B, 12]` float32 in {0, 1}."""
    held = torch.zeros(len(facts), len(CLASSES) - 1)
    for row, (classes, _) in enumerate(facts):
        held[row, [number - 1 for number in set(classes)]] = 1.0
    return held


@torch.no_grad()
def class_phrases(parts: DiffusionParts) -> torch.Tensor:
    """Return the state of each class's last word in `"a photo of a red disc"`, `[12, C]`."""
    tokens = tokenize(parts.tokenizer, [f"a photo of a {name}" for name in CLASSES[1:]])
    states = parts.text_encoder(input_ids=tokens.to(parts.text_encoder.device)).last_hidden_state
    return states[:, 6]


def load_latents(settings: DiffusionTraining, parts: DiffusionParts, folder: Path) -> tuple[LatentPool, LatentPool]:
    """Return the encoded scenes and small pictures, from `folder` if an interrupted training has left them there."""
    pools = []
    teacher = load_teacher(settings.teacher, torch.device(settings.device))
    for name, seed, count, config in (
        ("scenes", settings.world_seed, settings.scenes, None),
        ("pictures", settings.world_seed + 1, settings.pictures, PICTURE),
    ):
        path = folder / f"{name}.pt"
        if not path.is_file():
            images, facts = draw_squares(seed, count, config)
            pool = encode_squares(images, facts, parts.autoencoder, teacher)
            torch.save({"latents": pool.latents, "tokens": pool.tokens, "facts": pool.facts}, path)
        pools.append(LatentPool(**torch.load(path, weights_only=True)))
    return pools[0], pools[1]
