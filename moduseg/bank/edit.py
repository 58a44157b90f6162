"""Banks made of banks: classes, images and regions taken out, banks joined, single regions added.

Nothing here runs a model or touches a file, and no bank is changed: every function returns a new one. The order rule is
that of a bank built from scratch: images in their order, the regions of an image by ascending class id; what is added
comes behind what was there. So a bank of A with B added equals one built from the list A, B.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moduseg.bank.aggregation import aggregate, coverage, harden
from moduseg.bank.purification import purify
from moduseg.bank.store import Bank
from moduseg.config import BankConfig
from moduseg.errors import ArtefactError, ConfigError
from moduseg.structures import IGNORE_INDEX, TokenMap

MAX_CLASSES = 255
"""Class names that fit an 8-bit label map, background included; 255 is the ignored pixel."""
_DECIDING = ("purify", "min_area", "aggregation")
"""Keys of `bank` that decide what is stored."""


def remove(bank: Bank, classes: Sequence[str] = (), images: Sequence[str] = (), rows: Sequence[int] = ()) -> Bank:
    """A bank without some classes, images and regions.

    Args:
        bank: the bank.
        classes: names; their regions go and so do the names, the ids of later classes move up.
        images: ids of training images; their regions and the ids themselves go.
        rows: regions, by their row in the bank.

    Raises:
        ConfigError: a name, an id or a row that the bank does not have, or the background's name.
    """
    for name in classes:
        if name not in bank.classes[1:]:
            known = ", ".join(bank.classes[1:]) or "none"
            raise ConfigError(f"class: got {name!r}, expected one of {known}; the background can only lose regions")
    known_ids = set(bank.image_ids)
    for image_id in images:
        if image_id not in known_ids:
            raise ConfigError(f"image: got {image_id!r}, expected an image of the bank; see scripts/bank.py info")
    for row in rows:
        if not 0 <= row < len(bank):
            raise ConfigError(f"region: got row {row}, expected 0..{len(bank) - 1}; see scripts/bank.py info")
    gone_labels = [bank.classes.index(name) for name in classes]
    gone_images = [i for i, image_id in enumerate(bank.image_ids) if image_id in set(images)]
    keep = ~torch.isin(bank.labels, torch.tensor(gone_labels, dtype=torch.int64))
    keep &= ~torch.isin(bank.image_index, torch.tensor(gone_images, dtype=torch.int64))
    keep[torch.tensor(list(rows), dtype=torch.int64)] = False
    left_classes = tuple(name for name in bank.classes if name not in classes)
    left_images = tuple(image_id for image_id in bank.image_ids if image_id not in set(images))
    new_label = _numbers(bank.classes, left_classes)
    new_image = _numbers(bank.image_ids, left_images)
    files = {i: f for i, f in files_of(bank).items() if i not in set(images)}
    return Bank(
        bank.pooled[keep],
        new_label[bank.labels[keep]],
        new_image[bank.image_index[keep]],
        bank.areas[keep],
        left_images,
        left_classes,
        _with_files(bank.info, files),
    )


def merge(banks: Sequence[Bank]) -> Bank:
    """One bank of several that were made with one backbone and the same settings.

    Class lists are joined by name: those of the first bank keep their ids, new names follow in the order in which they
    come. The description (`info`) is that of the first.

    Raises:
        ArtefactError: another backbone, other settings, or an image that occurs in two banks.
        ConfigError: no bank, or more classes than a label map can hold.
    """
    if not banks:
        raise ConfigError("merge: got no bank, expected two or more; name their folders with banks=[a,b]")
    first = banks[0]
    classes, image_ids = list(first.classes), list(first.image_ids)
    labels, index = [first.labels], [first.image_index]
    files, sources = files_of(first), [str(first.info.get("label_source", ""))]
    for bank in banks[1:]:
        _check_same_making(first, bank)
        twice = set(image_ids) & set(bank.image_ids)
        if twice:
            raise ArtefactError(
                f"merge: image {min(twice)!r} is in two banks ({len(twice)} such), expected each image once; give one "
                "bank's images a prefix with prefix=true, or remove them with scripts/bank.py remove image=<id>"
            )
        classes += [name for name in bank.classes if name not in classes]
        new_label = torch.tensor([classes.index(name) for name in bank.classes], dtype=torch.int64)
        labels.append(new_label[bank.labels])
        index.append(bank.image_index + len(image_ids))
        image_ids += bank.image_ids
        files |= files_of(bank)
        source = str(bank.info.get("label_source", ""))
        sources += [source] if source not in sources else []
    if len(classes) > MAX_CLASSES:
        raise ConfigError(f"merge: got {len(classes)} classes, expected at most {MAX_CLASSES} with the background")
    return Bank(
        torch.cat([bank.pooled for bank in banks]),
        torch.cat(labels),
        torch.cat(index),
        torch.cat([bank.areas for bank in banks]),
        tuple(image_ids),
        tuple(classes),
        _with_files({**first.info, "label_source": "+".join(s for s in sources if s)}, files),
    )


def in_classes(bank: Bank, classes: Sequence[str]) -> Bank:
    """The same bank with the ids of another class list, matched by name.

    Args:
        bank: its classes may be fewer and in another order; a class that it lacks is never found.
        classes: names, background first.

    Raises:
        ArtefactError: the bank has a class that the list lacks.
    """
    foreign = [name for name in bank.classes if name not in classes]
    if foreign:
        raise ArtefactError(
            f"bank: has the class {foreign[0]!r}, expected only classes of the data set ({', '.join(classes[1:5])}, "
            "...); take it out with scripts/bank.py remove class=<name>, or add it to the data set's class list"
        )
    if tuple(classes) == bank.classes:
        return bank
    ids = torch.tensor([list(classes).index(name) for name in bank.classes], dtype=torch.int64)
    return dataclasses.replace(bank, labels=ids[bank.labels], classes=tuple(classes))


def with_prefix(bank: Bank, prefix: str) -> Bank:
    """The same bank with `<prefix>/` before every image id."""
    files = {f"{prefix}/{image_id}": file for image_id, file in files_of(bank).items()}
    ids = tuple(f"{prefix}/{image_id}" for image_id in bank.image_ids)
    return dataclasses.replace(bank, image_ids=ids, info=_with_files(bank.info, files))


def with_classes(classes: Sequence[str], new: Sequence[str]) -> tuple[str, ...]:
    """`classes` with the names of `new` that it lacks behind them.

    Raises:
        ConfigError: an empty name, or more classes than a label map can hold.
    """
    for name in new:
        if not name.strip() or name != name.strip():
            raise ConfigError(f"new: got the class name {name!r}, expected a word or words; write new=<name>")
    joined = tuple(dict.fromkeys([*classes, *new]))
    if len(joined) > MAX_CLASSES:
        raise ConfigError(f"new: got {len(joined)} classes, expected at most {MAX_CLASSES} with the background")
    return joined


def add_region(bank: Bank, image_id: str, class_name: str, pooled: Tensor, area: int) -> Bank:
    """The bank with one more region behind the others.

    Args:
        bank: the bank.
        image_id: the image it is from; a new one is put behind the others.
        class_name: its class; a new one is put behind the others.
        pooled: `[C]` float, the pooled vector before normalisation.
        area: pixels of the region.

    Raises:
        ConfigError: a vector of another length, or see `with_classes`.
    """
    if pooled.shape != bank.pooled.shape[1:]:
        raise ConfigError(f"region: got a vector of {tuple(pooled.shape)}, expected ({bank.pooled.shape[1]},)")
    classes = with_classes(bank.classes, [class_name])
    ids = tuple(dict.fromkeys([*bank.image_ids, image_id]))
    return dataclasses.replace(
        bank,
        pooled=torch.cat([bank.pooled, pooled.detach().float().cpu()[None]]),
        labels=torch.cat([bank.labels, torch.tensor([classes.index(class_name)])]),
        image_index=torch.cat([bank.image_index, torch.tensor([ids.index(image_id)])]),
        areas=torch.cat([bank.areas, torch.tensor([int(area)])]),
        image_ids=ids,
        classes=classes,
    )


def region_vector(mask: Tensor, tokens: TokenMap, cfg: BankConfig) -> tuple[Tensor, int]:
    """What one region drawn by hand gives to a bank: purified as pseudo masks are, where enough of it is left.

    A region that purification would leave smaller than `min_area` counts as a whole: somebody vouches for it.

    Args:
        mask: `[H, W]` bool.
        tokens: the image's patch tokens.
        cfg: purification, minimum area and aggregation of the bank.

    Returns:
        The pooled vector `[C]` and the pixels it stands for.

    Raises:
        ConfigError: an empty region.
    """
    if not bool(mask.any()):
        raise ConfigError("region: got a mask without pixels, expected some; click inside a proposal")
    if cfg.purify.enabled:
        label_map = torch.full(mask.shape, IGNORE_INDEX, dtype=torch.uint8, device=mask.device)
        label_map[mask] = 1
        purified = purify(label_map, cfg.purify.kernel_size, cfg.purify.iterations) == 1
        if int(purified.sum()) >= max(cfg.min_area, 1):
            mask = purified
    weights = coverage(mask[None].to(tokens.tokens.device), tokens)
    if cfg.aggregation == "hard":
        hard = harden(weights)
        weights = hard if bool(hard.any()) else weights
    return aggregate(tokens.tokens, weights, normalize=False)[0], int(mask.sum())


def files_of(bank: Bank) -> dict[str, str]:
    """Image files by id, of the images that do not belong to the data set the bank was built from."""
    return dict(bank.info.get("files", {}))


def with_files(bank: Bank, files: Mapping[str, str]) -> Bank:
    """The bank with more entries of `files_of`."""
    return dataclasses.replace(bank, info=_with_files(bank.info, {**files_of(bank), **files}))


def _with_files(info: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    # `vectors`, `dim` and `counts` are written anew by `Bank.save`.
    kept = {k: v for k, v in info.items() if k not in ("files", "vectors", "dim", "counts")}
    return {**kept, "files": dict(files)} if files else kept


def _numbers(before: Sequence[str], after: Sequence[str]) -> Tensor:
    """`[len(before)]` int64: the new position of each name, -1 where it is gone."""
    position = {name: i for i, name in enumerate(after)}
    return torch.tensor([position.get(name, -1) for name in before], dtype=torch.int64)


def _check_same_making(first: Bank, other: Bank) -> None:
    if first.info.get("backbone_digest") != other.info.get("backbone_digest"):
        one, two = (str(b.info.get("backbone_digest"))[:12] for b in (first, other))
        raise ArtefactError(
            f"merge: the banks were made with backbone weights {one} and {two}, expected the same; build one of them "
            "again with the other's backbone"
        )
    if first.pooled.shape[1] != other.pooled.shape[1]:
        raise ArtefactError(
            f"merge: the banks have {first.pooled.shape[1]} and {other.pooled.shape[1]} channels, expected the same; "
            "build one of them again with the other's backbone"
        )
    one_flat, two_flat = (_deciding(bank) for bank in (first, other))
    for key in sorted(one_flat.keys() | two_flat.keys()):
        if one_flat.get(key) != two_flat.get(key):
            raise ArtefactError(
                f"merge: the banks were made with {key}={one_flat.get(key)!r} and {two_flat.get(key)!r}, expected the "
                "same; build one of them again with the other's settings"
            )


def _deciding(bank: Bank) -> dict[str, Any]:
    """The settings that have to agree, `group.key` -> value."""
    config = bank.info.get("config", {})
    settings = {"backbone": {k: v for k, v in config.get("backbone", {}).items() if k != "batch_size"}}
    settings["bank"] = {k: v for k, v in config.get("bank", {}).items() if k in _DECIDING}
    flat: dict[str, Any] = {}
    _flatten("", settings, flat)
    return flat


def _flatten(prefix: str, value: Any, into: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _flatten(f"{prefix}.{key}" if prefix else str(key), inner, into)
    else:
        into[prefix] = value
