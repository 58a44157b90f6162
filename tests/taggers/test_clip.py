"""Tags by a CLIP, against a plain implementation that goes patch by patch and class by class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from moduseg.errors import ConfigError
from moduseg.structures import Sample
from moduseg.taggers import build
from moduseg.taggers.clip import ClipTagger, TagClipOptions, TagClipTagger, fill_boxes, select_affinity, select_tags
from tests.backbones.test_clip import tiny_config
from tests.pseudo_masks.contract import NAMES
from tests.support.devices import CPU

PATCH, SIDE = 4, 16
Make = Callable[..., Any]


@pytest.fixture
def make(words: tuple[Path, int, int]) -> Make:
    """A tagger on a random CLIP of four blocks, patch 4."""

    def inner(name: str = "tagclip", **options: Any) -> Any:
        config = tiny_config(words[1], words[2])
        config["vision_config"]["num_hidden_layers"] = 4
        settings = {"weights": "random", "config": config, "tokenizer": str(words[0]), "templates": ["a {}", "{}"]}
        settings |= {"background_words": ["grass", "sky"], "image_size": SIDE, "logit_scale": 30.0, **options}
        return build({"name": name, **settings}, CPU, NAMES)

    return inner


def picture(size: tuple[int, int], seed: int = 0) -> Sample:
    return Sample("a", np.random.default_rng([seed, *size]).integers(0, 256, (*size, 3), dtype=np.uint8))


def attend(block: Any, hidden: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A block head by head, and its attention averaged over the heads."""
    attention, normed = block.self_attn, block.layer_norm1(hidden)
    width = hidden.shape[-1] // attention.num_heads
    mixed, weights = [], []
    for head in range(attention.num_heads):
        columns = slice(head * width, (head + 1) * width)
        query, key, value = (p(normed)[:, columns] for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        logits = query @ key.T / width**0.5
        weights.append((logits if bias is None else logits + bias).softmax(-1))
        mixed.append(weights[-1] @ value)
    hidden = hidden + attention.out_proj(torch.cat(mixed, -1))
    return hidden + block.mlp(block.layer_norm2(hidden)), torch.stack(weights).mean(0)


def embed(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    vision = model.vision_model
    return vision.pre_layrnorm(vision.embeddings(pixels[None], interpolate_pos_encoding=True))[0]


def project(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    return F.normalize(model.visual_projection(model.vision_model.post_layernorm(hidden)), dim=-1)


def stretch(values: torch.Tensor) -> torch.Tensor:
    return (values - values.min()) / (values.max() - values.min())


def plain_tagclip(tagger: TagClipTagger, image: np.ndarray) -> tuple[tuple[int, ...], list[float]]:
    """The published steps, one word, one patch and one crop after the other."""
    options, model = tagger._options, tagger._source.model
    texts, labels = tagger._texts
    # S0 and the attention of every block.
    height, width = (-(-side // PATCH) * PATCH for side in image.shape[:2])
    pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    if (height, width) != image.shape[:2]:
        pixels = F.interpolate(pixels[None], size=(height, width), mode="bicubic", align_corners=False)[0].clamp(0, 1)
    mean, std = tagger._source.normalisation
    pixels = (pixels - mean) / std
    hidden, attention = embed(model, pixels), []
    *blocks, last = model.vision_model.encoder.layers
    for block in blocks:
        hidden, weights = attend(block, hidden)
        attention.append(weights[1:, 1:])
    num_patches = len(hidden) - 1
    attention.append(torch.eye(num_patches))
    for_last = last.layer_norm1(hidden)
    hidden = hidden + last.self_attn.out_proj(last.self_attn.v_proj(for_last))
    hidden = hidden + last.mlp(last.layer_norm2(hidden))
    coarse = (options.logit_scale * project(model, hidden)[1:] @ texts.T).softmax(-1)
    # The affinity: of four blocks the third alone, where one block or more agrees.
    affinity = torch.zeros(num_patches, num_patches)
    for i in range(num_patches):
        for j in range(num_patches):
            votes = sum(bool(weights[i, j] > weights.mean()) for weights in attention)
            affinity[i, j] = attention[2][i, j] if votes >= 1 else 0
    # The map of each word from inside its boxes.
    rows, columns = height // PATCH, width // PATCH
    maps = torch.zeros_like(coarse)
    for word in range(len(labels)):
        spread = stretch(affinity @ coarse[:, word])
        inside = torch.from_numpy(fill_boxes((spread > spread.mean()).reshape(rows, columns).numpy())).flatten()
        for i in range(num_patches):
            maps[i, word] = sum(affinity[i, j] * coarse[j, word] for j in range(num_patches) if inside[j])
    # Scores, and candidates again.
    by_class = torch.stack([maps[:, [w for w, n in enumerate(labels) if n == c]].amax(1) for c in range(1, 6)], 1)
    scores = by_class.amax(0)
    threshold = maps.min() + options.candidates * (maps.max() - maps.min())
    for index in [i for i in range(5) if scores[i] > threshold]:
        mask = stretch(by_class[:, index]).reshape(rows, columns) > 0.5
        y, x = mask.nonzero().T
        crop = pixels[:, y.min() * PATCH : (y.max() + 1) * PATCH, x.min() * PATCH : (x.max() + 1) * PATCH]
        crop = F.interpolate(crop[None], size=(SIDE, SIDE), mode="bilinear", align_corners=False)[0]
        part = mask[y.min() : y.max() + 1, x.min() : x.max() + 1].float()
        seen = F.interpolate(part[None, None], size=(SIDE // PATCH,) * 2, mode="nearest").flatten() > 0
        bias = torch.zeros(len(seen) + 1, len(seen) + 1)
        bias[0, 1:][~seen] = float("-inf")
        hidden = embed(model, crop)
        for block in model.vision_model.encoder.layers:
            hidden, _ = attend(block, hidden, bias)
        probability = (options.logit_scale * project(model, hidden)[0] @ texts.T).softmax(-1)
        best = max(float(probability[w]) for w, n in enumerate(labels) if n == index + 1)
        scores[index] = options.map_weight * scores[index] + options.crop_weight * best
    limit = scores.min() + options.keep * (scores.max() - scores.min())
    return tuple(i + 1 for i in range(5) if scores[i] > limit), scores.tolist()


@pytest.mark.parametrize("options", [
    pytest.param({}, id="half and half"),
    pytest.param({"candidates": 0.0, "map_weight": 0.4, "crop_weight": 0.8, "keep": 0.3}, id="every class in a crop"),
    pytest.param({"class_words": {"red disc": ["red disc", "disc"]}}, id="two words"),
])  # fmt: skip
@pytest.mark.parametrize("size", [(20, 28), (18, 13)], ids=["whole patches", "resized to whole patches"])
@torch.inference_mode()
def test_tagclip_equals_its_steps(make: Make, options: dict[str, Any], size: tuple[int, int]) -> None:
    tagger = make(**options)
    item = picture(size)
    tags = tagger.tag(item)
    expected, scores = plain_tagclip(tagger, item.image)
    assert tags.class_ids == expected
    assert tags.scores is not None
    assert tags.scores.tolist() == pytest.approx(scores, abs=1e-5)
    assert len({round(score, 6) for score in scores}) == 5


@torch.inference_mode()
def test_zero_shot_equals_the_model(make: Make) -> None:
    """The library's own forward pass on the square."""
    tagger: ClipTagger = make("clip", threshold=0.2)
    item = picture((SIDE, SIDE))
    pixels = torch.from_numpy(item.image).permute(2, 0, 1).float() / 255
    mean, std = tagger._source.normalisation
    output = tagger._source.model.get_image_features(pixel_values=((pixels - mean) / std)[None])
    feature = output if isinstance(output, torch.Tensor) else output.pooler_output
    texts, labels = tagger._texts
    probability = (30 * F.normalize(feature, dim=-1) @ texts.T).softmax(-1)[0]
    expected = [float(probability[labels.index(label)]) for label in range(1, 6)]
    tags = tagger.tag(item)
    assert tags.scores is not None
    assert tags.scores.tolist() == pytest.approx(expected, abs=1e-5)
    best = 1 + int(np.argmax(expected))
    assert tags.class_ids == tuple(i + 1 for i, p in enumerate(expected) if p >= 0.2 or i + 1 == best)


def test_boxes_fill_connected_parts() -> None:
    mask = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]], bool)
    expected = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]], bool)
    assert np.array_equal(fill_boxes(mask), expected)
    assert not fill_boxes(np.zeros((2, 3), bool)).any()


def test_affinity_needs_votes() -> None:
    attention = torch.tensor([[[0.9, 0.1], [0.4, 0.6]], [[0.2, 0.8], [0.3, 0.7]]])
    expected = torch.tensor([[0.0, 0.0], [0.0, 0.7]])
    assert torch.allclose(select_affinity(attention, (1, 1), 2), expected)
    assert torch.allclose(select_affinity(attention, (0, 1), 0), attention.mean(0))


@pytest.mark.parametrize(("scores", "keep", "expected"), [
    pytest.param([0.1, 0.9, 0.6], 0.5, (2, 3), id="above the middle"),
    pytest.param([0.1, 0.9, 0.6], 0.7, (2,), id="above seven tenths"),
    pytest.param([0.4, 0.4, 0.4], 0.5, (1,), id="all equal"),
])  # fmt: skip
def test_tags_are_chosen_between_lowest_and_highest(
    scores: list[float], keep: float, expected: tuple[int, ...]
) -> None:
    assert select_tags(torch.tensor(scores), keep) == expected


@pytest.mark.parametrize(("depth", "expected"), [
    pytest.param(12, (8, 10), id="ViT-B"), pytest.param(24, (16, 22), id="ViT-L"), pytest.param(6, (4, 4), id="six"),
    pytest.param(1, (0, 0), id="one"),
])  # fmt: skip
def test_blocks_follow_the_depth(depth: int, expected: tuple[int, int]) -> None:
    assert TagClipOptions().resolve_blocks(depth) == expected


def test_mistakes(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"tagger\.affinity_blocks: got \[3, 9\], expected blocks 0\.\.2"):
        make(affinity_blocks=[3, 9]).tag(picture((8, 8)))
    with pytest.raises(ConfigError, match=r"tagger: keep: got 1\.0, expected 0 <= share < 1"):
        make(keep=1.0)
    with pytest.raises(ConfigError, match=r"tagger: threshold: got 2\.0, expected 0 to 1"):
        make("clip", threshold=2.0)
