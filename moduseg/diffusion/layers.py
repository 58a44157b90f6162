"""The attention layers of a UNet by place, side and kind, and the choice of them that a map is the mean of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from moduseg.errors import ConfigError

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

Kind = Literal["cross", "self"]
KINDS = get_args(Kind)
_NAME = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?attentions\.(\d+)\.transformer_blocks\.(\d+)\.attn([12])")
_ORDER = ("down", "mid", "up")


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer of a UNet.

    Attributes:
        name: of the module in the UNet.
        place: block and attention, counted from 0: `down2.0`, `mid.0`, `up1.2`. Several layers share a place if a
            transformer has several blocks.
        kind: `cross` looks at the tokens of the text, `self` at the cells of the map.
        side: of its map in cells.
        num_heads: heads.
    """

    name: str
    place: str
    kind: Kind
    side: int
    num_heads: int


@dataclass(frozen=True, kw_only=True)
class MapRequest:
    """Which heads of which layers a map is the mean of.

    Attributes:
        kind: `cross` or `self`.
        side: layers whose map has so many cells on a side; of any side if omitted.
        places: layers at these places (`down2.0`, `mid.0`, `up1.2`); at all of them if omitted.
        heads: indices into the heads of the chosen layers, counted through from 0 in the order in which the UNet runs
            them; all heads if omitted.

    Raises:
        ValueError: an unknown kind.
    """

    kind: Kind
    side: int | None = None
    places: tuple[str, ...] | None = None
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: got {self.kind!r}, expected one of {', '.join(KINDS)}")


@dataclass(frozen=True)
class ChosenHeads:
    """The heads of one layer that take part in a map.

    Attributes:
        layer: the layer.
        heads: their indices in the layer, ascending or in the order of the request.
    """

    layer: AttentionLayer
    heads: tuple[int, ...]


def list_layers(unet: UNet2DConditionModel, latent_side: int) -> list[AttentionLayer]:
    """List the attention layers of a UNet in the order in which it runs them.

    Args:
        unet: a UNet of Stable Diffusion's family.
        latent_side: of the square latents in cells; each block but the last halves it, rounded up.
    """
    sides = [latent_side]
    for _ in range(len(unet.down_blocks) - 1):
        sides.append((sides[-1] + 1) // 2)
    found: list[tuple[tuple[int, ...], AttentionLayer]] = []
    for name, module in unet.named_modules():
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        part, block, attention, transformer, number = match[1], int(match[2] or 0), *map(int, match.groups()[2:])
        level = {"down": block, "mid": len(sides) - 1, "up": len(sides) - 1 - block}[part]
        place = f"{part}{'' if part == 'mid' else block}.{attention}"
        kind: Kind = "cross" if module.is_cross_attention else "self"
        position = (_ORDER.index(part), block, attention, transformer, number)
        found.append((position, AttentionLayer(name, place, kind, sides[level], module.heads)))
    return [layer for _, layer in sorted(found, key=lambda entry: entry[0])]


def choose_heads(layers: Sequence[AttentionLayer], request: MapRequest, where: str) -> list[ChosenHeads]:
    """Return the heads that a request asks for, layer by layer; layers without any of them are left out.

    Args:
        layers: of the UNet, in the order in which it runs them.
        request: what is asked for.
        where: the configuration key of the request, for messages.

    Raises:
        ConfigError: a place, side or head that this UNet does not have, or chosen layers of several sides.
    """
    of_kind = [layer for layer in layers if layer.kind == request.kind]
    places = list(dict.fromkeys(layer.place for layer in of_kind))
    for place in request.places or ():
        if place not in places:
            raise ConfigError(
                f"{where}: got place {place!r}, expected some of {', '.join(places)}, where this UNet has "
                f"{request.kind}-attention"
            )
    at_places = [layer for layer in of_kind if request.places is None or layer.place in request.places]
    chosen = [layer for layer in at_places if request.side in (None, layer.side)]
    sides = sorted({layer.side for layer in at_places})
    if not chosen:
        raise ConfigError(
            f"{where}: got side {request.side}, expected one of {', '.join(map(str, sides)) or 'none'}, the sides of "
            f"this UNet's {request.kind}-attention at the chosen places"
        )
    if len({layer.side for layer in chosen}) > 1:
        raise ConfigError(f"{where}: got layers with sides {', '.join(map(str, sides))}, expected one side; set side")
    if request.heads is None:
        return [ChosenHeads(layer, tuple(range(layer.num_heads))) for layer in chosen]
    total = sum(layer.num_heads for layer in chosen)
    if not request.heads or not all(0 <= head < total for head in request.heads):
        raise ConfigError(f"{where}: got heads {list(request.heads)}, expected some of 0 to {total - 1}")
    result, first = [], 0
    for layer in chosen:
        heads = tuple(head - first for head in request.heads if first <= head < first + layer.num_heads)
        first += layer.num_heads
        if heads:
            result.append(ChosenHeads(layer, heads))
    return result
