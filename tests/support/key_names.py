"""Names and shapes of published checkpoints: `python -m tests.support.key_names` writes `tests/data/manifests/` again.

A manifest is made by the architecture's own code at full size, on the meta device, where a model takes no memory.
Numbered blocks of one shape share a line: `blocks.{0..11}.norm1.weight`.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moduseg.backbones import build
from moduseg.config import compose
from moduseg.devices import Device

FOLDER = Path(__file__).parents[1] / "data" / "manifests"
META = Device(torch.device("meta"))
Shapes = dict[str, tuple[int, ...]]

TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
LARGE_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
CLIPS: dict[str, dict[str, Any]] = {
    "clip_vit_b16": {"text_config": TEXT, "vision_config": {**BASE, "patch_size": 16}, "projection_dim": 512},
    "clip_vit_b32": {"text_config": TEXT, "vision_config": {**BASE, "patch_size": 32}, "projection_dim": 512},
    "clip_vit_l14": {"text_config": LARGE_TEXT, "vision_config": {**LARGE, "patch_size": 14}, "projection_dim": 768},
    "metaclip_vit_b16": {"text_config": TEXT, "vision_config": {**BASE, "patch_size": 16}, "projection_dim": 512},
}
"""What the `config.json` of each published CLIP says, as far as it is not `CLIPConfig`'s default."""
TIMM = (
    "dinov2_vits14", "dinov2_vitb14", "dinov2_vitl14", "dinov2_vitg14",
    "dinov2_vits14_reg4", "dinov2_vitb14_reg4", "dinov2_vitl14_reg4", "dinov2_vitg14_reg4",
    "dinov3_vitb16", "dinov3_vitl16", "cradio_v4_so400m", "siglip2_b16", "siglip2_so400m", "dino_vitb8", "eva02_vitl14",
)  # fmt: skip


def preset(name: str, **overrides: Any) -> Any:
    """Return the backbone of `configs/backbone/<name>.yaml` at full size on the meta device, without weights."""
    cfg = {**compose([f"backbone={name}"]).backbone, "weights": "random", **overrides}
    if name in CLIPS:
        cfg["config"] = CLIPS[name]
    return build(cfg, META)


def model_of(backbone: Any) -> Any:
    """Return the network of a backbone, made on the meta device."""
    with META.torch_device:
        return backbone._source.model if hasattr(backbone, "_source") else backbone._model


def shapes_of(state: Mapping[str, torch.Tensor]) -> Shapes:
    """Return name and shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def fold(shapes: Shapes) -> dict[str, list[int]]:
    """Merge tensors whose names differ in their first number only, if that counts from 0."""
    groups: dict[tuple[str, str, tuple[int, ...]], list[int]] = {}
    lines: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        if match := re.fullmatch(r"(.*?\.)(\d+)(\..*)", name):
            groups.setdefault((match[1], match[3], shape), []).append(int(match[2]))
        else:
            lines[name] = list(shape)
    for (before, after, shape), numbers in groups.items():
        if len(numbers) > 1 and sorted(numbers) == list(range(len(numbers))):
            lines[f"{before}{{0..{len(numbers) - 1}}}{after}"] = list(shape)
        else:
            lines |= {f"{before}{number}{after}": list(shape) for number in numbers}
    return lines


def unfold(lines: Mapping[str, list[int]]) -> Shapes:
    """Return the shapes that `fold` was given."""
    shapes: Shapes = {}
    for name, shape in lines.items():
        match = re.fullmatch(r"(.*)\{0\.\.(\d+)\}(.*)", name)
        names = [f"{match[1]}{number}{match[3]}" for number in range(int(match[2]) + 1)] if match else [name]
        shapes |= dict.fromkeys(names, tuple(shape))
    return shapes


def read(name: str) -> Shapes:
    """Read the manifest `tests/data/manifests/<name>.json`."""
    return unfold(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["shapes"])


def write(name: str, published: str, library: str, shapes: Shapes) -> None:
    """Write a manifest: what checkpoint it is of, what made it, how much it holds, and its names and shapes."""
    head = {
        "checkpoint": published,
        "made_by": f"{library} {importlib.metadata.version(library)}",
        "tensors": len(shapes),
        "values": sum(int(torch.Size(shape).numel()) for shape in shapes.values()),
    }
    lines = [f"    {json.dumps(key)}: {json.dumps(shape)}" for key, shape in fold(shapes).items()]
    text = json.dumps(head, indent=2)[:-2] + ',\n  "shapes": {\n' + ",\n".join(lines) + "\n  }\n}\n"
    (FOLDER / f"{name}.json").write_text(text, encoding="utf-8")


def write_backbones() -> None:
    """Write the manifests of the backbones' presets."""
    import timm
    from transformers import CLIPConfig, CLIPModel

    with META.torch_device:
        for name in TIMM:
            model = compose([f"backbone={name}"]).backbone["model"]
            network = timm.create_model(model, num_classes=0)
            write(name, f"timm/{model}", "timm", shapes_of(network.state_dict()))
        for name, config in CLIPS.items():
            published = compose([f"backbone={name}"]).backbone["weights"]
            write(name, published, "transformers", shapes_of(CLIPModel(CLIPConfig(**config)).state_dict()))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    write_backbones()
