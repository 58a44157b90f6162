"""The bank on disk and in memory.

Stored are the pooled vectors before normalisation and before the outlier filter (docs/method.md, known traps), so that
centring, the filter and class subsets are switches of the reader and run no model.
"""

from __future__ import annotations

import json
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
from moduseg.bank.prototypes import class_prototypes
from moduseg.bank.subset import rows_of_images_per_class
from moduseg.config import BankConfig, OutliersConfig
from moduseg.errors import ArtefactError, ConfigError, DataError
from moduseg.files import read_json, write_atomic, write_json

_TENSORS = ("pooled", "labels", "image_index", "areas")


@dataclass(frozen=True)
class SearchBank:
    """What queries are compared with.

    Attributes:
        vectors: `[M, C]` float32, L2-normalised.
        labels: `[M]` int64, 0 background.
        rows: `[M]` int64, the row of the stored bank that each vector came from.
        centre: `[C]` float32 subtracted before the normalisation, from queries as well; `None` where not centred.
    """

    vectors: Tensor
    labels: Tensor
    rows: Tensor
    centre: Tensor | None

    def to(self, device: torch.device) -> SearchBank:
        """The same bank on another device."""
        centre = None if self.centre is None else self.centre.to(device)
        return SearchBank(self.vectors.to(device), self.labels.to(device), self.rows.to(device), centre)


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
    """

    pooled: Tensor
    labels: Tensor
    image_index: Tensor
    areas: Tensor
    image_ids: tuple[str, ...]
    classes: tuple[str, ...]
    info: Mapping[str, Any]

    def __post_init__(self) -> None:
        rows = len(self.pooled)
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
        """Vectors of each class by name."""
        counted = torch.bincount(self.labels, minlength=len(self.classes)).tolist()
        return dict(zip(self.classes, counted, strict=True))

    def save(self, folder: Path) -> None:
        """Write `bank.safetensors` and `bank.json`; equal banks give equal bytes."""
        write_atomic(folder / "bank.safetensors", save({n: getattr(self, n).contiguous().cpu() for n in _TENSORS}))
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
            ArtefactError: a file is missing or damaged, or the two do not fit each other.
        """
        path = folder / "bank.safetensors"
        try:
            tensors = load(path.read_bytes())
            info = dict(read_json(folder / "bank.json"))
            image_ids, classes = tuple(info.pop("image_ids")), tuple(info.pop("classes"))
            values = {name: tensors[name] for name in _TENSORS}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, json.JSONDecodeError) as error:
            raise ArtefactError(
                f"{path}: not readable as a bank ({error}); remove {folder} and build it again"
            ) from error
        return Bank(**values, image_ids=image_ids, classes=classes, info=info)

    def check_fits(self, backbone_digest: str, dim: int, classes: Sequence[str]) -> None:
        """Refuse a bank of another backbone or class list.

        Raises:
            ArtefactError: which of the two differs, and what to do.
        """
        got = self.info.get("backbone_digest")
        if got != backbone_digest or self.pooled.shape[1] != dim:
            raise ArtefactError(
                f"bank: made with backbone weights {str(got)[:12]} ({self.pooled.shape[1]} channels), expected "
                f"{backbone_digest[:12]} ({dim} channels); use the bank's backbone or build a bank with this one"
            )
        if tuple(classes) != self.classes:
            raise ArtefactError(
                f"bank: made for {len(self.classes)} classes {_shorten(self.classes)}, expected {len(classes)} "
                f"{_shorten(tuple(classes))}; use the bank's data set or build a bank for this one"
            )

    def configured(self, settings: BankConfig) -> SearchBank:
        """The bank to search: `for_search`, then the named classes alone, then prototypes.

        Args:
            settings: of these, what is applied when the bank is read.

        Raises:
            ConfigError: `classes` names one that the bank does not know.
        """
        found = self.for_search(
            settings.centre,
            settings.outliers,
            settings.shuffle_labels,
            settings.images_per_class,
            settings.images_seed,
        )
        if settings.classes is not None:
            unknown = [name for name in settings.classes if name not in self.classes]
            if unknown:
                raise ConfigError(
                    f"bank.classes: got {', '.join(unknown)}, expected some of {', '.join(self.classes)}; try null"
                )
            wanted = torch.tensor([0, *(self.classes.index(name) for name in settings.classes)])
            keep = torch.isin(found.labels, wanted.to(found.labels.device))
            found = SearchBank(found.vectors[keep], found.labels[keep], found.rows[keep], found.centre)
        if settings.prototypes is not None:
            vectors, labels, members = class_prototypes(found.vectors, found.labels, settings.prototypes)
            found = SearchBank(vectors, labels, found.rows[members], found.centre)
        return found

    def for_search(
        self,
        centre: bool,
        outliers: OutliersConfig,
        shuffle_labels: int | None = None,
        images_per_class: int | None = None,
        images_seed: int = 0,
    ) -> SearchBank:
        """Choose images, centre, normalise and filter (docs/method.md, steps 3 and 4).

        Args:
            centre: subtract the mean of all vectors (of the chosen images) before normalising; CNN features need it.
            outliers: drop the farthest vectors of each class.
            shuffle_labels: seed of a permutation of the labels, the control experiment; `None` keeps them.
            images_per_class: take so many images of each class alone, see `rows_of_images_per_class`; `None` is all.
            images_seed: which ones.
        """
        labels, pooled, chosen = self.labels, self.pooled, torch.arange(len(self), device=self.labels.device)
        if images_per_class is not None:
            chosen = rows_of_images_per_class(labels, self.image_index, self.image_ids, images_per_class, images_seed)
            labels, pooled = labels[chosen], pooled[chosen]
        if shuffle_labels is not None:
            labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(shuffle_labels))]
        mean = pooled.mean(0) if centre and len(pooled) else None
        vectors = functional.normalize(pooled if mean is None else pooled - mean, dim=1)
        keep = []
        for label in range(len(self.classes)):
            rows = torch.nonzero(labels == label).flatten()
            ratio = outliers.drop_ratio if label else outliers.drop_ratio_background
            if outliers.enabled and len(rows):
                rows = rows[nearest_to_centre(vectors[rows], ratio)]
            keep.append(rows)
        rows = torch.cat(keep).sort().values if keep else torch.empty(0, dtype=torch.int64)
        return SearchBank(vectors[rows], labels[rows], chosen[rows], mean)


def read_vectors(path: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors that a stage stored for one image, of equal length.

    Args:
        path: a file below `vectors/` of an artefact.
        names: `pooled` (`[N, C]` float32) and, of training images, `labels` and `areas` (`[N]` int64).

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        found = load(path.read_bytes())
        entry = {name: found[name] for name in names}
        lengths = {len(tensor) for tensor in entry.values()}
        if (
            len(lengths) != 1
            or entry["pooled"].ndim != 2
            or any(t.ndim != 1 for n, t in entry.items() if n != "pooled")
        ):
            raise ValueError(f"shapes {[tuple(tensor.shape) for tensor in entry.values()]}")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise DataError(
            f"{path}: not readable as vectors ({why}); run again with runtime.verify=true, which makes it anew"
        ) from error
    return entry


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"[{shown}, ...]" if len(names) > 4 else f"[{shown}]"
