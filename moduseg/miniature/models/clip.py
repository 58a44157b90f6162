"""The miniature CLIP: a small `transformers.CLIPModel` with a vocabulary learnt from the world's words."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from moduseg.errors import ConfigError
from moduseg.miniature.models.weights import save_weights
from moduseg.miniature.world.drawing import STUFF
from moduseg.miniature.world.scenes import CAPTION_TEMPLATES, HUES, NUMBERS, PLURALS, SHAPES

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

CLIP_SIZE = 128
CLIP_PATCH = 8
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Normalisation of inputs in [0, 1], OpenAI's, as for every CLIP."""
MAX_TOKENS = 48
PROMPT_TEMPLATES: tuple[str, ...] = (
    "a {}",
    "a {}.",
    "{}",
    "a photo of a {}",
    "a picture of a {}.",
    "one {}",
    "the {}",
    "there are some {}",
)
"""Wordings of a class or background name that the training has shown."""
EXTRA_WORDS: tuple[str, ...] = (
    "the", "an", "image", "photograph", "drawing", "scene", "object", "objects", "background", "large", "small",
    "big", "little", "this", "that", "is", "are", "it", "by", "at", "to", "from", "two", "bright", "dark",
    "clean", "good", "bad", "close", "up", "many",
)  # fmt: skip
DENSE_MODES: tuple[str, ...] = ("plain", "maskclip", "sclip", "clearclip", "naclip")

START, END = "<|startoftext|>", "<|endoftext|>"


def learn_vocabulary(words: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Learn a byte-pair encoding in which every given word becomes one token.

    Merges are learnt as usual, the most frequent adjacent pair first (ties: alphabetical), until no pair is left; other
    words fall back to pieces and at worst to single bytes, so that nothing is unknown.

    Args:
        words: lower-case words; repetitions count.

    Returns:
        token to id (the start and end of text last, as in CLIP) and the merges, each `"left right"`.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    counts = Counter(words)
    splits = {word: [*word[:-1], word[-1] + "</w>"] for word in counts}
    merges: list[str] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in splits.items():
            for pair in itertools.pairwise(pieces):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(" ".join(best))
        tokens.append("".join(best))
        for word, pieces in splits.items():
            merged: list[str] = []
            for piece in pieces:
                if merged and (merged[-1], piece) == best:
                    merged[-1] += piece
                else:
                    merged.append(piece)
            splits[word] = merged
    unique = list(dict.fromkeys([*tokens, START, END]))
    return {token: number for number, token in enumerate(unique)}, merges


def world_words() -> list[str]:
    """List every word of the world's captions and prompts, and a few more."""
    text = " ".join(
        [*CAPTION_TEMPLATES, *PROMPT_TEMPLATES, *HUES, *SHAPES, *PLURALS.values(), *NUMBERS, *STUFF, "some and a one"]
    )
    for mark in ("{objects}", "{stuff}", "{}", ".", ","):
        text = text.replace(mark, " ")
    return [*text.split(), *EXTRA_WORDS]


def build_tokenizer(directory: Path) -> CLIPTokenizer:
    """Write the tokenizer's files into `directory` and load them.

    Args:
        directory: made if absent; gets `vocab.json`, `merges.txt` and what `save_pretrained` adds.
    """
    from transformers import CLIPTokenizer

    vocabulary, merges = learn_vocabulary(world_words())
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(directory, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(directory)
    return tokenizer


def build_miniature_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Build a miniature CLIP with random weights for the tokens of `tokenizer`."""
    from transformers import CLIPConfig, CLIPModel

    width = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "hidden_act": "gelu"}
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id,
    }
    config = CLIPConfig(
        text_config={
            **width,
            **special,
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 3,
            "max_position_embeddings": MAX_TOKENS,
            "projection_dim": 128,
        },
        vision_config={
            **width,
            "num_hidden_layers": 6,
            "image_size": CLIP_SIZE,
            "patch_size": CLIP_PATCH,
            "projection_dim": 128,
        },
        projection_dim=128,
    )
    return CLIPModel(config)


def save_clip(model: CLIPModel, directory: Path) -> None:
    """Write `config.json`, `preprocessor_config.json` and float16 `model.safetensors`, each renamed into place.

    The configuration names float32 as the type to load to: half precision is for storage, not for the CPU.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = {**model.config.to_dict(), "architectures": ["CLIPModel"], "dtype": "float32"}
    for part in ("text_config", "vision_config"):
        config[part]["dtype"] = "float32"
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": False,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "do_convert_rgb": True,
    }
    for name, content in (("config.json", config), ("preprocessor_config.json", preprocessor)):
        temporary = directory / f".{name}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(directory / name)
    save_weights(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})


