"""Make banks from banks: remove classes, images and regions, merge banks, add single regions.

Nothing here runs a model or touches a file, and no bank is changed: every function returns a new one. The order is that
of a bank built from scratch: images in their order, the regions of an image by ascending class id; additions are
appended. So a bank of A with B added equals one built from the list A, B.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moduseg.bank.aggregation import aggregate, coverage, harden
from moduseg.bank.purification import purify
from moduseg.bank.store import Bank
from moduseg.config import BankConfig
from moduseg.errors import ArtefactError, ConfigError
from moduseg.structures import IGNORE_INDEX, TokenMap

log = logging.getLogger("moduseg")

MAX_CLASSES = 255
"""Largest number of class names for an 8-bit label map, background included; 255 is the ignored pixel."""
_STORED_SETTINGS = ("purify", "min_area", "aggregation", "regions", "flips", "parts")
"""Keys of the group `bank` that decide what is stored."""
_ABSENT_SETTINGS = {"flips": False, "parts": 0}
"""What banks did whose description was written before the key existed."""


def remove(bank: Bank, classes: Sequence[str] = (), images: Sequence[str] = (), rows: Sequence[int] = ()) -> Bank:
    """Return a bank without some classes, images and regions.

    Args:
        bank: the bank.
        classes: names; their regions and the names are removed, and the ids of later classes move up.
        images: ids of training images; their regions and the ids are removed.
        rows: regions, by their row in the bank.

    Raises:
        ConfigError: a name, an id or a row that the bank does not have, or the background's name.
    """
    for name in classes:
        if name not in bank.classes[1:]:
            names = ", ".join(bank.classes[1:]) or "none"
            raise ConfigError(f"class: got {name!r}, expected one of {names}; the background can only lose regions")
    for image_id in images:
        if image_id not in set(bank.image_ids):
            raise ConfigError(f"image: got {image_id!r}, expected an image of the bank; see scripts/bank.py info")
    for row in rows:
        if not 0 <= row < len(bank):
            raise ConfigError(f"region: got row {row}, expected 0..{len(bank) - 1}; see scripts/bank.py info")
    removed_labels = [bank.classes.index(name) for name in classes]
    removed_images = [i for i, image_id in enumerate(bank.image_ids) if image_id in set(images)]
    keep = ~torch.isin(bank.labels, torch.tensor(removed_labels, dtype=torch.int64))
    keep &= ~torch.isin(bank.image_index, torch.tensor(removed_images, dtype=torch.int64))
    keep[torch.tensor(list(rows), dtype=torch.int64)] = False
    kept_classes = tuple(name for name in bank.classes if name not in classes)
    kept_images = tuple(image_id for image_id in bank.image_ids if image_id not in set(images))
    new_label = _new_positions(bank.classes, kept_classes)
    new_image = _new_positions(bank.image_ids, kept_images)
    files = {i: f for i, f in files_of(bank).items() if i not in set(images)}
    return Bank(
        pooled=bank.pooled[keep],
        labels=new_label[bank.labels[keep]],
        image_index=new_image[bank.image_index[keep]],
        areas=bank.areas[keep],
        image_ids=kept_images,
        classes=kept_classes,
        info=_replace_files(bank.info, files),
        word_values=None if bank.word_values is None else bank.word_values[keep],
        is_trusted=None if bank.is_trusted is None else bank.is_trusted[keep],
    )


def merge(banks: Sequence[Bank]) -> Bank:
    """Merge banks that were made with one backbone and the same settings.

    Class lists are merged by name: those of the first bank keep their ids, new names follow in the order of the banks.
    The description (`info`) is that of the first.

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
        _check_compatible(first, bank)
        repeated = set(image_ids) & set(bank.image_ids)
        if repeated:
            raise ArtefactError(
                f"merge: image {min(repeated)!r} is in two banks ({len(repeated)} such), expected each image once; "
                "give the images of one bank a prefix with prefix=true, or remove them with scripts/bank.py remove "
                "image=<id>"
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
    trained_on = dict.fromkeys(str(bank.info["supervision"]) for bank in banks if bank.info.get("supervision"))
    supervision = {"supervision": "+".join(trained_on)} if trained_on else {}
    return Bank(
        pooled=torch.cat([bank.pooled for bank in banks]),
        labels=torch.cat(labels),
        image_index=torch.cat(index),
        areas=torch.cat([bank.areas for bank in banks]),
        image_ids=tuple(image_ids),
        classes=tuple(classes),
        info=_replace_files({**first.info, "label_source": "+".join(s for s in sources if s), **supervision}, files),
        word_values=_join_word_values(banks),
        is_trusted=_join_trust(banks),
    )


def align_classes(bank: Bank, aggregation: str, classes: Sequence[str], *, needs_vectors: bool = True) -> Bank:
    """Return a bank that `bank.path` names with the ids of the data set's classes.

    Args:
        bank: the stored bank.
        aggregation: how the vectors of the queries are pooled (`bank.aggregation`).
        classes: names of the data set's classes, background first.
        needs_vectors: whether a class without a vector cannot be found, which is warned of; words find it.

    Raises:
        ArtefactError: the bank has a class that the data set lacks, or its vectors are pooled in another way.
    """
    bank_aggregation = bank.info.get("config", {}).get("bank", {}).get("aggregation", aggregation)
    if bank_aggregation != aggregation:
        raise ArtefactError(
            f"bank.path: the bank was made with bank.aggregation={bank_aggregation}, got {aggregation}; set "
            f"bank.aggregation={bank_aggregation}"
        )
    missing = [name for name in classes if bank.counts.get(name, 0) == 0]
    if missing and needs_vectors:
        log.warning("infer: the bank has no vector for %s; no pixel can get these labels", ", ".join(missing))
    return remap_classes(bank, classes)


def remap_classes(bank: Bank, classes: Sequence[str]) -> Bank:
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


def prefix_images(bank: Bank, prefix: str) -> Bank:
    """Return the bank with `<prefix>/` before every image id."""
    files = {f"{prefix}/{image_id}": file for image_id, file in files_of(bank).items()}
    ids = tuple(f"{prefix}/{image_id}" for image_id in bank.image_ids)
    return dataclasses.replace(bank, image_ids=ids, info=_replace_files(bank.info, files))


def append_classes(classes: Sequence[str], new: Sequence[str]) -> tuple[str, ...]:
    """Return `classes` with the missing names of `new` appended.

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


def append_words(bank: Bank, names: Sequence[str]) -> Bank:
    """Return a bank that knows more classes by their names alone; it gets no region.

    Args:
        bank: a bank with word values.
        names: classes that the bank does not have, appended in this order.

    Raises:
        ArtefactError: the bank has no word values, so that no pixel could get these classes.
        ConfigError: a name that the bank has, an empty one, or too many classes.
    """
    if bank.word_values is None:
        raise ArtefactError(
            "words: the bank has no word values, so a class needs images; set images=<folder> new=<name>, or build the "
            "bank with retrieval.answer=words"
        )
    for name in names:
        if name in bank.classes:
            raise ConfigError(f"words: got {name!r}, which is a class of the bank already; leave it out")
    return dataclasses.replace(
        bank, classes=append_classes(bank.classes, names), info=_replace_files(bank.info, files_of(bank))
    )


def correct_region(bank: Bank, image_id: str, class_name: str, pooled: Tensor, area: int) -> Bank:
    """Return a copy of the bank with a region that a person named: it is trusted (`moduseg.retrieval.trust`).

    A region that was named before, whose vector is the same, has the new name alone.

    Args:
        bank: the bank.
        image_id, class_name, area: as for `add_region`.
        pooled: `[C]` float, the vector with which the region was labelled (a row of `Observation.pooled`), so that it
            is found again.

    Raises:
        ConfigError: as for `add_region`, or a vector of zeros, which resembles nothing.
    """
    vector = pooled.detach().float().cpu()
    if not bool(vector.any()):
        raise ConfigError("region: got a vector of zeros, expected one with a direction; name a larger region")
    if bank.is_trusted is not None and vector.shape == bank.pooled.shape[1:]:
        trusted_rows = bank.is_trusted.nonzero()[:, 0]
        is_same = (bank.pooled[trusted_rows] == vector).all(1)
        if bool(is_same.any()):
            bank = remove(bank, rows=trusted_rows[is_same].tolist())
    trusted = torch.zeros(len(bank), dtype=torch.bool) if bank.is_trusted is None else bank.is_trusted
    added = add_region(dataclasses.replace(bank, is_trusted=None), image_id, class_name, vector, area)
    return dataclasses.replace(added, is_trusted=torch.cat((trusted, torch.ones(1, dtype=torch.bool))))


def add_region(bank: Bank, image_id: str, class_name: str, pooled: Tensor, area: int) -> Bank:
    """Return a copy of the bank with one region appended; in a bank with word values it has none.

    Args:
        bank: the bank.
        image_id: the image of the region; a new one is appended.
        class_name: the class of the region; a new one is appended.
        pooled: `[C]` float, the pooled vector before normalisation.
        area: pixels of the region.

    Raises:
        ConfigError: a vector of another length, an empty class name, or too many classes.
    """
    if pooled.shape != bank.pooled.shape[1:]:
        raise ConfigError(f"region: got a vector of {tuple(pooled.shape)}, expected ({bank.pooled.shape[1]},)")
    classes = append_classes(bank.classes, [class_name])
    ids = tuple(dict.fromkeys([*bank.image_ids, image_id]))
    return dataclasses.replace(
        bank,
        pooled=torch.cat([bank.pooled, pooled.detach().float().cpu()[None]]),
        labels=torch.cat([bank.labels, torch.tensor([classes.index(class_name)])]),
        image_index=torch.cat([bank.image_index, torch.tensor([ids.index(image_id)])]),
        areas=torch.cat([bank.areas, torch.tensor([int(area)])]),
        image_ids=ids,
        classes=classes,
        word_values=None if bank.word_values is None else functional.pad(bank.word_values, (0, 0, 0, 1)),
        is_trusted=None if bank.is_trusted is None else functional.pad(bank.is_trusted, (0, 1)),
    )


def pool_region(mask: Tensor, tokens: TokenMap, cfg: BankConfig) -> tuple[Tensor, int]:
    """Pool the vector of one region drawn by hand, purified as pseudo masks are if enough of it is left.

    A region that purification would leave smaller than `min_area` is not purified, because a person vouches for it.

    Args:
        mask: `[H, W]` bool.
        tokens: the image's patch tokens.
        cfg: purification, minimum area and aggregation of the bank.

    Returns:
        The pooled vector `[C]` and the number of pixels that it stands for.

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
    """Return the image files by id of the images outside the data set that the bank was built from."""
    return dict(bank.info.get("files", {}))


def append_files(bank: Bank, files: Mapping[str, str]) -> Bank:
    """Return the bank with more image files by id, which `files_of` then has too."""
    return dataclasses.replace(bank, info=_replace_files(bank.info, {**files_of(bank), **files}))


def _replace_files(info: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    # `Bank.save` computes `vectors`, `dim` and `counts`.
    kept = {k: v for k, v in info.items() if k not in ("files", "vectors", "dim", "counts")}
    return {**kept, "files": dict(files)} if files else kept


def _new_positions(before: Sequence[str], after: Sequence[str]) -> Tensor:
    """Return `[len(before)]` int64: the new position of each name, -1 if it was removed."""
    position = {name: i for i, name in enumerate(after)}
    return torch.tensor([position.get(name, -1) for name in before], dtype=torch.int64)


def _join_word_values(banks: Sequence[Bank]) -> Tensor | None:
    """Return the word values of all banks, which all have them or all have none: then `None`."""
    values = [bank.word_values for bank in banks if bank.word_values is not None]
    return torch.cat(values) if values else None


def _join_trust(banks: Sequence[Bank]) -> Tensor | None:
    """Return which regions of all banks a person named; `None` for none."""
    if all(bank.is_trusted is None for bank in banks):
        return None
    none = (torch.zeros(len(bank), dtype=torch.bool) for bank in banks)
    return torch.cat([n if bank.is_trusted is None else bank.is_trusted for bank, n in zip(banks, none, strict=True)])


def _check_compatible(first: Bank, other: Bank) -> None:
    if first.info.get("backbone_digest") != other.info.get("backbone_digest"):
        digests = " and ".join(str(bank.info.get("backbone_digest"))[:12] for bank in (first, other))
        raise ArtefactError(
            f"merge: the banks were made with backbone weights {digests}, expected the same; build one of them "
            "again with the other's backbone"
        )
    if first.pooled.shape[1] != other.pooled.shape[1]:
        raise ArtefactError(
            f"merge: the banks have {first.pooled.shape[1]} and {other.pooled.shape[1]} channels, expected the same; "
            "build one of them again with the other's backbone"
        )
    clips = [str(bank.info.get("word_values_digest"))[:12] for bank in (first, other)]
    if clips[0] != clips[1]:
        raise ArtefactError(
            f"merge: the banks have word values of the CLIPs {' and '.join(clips)}, expected the same; "
            "build one of them again with the other's pseudo_masks.generator and retrieval.answer"
        )
    settings, others = (_stored_settings(bank) for bank in (first, other))
    for key in sorted(settings.keys() | others.keys()):
        if settings.get(key) != others.get(key):
            raise ArtefactError(
                f"merge: the banks were made with {key}={settings.get(key)!r} and {others.get(key)!r}, expected the "
                "same; build one of them again with the other's settings"
            )


def _stored_settings(bank: Bank) -> dict[str, Any]:
    """Return the settings that have to agree, `group.key` -> value."""
    config = bank.info.get("config", {})
    backbone = {key: value for key, value in config.get("backbone", {}).items() if key != "batch_size"}
    described = _ABSENT_SETTINGS | config.get("bank", {})
    stored = {key: value for key, value in described.items() if key in _STORED_SETTINGS}
    return _flatten({"backbone": backbone, "bank": stored})


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
