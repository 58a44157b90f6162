"""The images of a report: one photograph, the label maps, the proposals and why each has its label."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from tqdm import tqdm

from moduseg.bank.store import Bank
from moduseg.config import Config
from moduseg.datasets.io import read_label_png
from moduseg.errors import ArtefactError, DataError
from moduseg.evaluation.pairs import MAX_AUTO_WORKERS
from moduseg.pipeline.manifests import safe_name
from moduseg.pipeline.workspace import Workspace, log
from moduseg.proposers import sa1b
from moduseg.report.overlay import resize_image, resize_labels
from moduseg.report.page import Page
from moduseg.report.pictures import (
    encode_jpeg,
    encode_label_png,
    encode_layer_png,
    fit_size,
    pack_layers,
    shrink_masks,
)
from moduseg.report.source import Source
from moduseg.report.why import ErrorAttribution, RetrievalResult, owners, packed_neighbours, votes
from moduseg.retrieval.retriever import Retriever
from moduseg.structures import IGNORE_INDEX, Proposals

SHOWN_NEIGHBOURS = 25
"""Neighbours of a proposal that a report lists at most; all of them have voted."""


class RetrievalReplay:
    """Repeats retrieval from stored vectors, to recover the neighbours that `infer` does not store.

    Args:
        cfg: of the run.
        bank: the stored bank.
        queries: the artefact of stage `queries`.
        device: where the search runs.
        results: of images that were labelled just now, by image id; these are not searched again.
    """

    def __init__(
        self,
        cfg: Config,
        bank: Bank,
        queries: Path,
        device: torch.device,
        results: Mapping[str, RetrievalResult] | None = None,
    ) -> None:
        self._queries, self._results = queries, results or {}
        self.bank = bank.configured(cfg.bank).to(device)
        self._retriever = Retriever(self.bank, cfg.retrieval)

    def neighbours_of(self, image_id: str, proposals: Proposals) -> tuple[Proposals, RetrievalResult]:
        """Return the proposals of an image that were searched, and what the search said of them.

        Raises:
            DataError: the stored vectors are gone or do not fit the proposals.
        """
        result = self._results.get(image_id)
        if result is not None:
            searched = proposals.select(self._retriever.is_searched(proposals))
            if len(searched) == len(result.labels):
                return searched, result
        file = self._queries / safe_name(f"vectors/{image_id}", ".safetensors")
        if not file.is_file():
            raise DataError(f"{file}: no such file; run scripts/infer.py again")
        pooled = load_tensors(file.read_bytes())["pooled"]
        if len(pooled) != len(proposals):
            raise DataError(
                f"{file}: got {len(pooled)} vectors for {len(proposals)} proposals; run scripts/infer.py again"
            )
        prediction = self._retriever.predict(proposals, pooled)
        return prediction.proposals, RetrievalResult.of(prediction)


@dataclass(frozen=True)
class Entry:
    """What the page's list of images says of one.

    Attributes:
        size: `(H, W)` of the image; of its label map where there is no photograph.
        photograph: whether there is one.
        areas: label -> pixels of the label map.
        score: mean score of its kept foreground proposals, `None` where there is none.
        proposals: how many were searched, `None` where they are not known.
        result, owner, truth, scale: see `ErrorAttribution.add`; `None` where they are not known.
    """

    size: tuple[int, int]
    photograph: bool
    areas: list[list[int]]
    score: float | None = None
    proposals: int | None = None
    result: RetrievalResult | None = None
    owner: np.ndarray | None = None
    truth: np.ndarray | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Written:
    """What `write_images` leaves for the rest of the page.

    Attributes:
        entries: of each image.
        blame: of the bank's rows.
        used: row of the bank -> how often it was a neighbour.
    """

    entries: list[Entry]
    blame: ErrorAttribution
    used: dict[int, int]


def write_images(
    work: Workspace,
    source: Source,
    page: Page,
    ids: Sequence[str],
    retriever: RetrievalReplay | None,
    second: Source | None = None,
) -> Written:
    """Write the pictures of all images.

    Args:
        work: settings.
        source: the run.
        page: where they go, named by position.
        ids: the images shown.
        retriever: of the run, `None` where its bank or queries are gone or it has none.
        second: the run that it is compared with.
    """

    def write(item: tuple[int, str]) -> Entry:
        return _write_image(work, source, page, item[0], item[1], retriever, second)

    workers = work.cfg.evaluation.workers or min(MAX_AUTO_WORKERS, os.cpu_count() or 1)
    entries: list[Entry] = []
    blame, used = ErrorAttribution(), dict[int, int]()
    with ThreadPoolExecutor(workers, thread_name_prefix="report") as pool:
        found = pool.map(write, enumerate(ids))
        for index, entry in enumerate(tqdm(found, "report", len(ids), unit="img", leave=False)):
            if entry.result is not None:
                rows, counts = np.unique(entry.result.rows, return_counts=True)
                for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
                    if row >= 0:
                        used[row] = used.get(row, 0) + count
                if entry.owner is not None and entry.truth is not None:
                    blame.add(index, entry.result, entry.owner, entry.truth, entry.scale)
            # The arrays are no longer needed, and memory shall not grow with the number of images.
            entries.append(Entry(entry.size, entry.photograph, entry.areas, entry.score, entry.proposals))
    return Written(entries, blame, used)


def _write_image(
    work: Workspace,
    source: Source,
    page: Page,
    index: int,
    image_id: str,
    retriever: RetrievalReplay | None,
    second: Source | None,
) -> Entry:
    name = f"{index:06d}"
    labels = source.read(image_id)
    full = (labels.shape[0], labels.shape[1])
    size = fit_size(full, work.cfg.evaluation.report_size)
    photograph = _usable(lambda: source.dataset.load(image_id, labels=False).image)
    if photograph is not None:
        page.write_picture(f"photos/{name}.jpg", encode_jpeg(resize_image(photograph, size)))
    truth = _usable(lambda: source.dataset.semantic_of(image_id))
    maps = {"labels": labels, "truth": truth}
    if second is not None:
        maps["second"] = _usable(lambda: second.read(image_id))
    if source.what != "pseudo mask" and "pseudo_masks" in source.inputs:
        pseudo = source.inputs["pseudo_masks"] / safe_name(f"labels/{image_id}", ".png")
        maps["pseudo"] = read_label_png(pseudo) if pseudo.is_file() else None
    content = {key: _text(encode_label_png(array, size)) for key, array in maps.items() if array is not None}
    page.write_data(f"labels/{name}", content)
    counts = np.bincount(labels.ravel(), minlength=256)
    pixels = [[int(label), int(counts[label])] for label in np.flatnonzero(counts) if label != IGNORE_INDEX]
    entry = Entry(full, photograph is not None, pixels)
    if "propose" not in source.inputs:
        return entry
    proposals = _usable(
        lambda: sa1b.read_proposals(source.inputs["propose"] / safe_name(f"masks/{image_id}", ".json"), full)
    )
    if proposals is None:
        return entry
    result = None
    if retriever is not None:
        try:
            proposals, result = retriever.neighbours_of(image_id, proposals)
        except DataError as error:
            log.warning("report: nothing to say why: %s", error)
    masks = shrink_masks(proposals.masks.numpy(), size)
    page.write_data(f"why/{name}", _why(masks, proposals, result, work.cfg.retrieval.vote_temperature))
    if result is None:
        return Entry(full, entry.photograph, pixels, None, len(proposals))
    shown = [i for i in result.kept.tolist() if result.labels[i] > 0]
    score = float(result.scores[shown].mean()) if shown else None
    if truth is None:
        return Entry(full, entry.photograph, pixels, score, len(proposals), result)
    scale = full[0] * full[1] / (size[0] * size[1])
    owner = owners(masks, result.labels, result.kept, resize_labels(labels, size))
    shrunk = resize_labels(truth, size)
    return Entry(full, entry.photograph, pixels, score, len(proposals), result, owner, shrunk, scale)


def _why(
    masks: np.ndarray, proposals: Proposals, result: RetrievalResult | None, temperature: float | None
) -> dict[str, Any]:
    packed = pack_layers(masks)
    content: dict[str, Any] = {
        "layers": [_text(encode_layer_png(layer)) for layer in packed.layers],
        "layer": packed.layer_of,
        "code": packed.code_of,
        "area": proposals.areas.tolist(),
        "own": [round(float(score), 4) for score in proposals.predicted_iou],
    }
    if result is not None:
        near = slice(0, SHOWN_NEIGHBOURS)
        content |= {
            "label": result.labels.tolist(),
            "score": [round(float(score), 4) for score in result.scores],
            "kept": result.kept.tolist(),
            "votes": votes(result, temperature),
            "neighbours": packed_neighbours(result.rows[:, near], result.similarities[:, near]),
        }
    return content


def _usable(read: Callable[[], Any]) -> Any:
    """What `read` gives, or `None` where the file is not there or cannot be used: the page then does without."""
    try:
        return read()
    except (DataError, ArtefactError):
        return None


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
