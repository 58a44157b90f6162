"""Write the images of a report: photograph, label maps, proposals, and why each proposal has its label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from moduseg.bank.store import Bank
from moduseg.config import Config
from moduseg.errors import ArtefactError, DataError
from moduseg.masks.encoded import decoded
from moduseg.pipeline.manifests import StageFolder
from moduseg.pipeline.workspace import Workspace, log
from moduseg.report.attribution import ErrorAttribution, RetrievalResult, find_owners, tally_votes
from moduseg.report.finished_run import FinishedRun
from moduseg.report.overlay import resize_image, resize_labels
from moduseg.report.packing import pack_neighbours, to_base64
from moduseg.report.page import Page
from moduseg.report.pictures import (
    encode_grey_png,
    encode_heat_png,
    encode_jpeg,
    encode_label_png,
    encode_layer_png,
    fit_size,
    pack_layers,
    shrink_masks,
)
from moduseg.report.threads import map_in_threads
from moduseg.retrieval.ranking import Ranking
from moduseg.retrieval.retriever import Retriever
from moduseg.structures import IGNORE_INDEX, Proposals, WordFeatures

SHOWN_NEIGHBOURS = 25
"""At most this many neighbours of a proposal are listed; all of them have voted."""
Content = TypeVar("Content")


class RetrievalReplay:
    """Repeats retrieval from stored vectors, to recover the neighbours that `infer` does not store.

    Args:
        cfg: of the run.
        bank: the stored bank.
        queries: folder of stage `queries`.
        device: where the search runs.
        words: what regions are compared with, with `retrieval.answer=words`.
        ranking: what labels proposals, with `retrieval.selection=learnt`.
    """

    def __init__(
        self,
        cfg: Config,
        bank: Bank,
        queries: StageFolder,
        device: torch.device,
        *,
        words: WordFeatures | None = None,
        ranking: Ranking | None = None,
    ) -> None:
        self._queries = queries
        self._names = ("pooled",) if words is None else ("pooled", "word_values")
        self.bank = bank.configured(cfg.searched_bank).to(device)
        self._retriever = Retriever(self.bank, cfg.retrieval, words, ranking)

    def neighbours_of(self, image_id: str, proposals: Proposals) -> tuple[Proposals, RetrievalResult]:
        """Return the proposals of an image that were searched, and what the search said of them.

        Raises:
            DataError: the stored vectors are gone or do not fit the proposals.
        """
        vectors = self._queries.vectors(image_id, self._names)
        pooled = vectors["pooled"]
        if len(pooled) != len(proposals):
            raise DataError(
                f"{self._queries.file('vectors', image_id)}: got {len(pooled)} vectors for {len(proposals)} proposals, "
                "expected one each; run scripts/infer.py again"
            )
        prediction = self._retriever.predict(proposals, pooled, vectors.get("word_values"))
        return prediction.proposals, RetrievalResult.of(prediction)


@dataclass(frozen=True)
class ImageEntry:
    """An image in the page's list of images.

    Attributes:
        size: `(height, width)` of its label map.
        has_photograph: whether its photograph could be read.
        areas: `[label, pixels]` of its label map, ascending by label.
        num_proposals: how many were searched; `None` if its proposals are gone.
        score: mean score of its kept foreground proposals; `None` if there is none.
        has_heat: whether the class scores behind its pseudo mask are stored.
    """

    size: tuple[int, int]
    has_photograph: bool
    areas: list[list[int]]
    num_proposals: int | None = None
    score: float | None = None
    has_heat: bool = False


@dataclass(frozen=True)
class ImageEvidence:
    """What is known of the reasons for an image's labels, at the size of the report.

    Attributes:
        result: what retrieval said of its proposals.
        owner: `[h, w]` from `find_owners`; `None` without ground truth.
        truth: `[h, w]` uint8; `None` without ground truth.
        scale: pixels of the image for one pixel of these maps.
    """

    result: RetrievalResult
    owner: np.ndarray | None = None
    truth: np.ndarray | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class WrittenImages:
    """What the images of a report say together.

    Attributes:
        entries: of each image.
        attribution: of errors to rows of the bank.
        times_neighbour: row of the bank -> number of proposals that it is a neighbour of.
    """

    entries: list[ImageEntry]
    attribution: ErrorAttribution
    times_neighbour: dict[int, int]


def write_images(
    work: Workspace,
    run: FinishedRun,
    page: Page,
    ids: Sequence[str],
    *,
    replay: RetrievalReplay | None,
    second: FinishedRun | None = None,
) -> WrittenImages:
    """Write the pictures and data of all images.

    Args:
        work: settings.
        run: the run.
        page: where they go, named by index.
        ids: the images shown.
        replay: retrieval of the run; `None` if its bank or queries are gone, or it has none.
        second: a run that it is compared with.
    """
    writer = _ImageWriter(work, run, page, replay, second)
    entries: list[ImageEntry] = []
    attribution, times_neighbour = ErrorAttribution(), dict[int, int]()
    written = map_in_threads(work.cfg, writer.write, list(enumerate(ids)), "report")
    # Evidence is used up here, so that memory does not grow with the number of images.
    for index, (entry, evidence) in enumerate(written):
        entries.append(entry)
        if evidence is None:
            continue
        rows, counts = np.unique(evidence.result.rows, return_counts=True)
        for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
            if row >= 0:
                times_neighbour[row] = times_neighbour.get(row, 0) + count
        if evidence.owner is not None and evidence.truth is not None:
            attribution.add(index, evidence.result, evidence.owner, evidence.truth, evidence.scale)
    return WrittenImages(entries, attribution, times_neighbour)


@dataclass(frozen=True)
class _ImageWriter:
    """Writes single images; the attributes are the arguments of `write_images`."""

    work: Workspace
    run: FinishedRun
    page: Page
    replay: RetrievalReplay | None
    second: FinishedRun | None

    def write(self, item: tuple[int, str]) -> tuple[ImageEntry, ImageEvidence | None]:
        """Write one image, given its index and id."""
        index, image_id = item
        label_map = self.run.read_label_map(image_id)
        size = (label_map.shape[0], label_map.shape[1])
        shown_size = fit_size(size, self.work.cfg.evaluation.report_size)
        # What is looked at: the photograph and the label maps over it.
        photograph = _read_if_usable(lambda: self.run.dataset.load(image_id, labels=False).image)
        if photograph is not None:
            self.page.write_picture(f"photos/{index:06d}.jpg", encode_jpeg(resize_image(photograph, shown_size)))
        truth = _read_if_usable(lambda: self.run.dataset.semantic_of(image_id))
        maps = {"labels": label_map, "truth": truth, **self._read_other_maps(image_id)}
        pngs = {name: encode_label_png(array, shown_size) for name, array in maps.items() if array is not None}
        confidence = _read_if_usable(lambda: self.run.folder.confidence(image_id))
        if confidence is not None and confidence.shape == size:
            pngs["confidence"] = encode_grey_png(confidence, shown_size)
        self.page.write_data(f"labels/{index:06d}", {name: to_base64(png) for name, png in pngs.items()})
        entry = ImageEntry(size, photograph is not None, _count_pixels(label_map))
        heat = self._read_heat(image_id, shown_size)
        if heat:
            self.page.write_data(f"heat/{index:06d}", heat)
            entry = replace(entry, has_heat=True)
        # Why the labels are what they are: proposals, votes and neighbours.
        folder = self.run.inputs.get("propose")
        waiting = None if folder is None else _read_if_usable(lambda: folder.waiting_proposals(image_id, size))
        if waiting is None:
            return entry, None
        with decoded(waiting) as proposals:
            return self._explain(index, image_id, entry, proposals, label_map=label_map, truth=truth)

    def _explain(
        self,
        index: int,
        image_id: str,
        entry: ImageEntry,
        proposals: Proposals,
        *,
        label_map: np.ndarray,
        truth: np.ndarray | None,
    ) -> tuple[ImageEntry, ImageEvidence | None]:
        """Write why the labels of an image are what they are, and return its entry with what that adds."""
        size = entry.size
        shown_size = fit_size(size, self.work.cfg.evaluation.report_size)
        proposals, result = self._find_reasons(image_id, proposals)
        masks = shrink_masks(proposals.masks.numpy(), shown_size)
        temperature = self.work.cfg.retrieval.vote_temperature
        self.page.write_data(f"why/{index:06d}", _describe_proposals(masks, proposals, result, temperature))
        entry = replace(entry, num_proposals=len(proposals), score=_mean_score(result))
        if result is None or truth is None:
            return entry, None if result is None else ImageEvidence(result)
        owner = find_owners(masks, result.labels, result.kept, resize_labels(label_map, shown_size))
        scale = size[0] * size[1] / (shown_size[0] * shown_size[1])
        return entry, ImageEvidence(result, owner, resize_labels(truth, shown_size), scale)

    def _read_other_maps(self, image_id: str) -> dict[str, np.ndarray | None]:
        """Return the label map of the second run and the pseudo mask, as far as there are any."""
        maps: dict[str, np.ndarray | None] = {}
        second, pseudo_masks = self.second, self.run.inputs.get("pseudo_masks")
        if second is not None:
            maps["second"] = _read_if_usable(lambda: second.read_label_map(image_id))
        if pseudo_masks is not None and self.run.what != "pseudo mask":
            maps["pseudo"] = _read_if_usable(lambda: pseudo_masks.label_map(image_id))
        return maps

    def _read_heat(self, image_id: str, shown_size: tuple[int, int]) -> dict[str, str]:
        """Return the stored scores of an image's classes as PNGs by label; empty if there are none."""
        folder = self.run.inputs.get("scores")
        # The scores are those of the images that were labelled for the bank, which a prediction's images may not be.
        if folder is None or not folder.file("scores", image_id).is_file():
            return {}
        maps = _read_if_usable(lambda: folder.scores(image_id))
        if maps is None:
            return {}
        by_label = dict(zip(maps.class_ids, maps.scores, strict=True))
        if maps.background is not None:
            by_label = {0: maps.background, **by_label}
        return {str(label): to_base64(encode_heat_png(each.numpy(), shown_size)) for label, each in by_label.items()}

    def _find_reasons(self, image_id: str, proposals: Proposals) -> tuple[Proposals, RetrievalResult | None]:
        """Return the proposals of an image that were searched, and what retrieval says of them if that is there."""
        if self.replay is None:
            return proposals, None
        try:
            return self.replay.neighbours_of(image_id, proposals)
        except DataError as error:
            log.warning("report: nothing to say why: %s", error)
            return proposals, None


