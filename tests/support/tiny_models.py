"""Tiny models of `transformers` in directories, and the names that two implementations of SAM give the same tensors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moduseg.weights.sources import find_weights

SIDE = 128
"""Side of the input of SAM, SAM-HQ and SAM 2 in pixels; the miniature has it too."""


def _sam_parts(hq: bool) -> dict[str, Any]:
    from moduseg.miniature.models import sam as size

    decoder = size.SAM_DECODER_WIDTH
    vision = {
        "hidden_size": size.SAM_WIDTH,
        "output_channels": decoder,
        "num_hidden_layers": size.SAM_DEPTH,
        "num_attention_heads": size.SAM_HEADS,
        "image_size": size.SAM_SIZE,
        "patch_size": size.SAM_PATCH,
        "window_size": size.SAM_WINDOW,
        "global_attn_indexes": list(size.SAM_GLOBAL_BLOCKS),
        "num_pos_feats": decoder // 2,
        "mlp_dim": 4 * size.SAM_WIDTH,
    }
    prompts = {"hidden_size": decoder, "image_size": size.SAM_SIZE, "patch_size": size.SAM_PATCH}
    masks = {
        "hidden_size": decoder,
        "mlp_dim": 4 * decoder,
        "num_attention_heads": 4,
        "iou_head_hidden_dim": decoder,
        # PyTorch's own, as in `segment_anything`; published configurations have 1e-6, which moves a mask by 1e-4.
        "layer_norm_eps": 1e-5,
        **({"vit_dim": size.SAM_WIDTH} if hq else {}),
    }
    return {"vision_config": vision, "prompt_encoder_config": prompts, "mask_decoder_config": masks}


def _sam2_parts() -> dict[str, Any]:
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "image_size": [SIDE, SIDE],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [4, 4, 4, 4],
        "global_attention_blocks": [3],
    }
    vision = {
        "model_type": "sam2_vision_model",
        "backbone_config": backbone,
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "fpn_hidden_size": 32,
    }
    return {
        "vision_config": vision,
        "prompt_encoder_config": {"hidden_size": 32, "image_size": SIDE, "patch_size": 16},
        "mask_decoder_config": {
            "hidden_size": 32,
            "mlp_dim": 64,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 32,
        },
    }


def _sam3_parts() -> dict[str, Any]:
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 112,
        "patch_size": 14,
        "window_size": 4,
        "global_attn_indexes": [1],
        "pretrain_image_size": 56,
    }
    vision = {
        "model_type": "sam3_vision_model",
        "backbone_config": backbone,
        "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    }
    parts = _sam2_parts()
    return {
        **parts,
        "vision_config": vision,
        "prompt_encoder_config": {"hidden_size": 32, "image_size": 112, "patch_size": 14},
    }


def build_sam(family: str) -> Any:
    """Build a tiny model of `sam`, `sam_hq`, `sam2` or `sam3_tracker`, whose every parameter is random."""
    import transformers

    name, parts = {
        "sam": ("Sam", _sam_parts(False)),
        "sam_hq": ("SamHQ", _sam_parts(True)),
        "sam2": ("Sam2", _sam2_parts()),
        "sam3_tracker": ("Sam3Tracker", _sam3_parts()),
    }[family]
    config = getattr(transformers, f"{name}Config")(**parts)
    model = getattr(transformers, f"{name}Model")(config).eval()
    return randomise(model)


def concept_config(num_tokens: int, last_token: int, side: int = 112) -> Any:
    """Return the configuration of a tiny SAM 3 with detector and text encoder, for squares of `side` pixels."""
    import transformers

    width = {"hidden_size": 32, "num_attention_heads": 2}
    layers = {**width, "num_layers": 2, "intermediate_size": 64}
    vision = _sam3_parts()["vision_config"]
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 16,
        "max_position_embeddings": 32,
        "vocab_size": num_tokens,
        "eos_token_id": last_token,
        "hidden_act": "gelu",
    }
    return transformers.Sam3Config(
        vision_config={**vision, "backbone_config": {**vision["backbone_config"], "image_size": side}},
        text_config=text,
        geometry_encoder_config=layers,
        detr_encoder_config=layers,
        detr_decoder_config={**layers, "num_queries": 8},
        mask_decoder_config=width,
    )


def build_concepts(num_tokens: int, last_token: int, side: int = 112) -> Any:
    """Build a tiny SAM 3 that finds what words say, whose every parameter is random."""
    import transformers

    return randomise(transformers.Sam3Model(concept_config(num_tokens, last_token, side)).eval())


def save_concepts(words: tuple[Path, int, int], folder: Path) -> str:
    """Write a tiny SAM 3 with the tokenizer in `words` (folder, number of tokens, id of the last); return its path."""
    save(build_concepts(*words[1:]), folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        if (words[0] / name).is_file():
            shutil.copy(words[0] / name, folder)
    return str(folder)


def randomise(model: Any, seed: int = 0) -> Any:
    """Draw all parameters of a model again, also those that start as zeros or tiny numbers, and return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / max(1, parameter[0].numel()) ** 0.5)
            else:
                parameter.copy_(0.1 * noise + (1 if name.endswith("weight") else 0))
    return model


