"""Names and shapes of published checkpoints of SAM, written from the architectures' own code.

`python -m tests.proposers.manifests` writes `tests/manifests/*.json.gz` anew.
"""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parents[1] / "manifests"
SAM = ("sam_vit_b", "sam_vit_l", "sam_vit_h")
"""In the names of `segment_anything`."""
HUB = ("sam_hq_vit_h", "sam2.1_hiera_large")
"""In the names of `transformers`. That of SAM 2.1 is of the video model, whose file on the hub serves both."""
PUBLISHED_BYTES = {
    "sam_vit_b": 375e6,
    "sam_vit_l": 1.25e9,
    "sam_vit_h": 2.56e9,
    "sam_hq_vit_h": 2.57e9,
    "sam2.1_hiera_large": 898e6,
}
"""Sizes of the published files, float32, to the digits that are shown beside the downloads."""

_HUGE = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "global_attn_indexes": [7, 15, 23, 31],
    "mlp_dim": 5120,
}
_HIERA_LARGE = {
    "model_type": "sam2_hiera_det_model",
    "hidden_size": 144,
    "num_attention_heads": 2,
    "blocks_per_stage": [2, 6, 36, 4],
    "embed_dim_per_stage": [144, 288, 576, 1152],
    "num_attention_heads_per_stage": [2, 4, 8, 16],
    "window_size_per_stage": [8, 4, 16, 8],
    "global_attention_blocks": [23, 33, 43],
}
_SAM2_LARGE = {
    "model_type": "sam2_vision_model",
    "backbone_config": _HIERA_LARGE,
    "backbone_channel_list": [1152, 576, 288, 144],
}


def build(name: str) -> Any:
    """The full-size model, on the `meta` device."""
    import transformers
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        if name in SAM:
            return sam_model_registry[name.removeprefix("sam_")]()
        if name == "sam_hq_vit_h":
            config = transformers.SamHQConfig(vision_config=_HUGE, mask_decoder_config={"vit_dim": 1280})
            return transformers.SamHQModel(config)
        return transformers.Sam2VideoModel(transformers.Sam2VideoConfig(vision_config=_SAM2_LARGE))


def shapes(model: Any) -> dict[str, list[int]]:
    """Names and shapes of a model's tensors, in its order."""
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def read(name: str) -> dict[str, list[int]]:
    """A manifest."""
    data: dict[str, list[int]] = json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))
    return data


def write_sparse(path: Path, tensors: dict[str, list[int]]) -> None:
    """A safetensors file of zeros that takes no room on the disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 4 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for manifest in (*SAM, *HUB):
        text = json.dumps(shapes(build(manifest)), separators=(",", ":")).encode()
        (FOLDER / f"{manifest}.json.gz").write_bytes(gzip.compress(text, mtime=0))
