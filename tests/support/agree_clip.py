"""transformers' CLIP, through our backbone, beside open_clip's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moduseg.backbones.clip import ClipBackbone, ClipOptions
from moduseg.devices import Device
from moduseg.miniature.models.clip import build_tokenizer
from tests.support.agreement import (
    MEAN,
    STD,
    Row,
    State,
    compare_tokens,
    make_padded_input,
    measure_relative_error,
    picture,
    randomise,
    rename_tensors,
)

CPU = Device(torch.device("cpu"))
DEPTH, HEADS = 3, 2
PROMPTS = ("a red disc", "grass", "a photo of a large green square.", "two small blue discs")

CLIP = [
    (r"^vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
]


def clip_state(state: State) -> State:
    """transformers' CLIP weights under the names that OpenAI and open_clip use."""
    named = {re.sub(r"\.qkv\.", ".in_proj_", n): t for n, t in rename_tensors(state, CLIP).items()}
    projections = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
    return {
        projections.get(name, name): tensor.T.contiguous() if name in projections else tensor
        for name, tensor in named.items()
        if not name.endswith("position_ids")
    }


def write_clip(folder: Path, activation: str) -> Any:
    """Write a random CLIP with the miniature's tokenizer, as `save_pretrained` does; return transformers' model."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = build_tokenizer(folder)
    size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    size |= {"intermediate_size": 128, "hidden_act": activation}
    end = tokenizer.eos_token_id
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": end}
    text = {**size, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 20}
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 24, "patch_size": 4}, projection_dim=20)
    model = randomise(CLIPModel(config))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return model


@torch.no_grad()
def compare_clip(folder: Path) -> list[Row]:
    """transformers (ours) and open_clip, with both activations; open_clip gets transformers' resampled positions."""
    import open_clip
    from transformers import CLIPTokenizer

    rows = []
    for activation in ("quick_gelu", "gelu"):
        clip_folder = folder / activation
        model = write_clip(clip_folder, activation)
        state = clip_state(model.state_dict())
        tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
        text = {"context_length": 20, "vocab_size": len(tokenizer), "width": 32, "heads": HEADS, "layers": DEPTH}
        title = f"CLIP, {activation}"
        plain, projected = (
            ClipBackbone(ClipOptions(weights=str(clip_folder), project=project), CPU) for project in (False, True)
        )
        for size in ((24, 24), (28, 40), (26, 37), (17, 15)):
            pair = "transformers, open_clip" + (" given its positions" if size != (24, 24) else "")
            inputs = make_padded_input(picture(*size), 4)
            vision = {"layers": DEPTH, "width": 32, "head_width": 16, "patch_size": 4, "output_tokens": True}
            other = open_clip.CLIP(
                20, vision | {"image_size": tuple(inputs.shape[2:])}, text, quick_gelu=activation == "quick_gelu"
            ).eval()
            patches = torch.zeros(1, inputs.shape[2] * inputs.shape[3] // 16, 32)
            embeddings = model.vision_model.embeddings
            positions = embeddings.interpolate_pos_encoding(F.pad(patches, (0, 0, 1, 0)), *inputs.shape[2:])
            other.load_state_dict({**state, "visual.positional_embedding": positions[0]})
            pooled, tokens = other.visual(inputs)
            rows.append(compare_tokens(title, pair, plain, picture(*size), tokens[0]))
            rows.append(
                compare_tokens(
                    title, pair, projected, picture(*size), tokens[0] @ other.visual.proj, output="projected tokens"
                )
            )
            ours = model.get_image_features(inputs, interpolate_pos_encoding=True)
            ours = ours if isinstance(ours, Tensor) else ours.pooler_output
            label = f"{size[0]} x {size[1]}"
            rows.append(Row(title, pair, "image embedding", label, measure_relative_error(ours, pooled)))
        ids = tokenizer(list(PROMPTS), padding="max_length", max_length=20, return_tensors="pt")["input_ids"]
        error = measure_relative_error(projected.text_features(PROMPTS), other.encode_text(ids, normalize=True))
        rows.append(Row(title, "transformers, open_clip", "text embedding", f"{len(PROMPTS)} prompts", error))
    return rows
