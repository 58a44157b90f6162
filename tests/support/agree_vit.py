"""timm's ViTs, through our backbone, beside transformers'."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from moduseg.backbones.timm_backbone import TimmBackbone, TimmOptions
from moduseg.devices import Device
from tests.support.agreement import (
    MEAN,
    STD,
    Row,
    State,
    compare_tokens,
    make_padded_input,
    picture,
    randomise,
    rename_tensors,
)

WIDTH, DEPTH, HEADS = 24, 3, 2


def backbone_with(state: State, model: str, folder: Path, **options: Any) -> TimmBackbone:
    """Return a timm backbone that has loaded `state` from a file."""
    file = folder / f"{model}.safetensors"
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, file)
    return TimmBackbone(
        TimmOptions(model, weights=str(file), mean=MEAN, std=STD, **options), Device(torch.device("cpu"))
    )


BLOCKS = [
    (r"^(encoder\.layer|encoder\.layers|layers|layer|model\.layer)\.(\d+)\.", r"blocks.\2."),
    (r"\.(attention|self_attn)\.([qkv])_proj\.", r".attn.\2."),
    (r"\.(attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
    # As older releases of transformers call them.
    (r"\.attention\.attention\.([qkv])(uery|ey|alue)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1", r".ls\1.gamma"),
    (r"^layernorm\.", "norm."),
]
DINOV2 = [
    *BLOCKS,
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"\.mlp\.(down_proj|weights_out)\.", ".mlp.w3."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
]
DINOV3 = [
    *BLOCKS,
    (r"^embeddings\.register_tokens", "storage_tokens"),
    (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
]


def dinov2(registers: int = 0, swiglu: bool = False) -> Any:
    """transformers' DINOv2, trained at 6 x 6 patches of 14 pixels."""
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    settings: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    settings |= {"image_size": 84, "patch_size": 14, "use_swiglu_ffn": swiglu}
    if registers:
        return randomise(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**settings, num_register_tokens=registers)))
    return randomise(Dinov2Model(Dinov2Config(**settings)))


def dinov2_state(model: Any) -> State:
    """Return a DINOv2's weights under the names of Meta's files."""
    state = rename_tensors(model.state_dict(), DINOV2)
    for name in [n for n in state if ".mlp.gate_proj." in n]:
        state[name.replace("gate_proj", "w12")] = torch.cat([state.pop(name), state.pop(name.replace("gate", "up"))])
    return state


