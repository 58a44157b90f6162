"""Names and shapes of the published checkpoints of SAM: `python -m tests.support.sam_manifests` writes them again."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch

from tests.support.key_names import META, Shapes, shapes_of, write

SAM = {
    "sam_vit_b": "sam_vit_b_01ec64.pth",
    "sam_vit_l": "sam_vit_l_0b3195.pth",
    "sam_vit_h": "sam_vit_h_4b8939.pth",
}
"""Files of `segment_anything`, by the name of the manifest."""
HUB = {"sam_hq_vit_h": "syscv-community/sam-hq-vit-huge", "sam2.1_hiera_large": "facebook/sam2.1-hiera-large"}
"""Repositories of `transformers` models. That of SAM 2.1 holds the video model, whose file serves both."""
PUBLISHED_BYTES = {
    "sam_vit_b": 375e6,
    "sam_vit_l": 1.25e9,
    "sam_vit_h": 2.56e9,
    "sam_hq_vit_h": 2.57e9,
    "sam2.1_hiera_large": 898e6,
}
"""Sizes of the published files in float32, rounded as they are shown beside the downloads."""

HUGE = {
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
SAM2_LARGE = {
    "model_type": "sam2_vision_model",
    "backbone_config": _HIERA_LARGE,
    "backbone_channel_list": [1152, 576, 288, 144],
}


def build(name: str) -> Any:
    """Build the full-size model, on the meta device."""
    import transformers
    from segment_anything import sam_model_registry

    with META.torch_device:
        if name in SAM:
            return sam_model_registry[name.removeprefix("sam_")]()
        if name == "sam_hq_vit_h":
            config = transformers.SamHQConfig(vision_config=HUGE, mask_decoder_config={"vit_dim": 1280})
            return transformers.SamHQModel(config)
        return transformers.Sam2VideoModel(transformers.Sam2VideoConfig(vision_config=SAM2_LARGE))


def write_sparse(path: Path, tensors: Shapes) -> None:
    """Write a safetensors file of zeros that takes no space on the disk."""
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
    for manifest, published in {**SAM, **HUB}.items():
        library = "segment-anything" if manifest in SAM else "transformers"
        write(manifest, published, library, shapes_of(build(manifest).state_dict()))
