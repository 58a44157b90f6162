"""Building, loading and measuring timm models, for `TimmBackbone`."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moduseg.allocator import pause_collection
from moduseg.backbones.efficientnet_names import has_port_names, to_timm_names
from moduseg.devices import seed_weights
from moduseg.errors import ArtefactError, ConfigError, suggest
from moduseg.weights.tensors import load_state

HEAD_PREFIXES = ("head.", "head_dist.", "classifier.", "fc.", "fc_norm.", "attn_pool.")
"""Parameters of classifiers and of their pooling, which a model without them leaves out."""
_PROBE_CELLS = 64


def find_pretrained_id(name: str) -> str:
    """Return the hub id under which timm publishes the weights of a model.

    Raises:
        ConfigError: timm has no such model, or publishes no weights for it.
    """
    import timm

    _check_name(name)
    try:
        published = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise ConfigError(f"backbone.model: got {name!r}; {error}") from error
    if published is None or not published.hf_hub_id:
        raise ConfigError(
            f"backbone.weights: got 'hub', but timm publishes no weights for {name!r}; "
            "give a path: backbone.weights=<path>"
        )
    # timm fills in the id of its own models as `timm/` and expects `<architecture>.<tag>` after it.
    hub_id = str(published.hf_hub_id)
    return hub_id + f"{published.architecture}.{published.tag}" if hub_id.endswith("/") else hub_id


def build_model(name: str, kwargs: Mapping[str, Any], output_stride: int | None, seed: int) -> Any:
    """Build a timm model without classifier, on the CPU: a ViT that takes any size, or a CNN.

    Args:
        name: timm's name, with or without `.tag`.
        kwargs: more arguments for `timm.create_model`.
        output_stride: of a CNN, in pixels; `None` is the model's own.
        seed: of the random weights; the caller's random state does not change.

    Raises:
        ConfigError: unknown model or argument, or a model that is neither a plain ViT nor a CNN.
    """
    with pause_collection():
        import timm

    _check_name(name)
    arguments = {"num_classes": 0, **kwargs}
    if output_stride is not None:
        arguments |= {"output_stride": output_stride}
    with seed_weights(seed):
        try:
            try:
                model = timm.create_model(name, dynamic_img_size=True, **arguments)
            except TypeError:
                # CNNs, and transformers that take any size as they are, do not know the switch.
                torch.default_generator.manual_seed(seed)
                model = timm.create_model(name, **arguments)
        except (TypeError, NotImplementedError, AssertionError) as error:
            raise ConfigError(
                f"backbone.model_kwargs: timm refuses {arguments} for {name!r} ({error}); "
                "correct backbone.model_kwargs or backbone.output_stride"
            ) from error
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"backbone.model: timm cannot build {name!r} with {arguments} ({error}); "
                "correct backbone.model or backbone.model_kwargs"
            ) from error
    if not is_transformer(model) and not _is_cnn(model):
        raise ConfigError(
            f"backbone.model: got {name!r} ({type(model).__name__}), expected a ViT with patch tokens or a CNN with a "
            "feature map; try vit_base_patch14_dinov2 or mobilenetv2_100"
        )
    if is_transformer(model) and getattr(getattr(model, "patch_embed", None), "strict_img_size", False):
        raise ConfigError(
            f"backbone.model: {name!r} takes images of {model.patch_embed.img_size} only, expected a ViT with "
            "dynamic_img_size; try a vit_* or eva02_* model"
        )
    if "_radio_" in name and hasattr(model, "patch_embed"):
        raise ConfigError(
            f"backbone.model: {name!r} has its positions resampled for one input size, expected the model that keeps "
            f"all of them; try {name.replace('vit_', 'naflexvit_', 1)}"
        )
    return model


def is_transformer(model: nn.Module) -> bool:
    """Return whether the model has patch tokens (a ViT in timm's sense)."""
    return all(hasattr(model, name) for name in ("blocks", "num_prefix_tokens", "forward_intermediates"))


def get_patch_side(model: Any) -> int:
    """Return the side of a ViT's patch, in pixels."""
    if hasattr(model, "patch_embed"):
        return int(model.patch_embed.feat_ratio())
    side = model.embeds.patch_size  # NaFlex models keep their patches in a module of this name
    return int(max(side) if isinstance(side, tuple) else side)


def _is_cnn(model: nn.Module) -> bool:
    return (
        hasattr(model, "forward_features")
        and not hasattr(model, "patch_embed")
        and not is_transformer(model)
        and any(isinstance(module, nn.Conv2d) for module in model.modules())
    )


def check_layers(model: Any, layers: Sequence[int], name: str) -> tuple[int, ...]:
    """Return the indices, counted from 0, of the blocks or of the stage that are taken.

    Args:
        model: a timm model.
        layers: blocks of a ViT, counted from 0 or, negative, from the end; of a CNN one stage, or -1 for the last map.
        name: of the model, for messages.

    Returns:
        The blocks in the order of `layers`; of a CNN its stage, or nothing for the last map.

    Raises:
        ConfigError: a block or stage that the model has not, a block named twice, or several stages of a CNN.
    """
    if not is_transformer(model):
        if list(layers) == [-1]:
            return ()
        stages = len(getattr(model, "feature_info", ())) if hasattr(model, "forward_intermediates") else 0
        if len(layers) != 1 or not 0 <= layers[0] < stages:
            choice = f"-1, its last map, or one stage of 0..{stages - 1}" if stages else "-1"
            raise ConfigError(
                f"backbone.layer: got {', '.join(map(str, layers))}, expected {choice} for the CNN {name!r}; "
                "leave it out, or join several with backbone=concat"
            )
        return (layers[0],)
    depth = len(model.blocks)
    for layer in layers:
        if not -depth <= layer < depth:
            raise ConfigError(
                f"backbone.layer: got {layer}, expected {-depth}..{depth - 1} for {name!r}; try -1, the last block"
            )
    counted = tuple(layer % depth for layer in layers)
    if len(set(counted)) < len(counted):
        raise ConfigError(
            f"backbone.layers: got {list(layers)}, which names a block of {name!r} twice, expected different ones; "
            f"try {sorted(set(counted))}"
        )
    return counted


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a weight file, accounting for every tensor of the model; half precision becomes float32.

    EfficientNet's tensors may have the names of its PyTorch ports. timm's own filter of the architecture runs next, if
    there is one: it translates the names of other publishers and resizes positional embeddings. Classifier tensors that
    the model does not have are dropped.

    Raises:
        ArtefactError: a tensor is missing, left over or of another shape, or the file is damaged.
    """
    state = load_state(path)
    if has_port_names(state) and hasattr(model, "blocks"):
        state = to_timm_names(state, model)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            state = convert(state, model)
        except (KeyError, IndexError, AttributeError, RuntimeError, ValueError, AssertionError) as error:
            raise ArtefactError(
                f"{path}: not weights of {type(model).__name__} ({type(error).__name__}: {error}); "
                "check backbone.weights and backbone.model"
            ) from error
    expected = model.state_dict()
    state = {key: value for key, value in state.items() if key in expected or not key.startswith(HEAD_PREFIXES)}
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    faults = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if faults:
        raise ArtefactError(
            f"{path}: not weights of this {type(model).__name__}: {'; '.join(faults)}; "
            "check backbone.weights, backbone.model and backbone.model_kwargs"
        )
    model.load_state_dict(state, strict=False)


def run_cnn(model: Any, batch: Tensor, stages: Sequence[int]) -> Tensor:
    """Return a CNN's last map, or that of the stage which `check_layers` returned, `[B, C, h, w]`."""
    if not stages:
        return model.forward_features(batch)
    return model.forward_intermediates(batch, indices=list(stages), intermediates_only=True, stop_early=True)[0]


def run_blocks(model: Any, batch: Tensor, blocks: Sequence[int]) -> Tensor:
    """Return the outputs of a ViT's blocks after the final norm, concatenated in this order, `[B, h, w, C]`."""
    intermediates = model.forward_intermediates(
        batch, indices=list(blocks), norm=True, stop_early=True, intermediates_only=True, output_fmt="NCHW"
    )
    # timm returns them in the order of the blocks, not in that of the indices.
    by_block = dict(zip(sorted(blocks), intermediates, strict=True))
    outputs = [by_block[block].permute(0, 2, 3, 1) for block in blocks]
    if isinstance(model.norm, nn.Identity) and isinstance(getattr(model, "fc_norm", None), nn.Module):
        # Models that pool by the mean apply their final norm after the pooling.
        outputs = [model.fc_norm(output) for output in outputs]
    return torch.cat(outputs, dim=-1)


@torch.no_grad()
def measure_grid(model: Any, name: str, stages: Sequence[int] = ()) -> tuple[int, float]:
    """Return a CNN's stride and the centre of its first cell, both in pixels (pixel 0 spans [0, 1]).

    A copy of the model is made linear (averaging convolutions; no norms, activations or gates) and gets the pixels'
    coordinates as input: a cell then holds the mean coordinate of its receptive field. Weights do not matter. The copy
    computes in float64 on the CPU: TF32 of a CUDA device rounds coordinates of 1024 and more to whole pixels or worse.

    Args:
        model: a timm CNN.
        name: of the model, for messages.
        stages: the stage whose map is taken; the last map if empty.

    Raises:
        ConfigError: the cells do not lie on a regular grid.
    """
    probe = _linearise(copy.deepcopy(model).to("cpu", torch.float64))
    side = int(run_cnn(probe, torch.zeros(1, 3, 64, 64, dtype=torch.float64), stages).shape[-1])
    stride = 64 // max(side, 1)
    width = _PROBE_CELLS * stride
    coordinates = torch.arange(width, dtype=torch.float64) + 0.5
    inputs = torch.stack([torch.ones_like(coordinates), coordinates]).view(2, 1, 1, width).expand(2, 3, stride, width)
    responses = run_cnn(probe, inputs.contiguous(), stages)
    middle = _PROBE_CELLS // 2
    centres = (responses[1].mean(0)[0] / responses[0].mean(0)[0])[middle - 2 : middle + 3]
    indices = torch.arange(middle - 2, middle + 3)
    # Convolutions move the centre by half pixels; rounding removes what padding and sums add.
    offset = round(2 * float((centres - stride * indices).mean())) / 2
    if len(centres) != 5 or not torch.allclose(centres, stride * indices.double() + offset, atol=0.2):
        raise ConfigError(
            f"backbone.model: the cells of {name!r} do not lie on a regular grid (centres at {centres.tolist()} at "
            f"stride {stride}); try another CNN, such as mobilenetv2_100, or a ViT"
        )
    return stride, offset


def _linearise(model: nn.Module) -> Any:
    """Turn every layer of `model` into a local average, in place."""
    for module in list(model.modules()):
        for key, child in module.named_children():
            kind = type(child)
            if isinstance(child, nn.MaxPool2d):
                average = nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode)
                setattr(module, key, average)
            elif (
                ("Norm" in kind.__name__ and not any(isinstance(m, nn.Conv2d | nn.Linear) for m in child.modules()))
                or kind.__module__.endswith((".activation", ".activations", ".activations_me"))
                or key in ("se", "attn_last")
            ):
                setattr(module, key, nn.Identity())
    for key, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.fill_(parameter.shape[0] / parameter.numel())
        else:
            parameter.fill_(0.0 if "bias" in key else 1.0)
    return model.eval()


