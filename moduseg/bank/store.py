"""The bank on disk and in memory.

The pooled vectors are stored before normalisation and before the outlier filter (docs/method.md, known traps), so that
centring, the filter and class subsets are settings of the reader and run no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional

from moduseg.bank.outliers import nearest_to_centre
from moduseg.bank.prototypes import find_prototypes
from moduseg.bank.subset import choose_rows
from moduseg.config import BankConfig, OutliersConfig
from moduseg.errors import ArtefactError, ConfigError, DataError
from moduseg.files import read_json, write_atomic, write_json
from moduseg.structures import SearchBank

_TENSORS = ("pooled", "labels", "image_index", "areas")
_WORD_VALUES = "word_values"
_TRUSTED = "is_trusted"
_FLOATS = ("pooled", _WORD_VALUES)
"""Tensors of one row a region, `[B, C]` or `[B, D]` float32; the others are `[B]` int64, and `is_trusted` bool."""


@dataclass(frozen=True)
class Bank:
    """One vector for each (image, class) of the training set.

    Attributes:
        pooled: `[B, C]` float32, soft-mask pooled tokens, not normalised.
        labels: `[B]` int64, 0 background, 1..num_classes.
        image_index: `[B]` int64, into `image_ids`.
        areas: `[B]` int64, pixels of the purified region.
        image_ids: the training images, in the order of the data set.
        classes: class names, background first.
        info: what the vectors were made with (`backbone`, `backbone_digest`, `config`, ...), JSON values.
        word_values: `[B, D]` float32, the CLIP feature of each region, of length 1; all zero for a region without.
            `None` in a bank that was not built for `retrieval.answer=words`.
        is_trusted: `[B]` bool, regions that a person named, which decide as `moduseg.retrieval.trust` says; `None` for
            none.
    """

    pooled: Tensor
    labels: Tensor
    image_index: Tensor
    areas: Tensor
    image_ids: tuple[str, ...]
    classes: tuple[str, ...]
    info: Mapping[str, Any]
    word_values: Tensor | None = None
    is_trusted: Tensor | None = None

    def __post_init__(self) -> None:
        rows = len(self.pooled)
        if self.word_values is not None and (self.word_values.ndim != 2 or len(self.word_values) != rows):
            raise ArtefactError(
                f"bank: got word values {tuple(self.word_values.shape)}, expected ({rows}, D); build the bank again"
            )
        if self.is_trusted is not None and (self.is_trusted.shape != (rows,) or self.is_trusted.dtype != torch.bool):
            raise ArtefactError(
                f"bank: got is_trusted {tuple(self.is_trusted.shape)} {self.is_trusted.dtype}, expected ({rows},) bool;"
                " build the bank again"
            )
        if self.pooled.ndim != 2 or any(getattr(self, n).shape != (rows,) for n in _TENSORS[1:]):
            shapes = {name: tuple(getattr(self, name).shape) for name in _TENSORS}
            raise ArtefactError(f"bank: got {shapes}, expected [B, C] and three times [B]; build the bank again")
        if rows and not (int(self.labels.min()) >= 0 and int(self.labels.max()) < len(self.classes)):
            raise ArtefactError(
                f"bank: got labels {int(self.labels.min())}..{int(self.labels.max())}, expected 0.."
                f"{len(self.classes) - 1} for {len(self.classes)} classes; build the bank again"
            )
        if rows and not (int(self.image_index.min()) >= 0 and int(self.image_index.max()) < len(self.image_ids)):
            raise ArtefactError("bank: an image index is out of range; build the bank again")

    def __len__(self) -> int:
        return len(self.pooled)

    @property
    def counts(self) -> dict[str, int]:
        """Number of vectors of each class, by name."""
        counts = torch.bincount(self.labels, minlength=len(self.classes)).tolist()
        return dict(zip(self.classes, counts, strict=True))

    @property
    def colours(self) -> dict[str, str]:
        """Colours of one's own in which classes are shown, name -> `#rrggbb`, as the class list named them."""
        named = self.info.get("colours", {})
        # A bank may come from a stranger.
        return {
            str(name): colour
            for name, colour in (named.items() if isinstance(named, Mapping) else ())
            if isinstance(colour, str) and re.fullmatch("#[0-9a-fA-F]{6}", colour)
        }

    def save(self, folder: Path) -> None:
        """Write `bank.safetensors` and `bank.json`; equal banks give equal bytes."""
        names = (*_TENSORS, *(name for name in (_WORD_VALUES, _TRUSTED) if getattr(self, name) is not None))
        write_atomic(folder / "bank.safetensors", save({n: getattr(self, n).contiguous().cpu() for n in names}))
        write_json(
            folder / "bank.json",
            {
                "classes": list(self.classes),
                "vectors": len(self),
                "dim": self.pooled.shape[1],
                "counts": self.counts,
                "image_ids": list(self.image_ids),
                **self.info,
            },
        )

    @staticmethod
    def load(folder: Path) -> Bank:
        """Read what `save` wrote.

        Raises:
            ArtefactError: a file is missing or damaged, holds NaN or infinity, or the two do not fit each other.
        """
        path = folder / "bank.safetensors"
        try:
            tensors = load(path.read_bytes())
            info = dict(read_json(folder / "bank.json"))
            image_ids, classes = tuple(info.pop("image_ids")), tuple(info.pop("classes"))
            optional = (name for name in (_WORD_VALUES, _TRUSTED) if name in tensors)
            values = {name: tensors[name] for name in (*_TENSORS, *optional)}
            _check_values(values, [*image_ids, *classes])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, json.JSONDecodeError) as error:
            raise ArtefactError(
                f"{path}: not readable as a bank ({error}); remove {folder} and build it again"
            ) from error
        return Bank(**values, image_ids=image_ids, classes=classes, info=info)

    def check_fits(self, backbone_digest: str, dim: int, classes: Sequence[str]) -> None:
        """Check that the bank was made with this backbone and class list.

        Raises:
            ArtefactError: one of them differs; the message says which and what to do.
        """
        bank_digest = self.info.get("backbone_digest")
        if bank_digest != backbone_digest or self.pooled.shape[1] != dim:
            raise ArtefactError(
                f"bank: made with backbone weights {str(bank_digest)[:12]} ({self.pooled.shape[1]} channels), expected "
                f"{backbone_digest[:12]} ({dim} channels); use the bank's backbone or build a bank with this one"
            )
        if tuple(classes) != self.classes:
            raise ArtefactError(
                f"bank: made for {len(self.classes)} classes {_shorten(self.classes)}, expected {len(classes)} "
                f"{_shorten(tuple(classes))}; use the bank's data set or build a bank for this one"
            )

    def check_words_fit(self, digest: str) -> None:
        """Check that the bank has word values, made with this CLIP.

        Raises:
            ArtefactError: it has none, or those of another one.
        """
        if self.word_values is None:
            raise ArtefactError(
                "bank: has no word values, expected them with retrieval.answer=words; build it with "
                "retrieval.answer=words, or set retrieval.answer=labels"
            )
        bank_digest = self.info.get("word_values_digest")
        if bank_digest != digest:
            raise ArtefactError(
                f"bank: has word values of the CLIP {str(bank_digest)[:12]}, expected {digest[:12]}; use the "
                "pseudo_masks.generator that the bank was built with, or build it again"
            )

    def configured(self, settings: BankConfig) -> SearchBank:
        """Return the bank to search: `select_vectors`, then only the named classes, then prototypes.

        Args:
            settings: the group `bank`; settings that decide the stored vectors are not read here.

        Raises:
            ConfigError: `classes` names one that the bank does not have.
        """
        search = self.select_vectors(
            settings.centre,
            settings.outliers,
            shuffle_labels=settings.shuffle_labels,
            images_per_class=settings.images_per_class,
            images_seed=settings.images_seed,
        )
        if settings.classes is not None:
            unknown = [name for name in settings.classes if name not in self.classes]
            if unknown:
                raise ConfigError(
                    f"bank.classes: got {', '.join(unknown)}, expected some of {', '.join(self.classes)}; try null"
                )
            wanted = torch.tensor([0, *(self.classes.index(name) for name in settings.classes)])
            search = search.select(torch.isin(search.labels, wanted.to(search.labels.device)))
        return search if settings.prototypes is None else _replace_by_prototypes(search, settings.prototypes)

    def select_vectors(
        self,
        centre: bool,
        outliers: OutliersConfig,
        *,
        shuffle_labels: int | None = None,
        images_per_class: int | None = None,
        images_seed: int = 0,
    ) -> SearchBank:
        """Choose images, centre, normalise and filter (docs/method.md, steps 3 and 4).

        Trusted vectors are kept in any case, and decide neither the centre nor which others are dropped.

        Args:
            centre: subtract the mean of all vectors (of the chosen images) before normalising; CNN features need it.
            outliers: drop the farthest vectors of each class.
            shuffle_labels: seed of a permutation of the labels, the control experiment; `None` keeps them.
            images_per_class: use only so many images of each class, chosen by `choose_rows`; `None` uses all.
            images_seed: seed of that choice.
        """
        labels, pooled, chosen_rows = self.labels, self.pooled, torch.arange(len(self), device=self.labels.device)
        if images_per_class is not None:
            chosen_rows = choose_rows(labels, self.image_index, self.image_ids, images_per_class, images_seed)
            labels, pooled = labels[chosen_rows], pooled[chosen_rows]
        if shuffle_labels is not None:
            labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(shuffle_labels))]
        trusted = None if self.is_trusted is None else self.is_trusted[chosen_rows]
        others = pooled if trusted is None or bool(trusted.all()) else pooled[~trusted]
        mean = others.mean(0) if centre and len(others) > (trusted is not None) else None
        vectors = functional.normalize(pooled if mean is None else pooled - mean, dim=1)
        kept_rows = []
        for label in range(len(self.classes)):
            rows = torch.nonzero(labels == label if trusted is None else (labels == label) & ~trusted).flatten()
            ratio = outliers.drop_ratio if label else outliers.drop_ratio_background
            if outliers.enabled and len(rows):
                rows = rows[nearest_to_centre(vectors[rows], ratio)]
            kept_rows.append(rows)
        kept_rows += [] if trusted is None else [trusted.nonzero()[:, 0]]
        rows = torch.cat(kept_rows).sort().values if kept_rows else torch.empty(0, dtype=torch.int64)
        stored_rows = chosen_rows[rows]
        values = None if self.word_values is None else self.word_values[stored_rows]
        is_trusted = None if trusted is None else trusted[rows]
        return SearchBank(vectors[rows], labels[rows], stored_rows, mean, values, is_trusted)


