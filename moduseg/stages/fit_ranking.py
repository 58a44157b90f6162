"""Stage `fit_ranking`: bank + proposals of the training images -> the ranking of `retrieval.selection=learnt`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.nn import functional

from moduseg.bank.store import Bank, encode_vectors
from moduseg.errors import ConfigError, DataError
from moduseg.files import file_digest, to_json_values, write_atomic
from moduseg.masks.cells import Cells
from moduseg.masks.encoded import WaitingProposals, decode
from moduseg.masks.shapes import SHAPES, describe_shapes
from moduseg.pipeline.batches import Files, Outcome
from moduseg.pipeline.manifests import StageFolder, stored_name
from moduseg.pipeline.stage import Stage, skipped_images
from moduseg.retrieval.balance import ClassIndex
from moduseg.retrieval.ranking import RANKING_FILE, Examples, fit_ranking
from moduseg.retrieval.selection import NEAREST, compute_margins, compute_worths, select_masks
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.queries import Queries
from moduseg.structures import Proposals, SearchBank

_MAX_EXAMPLES = 50_000
"""Proposals that the fit looks at, evenly spaced over all: bounds its memory and time."""
Item = tuple[str, WaitingProposals, Tensor, tuple[int, ...] | None]


class FitRanking(Stage[Item]):
    """Fits the ranking of a bank. An item is a training image's id, its proposals, their vectors and its tags.

    Each training image is labelled by `selection=margin` from a bank without its own regions, restricted to its tags;
    what its proposals consist of is measured on that label map. No ground truth is read. The folder holds
    `examples/<id>.safetensors`, `ranking.safetensors`, `failures.jsonl` and `manifest.json`; the ranking is written
    into the bank's folder as well, where `predict` and `Segmenter` find it.
    """

    name = "fit_ranking"
    uses = "train"

    @property
    def title(self) -> str:
        """Text of the progress bar."""
        return f"fit ranking {self.split}"

    def inputs(self) -> dict[str, Stage[Any]]:
        """Return `build_bank` and the `queries` of the training split.

        Raises:
            ConfigError: prototypes, whose centres are made of the very images that the ranking is fitted on.
        """
        if self.cfg.bank.prototypes is not None:
            raise ConfigError(
                f"bank.prototypes: got {self.cfg.bank.prototypes}, expected null with retrieval.selection=learnt, "
                "whose ranking is fitted with a bank that lacks the image it looks at, while a centre has vectors of "
                "many; set bank.prototypes=null, or retrieval.selection=margin"
            )
        return {"build_bank": BuildBank(self.work), "queries": Queries(self.work, self.split)}

    @property
    def has_known_key(self) -> bool:
        """Whether the bank is there, whose content is part of the key."""
        return StageFolder(self.input_folders["build_bank"].path).is_complete

    @cached_property
    def proposals(self) -> StageFolder:
        """The proposals that the queries were made from."""
        return self.input_folders["queries"].inputs["propose"]

    @cached_property
    def stored_bank(self) -> Bank:
        """The bank as it is stored."""
        return Bank.load(self.input_folders["build_bank"].path)

    @cached_property
    def searched_bank(self) -> SearchBank:
        """The bank as the configuration reads it, on the CPU."""
        return self.stored_bank.configured(self.cfg.searched_bank)

    def folder_name(self) -> str:
        """Return the readable part of the folder's name."""
        return f"{self.cfg.backbone['name']}-{self.split}"

    def key(self) -> dict[str, Any]:
        """Return everything that decides the ranking: of `retrieval` what lets a proposal through.

        The tags are part of the data set's fingerprint.
        """
        bank_path, bank, retrieval = self.input_folders["build_bank"].path, self.cfg.bank, self.cfg.retrieval
        return {
            "dataset": self.work.dataset_parts(self.split),
            "queries": self.input_folders["queries"].name,
            "bank_sha256": file_digest(bank_path / "bank.safetensors"),
            "centre": bank.centre,
            "outliers": to_json_values(vars(bank.outliers)),
            "subset": to_json_values(
                [bank.images_per_class, bank.images_seed, bank.classes, bank.prototypes, bank.shuffle_labels]
            ),
            "limits": [retrieval.min_area, retrieval.min_predicted_iou],
            "version": 1,
        }

    def load(self, image_id: str) -> Item:
        """Return an image's proposals, their vectors and its tags; `None` for tags that are unknown."""
        proposals = self.proposals.waiting_proposals(image_id, self.dataset.image_size(image_id))
        pooled = self.input_folders["queries"].vectors(image_id)["pooled"]
        if len(pooled) != len(proposals):
            raise DataError(
                f"{image_id}: {len(pooled)} query vectors for {len(proposals)} proposals; remove "
                f"{self.input_folders['queries'].path} and run again"
            )
        return image_id, proposals, pooled, self.dataset.labels_of(image_id)

    def process(self, items: list[Item]) -> list[Files]:
        """Return what there is to learn from each of several images."""
        # One image's masks are in memory at a time.
        return [
            self._make_examples(image_id, decode(waiting), pooled, tags) for image_id, waiting, pooled, tags in items
        ]

    def reads(self, image_id: str) -> list[Path]:
        """Return the files of the image's proposals and their vectors."""
        return [self.proposals.file("proposals", image_id), self.input_folders["queries"].file("vectors", image_id)]

    def skipped(self) -> dict[str, str]:
        """Return the images without proposals or queries; those that the bank lacks teach all the same."""
        return skipped_images({"propose": self.proposals, "queries": self.input_folders["queries"]})

    def merge(self, outcome: Outcome) -> dict[str, Any]:
        """Fit the ranking, unless that is done, and write it beside the bank as well."""
        file, stored = self.artefact.path / RANKING_FILE, self.artefact.manifest.get("ranking_sha256")
        if outcome.changed or not file.is_file() or file_digest(file) != stored:
            is_centred = self.searched_bank.centre is not None
            fit_ranking(self._read_examples(outcome.failed), self.dataset.classes, is_centred=is_centred).save(file)
        copy = self.input_folders["build_bank"].path / RANKING_FILE
        if not copy.is_file() or file_digest(copy) != file_digest(file):
            write_atomic(copy, file.read_bytes())
        return {"ranking_sha256": file_digest(file)}

    def _make_examples(
        self, image_id: str, proposals: Proposals, pooled: Tensor, tags: tuple[int, ...] | None
    ) -> Files:
        """Return the file of what an image teaches: vectors, shapes and what its proposals consist of."""
        settings, bank = self.cfg.retrieval, self._hold_out(image_id)
        keep = (proposals.areas >= settings.min_area) & (proposals.predicted_iou >= settings.min_predicted_iou)
        keep &= (pooled != 0).any(1)
        proposals, pooled = proposals.select(keep), pooled[keep]
        queries = functional.normalize(pooled if bank.centre is None else pooled - bank.centre, dim=1)
        label_map = _label_by_margin(proposals, queries, bank, tags)
        masks = proposals.masks.numpy()
        counts = [np.bincount(label_map[mask], minlength=len(self.dataset.classes)) for mask in masks]
        shares = (
            np.stack(counts) / proposals.areas.numpy()[:, None] if counts else np.zeros((0, len(self.dataset.classes)))
        )
        tensors = {
            "queries": queries,
            "shapes": torch.from_numpy(describe_shapes(masks)),
            "shares": torch.from_numpy(shares.astype(np.float32)),
        }
        return {stored_name("examples", image_id): partial(encode_vectors, tensors)}

    def _hold_out(self, image_id: str) -> SearchBank:
        """Return the bank without the regions of an image."""
        stored, bank = self.stored_bank, self.searched_bank
        if image_id not in self._index_of_image:
            return bank
        return bank.select((stored.image_index[bank.rows] != self._index_of_image[image_id]).nonzero()[:, 0])

    @cached_property
    def _index_of_image(self) -> dict[str, int]:
        return {image_id: index for index, image_id in enumerate(self.stored_bank.image_ids)}

    def _read_examples(self, failed: Mapping[str, str]) -> Examples:
        """Return what all images teach, `_MAX_EXAMPLES` proposals at most, evenly spaced over the images."""
        folder, dim = StageFolder(self.artefact.path), self.stored_bank.pooled.shape[1]
        ids = [image_id for image_id in self.image_ids() if image_id not in failed]
        step = max(1, -(-sum(_read_example(folder, i)["shapes"].shape[0] for i in ids) // _MAX_EXAMPLES))
        columns: dict[str, list[np.ndarray]] = {
            "queries": [np.zeros((0, dim), np.float32)],
            "shapes": [np.zeros((0, len(SHAPES)))],
            "shares": [np.zeros((0, len(self.dataset.classes)), np.float32)],
        }
        for image_id in ids:
            for name, tensor in _read_example(folder, image_id).items():
                columns[name].append(tensor[::step].numpy())
        return Examples(**{name: np.concatenate(parts) for name, parts in columns.items()})


def _label_by_margin(
    proposals: Proposals, queries: Tensor, bank: SearchBank, tags: tuple[int, ...] | None
) -> np.ndarray:
    """Return the label map that `selection=margin` makes where only an image's tags compete, `[H, W]` int64.

    Args:
        proposals: `N` of them, on the CPU, each with a vector.
        queries: `[N, C]`, of length 1.
        bank: what they are compared with, on the CPU.
        tags: of the image; `None` lets all classes of the bank compete.
    """
    label_map = np.zeros(tuple(proposals.masks.shape[1:]), dtype=np.int64)
    allowed = torch.ones_like(bank.labels, dtype=torch.bool)
    if tags is not None:
        allowed = torch.isin(bank.labels, torch.tensor([0, *tags]))
    if not len(proposals) or not bool(allowed.any()):
        return label_map
    # The nearest class wins; how much nearer it is than the nearest of all others says how sure that is.
    candidates = ClassIndex(bank.vectors, bank.labels).nearest(queries, NEAREST)
    possible = torch.unique(bank.labels[allowed])
    distances = torch.stack([(1 - candidates.similarities[:, candidates.labels == i]).mean(1) for i in possible], 1)
    labels = possible[distances.argmin(1)]
    worths = compute_worths(compute_margins(candidates, labels), proposals.quality)
    parents = None if proposals.parents is None else proposals.parents.numpy()
    chosen = select_masks(Cells.of(proposals.masks, parents=proposals.parents), labels.numpy(), worths, parents)
    # The surest mask is painted last, over the others.
    masks, nearest = proposals.masks.numpy(), distances.amin(1).numpy()
    for index in chosen[np.argsort(-nearest[chosen], kind="stable")]:
        label_map[masks[index]] = int(labels[index])
    return label_map


def _read_example(folder: StageFolder, image_id: str) -> dict[str, Tensor]:
    """Return the tensors of an image's examples.

    Raises:
        DataError: the file is missing or damaged.
    """
    file = folder.file("examples", image_id)
    try:
        tensors = load(file.read_bytes())
        return {name: tensors[name] for name in ("queries", "shapes", "shares")}
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(f"{file}: not readable as examples ({error}); run again with runtime.verify=true") from error
