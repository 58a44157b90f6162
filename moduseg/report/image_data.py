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
from torch import Tensor
from tqdm import tqdm

from moduseg.bank.store import Bank, SearchBank
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
from moduseg.report.why import Answer, Blame, owners, packed_neighbours, votes
from moduseg.retrieval.retriever import Retriever
from moduseg.structures import IGNORE_INDEX, Proposals

SHOWN_NEIGHBOURS = 25
"""Neighbours of a proposal that a report lists at most; all of them have voted."""


class Reasons:
    """Retrieval once more, from the stored query vectors and the stored bank: what `infer` did and did not keep.

    Args:
        cfg: of the run.
        bank: the stored bank.
        queries: the artefact of stage `queries`.
        device: where the search happens.
        known: answers of images that were labelled just now, which need no second search.
    """

    def __init__(
        self,
        cfg: Config,
        bank: Bank,
        queries: Path,
        device: torch.device,
        known: Mapping[str, Answer] | None = None,
    ) -> None:
        self.settings, self.queries, self.device = cfg.retrieval, queries, device
        self.known = known or {}
        self.bank = bank.configured(cfg.bank).to(device)
        self._retriever = Retriever(self.bank.vectors, self.bank.labels, self.bank.centre, cfg.retrieval)

    @torch.inference_mode()
    def ask(self, image_id: str, found: Proposals) -> tuple[Proposals, Answer]:
        """The proposals that were searched, and what the search said of them.

        Raises:
            DataError: the stored vectors are gone or do not fit the proposals.
        """
        settings, bank = self.settings, self.bank
        keep = (torch.from_numpy(areas(found)) >= settings.min_area) & (
            found.predicted_iou >= settings.min_predicted_iou
        )
        answer = self.known.get(image_id)
        if answer is not None and len(answer.labels) == int(keep.sum()):
            return found.select(keep), answer
        file = self.queries / safe_name(f"vectors/{image_id}", ".safetensors")
        if not file.is_file():
            raise DataError(f"{file}: no such file; run scripts/infer.py again")
        pooled = load_tensors(file.read_bytes())["pooled"]
        if len(pooled) != len(found):
            raise DataError(f"{file}: got {len(pooled)} vectors for {len(found)} proposals; run scripts/infer.py again")
        found = found.select(keep)
        pooled = pooled[keep].to(self.device)
        labels, scores, neighbours, similarities = self._retriever.label(pooled)
        _, kept = self._retriever.assemble(found, pooled, labels, scores)
        return found, answer_of(bank, labels, scores, kept, neighbours, similarities)


def answer_of(
    bank: SearchBank, labels: Tensor, scores: Tensor, kept: Tensor, neighbours: Tensor, similarities: Tensor
) -> Answer:
    """What a report keeps of the retrieval for one image; arguments as `label_proposals` and `suppress` give them.

    Neighbours beyond `SHOWN_NEIGHBOURS` are kept as well: all of them have voted.
    """
    rows = row_labels = neighbours
    if len(bank.rows):
        searched = neighbours >= 0
        rows = torch.where(searched, bank.rows[neighbours.clamp(min=0)], -1)
        row_labels = torch.where(searched, bank.labels[neighbours.clamp(min=0)], -1)
    return Answer(
        labels.cpu().numpy().astype(np.int64),
        scores.cpu().numpy(),
        kept.cpu().numpy(),
        rows.cpu().numpy().astype(np.int32),
        row_labels.cpu().numpy().astype(np.int16),
        similarities.cpu().numpy(),
    )


@dataclass(frozen=True)
class Entry:
    """What the page's list of images says of one.

    Attributes:
        size: `(H, W)` of the image; of its label map where there is no photograph.
        photograph: whether there is one.
        areas: label -> pixels of the label map.
        score: mean score of its kept foreground proposals, `None` where there is none.
        proposals: how many were searched, `None` where they are not known.
        answer, owner, truth, scale: see `Blame.add`; `None` where they are not known.
    """

    size: tuple[int, int]
    photograph: bool
    areas: list[list[int]]
    score: float | None = None
    proposals: int | None = None
    answer: Answer | None = None
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
    blame: Blame
    used: dict[int, int]


def write_images(
    work: Workspace,
    source: Source,
    page: Page,
    ids: Sequence[str],
    retriever: Reasons | None,
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
    blame, used = Blame(), dict[int, int]()
    with ThreadPoolExecutor(workers, thread_name_prefix="report") as pool:
        found = pool.map(write, enumerate(ids))
        for index, entry in enumerate(tqdm(found, "report", len(ids), unit="img", leave=False)):
            if entry.answer is not None:
                rows, counts = np.unique(entry.answer.rows, return_counts=True)
                for row, count in zip(rows.tolist(), counts.tolist(), strict=True):
                    if row >= 0:
                        used[row] = used.get(row, 0) + count
                if entry.owner is not None and entry.truth is not None:
                    blame.add(index, entry.answer, entry.owner, entry.truth, entry.scale)
            # The arrays are no longer needed, and memory shall not grow with the number of images.
            entries.append(Entry(entry.size, entry.photograph, entry.areas, entry.score, entry.proposals))
    return Written(entries, blame, used)


def _write_image(
    work: Workspace,
    source: Source,
    page: Page,
    index: int,
    image_id: str,
    retriever: Reasons | None,
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
    answer = None
    if retriever is not None:
        try:
            proposals, answer = retriever.ask(image_id, proposals)
        except DataError as error:
            log.warning("report: nothing to say why: %s", error)
    masks = shrink_masks(proposals.masks.numpy(), size)
    page.write_data(f"why/{name}", _why(masks, proposals, answer, work.cfg.retrieval.vote_temperature))
    if answer is None:
        return Entry(full, entry.photograph, pixels, None, len(proposals))
    shown = [i for i in answer.kept.tolist() if answer.labels[i] > 0]
    score = float(answer.scores[shown].mean()) if shown else None
    if truth is None:
        return Entry(full, entry.photograph, pixels, score, len(proposals), answer)
    scale = full[0] * full[1] / (size[0] * size[1])
    owner = owners(masks, answer.labels, answer.kept, resize_labels(labels, size))
    shrunk = resize_labels(truth, size)
    return Entry(full, entry.photograph, pixels, score, len(proposals), answer, owner, shrunk, scale)


def areas(proposals: Proposals) -> np.ndarray:
    """`[N]` int64, `Proposals.areas` of masks on the CPU, many times faster than torch adds up booleans there."""
    return np.array([np.count_nonzero(mask) for mask in proposals.masks.cpu().numpy()], dtype=np.int64)


def _why(masks: np.ndarray, proposals: Proposals, answer: Answer | None, temperature: float | None) -> dict[str, Any]:
    packed = pack_layers(masks)
    content: dict[str, Any] = {
        "layers": [_text(encode_layer_png(layer)) for layer in packed.layers],
        "layer": packed.layer_of,
        "code": packed.code_of,
        "area": areas(proposals).tolist(),
        "own": [round(float(score), 4) for score in proposals.predicted_iou],
    }
    if answer is not None:
        near = slice(0, SHOWN_NEIGHBOURS)
        content |= {
            "label": answer.labels.tolist(),
            "score": [round(float(score), 4) for score in answer.scores],
            "kept": answer.kept.tolist(),
            "votes": votes(answer, temperature),
            "neighbours": packed_neighbours(answer.rows[:, near], answer.similarities[:, near]),
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