@torch.no_grad()
def compare_dinov2(folder: Path) -> list[Row]:
    """timm and transformers; sizes: the trained one, larger, no multiple of the patch, smaller on one side or both."""
    rows = []
    for title, name, registers, swiglu in (
        ("DINOv2", "vit_small_patch14_dinov2", 0, False),
        ("DINOv2, 4 registers", "vit_small_patch14_reg4_dinov2", 4, False),
        ("DINOv2-g (SwiGLU)", "vit_giant_patch14_dinov2", 0, True),
    ):
        model = dinov2(registers, swiglu)
        kwargs = {"img_size": 84, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
        antialias = None if registers else False
        backbone = backbone_with(dinov2_state(model), name, folder, model_kwargs=kwargs, antialias=antialias)
        for size in ((84, 84), (98, 140), (93, 131), (84, 57), (40, 61)):
            theirs = model(make_padded_input(picture(*size), 14)).last_hidden_state[0, 1 + registers :]
            rows.append(compare_tokens(title, "timm, transformers", backbone, picture(*size), theirs))
    return rows


@torch.no_grad()
def compare_dinov3(folder: Path) -> list[Row]:
    """timm's EVA with DINOv3's rotary positions, and transformers."""
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    config = DINOv3ViTConfig(
        hidden_size=32, intermediate_size=128, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        num_register_tokens=4, query_bias=False, value_bias=False, patch_size=16, image_size=64,
    )  # fmt: skip
    model = randomise(DINOv3ViTModel(config))
    kwargs = {"embed_dim": 32, "depth": DEPTH, "num_heads": HEADS}
    backbone = backbone_with(
        rename_tensors(model.state_dict(), DINOV3), "vit_small_patch16_dinov3", folder, model_kwargs=kwargs
    )
    rows = []
    for size in ((64, 64), (64, 112), (61, 99)):
        theirs = model(make_padded_input(picture(*size), 16)).last_hidden_state[0, 5:]
        rows.append(compare_tokens("DINOv3", "timm, transformers", backbone, picture(*size), theirs))
    return rows


VIT = [
    *BLOCKS,
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
]


@torch.no_grad()
def compare_dino(folder: Path) -> list[Row]:
    """Compare DINO's plain ViT: tokens, and query plus key of the last block (what CorrCLIP takes from it)."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        patch_size=8, image_size=48, layer_norm_eps=1e-6,
    )  # fmt: skip
    model = randomise(ViTModel(config, add_pooling_layer=False))
    kwargs = {"img_size": 48, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    state = rename_tensors(model.state_dict(), VIT)
    tokens, affinity = (
        backbone_with(state, "vit_base_patch8_224", folder, model_kwargs=kwargs, facet=facet, antialias=False)
        for facet in ("tokens", "qk")
    )
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if re.search(rf"\.{DEPTH - 1}\..*(q_proj|k_proj|query|key)$", name):
            module.register_forward_hook(lambda _, __, output, name=name: seen.__setitem__(name, output))
    rows = []
    for size in ((48, 48), (56, 72), (53, 70)):
        image = picture(*size)
        theirs = model(make_padded_input(image, 8), interpolate_pos_encoding=True).last_hidden_state[0, 1:]
        rows.append(compare_tokens("DINO", "timm, transformers", tokens, image, theirs))
        query, key = seen.values()
        theirs = F.normalize((query + key)[0, 1:], dim=-1)
        rows.append(compare_tokens("DINO", "timm, transformers", affinity, image, theirs, output="query + key"))
    return rows


# SigLIP and C-RADIO ---------------------------------------------------------------------------------------------------

SIGLIP = [
    (r"^vision_model\.", ""),
    *BLOCKS,
    (r"^post_layernorm\.", "norm."),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.position_embedding\.weight", "pos_embed"),
    (r"\.layer_norm(\d)\.", r".norm\1."),
]


@torch.no_grad()
def compare_siglip(folder: Path) -> list[Row]:
    """Compare SigLIP (2's fixed-size models share its architecture), positions resampled as transformers does."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
        patch_size=16, image_size=64, vision_use_head=False,
    )  # fmt: skip
    model = randomise(SiglipVisionModel(config))
    state = rename_tensors(model.state_dict(), SIGLIP)
    state["pos_embed"] = state["pos_embed"][None]
    kwargs: dict[str, Any] = {"img_size": 64, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    kwargs |= {"global_pool": "avg", "fc_norm": False, "act_layer": "gelu_tanh"}
    name = "vit_base_patch16_siglip_512"
    backbone = backbone_with(state, name, folder, model_kwargs=kwargs, antialias=False)
    rows = []
    for size in ((64, 64), (80, 112), (77, 99)):
        theirs = model(make_padded_input(picture(*size), 16), interpolate_pos_encoding=True).last_hidden_state[0]
        rows.append(compare_tokens("SigLIP, antialias=false", "timm, transformers", backbone, picture(*size), theirs))
    return rows


def radio_state(prefix: int = 10) -> State:
    """Return random weights of a tiny C-RADIO under NVIDIA's names, with the tensors that timm drops."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_generator.embedder.weight": (WIDTH, 3 * 16 * 16),
        "patch_generator.pos_embed": (1, 128 * 128, WIDTH),
        "patch_generator.cls_token.token": (prefix, WIDTH),
    }
    for block in range(DEPTH):
        for layer, (rows, columns) in {
            "attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), "mlp.fc1": (4 * WIDTH, WIDTH),
            "mlp.fc2": (WIDTH, 4 * WIDTH),
        }.items():  # fmt: skip
            shapes |= {f"blocks.{block}.{layer}.weight": (rows, columns), f"blocks.{block}.{layer}.bias": (rows,)}
        shapes |= {f"blocks.{block}.{n}.{p}": (WIDTH,) for n in ("norm1", "norm2") for p in ("weight", "bias")}
    state = {}
    for name, shape in shapes.items():
        scale = shape[1] ** -0.5 if name.endswith("weight") and len(shape) == 2 else 0.5
        state[f"radio_model.model.{name}"] = torch.randn(shape, generator=generator) * scale
    state |= {f"radio_model.input_conditioner.{n}": torch.ones(3, 1, 1) for n in ("norm_mean", "norm_std")}
    return state | {"radio_model.summary_idxs": torch.tensor([0, 1, 2])}


@torch.no_grad()
def compare_radio(folder: Path) -> list[Row]:
    """timm's two implementations: one keeps all positions, the other is built and loaded for one size."""
    import timm
    from timm.models.vision_transformer import checkpoint_filter_fn

    kwargs = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 4.0}
    state = radio_state()
    backbone = backbone_with(state, "naflexvit_so400m_patch16_radio_v4", folder, model_kwargs=kwargs)
    rows = []
    for size in ((64, 64), (64, 112), (61, 99)):
        inputs = make_padded_input(picture(*size), 16)
        other = timm.create_model("vit_so400m_patch16_radio_v4", img_size=tuple(inputs.shape[2:]), **kwargs).eval()
        other.load_state_dict(
            checkpoint_filter_fn(state, other, interpolation="bilinear", antialias=False, align_corners=False)
        )
        theirs = other.forward_features(inputs)[0, 10:]
        rows.append(compare_tokens("C-RADIOv4", "timm naflexvit, timm vit", backbone, picture(*size), theirs))
    return rows