def save(model: Any, folder: Path) -> str:
    """Write a model as the hub stores it, and return the directory's path."""
    model.save_pretrained(folder)
    return str(folder)


_RENAMES = (
    (r"^image_encoder\.", "vision_encoder."),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"^vision_encoder\.blocks\.", "vision_encoder.layers."),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"norm_final_attn", "layer_norm_final_attn"),
    (r"neck\.0\.", "neck.conv1."),
    (r"neck\.1\.", "neck.layer_norm1."),
    (r"neck\.2\.", "neck.conv2."),
    (r"neck\.3\.", "neck.layer_norm2."),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix", "shared_image_embedding.positional_embedding"),
    (r"point_embeddings\.", "point_embed."),
    (r"mask_downscaling\.0\.", "mask_embed.conv1."),
    (r"mask_downscaling\.1\.", "mask_embed.layer_norm1."),
    (r"mask_downscaling\.3\.", "mask_embed.conv2."),
    (r"mask_downscaling\.4\.", "mask_embed.layer_norm2."),
    (r"mask_downscaling\.6\.", "mask_embed.conv3."),
    (r"output_upscaling\.0\.", "upscale_conv1."),
    (r"output_upscaling\.1\.", "upscale_layer_norm."),
    (r"output_upscaling\.3\.", "upscale_conv2."),
    (r"(mlps\.\d|iou_prediction_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(mlps\.\d|iou_prediction_head)\.layers\.2\.", r"\1.proj_out."),
    (r"(mlps\.\d|iou_prediction_head)\.layers\.1\.", r"\1.layers.0."),
)


def transformers_name(name: str) -> str:
    """Return the name that `transformers` gives a tensor of `segment_anything`'s SAM."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def transformers_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of `segment_anything`'s SAM under the names of `SamModel`."""
    renamed = {transformers_name(name): tensor for name, tensor in state.items()}
    # Both parts of the model hold this matrix.
    renamed["prompt_encoder.shared_embedding.positional_embedding"] = renamed[
        "shared_image_embedding.positional_embedding"
    ]
    return renamed


def _swin() -> dict[str, Any]:
    return {
        "model_type": "swin",
        "image_size": 64,
        "patch_size": 4,
        "embed_dim": 8,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
        "window_size": 4,
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }


def build_universal(family: str, classes: int = 3) -> Any:
    """Build a tiny model of `mask2former`, `oneformer`, `eomt` or `eomt_dinov3`, whose every parameter is random."""
    import transformers

    decoder = {"backbone_config": _swin(), "num_queries": 8, "hidden_dim": 32, "num_attention_heads": 4}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_feedforward_dim": 32, "dim_feedforward": 32}
    vit = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
        "num_blocks": 1,
        "num_queries": 8,
        "num_upscale_blocks": 2,
    }
    name, parts = {
        "mask2former": ("Mask2Former", {**decoder, **layers, "feature_size": 32, "mask_feature_size": 32}),
        "oneformer": (
            "OneFormer",
            {**decoder, **layers, "conv_dim": 32, "mask_dim": 32, "norm": "GN", "query_dec_layers": 1},
        ),
        "eomt": ("Eomt", vit),
        "eomt_dinov3": ("EomtDinov3", {**vit, "intermediate_size": 64}),
    }[family]
    config = getattr(transformers, f"{name}Config")(**parts, num_labels=classes)
    return randomise(getattr(transformers, f"{name}ForUniversalSegmentation")(config).eval())


def save_universal(family: str, folder: Path, settings: Mapping[str, Any], classes: int = 3) -> str:
    """Write a model with its image processor's settings and, for OneFormer, a tokenizer; return its directory."""
    save(build_universal(family, classes), folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    if family == "oneformer":
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
            shutil.copy(find_weights("miniature/clip", "tokenizer") / name, folder)
    return str(folder)
