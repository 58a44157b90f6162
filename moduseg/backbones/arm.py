"""ARM: a small module, trained once on masks, that sharpens the patch features of any way to run a CLIP's last block.

After arXiv 2512.24224, of which layers, widths and losses are not public: those here are our own. Shallow features of
the CLIP, which still know where things end, ask the features that are compared with words, which know what they are.
What comes out is added to the latter. An untrained module adds nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from moduseg.errors import ArtefactError, ConfigError
from moduseg.files import write_atomic

FORMAT = "moduseg ARM 1"
_PUBLISHED_BLOCKS, _PUBLISHED_DEPTH = (3, 6), 12


@dataclass(frozen=True, kw_only=True)
class ArmShape:
    """The sizes of an ARM, which its weights fix.

    Attributes:
        deep_width: channels of the features that are refined: those of the space of the texts.
        shallow_width: channels of the CLIP's blocks.
        blocks: first and last block whose outputs are the shallow features, counted from 1.
        width: channels inside the module.
        heads: of both attentions.
        mlp_width: channels inside the MLP.

    Raises:
        ValueError: a number out of range.
    """

    deep_width: int
    shallow_width: int
    blocks: tuple[int, int]
    width: int = 256
    heads: int = 8
    mlp_width: int = 1024

    def __post_init__(self) -> None:
        for name in ("deep_width", "shallow_width", "width", "heads", "mlp_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 1 or more; try width=256 heads=8")
        if self.width % self.heads:
            raise ValueError(f"heads: got {self.heads} for width={self.width}, expected a divisor; try 4")
        if len(self.blocks) != 2 or not 1 <= self.blocks[0] <= self.blocks[1]:
            raise ValueError(f"blocks: got {list(self.blocks)}, expected [first, last] from 1 on; try [3, 6]")


class Arm(nn.Module):
    """Patch features of a host and of the CLIP's earlier blocks -> refined patch features.

    Shallow features, averaged over the blocks and projected, are the queries of a cross-attention whose keys and values
    are the host's features. Self-attention and an MLP follow. The last layer starts at zero, and what it gives is
    added in units of the host's feature, as hosts differ in their lengths.

    Args:
        shape: sizes.
    """

    def __init__(self, shape: ArmShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.width
        self.shallow_norm = nn.LayerNorm(shape.shallow_width)
        self.shallow = nn.Linear(shape.shallow_width, width)
        self.deep_norm = nn.LayerNorm(shape.deep_width)
        self.deep = nn.Linear(shape.deep_width, width)
        self.query_norm = nn.LayerNorm(width)
        self.cross = _Attention(width, shape.heads)
        self.self_norm = nn.LayerNorm(width)
        self.mix = _Attention(width, shape.heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, shape.mlp_width), nn.GELU(), nn.Linear(shape.mlp_width, width))
        self.out_norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, shape.deep_width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.log_scale = nn.Parameter(torch.zeros(()))

    @property
    def num_parameters(self) -> int:
        """Numbers that are learnt."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def scale_factor(self) -> Tensor:
        """Scalar by which the host's `logit_scale` is multiplied; 1 before training."""
        return self.log_scale.exp()

    def forward(self, features: Tensor, shallow: Tensor) -> Tensor:
        """Return refined features.

        Args:
            features: `[B, h, w, D]` of the host, in the space of the texts, of any length.
            shallow: `[B, h, w, C]`, the mean of the blocks' outputs.

        Returns:
            `[B, h, w, D]`.
        """
        grid = features.shape[1:3]
        flat = features.flatten(1, 2)
        hidden = self.shallow(self.shallow_norm(shallow.flatten(1, 2)))
        hidden = hidden + self.cross(self.query_norm(hidden), self.deep(self.deep_norm(flat)))
        normed_hidden = self.self_norm(hidden)
        hidden = hidden + self.mix(normed_hidden, normed_hidden)
        hidden = hidden + self.mlp(self.mlp_norm(hidden))
        length = flat.square().sum(-1, keepdim=True).sqrt()
        change = self.out(self.out_norm(hidden)).to(features.dtype) * length
        return features + change.unflatten(1, grid)