def _count_pixels(label_map: np.ndarray) -> list[list[int]]:
    """Return `[label, pixels]` of the labels in a map, ascending, without 255."""
    counts = np.bincount(label_map.ravel(), minlength=256)
    return [[int(label), int(counts[label])] for label in np.flatnonzero(counts) if label != IGNORE_INDEX]


def _mean_score(result: RetrievalResult | None) -> float | None:
    """Return the mean score of the kept foreground proposals; `None` if there is none."""
    if result is None:
        return None
    foreground = [index for index in result.kept.tolist() if result.labels[index] > 0]
    return float(result.scores[foreground].mean()) if foreground else None


def _describe_proposals(
    masks: np.ndarray, proposals: Proposals, result: RetrievalResult | None, temperature: float | None
) -> dict[str, Any]:
    """Return the content of `data/why/<index>.js`."""
    packed = pack_layers(masks)
    content: dict[str, Any] = {
        "layers": [to_base64(encode_layer_png(layer)) for layer in packed.layers],
        "layer": packed.layer_of,
        "code": packed.code_of,
        "area": proposals.areas.tolist(),
        "own": [round(float(score), 4) for score in proposals.predicted_iou],
    }
    if result is not None:
        shown = slice(0, SHOWN_NEIGHBOURS)
        content |= {
            "label": result.labels.tolist(),
            "score": [round(float(score), 4) for score in result.scores],
            "kept": result.kept.tolist(),
            "votes": tally_votes(result, temperature),
            "neighbours": pack_neighbours(result.rows[:, shown], result.similarities[:, shown]),
        }
    return content


def _read_if_usable(read: Callable[[], Content]) -> Content | None:
    """Return what `read` returns, or `None` if the file is missing or damaged; the page then does without it."""
    try:
        return read()
    except (DataError, ArtefactError):
        return None
