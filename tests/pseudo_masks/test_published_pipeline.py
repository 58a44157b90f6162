"""Label maps of the presets of the open-vocabulary protocols, on random weights, against the published pipeline.

The pipeline is written down plainly, on arrays: resize, windows, padding, patches to pixels, mean over windows, back to
the image's size, softmax over all words, maximum of a class's words, areas, threshold. What the last block computes is
ours (`encode_patches`) and has tests of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.backbones.base import Backbone
from moduseg.backbones.clip_attention import Affinity, cosine_similarity, encode_patches
from moduseg.backbones.regions import merge_regions, sample_regions
from moduseg.backbones.timm_backbone import TimmBackbone, TimmOptions
from moduseg.config import PseudoMasksConfig, compose
from moduseg.datasets.classes import VOC_CLASSES
from moduseg.pseudo_masks import build
from moduseg.pseudo_masks.labelling import ScoredImage, to_label_map
from moduseg.structures import Proposals, Sample, TokenMap
from tests.backbones.test_clip import tiny_config
from tests.support.devices import CPU

LEVELS = (120, 110, 100)
"""The model's mean colour, in whole levels, so that padding with it is padding with zeros."""
SIZE = (150, 215)


def make_proxy() -> Backbone:
    kwargs = {"img_size": 224, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return TimmBackbone(TimmOptions("vit_tiny_patch16_224", model_kwargs=kwargs, facet="qk"), CPU)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of two blocks, patch 16."""
    from transformers import CLIPConfig, CLIPModel

    from moduseg.miniature.models.clip import build_tokenizer

    folder = tmp_path_factory.mktemp("clip16")
    tokenizer = build_tokenizer(folder)
    config = tiny_config(len(tokenizer), tokenizer.eos_token_id)
    config["vision_config"] |= {"image_size": 224, "patch_size": 16, "num_hidden_layers": 3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        CLIPModel(CLIPConfig(**config)).save_pretrained(folder)
    preprocessor = {"image_mean": [level / 255 for level in LEVELS], "image_std": [0.25, 0.26, 0.27]}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    coarse = np.random.default_rng(5).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return cv2.resize(coarse, SIZE[::-1], interpolation=cv2.INTER_CUBIC)


def make_regions(size: tuple[int, int]) -> Proposals:
    """Four quarters, and a large one under them."""
    masks = torch.zeros(5, *size, dtype=torch.bool)
    middle = (size[0] // 2, size[1] // 2)
    for index, (rows, columns) in enumerate((r, c) for r in (0, 1) for c in (0, 1)):
        masks[index, rows * middle[0] : (rows + 1) * middle[0], columns * middle[1] : (columns + 1) * middle[1]] = True
    masks[4, 20:90, 30:120] = True
    return Proposals(masks)


def compose_method(name: str, clip: Path, **more: Any) -> tuple[PseudoMasksConfig, dict[str, Any]]:
    """The preset with the random CLIP in place of its weights, and few prompts."""
    settings = compose([f"protocol={name}"]).pseudo_masks
    generator = {**settings.generator, "weights": str(clip), "activation": None, "templates": ["a {}", "{}"], **more}
    generator |= {"affinity": None, "spatial_blocks": [0, 1]} if generator["name"] == "corrclip" else {}
    return settings, generator


def published_label_map(
    generator: Any, settings: PseudoMasksConfig, options: dict[str, Any], image: np.ndarray, regions: Tensor | None
) -> tuple[np.ndarray, Tensor]:
    """Label map and scores of all classes by the published pipeline, one window after the other."""
    texts, label_of_text = generator._texts
    # Resize: the ratio is kept, 2048 pixels at most.
    height, width = image.shape[:2]
    factor = min(2048 / max(height, width), options["short_side"] / min(height, width))
    rows, columns = int(height * factor + 0.5), int(width * factor + 0.5)
    pixels = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_LINEAR)
    mean, std = generator._source.normalisation
    tensor = (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - mean) / std
    if regions is not None:
        y, x = ((torch.arange(n) + 0.5) * m / n for n, m in ((rows, height), (columns, width)))
        regions = regions[y.long()[:, None], x.long()]
    if options["window"] is None:
        logits = see(generator, options, tensor, pixels, regions) @ texts.T
        logits = F.interpolate(logits.permute(2, 0, 1)[None], size=(height, width), mode="bilinear")[0]
    else:
        total, count = torch.zeros(len(texts), rows, columns), torch.zeros(rows, columns)
        window, step = options["window"], options["stride"]
        for row in range(max(rows - window + step - 1, 0) // step + 1):
            for column in range(max(columns - window + step - 1, 0) // step + 1):
                bottom, right = min(row * step + window, rows), min(column * step + window, columns)
                top, left = max(bottom - window, 0), max(right - window, 0)
                part = None if regions is None else regions[top:bottom, left:right]
                crop = tensor[:, top:bottom, left:right]
                size = crop.shape[1:]
                vertical, horizontal = (-side % (options["padding"] or 1) for side in size)
                border = (horizontal // 2, horizontal - horizontal // 2, vertical // 2, vertical - vertical // 2)
                padded = F.pad(crop, border)
                levels = F.pad(torch.from_numpy(pixels[top:bottom, left:right]).permute(2, 0, 1), border)
                for channel, level in enumerate(LEVELS):
                    outside = F.pad(torch.zeros(size), border, value=1.0) > 0
                    levels[channel][outside] = level
                part = None if part is None else F.pad(part, border, value=-1)
                features = see(generator, options, padded, levels.permute(1, 2, 0).numpy(), part)
                logits = (features @ texts.T).permute(2, 0, 1)
                logits = F.interpolate(logits[None], size=padded.shape[1:], mode="bilinear")[0]
                logits = logits[:, border[2] : border[2] + size[0], border[0] : border[0] + size[1]]
                total[:, top:bottom, left:right] += logits
                count[top:bottom, left:right] += 1
        logits = F.interpolate((total / count)[None], size=(height, width), mode="bilinear")[0]
    # Softmax over all words; the maximum of a class's words, class 0 among them.
    probability = (options["logit_scale"] * logits).softmax(0)
    by_class = torch.zeros(len(VOC_CLASSES), height, width)
    for text, label in enumerate(label_of_text):
        by_class[label] = torch.maximum(by_class[label], probability[text])
    scores = by_class.clone()
    if settings.min_class_share:
        areas = torch.bincount(by_class.argmax(0).flatten(), minlength=len(by_class))[1:]
        by_class[1:] *= (areas > settings.min_class_share * areas.sum())[:, None, None]
    labels = by_class.argmax(0)
    labels[by_class.amax(0) < settings.background.value] = 0
    return labels.numpy(), scores


def see(generator: Any, options: dict[str, Any], crop: Tensor, levels: np.ndarray, ids: Tensor | None) -> Tensor:
    """Features `[h, w, D]` of a window, L2-normalised; what is left of the last whole patch is not seen."""
    rows, columns = (side // 16 * 16 for side in crop.shape[1:])
    batch = crop[None, :, :rows, :columns]
    variant, affinity = options.get("variant", "corrclip"), None
    if variant in ("proxyclip", "corrclip"):
        proxy: TokenMap = make_proxy().tokens([levels])[0]
        weights = [generator._encoder._make_resampling(crop, (rows, columns), proxy)[axis] for axis in (0, 1)]
        fine = coarse = None
        if ids is not None:
            fine = sample_regions(ids, proxy.tokens.shape[:2], 8, (rows, columns))  # type: ignore[arg-type]
            merged = merge_regions(proxy.tokens, fine, int(ids.max()) + 1, options["merge_eps"])
            coarse = merged[sample_regions(ids, (rows // 16, columns // 16), 16, (rows, columns))].flatten()[None]
            fine = merged[fine].flatten()[None]
        affinity = Affinity(
            cosine_similarity(proxy.tokens[None]),
            rows=weights[0],
            columns=weights[1],
            regions=fine,
            patch_regions=coarse,
            branches=generator._encoder.options.branches,
        )
    features = encode_patches(generator._source.model, batch, variant, affinity)[0]
    return F.normalize(features, dim=-1)


@pytest.mark.parametrize(("method", "more"), [
    *(pytest.param(method, {}, id=method) for method in ("sclip", "clearclip", "naclip", "proxyclip", "corrclip")),
    # Windows of the presets are whole patches; these are not.
    pytest.param("sclip", {"window": 230, "stride": 120}, id="sclip, windows cut"),
    pytest.param("clearclip", {"window": 390, "stride": 200}, id="clearclip, windows padded"),
    pytest.param("proxyclip", {"window": 290, "stride": 190}, id="proxyclip, windows padded"),
    pytest.param("corrclip", {"window": 290, "stride": 190}, id="corrclip, windows padded"),
])  # fmt: skip
@torch.inference_mode()
def test_label_maps_equal_the_published_pipeline(
    method: str, more: dict[str, int], clip: Path, image: np.ndarray
) -> None:
    settings, options = compose_method(f"voc21_{method}", clip, **more)
    generator = build(options, CPU, make_proxy, VOC_CLASSES)
    proposals = make_regions(SIZE)
    regions = generator._find_regions(Sample("a", image), proposals) if method == "corrclip" else None  # type: ignore[attr-defined]
    expected, by_class = published_label_map(generator, settings, options, image, regions)
    maps = generator.generate(Sample("a", image), tuple(range(1, len(VOC_CLASSES))), proposals)
    assert maps.background is not None
    assert torch.allclose(torch.cat([maps.background[None], maps.scores]), by_class, atol=1e-4)
    labels = to_label_map(ScoredImage("a", maps), settings, CPU.torch_device).numpy()
    # Scores that are equal but for their last bits may fall to another word.
    assert (labels != expected).mean() < 1e-3
    assert by_class.std(dim=(1, 2)).max() > 5e-4