class _Attention(nn.Module):
    """Multi-head attention of `[B, n, width]` queries to `[B, m, width]` keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        query = self._split(self.query(queries))
        key, value = (self._split(part) for part in self.key_value(context).chunk(2, dim=-1))
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)


@dataclass(frozen=True)
class ArmRecord:
    """What an ARM's file says beside its weights.

    Attributes:
        shape: sizes.
        supervision: what it was trained on: `pixel:<data set>`.
        clip: digest of the CLIP that it was trained beside.
        hosts: ways to run the last block that it saw in training.
    """

    shape: ArmShape
    supervision: str
    clip: str
    hosts: tuple[str, ...] = ()


def choose_blocks(depth: int) -> tuple[int, int]:
    """Return the blocks of the shallow features in an encoder of `depth` blocks, from 1: 3..6 of 12, and as deep in
    other encoders.
    """
    first, last = (max(1, round(block * depth / _PUBLISHED_DEPTH)) for block in _PUBLISHED_BLOCKS)
    # The last block is not run as it is, so its output is no shallow feature.
    return min(first, max(1, depth - 1)), min(max(first, last), max(1, depth - 1))


def write_arm(arm: Arm, record: ArmRecord, path: Path) -> None:
    """Write an ARM as float16 safetensors, complete or not at all.

    Raises:
        StorageError: the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().half().contiguous() for name, tensor in arm.state_dict().items()}
    content = {**asdict(record), "format": FORMAT}
    write_atomic(path, save(tensors, metadata={"arm": json.dumps(content, sort_keys=True)}))


def read_record(path: Path, key: str) -> ArmRecord:
    """Return what the file of an ARM says of it; no weights are read.

    Args:
        path: the file.
        key: the configuration key, for messages.

    Raises:
        ArtefactError: no safetensors file, or that of something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("arm")
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{key}: {path} is no safetensors file ({error}); {_remedy(key)}") from error
    try:
        content: Mapping[str, Any] = json.loads(text or "{}")
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        shape = {**content["shape"], "blocks": tuple(content["shape"]["blocks"])}
        hosts = tuple(content["hosts"])
        return ArmRecord(ArmShape(**shape), str(content["supervision"]), str(content["clip"]), hosts)
    except (KeyError, TypeError, ValueError) as error:
        raise ArtefactError(f"{key}: {path} holds no ARM; {_remedy(key)}") from error


def load_arm(path: Path, key: str) -> Arm:
    """Return the ARM of a file, in float32 on the CPU, in evaluation mode and without gradients.

    Args:
        path: the file.
        key: the configuration key, for messages.

    Raises:
        ArtefactError: no ARM, or tensors that do not fit its sizes.
    """
    arm = Arm(read_record(path, key).shape)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    try:
        arm.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ArtefactError(f"{key}: {path} does not fit its own sizes ({reason}); {_remedy(key)}") from error
    return arm.eval().requires_grad_(False)


def check_widths(shape: ArmShape, path: Path, key: str, *, shallow_width: int, deep_width: int, depth: int) -> None:
    """Check that an ARM fits a CLIP.

    Args:
        shape: of the ARM.
        path: its file, for the message.
        key: the configuration key, for the message.
        shallow_width: of the CLIP's blocks.
        deep_width: of the space of the texts.
        depth: blocks of the CLIP's image encoder.

    Raises:
        ConfigError: other widths, or blocks that the CLIP has not; the last one does not count, as hosts replace it.
    """
    if (shape.shallow_width, shape.deep_width) != (shallow_width, deep_width):
        raise ConfigError(
            f"{key}: {path} fits a CLIP of width {shape.shallow_width} with texts of {shape.deep_width}, got one of "
            f"width {shallow_width} with texts of {deep_width}; {_remedy(key)}"
        )
    if shape.blocks[1] > depth - 1:
        raise ConfigError(
            f"{key}: {path} takes blocks {shape.blocks[0]}..{shape.blocks[1]}, expected some of 1..{depth - 1} of a "
            f"CLIP of {depth}; {_remedy(key)}"
        )


def _remedy(key: str) -> str:
    return f"train one beside this CLIP with scripts/train_arm.py, or set {key}=null"