def resample_to_patches(features: Tensor, stride: int, offset: float) -> Tensor:
    """Return bilinear values of a CNN's map at the centres of regular patches.

    Args:
        features: `[B, C, h, w]` float; cell `i` is centred at pixel `offset + i * stride`.
        stride, offset: in pixels, as `measure_grid` returns them.

    Returns:
        `[B, C, h, w]`, cell `i` centred at `(i + 0.5) * stride`; beyond the outermost centres the border is repeated.
    """
    if offset == stride / 2:
        return features
    shift = 0.5 - offset / stride
    for dim in (2, 3):
        size = features.shape[dim]
        position = (torch.arange(size, device=features.device) + shift).clamp(0, size - 1)
        low = position.floor().long()
        high = (low + 1).clamp(max=size - 1)
        weight = (position - low).view(-1, 1) if dim == 2 else position - low
        features = features.index_select(dim, low) * (1 - weight) + features.index_select(dim, high) * weight
    return features


def _check_name(name: str) -> None:
    import timm

    if timm.is_model(name.split(".")[0]):
        return
    raise ConfigError(
        f"backbone.model: got {name!r}, which timm {timm.__version__} does not have; "
        f"try {suggest(name, timm.list_models()) or 'vit_base_patch14_dinov2'}, or look in timm.list_models()"
    )
