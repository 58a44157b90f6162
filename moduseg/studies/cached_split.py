"""A split in memory, as `infer` reads it: any setting of retrieval is scored on it without a model or a label map.

Proposals are read once, as cells (`moduseg.masks.cells`), which know all overlaps and paint a label map in a few
dozen steps; the bank is searched once for each way of reading it, to the depth of the largest K. The confusion matrices
are those of `infer`, to the pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from moduseg.bank.edit import align_classes
from moduseg.bank.store import Bank, SearchBank
from moduseg.config import BankConfig, Config, RetrievalConfig
from moduseg.errors import ConfigError, DataError
from moduseg.files import canonical_json, to_json_values
from moduseg.masks.cells import Cells
from moduseg.pipeline.manifests import StageFolder
from moduseg.pipeline.workspace import Workspace, log
from moduseg.retrieval import indices
from moduseg.retrieval.balance import Candidates, balanced, class_candidates, class_spreads, smallest_class
from moduseg.retrieval.majority import majority_of_cells
from moduseg.retrieval.search import BankIndex, search
from moduseg.retrieval.selection import NEAREST, margins, select, similarity_certainty, worth
from moduseg.retrieval.vote import vote
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.propose import Propose
from moduseg.stages.queries import Queries
from moduseg.structures import IGNORE_INDEX


@dataclass
class _Image:
    """One image: its cells, split by the truth, and which of the split's queries are its proposals.

    `known` holds counts by what decides them: settings that label an image alike are counted once.
    """

    id: str
    cells: Cells
    queries: slice
    known: dict[tuple[bytes, ...], np.ndarray] = field(default_factory=dict)


class CachedSplit:
    """The evaluated split of a configuration, ready for many settings of `retrieval` and of how the bank is read.

    Args:
        cfg: the run; stages that are not complete are run first.
        settings: what will be asked: the search goes as deep as the largest `top_k` needs, with `cfg`'s engine.
        held_out: whether an image's neighbours may not come from the image itself: for the training split, whose
            images the bank is made of. The mean and the outlier filter of the bank still know the image.

    Raises:
        DataError: no ground truth, or artefacts that do not fit each other.
    """

    def __init__(self, cfg: Config, settings: Sequence[RetrievalConfig], held_out: bool = False) -> None:
        work = Workspace(cfg)
        self.dataset = work.dataset(work.eval_split)
        if not self.dataset.has_truth:
            raise DataError(
                f"{self.dataset.name} {self.dataset.split}: got no ground truth, expected label maps to score against; "
                "sweep a split that has them"
            )
        bank_path, vectors, proposals = BuildBank.run(cfg, work), Queries.run(cfg, work), Propose.run(cfg, work)
        self.inputs = {"build_bank": bank_path, "queries": vectors, "propose": proposals}
        self.bank = Bank.load(bank_path)
        if cfg.bank.path is not None:
            self.bank = align_classes(self.bank, cfg.bank.aggregation, self.dataset.classes)
        self._device, self._held_out, self._rules = work.device.torch_device, held_out, cfg.retrieval
        self._top_k = max(s.top_k for s in settings)
        self._readings: dict[str, _Reading] = {}
        self._labelled: dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]] = {}

        proposals_folder, queries_folder = StageFolder(proposals), StageFolder(vectors)
        failed = {*proposals_folder.failures, *queries_folder.failures}
        self.images: list[_Image] = []
        predicted: list[Tensor] = []
        quality: list[Tensor] = []
        pooled: list[Tensor] = []
        count = 0
        for image_id in tqdm(self.dataset.ids, desc=f"read {self.dataset.split}", unit="img", leave=False):
            truth = None if image_id in failed else self._truth(image_id)
            if truth is None:
                continue
            own = proposals_folder.proposals(image_id, (truth.shape[0], truth.shape[1]))
            pooled.append(queries_folder.vectors(image_id)["pooled"])
            if len(pooled[-1]) != len(own):
                raise DataError(
                    f"{image_id}: {len(pooled[-1])} query vectors for {len(own)} proposals; remove {vectors} and run "
                    "again"
                )
            cells = Cells.of(own.masks, torch.from_numpy(truth))
            self.images.append(_Image(image_id, cells, slice(count, count + len(own))))
            predicted.append(own.predicted_iou)
            quality.append(own.quality)
            count += len(own)
        if not self.images:
            raise DataError(f"{self.dataset.name} {self.dataset.split}: got no image with ground truth and proposals")
        self._pooled = torch.cat(pooled).to(self._device)
        self._has_vector = (self._pooled != 0).any(1).nonzero()[:, 0]
        self._predicted, self._quality = torch.cat(predicted).numpy(), torch.cat(quality)
        self._areas = np.concatenate([image.cells.shared.diagonal() for image in self.images])
        position = {image_id: i for i, image_id in enumerate(self.bank.image_ids)}
        places = [position.get(image.id, -1) for image in self.images]
        lengths = [image.queries.stop - image.queries.start for image in self.images]
        self._image_of = torch.tensor(places).repeat_interleave(torch.tensor(lengths)).to(self._device)

    def confusion(self, bank: BankConfig, settings: RetrievalConfig) -> np.ndarray:
        """`[S, S]` int64, rows truth: the counts of the whole split that `infer` comes to.

        Raises:
            ConfigError: prototypes where images are held out: a centre has vectors of many images.
        """
        labels, scores = self._label(bank, settings)
        worths = self._worth(bank, settings, labels, scores)
        if settings.selection == "nms_quality":
            scores = scores * self._quality.numpy()
        keep = (self._areas >= settings.min_area) & (self._predicted >= settings.min_predicted_iou)
        size = len(self.dataset.classes)
        total = np.zeros((size, size), dtype=np.int64)
        for image in self.images:
            own = image.queries
            total += _count(image, keep[own], labels[own], scores[own], worths[own], settings, size)
        if not self.dataset.has_background and total[0].any():
            raise DataError(
                f"{self.dataset.name} {self.dataset.split}: its truth has pixels of label 0, expected 1.. or 255 where "
                "there is no background; correct the label maps"
            )
        return total

    def _label(self, bank: BankConfig, settings: RetrievalConfig) -> tuple[np.ndarray, np.ndarray]:
        """`labels [Q]` int64 and `scores [Q]` float32 of all proposals of the split."""
        reading = self._reading(bank)
        vote_rules = (settings.top_k, settings.cap_top_k, settings.vote_balance, settings.vote_temperature)
        key = (reading.name, *vote_rules)
        if key not in self._labelled:
            labels = torch.zeros(len(self._pooled), dtype=torch.int64, device=self._device)
            scores = torch.zeros(len(self._pooled), device=self._device)
            if len(self._has_vector) and len(reading.bank.vectors):
                near, rows = reading.neighbours(settings)
                own, found = vote(reading.bank.labels[rows], near, settings.vote_temperature)
                labels[self._has_vector], scores[self._has_vector] = own, found
            self._labelled[key] = labels.cpu().numpy(), scores.cpu().numpy()
        return self._labelled[key]

    def _worth(self, bank: BankConfig, settings: RetrievalConfig, labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
        if settings.selection in ("nms", "nms_quality", "majority"):
            return np.zeros(len(labels), dtype=np.int64)
        certainty = similarity_certainty(torch.from_numpy(scores))
        if settings.selection == "margin":
            certainty = torch.zeros(len(labels), dtype=torch.float64)
            voted = torch.from_numpy(labels).to(self._device)[self._has_vector]
            reading = self._reading(bank)
            certainty[self._has_vector.cpu()] = margins(reading.candidates, voted, reading.allowed).cpu().double()
        return worth(certainty, self._quality)

    def _reading(self, bank: BankConfig) -> _Reading:
        values = {
            k: v for k, v in vars(bank).items() if k not in ("purify", "min_area", "aggregation", "flips", "path")
        }
        name = canonical_json(to_json_values({**values, "outliers": vars(bank.outliers)}))
        if name not in self._readings:
            if self._held_out and bank.prototypes is not None:
                raise ConfigError(
                    "select: got the training split with bank.prototypes, whose centres are made of the very images; "
                    "choose on another split: select=<split>"
                )
            found = self.bank.configured(bank).to(self._device)
            queries = self._pooled[self._has_vector]
            queries = queries if found.centre is None else queries - found.centre
            image_of = None
            if self._held_out:
                places = self.bank.image_index.to(self._device)[found.rows]
                image_of = (self._image_of[self._has_vector], places)
            index = indices.build(found.vectors, self._rules.engine, self._rules.storage)
            self._readings[name] = _Reading(name, found, index, queries, self._top_k, image_of)
        return self._readings[name]

    def _truth(self, image_id: str) -> np.ndarray | None:
        """As scoring reads it: images without a usable label map are left out and named."""
        try:
            truth = self.dataset.semantic_of(image_id)
        except DataError as error:
            log.warning("not scored: %s", error)
            return None
        if truth is not None and self.dataset.image_size(image_id) != truth.shape:
            log.warning("not scored: image %r: its label map has another size than the image", image_id)
            return None
        return truth


@dataclass
class _Reading:
    """The bank read in one way, and how near its vectors are to the queries.

    Attributes:
        name: of the way.
        bank: what is searched.
        index: its vectors, made ready.
        queries: `[F, C]`, centred like the bank.
        top_k: how deep a search goes at most.
        image_of: the image of each query and of each vector, where those of one image may not meet.
    """

    name: str
    bank: SearchBank
    index: BankIndex
    queries: Tensor
    top_k: int
    image_of: tuple[Tensor, Tensor] | None

    def neighbours(self, settings: RetrievalConfig) -> tuple[Tensor, Tensor]:
        """`similarities [F, k]` and `rows [F, k]` of those that vote."""
        top_k = min(settings.top_k, smallest_class(self.bank.labels)) if settings.cap_top_k else settings.top_k
        if settings.vote_balance == "none" and self.image_of is None:
            near, rows = self._nearest
            return near[:, :top_k], rows[:, :top_k]
        return balanced(self.candidates, top_k, settings.vote_balance, self._spreads, self.allowed)

    @cached_property
    def candidates(self) -> Candidates:
        """Of each class the nearest, and as many more as may be left out."""
        spare = 0
        if self.image_of is not None and len(self.bank.labels):
            # Vectors of one class that come from one image.
            size = int(self.bank.labels.max()) + 1
            spare = int(torch.bincount(self.image_of[1] * size + self.bank.labels).max())
        depth = max(self.top_k, NEAREST) + spare
        return class_candidates(self.queries, self.bank.vectors, self.bank.labels, depth)

    @cached_property
    def allowed(self) -> Tensor | None:
        """`[F, M]` bool, candidates that come from another image than the query; `None` where all may vote."""
        if self.image_of is None:
            return None
        own, image = self.image_of
        return image[self.candidates.indices] != own[:, None]

    @cached_property
    def _nearest(self) -> tuple[Tensor, Tensor]:
        return search(self.queries, self.index, self.top_k)

    @cached_property
    def _spreads(self) -> Tensor:
        return class_spreads(self.bank.vectors, self.bank.labels)


def _count(
    image: _Image,
    keep: np.ndarray,
    labels: np.ndarray,
    scores: np.ndarray,
    worths: np.ndarray,
    settings: RetrievalConfig,
    size: int,
) -> np.ndarray:
    """`[S, S]` int64: one image under one setting."""
    places = np.flatnonzero(keep)
    order = places[np.argsort(-scores[places], kind="stable")]
    suppressed, votes = settings.selection in ("nms", "nms_quality"), settings.selection == "majority"
    rule = f"nms {settings.nms_iou}" if suppressed else "majority" if votes else "select"
    decides = scores if votes else worths
    key = (rule.encode(), order.tobytes(), labels.tobytes(), decides.tobytes())
    if key not in image.known:
        cells = image.cells
        if suppressed:
            order = cells.suppress(order, labels, settings.nms_iou)
        elif not votes:
            kept = Cells(cells.cover[:, places], cells.sizes, cells.values)
            chosen = places[select(kept, labels[places], worths[places])]
            order = order[np.isin(order, chosen)]
        painted = majority_of_cells(cells, order, labels, scores) if votes else cells.paint(order, labels)
        counted = cells.values != IGNORE_INDEX
        codes = cells.values[counted] * size + painted[counted]
        counts = np.bincount(codes, cells.sizes[counted], size * size)
        image.known[key] = counts.astype(np.int64).reshape(size, size)
    return image.known[key]