def text_embeddings(model: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Return L2-normalised text features, `[len(texts), D]` float32."""
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    device = model.logit_scale.device
    pooled = model.text_model(
        input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
    ).pooler_output
    return F.normalize(model.text_projection(pooled).float(), dim=-1)


def last_block_input(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    """Return the hidden states `[B, 1 + h * w, C]` that enter the last block of the image encoder.

    Args:
        model: a CLIP.
        pixels: `[B, 3, H, W]` normalised, sides multiples of the patch size; positions are interpolated.
    """
    vision = model.vision_model
    hidden = vision.pre_layrnorm(vision.embeddings(pixels, interpolate_pos_encoding=True))
    for layer in vision.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    return hidden


def project(model: CLIPModel, hidden: torch.Tensor) -> torch.Tensor:
    """Apply final norm and projection to tokens: `[..., C]` to L2-normalised `[..., D]` float32."""
    return F.normalize(model.visual_projection(model.vision_model.post_layernorm(hidden)).float(), dim=-1)


def dense_features(model: CLIPModel, hidden: torch.Tensor, grid: tuple[int, int], mode: str = "plain") -> torch.Tensor:
    """Return patch features in the space of the texts, by one of the ways to run the last block.

    Args:
        model: a CLIP.
        hidden: result of `last_block_input`.
        grid: rows and columns of the patch grid.
        mode: `"plain"` (the model as it is), `"maskclip"` (every patch attends to itself), `"sclip"` (softmax of
            query-query plus key-key, residual and MLP kept), `"clearclip"` (query-query, neither kept) or `"naclip"`
            (key-key plus a Gaussian over distance, neither kept).

    Returns:
        `[B, h, w, D]` float32, L2-normalised.

    Raises:
        ConfigError: an unknown mode.
    """
    layer = model.vision_model.encoder.layers[-1]
    h, w = grid
    if mode == "plain":
        out = layer(hidden, attention_mask=None)
    elif mode == "maskclip":
        out = layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(hidden)))
    elif mode in DENSE_MODES:
        attention = layer.self_attn
        normed = layer.layer_norm1(hidden)
        batch, length, width = normed.shape
        heads = (batch, length, attention.num_heads, attention.head_dim)
        query, key, value = (
            linear(normed).view(heads).transpose(1, 2)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scale = attention.head_dim**-0.5
        if mode == "sclip":
            weights = sum((scale * x @ x.transpose(-1, -2)).softmax(-1) for x in (query, key))
        elif mode == "clearclip":
            weights = (scale * query @ query.transpose(-1, -2)).softmax(-1)
        else:
            logits = scale * key @ key.transpose(-1, -2)
            logits[..., 1:, 1:] += _gaussian(h, w, 5.0).to(logits)
            weights = logits.softmax(-1)
        out = attention.out_proj((weights @ value).transpose(1, 2).reshape(batch, length, width))
        if mode == "sclip":
            out = hidden + out
            out = out + layer.mlp(layer.layer_norm2(out))
    else:
        raise ConfigError(f"mode: got {mode!r}, expected one of {DENSE_MODES}; try 'plain'")
    return project(model, out[:, 1:]).unflatten(1, (h, w))


def _gaussian(h: int, w: int, deviation: float) -> torch.Tensor:
    """Return `[h * w, h * w]` weights that fall with the distance of two patches, 1 at distance 0."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    centres = torch.stack([y.flatten(), x.flatten()], dim=1).float()
    return torch.exp(-torch.cdist(centres, centres).square() / (2.0 * deviation**2))