def _replace_by_prototypes(search: SearchBank, count: int) -> SearchBank:
    """Return a bank of a few centres for each class, and of the trusted vectors as they are."""
    trusted = search.is_trusted
    others = search if trusted is None else search.select(~trusted)
    centres = find_prototypes(others.vectors, others.labels, count)
    vectors, labels, rows = centres.vectors, centres.labels, others.rows[centres.members]
    if trusted is None:
        return SearchBank(vectors, labels, rows, search.centre)
    named = search.select(trusted)
    is_trusted = torch.cat((torch.zeros_like(labels, dtype=torch.bool), trusted[trusted]))
    return SearchBank(
        torch.cat((vectors, named.vectors)),
        torch.cat((labels, named.labels)),
        torch.cat((rows, named.rows)),
        search.centre,
        is_trusted=is_trusted,
    )


def encode_vectors(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the bytes of a file that `read_vectors` reads; the tensors may be on any device."""
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


def read_vectors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Read the tensors that a stage stored for one image.

    Args:
        path: a file below `vectors/` of an artefact.
        names: `pooled` (`[N, C]` float32), of training images `labels` and `areas` (`[N]` int64), and where proposals
            are labelled by words `word_values` (`[N, D]` float32).

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        stored = load(path.read_bytes())
        tensors = {name: stored[name] for name in names}
        lengths = {len(tensor) for tensor in tensors.values()}
        if len(lengths) != 1 or any(tensor.ndim != (2 if n in _FLOATS else 1) for n, tensor in tensors.items()):
            raise ValueError(f"shapes {[tuple(tensor.shape) for tensor in tensors.values()]}")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise DataError(
            f"{path}: not readable as vectors ({why}); run again with runtime.verify=true, which makes it again"
        ) from error
    return tensors


def _check_values(tensors: Mapping[str, Tensor], names: Sequence[Any]) -> None:
    """Raise `ValueError` for tensors and names that no bank holds, whoever wrote the files."""
    for name, tensor in tensors.items():
        expected = torch.float32 if name in _FLOATS else torch.bool if name == _TRUSTED else torch.int64
        if tensor.dtype != expected:
            raise ValueError(f"{name} is {tensor.dtype}, expected {expected}")
    if _WORD_VALUES in tensors and not bool(torch.isfinite(tensors[_WORD_VALUES]).all()):
        raise ValueError("word_values hold NaN or infinity")
    # A NaN would be every query's nearest neighbour, or none's, as the search happens to compare.
    if not bool(torch.isfinite(tensors["pooled"]).all()):
        rows = (~torch.isfinite(tensors["pooled"]).all(1)).nonzero()[:, 0].tolist()
        raise ValueError(f"{len(rows)} vectors hold NaN or infinity, the first in row {rows[0]}")
    if not all(isinstance(name, str) for name in names):
        raise ValueError("image_ids and classes have to be text")


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"[{shown}, ...]" if len(names) > 4 else f"[{shown}]"
