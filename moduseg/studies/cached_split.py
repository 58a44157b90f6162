"""A split kept in memory, on which any setting of retrieval is scored without running a model.

Proposals are read once, as cells (`moduseg.masks.cells`), which know all overlaps and paint a label map in a few
dozen steps. The bank is searched once for each configuration of it, to the depth of the largest K. The confusion
matrices equal those of `infer`, to the pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moduseg.bank.edit import align_classes
from moduseg.bank.store import Bank
from moduseg.config import BankConfig, Config, RetrievalConfig
from moduseg.errors import ConfigError, DataError
from moduseg.files import canonical_json, to_json_values
from moduseg.masks.cells import Cells
from moduseg.masks.shapes import describe_shapes
from moduseg.pipeline.manifests import StageFolder
from moduseg.pipeline.workspace import Workspace, log
from moduseg.progress import track
from moduseg.retrieval import indices
from moduseg.retrieval.balance import (
    Candidates,
    balance_neighbours,
    count_smallest_class,
    find_class_candidates,
    measure_class_spreads,
    widest_float,
)
from moduseg.retrieval.majority import label_cells_by_majority
from moduseg.retrieval.ranking import find_possible, find_ranking, label_shares, measure_closeness
from moduseg.retrieval.search import BankIndex, search
from moduseg.retrieval.selection import NEAREST, compute_certainty, compute_margins, compute_worths, select_masks
from moduseg.retrieval.shares import DividedVotes, divide_votes, label_cells_by_shares
from moduseg.retrieval.vote import vote
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.fit_ranking import FitRanking
from moduseg.stages.propose import Propose
from moduseg.stages.queries import Queries
from moduseg.structures import IGNORE_INDEX, SearchBank, select_parents

STORED_KEYS = ("purify", "min_area", "aggregation", "flips", "path", "parts")
"""Keys of `bank` that decide what is stored; the others decide how the stored bank is read."""


@dataclass
class SplitImage:
    """One image of the split.

    Attributes:
        id: its id.
        cells: its proposals' cells, split by the truth.
        queries: which of the split's queries are its proposals.
        parents: `[N]` int64 of its proposals (`Proposals.parents`), or `None`.
        counts_by_rule: confusion counts by what decides them: settings that label an image alike are counted once.
    """

    id: str
    cells: Cells
    queries: slice
    parents: Tensor | None = None
    counts_by_rule: dict[tuple[bytes, ...], np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class SplitQueries:
    """The proposals of all images of the split, one after the other.

    Attributes:
        pooled: `[Q, C]`, pooled vectors; zeros where a proposal has none.
        has_vector: `[F]` int64, the proposals that have a vector, ascending.
        predicted_iou: `[Q]` float32.
        quality: `[Q]` float32.
        areas: `[Q]` pixels.
        shapes: `[Q, len(SHAPES)]` of their masks (`describe_shapes`), if `selection=learnt` is asked for; else `None`.
    """

    pooled: Tensor
    has_vector: Tensor
    predicted_iou: np.ndarray
    quality: Tensor
    areas: np.ndarray
    shapes: np.ndarray | None = None


@dataclass(frozen=True)
class Answers:
    """What retrieval says of proposals under one setting.

    Attributes:
        is_kept: `[Q]` bool, whether a proposal is large and good enough.
        labels: `[Q]` int64.
        scores: `[Q]` float64 (float32 on MPS).
        worths: `[Q]` int64, what a selection maximises; zeros for rules that weigh nothing.
        divided: the divided votes of all proposals, for `selection=shares`; else `None`.
    """

    is_kept: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    worths: np.ndarray
    divided: DividedVotes | None = None

    def select(self, rows: slice) -> Answers:
        """Return the answers for some of the proposals."""
        divided = None if self.divided is None else DividedVotes(self.divided.labels, self.divided.units[rows])
        return Answers(self.is_kept[rows], self.labels[rows], self.scores[rows], self.worths[rows], divided)


class CachedSplit:
    """The evaluated split of a configuration, ready for many settings of `retrieval` and of how the bank is read.

    Args:
        cfg: the run; stages that are not complete are run first.
        settings: what will be asked: the search goes as deep as the largest `top_k` needs, with `cfg`'s engine.
        is_held_out: whether an image's neighbours may not come from the image itself: for the training split, whose
            images the bank is made of. The mean and the outlier filter of the bank are still made with the image.

    Raises:
        ConfigError: a setting that tidies label maps: their pixels are not kept here; `answer=words`; a bank with
            regions that a person named; or `selection=learnt` where images are held out, as these taught the ranking.
        DataError: no ground truth, or artefacts that do not fit each other.
    """

    def __init__(self, cfg: Config, settings: Sequence[RetrievalConfig], is_held_out: bool = False) -> None:
        for name, value in (pair for setting in settings for pair in setting.tidying.items()):
            if value:
                raise ConfigError(
                    f"retrieval.{name}: got {value}, expected 0, as a sweep scores regions and not single pixels; "
                    "leave it out here, and set it for scripts/infer.py"
                )
        if cfg.uses_words or any(setting.answer == "words" for setting in settings):
            raise ConfigError(
                "retrieval.answer: got words, expected labels, as a sweep keeps no CLIP features of regions; leave it "
                "out here, and set it for scripts/infer.py"
            )
        self._needs_shapes = any(setting.selection == "learnt" for setting in settings)
        if self._needs_shapes and is_held_out:
            raise ConfigError(
                "select: got the training split with retrieval.selection=learnt, whose ranking is fitted on the very "
                "images; choose on another split or world: select=<split>, select=dataset.seed=11"
            )
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
        if self.bank.is_trusted is not None and bool(self.bank.is_trusted.any()):
            raise ConfigError(
                f"bank.path: got a bank with {int(self.bank.is_trusted.sum())} regions that a person named, expected "
                "none, as these decide alone and a sweep lets all regions vote; sweep the bank that was corrected"
            )
        self._cfg = cfg
        self._device, self._is_held_out, self._search_settings = work.device.torch_device, is_held_out, cfg.retrieval
        self._top_k = max(s.top_k for s in settings)
        self._views: dict[str, BankView] = {}
        self._votes: dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]] = {}
        self.images, self.queries = self._read_images(StageFolder(proposals), StageFolder(vectors))

    def confusion(self, bank: BankConfig, settings: RetrievalConfig) -> np.ndarray:
        """Return the confusion counts of the whole split that `infer` comes to, `[S, S]` int64, rows truth.

        Raises:
            ConfigError: prototypes where images are held out: a centre has vectors of many images.
        """
        answers = self.answer(bank, settings)
        num_labels = len(self.dataset.classes)
        total = np.zeros((num_labels, num_labels), dtype=np.int64)
        for image in self.images:
            total += _count_image(image, answers.select(image.queries), settings, num_labels)
        if not self.dataset.has_background and total[0].any():
            raise DataError(
                f"{self.dataset.name} {self.dataset.split}: its truth has pixels of label 0, expected 1.. or 255 where "
                "there is no background; correct the label maps"
            )
        return total

    def answer(self, bank: BankConfig, settings: RetrievalConfig) -> Answers:
        """Label and score all proposals of the split; errors as `confusion`."""
        labels, scores = self._vote(bank, settings)
        if settings.selection == "learnt":
            labels, scores, worths = self._rank(bank, settings, labels, scores)
        else:
            worths = self._weigh(bank, settings, labels, scores)
        if settings.selection == "nms_quality":
            scores = scores * self.queries.quality.numpy()
        is_large = self.queries.areas >= settings.min_area
        is_kept = is_large & (self.queries.predicted_iou >= settings.min_predicted_iou)
        divided = self._divide(bank, settings) if settings.selection == "shares" else None
        return Answers(is_kept, labels, scores, worths, divided)

    def _read_images(self, propose: StageFolder, queries: StageFolder) -> tuple[list[SplitImage], SplitQueries]:
        """Read truth, proposals and vectors of every image that was processed and has a usable truth."""
        failed = {*propose.failures, *queries.failures}
        images: list[SplitImage] = []
        pooled: list[Tensor] = []
        predicted_iou: list[Tensor] = []
        quality: list[Tensor] = []
        shapes: list[np.ndarray] = []
        start = 0
        for image_id in track(self.dataset.ids, f"read {self.dataset.split}"):
            truth = None if image_id in failed else self._read_truth(image_id)
            if truth is None:
                continue
            proposals = propose.proposals(image_id, (truth.shape[0], truth.shape[1]))
            pooled.append(queries.vectors(image_id)["pooled"])
            if len(pooled[-1]) != len(proposals):
                raise DataError(
                    f"{image_id}: {len(pooled[-1])} query vectors for {len(proposals)} proposals; remove "
                    f"{queries.path} and run again"
                )
            cells = Cells.of(proposals.masks, torch.from_numpy(truth), proposals.parents)
            images.append(SplitImage(image_id, cells, slice(start, start + len(proposals)), proposals.parents))
            predicted_iou.append(proposals.predicted_iou)
            quality.append(proposals.quality)
            shapes += [describe_shapes(proposals.masks.numpy())] if self._needs_shapes else []
            start += len(proposals)
        if not images:
            raise DataError(f"{self.dataset.name} {self.dataset.split}: got no image with ground truth and proposals")
        vectors = torch.cat(pooled).to(self._device)
        return images, SplitQueries(
            vectors,
            (vectors != 0).any(1).nonzero()[:, 0],
            torch.cat(predicted_iou).numpy(),
            torch.cat(quality),
            np.concatenate([image.cells.shared.diagonal() for image in images]),
            np.concatenate(shapes) if self._needs_shapes else None,
        )

    def _read_truth(self, image_id: str) -> np.ndarray | None:
        """Read a label map as scoring does; `None`, with a warning, for one that is not usable."""
        try:
            truth = self.dataset.semantic_of(image_id)
        except DataError as error:
            log.warning("not scored: %s", error)
            return None
        if truth is not None and self.dataset.image_size(image_id) != truth.shape:
            log.warning("not scored: image %r: its label map has another size than the image", image_id)
            return None
        return truth

    def _vote(self, bank: BankConfig, settings: RetrievalConfig) -> tuple[np.ndarray, np.ndarray]:
        """Return `labels [Q]` int64 and `scores [Q]` float64 (float32 on MPS) of all proposals of the split."""
        view = self._view(bank)
        key = (view.name, settings.top_k, settings.cap_top_k, settings.vote_balance, settings.vote_temperature)
        if key not in self._votes:
            has_vector = self.queries.has_vector
            labels = torch.zeros(len(self.queries.pooled), dtype=torch.int64, device=self._device)
            scores = torch.zeros(len(labels), dtype=widest_float(labels.device), device=self._device)
            if len(has_vector) and len(view.bank.vectors):
                similarities, rows = view.find_neighbours(settings)
                voted = vote(view.bank.labels[rows], similarities, settings.vote_temperature)
                labels[has_vector], scores[has_vector] = voted
            self._votes[key] = labels.cpu().numpy(), scores.cpu().numpy()
        return self._votes[key]

    def _divide(self, bank: BankConfig, settings: RetrievalConfig) -> DividedVotes:
        """Return how all proposals divide their votes, on the CPU."""
        view, has_vector = self._view(bank), self.queries.has_vector
        neighbour_labels = torch.full((len(self.queries.pooled), 1), -1, device=self._device)
        similarities = torch.zeros(neighbour_labels.shape, device=self._device)
        if len(has_vector) and len(view.bank.vectors):
            found, rows = view.find_neighbours(settings)
            neighbour_labels = neighbour_labels.repeat(1, rows.shape[1])
            similarities = similarities.repeat(1, rows.shape[1])
            neighbour_labels[has_vector], similarities[has_vector] = view.bank.labels[rows], found
        areas = torch.from_numpy(self.queries.areas)
        return divide_votes(areas, neighbour_labels.cpu(), similarities.cpu(), settings.vote_temperature)

    def _weigh(self, bank: BankConfig, settings: RetrievalConfig, labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Return what the rule of selection maximises, `[Q]` int64; zeros for rules that weigh nothing."""
        if settings.selection in ("nms", "nms_quality", "majority", "shares"):
            return np.zeros(len(labels), dtype=np.int64)
        certainty = compute_certainty(torch.from_numpy(scores))
        if settings.selection == "margin":
            has_vector, view = self.queries.has_vector, self._view(bank)
            certainty = torch.zeros(len(labels), dtype=torch.float64)
            voted = torch.from_numpy(labels).to(self._device)[has_vector]
            certainty[has_vector.cpu()] = compute_margins(view.candidates, voted, view.is_allowed).cpu().double()
        return compute_worths(certainty, self.queries.quality)

    def _rank(
        self, bank: BankConfig, settings: RetrievalConfig, labels: np.ndarray, scores: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return labels `[Q]`, scores `[Q]` and worths `[Q]` with the ranking that is fitted for these settings.

        Args:
            bank: how the bank is read.
            settings: of retrieval.
            labels, scores: of the vote, which stay where a proposal has no vector.
        """
        if self.queries.shapes is None:
            raise ValueError("cached split: got selection=learnt, expected it among the settings that were announced")
        if bank.path is None:
            folder = FitRanking.run(replace(self._cfg, bank=bank, retrieval=settings))
        else:
            folder = self.inputs["build_bank"]
        ranking = find_ranking(folder).align(self.dataset.classes)
        view, rows = self._view(bank), self.queries.has_vector.cpu().numpy()
        ranking.check_fits(view.bank.vectors.shape[1], is_centred=view.bank.centre is not None)
        is_possible = find_possible(view.bank.labels, len(self.dataset.classes))
        shares = ranking.estimate_shares(view.queries.cpu().numpy(), self.queries.shapes[rows], is_possible)
        labels, scores, certainty = labels.copy(), scores.copy(), np.zeros(len(labels))
        labels[rows], scores[rows], gain = label_shares(shares)
        ranked = torch.from_numpy(labels[rows]).to(view.candidates.labels.device)
        certainty[rows] = gain * measure_closeness(view.candidates, ranked).cpu().numpy()
        return labels, scores, compute_worths(torch.from_numpy(certainty), self.queries.quality)

    def _view(self, bank: BankConfig) -> BankView:
        """Return the stored bank as `bank` reads it, with its cached neighbour lists."""
        values = {key: value for key, value in vars(bank).items() if key not in STORED_KEYS}
        name = canonical_json(to_json_values({**values, "outliers": vars(bank.outliers)}))
        if name not in self._views:
            if self._is_held_out and bank.prototypes is not None:
                raise ConfigError(
                    "select: got the training split with bank.prototypes, whose centres are made of the very images; "
                    "choose on another split: select=<split>"
                )
            searched = self.bank.configured(bank).to(self._device)
            vectors = self.queries.pooled[self.queries.has_vector]
            vectors = vectors if searched.centre is None else vectors - searched.centre
            index = indices.build(searched.vectors, self._search_settings.engine, self._search_settings.storage)
            images = self._images_of(searched) if self._is_held_out else None
            self._views[name] = BankView(
                name=name, bank=searched, index=index, queries=vectors, top_k=self._top_k, images=images
            )
        return self._views[name]

    def _images_of(self, searched: SearchBank) -> tuple[Tensor, Tensor]:
        """Return the image of each query that has a vector and of each vector, as indices into the bank's images.

        Images of the split that the bank does not hold are -1.
        """
        index_of = {image_id: i for i, image_id in enumerate(self.bank.image_ids)}
        image_indices = torch.tensor([index_of.get(image.id, -1) for image in self.images])
        num_queries = torch.tensor([image.queries.stop - image.queries.start for image in self.images])
        query_images = image_indices.repeat_interleave(num_queries).to(self._device)
        vector_images = self.bank.image_index.to(self._device)[searched.rows]
        return query_images[self.queries.has_vector], vector_images


@dataclass
class BankView:
    """One configuration of the bank with its cached neighbour lists.

    Attributes:
        name: cache key.
        bank: what is searched.
        index: its vectors, prepared for the search.
        queries: `[F, C]`, centred like the bank.
        top_k: how deep a search goes at most.
        images: the image of each query and of each vector, if those of one image may not meet.
    """

    name: str
    bank: SearchBank
    index: BankIndex
    queries: Tensor
    top_k: int
    images: tuple[Tensor, Tensor] | None

    def find_neighbours(self, settings: RetrievalConfig) -> tuple[Tensor, Tensor]:
        """Return `similarities [F, k]` and `rows [F, k]` of the vectors that vote."""
        top_k = min(settings.top_k, count_smallest_class(self.bank.labels)) if settings.cap_top_k else settings.top_k
        if settings.vote_balance == "none" and self.images is None:
            similarities, rows = self._nearest
            return similarities[:, :top_k], rows[:, :top_k]
        return balance_neighbours(
            self.candidates, top_k, settings.vote_balance, spreads=self._spreads, is_allowed=self.is_allowed
        )

    @cached_property
    def candidates(self) -> Candidates:
        """The nearest vectors of each class, and as many more as may have to be skipped."""
        num_spare = 0
        if self.images is not None and len(self.bank.labels):
            # At most as many are skipped as vectors of one class come from one image.
            num_labels = int(self.bank.labels.max()) + 1
            num_spare = int(torch.bincount(self.images[1] * num_labels + self.bank.labels).max())
        depth = max(self.top_k, NEAREST) + num_spare
        return find_class_candidates(self.queries, self.bank.vectors, self.bank.labels, depth)

    @cached_property
    def is_allowed(self) -> Tensor | None:
        """`[F, M]` bool, candidates that come from another image than the query; `None` if all may vote."""
        if self.images is None:
            return None
        query_images, vector_images = self.images
        return vector_images[self.candidates.indices] != query_images[:, None]

    @cached_property
    def _nearest(self) -> tuple[Tensor, Tensor]:
        return search(self.queries, self.index, self.top_k)

    @cached_property
    def _spreads(self) -> Tensor:
        return measure_class_spreads(self.bank.vectors, self.bank.labels)


def _count_image(image: SplitImage, answers: Answers, settings: RetrievalConfig, num_labels: int) -> np.ndarray:
    """Return the confusion counts of one image under one setting, `[S, S]` int64."""
    kept = np.flatnonzero(answers.is_kept)
    order = kept[np.argsort(-answers.scores[kept], kind="stable")]
    is_suppressed, is_majority = settings.selection in ("nms", "nms_quality"), settings.selection == "majority"
    rule = f"nms {settings.nms_iou}" if is_suppressed else settings.selection if is_majority else "select"
    weights = answers.scores if is_majority else answers.worths
    if answers.divided is not None:
        rule, weights = f"shares {answers.divided.labels.tolist()}", answers.divided.units.numpy()
    key = (rule.encode(), order.tobytes(), answers.labels.tobytes(), weights.tobytes())
    if key not in image.counts_by_rule:
        cells = image.cells
        if is_suppressed:
            order = cells.suppress(order, answers.labels, settings.nms_iou)
        elif not is_majority and answers.divided is None:
            kept_cells = Cells(cells.cover[:, kept], cells.sizes, cells.values)
            parents = image.parents
            tree = None if parents is None else select_parents(parents, torch.from_numpy(kept)).numpy()
            chosen = kept[select_masks(kept_cells, answers.labels[kept], answers.worths[kept], tree)]
            order = order[np.isin(order, chosen)]
        if answers.divided is not None:
            painted = label_cells_by_shares(cells, order, answers.divided)
        elif is_majority:
            painted = label_cells_by_majority(cells, order, answers.labels, answers.scores)
        else:
            painted = cells.paint(order, answers.labels)
        is_counted = cells.values != IGNORE_INDEX
        codes = cells.values[is_counted] * num_labels + painted[is_counted]
        counts = np.bincount(codes, cells.sizes[is_counted], num_labels**2)
        image.counts_by_rule[key] = counts.astype(np.int64).reshape(num_labels, num_labels)
    return image.counts_by_rule[key]
