"""The bank in a report: pictures of its regions, their neighbours, those that mislead most, and a map of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from moduseg.bank.purification import purify
from moduseg.bank.store import Bank
from moduseg.config import Config, PurifyConfig
from moduseg.datasets.io import read_label_png
from moduseg.errors import ConfigError, DataError
from moduseg.evaluation.pairs import MAX_AUTO_WORKERS
from moduseg.pipeline.manifests import safe_name
from moduseg.pipeline.workspace import Workspace, log
from moduseg.report.bank_regions import RegionPictures
from moduseg.report.image_data import RetrievalReplay, Written
from moduseg.report.page import Page
from moduseg.report.pictures import crop_region, draw_purification, encode_jpeg
from moduseg.report.source import Source
from moduseg.report.why import packed, packed_neighbours, principal_plane, unit_square
from moduseg.retrieval.search import search
from moduseg.structures import IGNORE_INDEX

NEIGHBOURS = 12
"""Of each pictured region that a page lists."""
WORST = 200
"""Regions in the gallery of those that mislead."""
_PICTURE = 320
_MAP_STEPS = 65_535


def write_bank(
    work: Workspace, source: Source, page: Page, bank: Bank, retriever: RetrievalReplay, written: Written
) -> None:
    """Write `data/bank.js` and the pictures below `bank/`.

    Args:
        work: settings.
        source: the run; its pseudo masks outline the regions.
        page: where it goes.
        bank: as stored.
        retriever: holds the bank as it is searched.
        written: of the images.
    """
    searched = retriever.bank
    count = len(bank)
    labels = bank.labels.clone()
    labels[searched.rows.cpu()] = searched.labels.cpu()
    used = np.zeros(count, dtype=np.int64)
    used[list(written.used)] = list(written.used.values())
    worst = written.blame.worst(WORST)
    chosen = _chosen(count, [entry["row"] for entry in worst], used, work.cfg.evaluation.report_regions)
    pictured = _write_pictures(work, source, page, bank, labels, chosen)
    in_search = np.zeros(count, dtype=bool)
    in_search[searched.rows.cpu().numpy()] = True
    page.write_data(
        "bank",
        {
            "rows": count,
            "labels": packed(labels.numpy(), "u2"),
            "image": packed(bank.image_index.numpy(), "u4"),
            "areas": packed(bank.areas.numpy(), "u4"),
            "used": packed(used, "u4"),
            "searched": packed(in_search, "u2"),
            "ids": list(bank.image_ids),
            "pictured": pictured,
            "neighbours": _neighbours(bank, retriever, pictured),
            "worst": worst,
            "maps": _maps(work.cfg, bank, retriever),
        },
    )


def _chosen(count: int, first: list[int], used: np.ndarray, most: int) -> list[int]:
    """The rows that get a picture, ascending: those that mislead, then those that voted most often, then the rest."""
    order = [*first, *np.argsort(-used, kind="stable").tolist()]
    return sorted(list(dict.fromkeys(order))[: min(most, count)])


Found = tuple[np.ndarray, np.ndarray]
"""A training image, `[H, W, 3]` uint8, and its pseudo mask in the bank's ids, `[H, W]` uint8."""


def _finder(work: Workspace, source: Source, bank: Bank) -> Callable[[str], Found | None]:
    """Where the regions of a bank come from: id -> image and pseudo mask, `None` where they are not at hand."""
    if work.cfg.bank.path is not None:
        # A bank that was made of others may hold images of no data set, and label maps with other ids.
        pictures = RegionPictures(source.inputs["build_bank"], bank)

        def of_given(image_id: str) -> Found | None:
            image, stored = pictures.find_image(image_id), pictures.find_label_map(image_id)
            if image is None or stored is None:
                return None
            table = np.full(256, IGNORE_INDEX, np.uint8)
            for label, name in enumerate(stored[1]):
                if name in bank.classes:
                    table[label] = bank.classes.index(name)
            return image, table[stored[0]]

        return of_given
    dataset = work.dataset(work.train_split)

    def of_built(image_id: str) -> Found | None:
        if "pseudo_masks" not in source.inputs:
            return None
        try:
            pseudo = read_label_png(source.inputs["pseudo_masks"] / safe_name(f"labels/{image_id}", ".png"))
            return dataset.load(image_id, labels=False).image, pseudo
        except DataError as error:
            log.warning("report: no picture of a bank region: %s", error)
            return None

    return of_built


def _write_pictures(
    work: Workspace, source: Source, page: Page, bank: Bank, labels: Tensor, chosen: list[int]
) -> list[int]:
    """A crop of each chosen row's region and a picture of each of their images; the rows that could be pictured."""
    find = _finder(work, source, bank)
    settings = work.cfg.bank.purify
    stored = bank.info.get("config", {}).get("bank", {}).get("purify")
    if isinstance(stored, Mapping):
        settings = PurifyConfig(**stored)
    by_image: dict[int, list[int]] = {}
    for row in chosen:
        by_image.setdefault(int(bank.image_index[row]), []).append(row)

    def write(item: tuple[int, list[int]]) -> list[int]:
        image_index, rows = item
        found = find(bank.image_ids[image_index])
        if found is None or found[0].shape[:2] != found[1].shape:
            return []
        image, pseudo = found
        kept = pseudo
        if settings.enabled:
            kept = purify(torch.from_numpy(pseudo), settings.kernel_size, settings.iterations).numpy()
        for row in rows:
            # The region is that of the label it was stored with, even where the control shuffles the labels.
            region = kept == int(bank.labels[row])
            page.write_picture(f"bank/{row:06d}.jpg", encode_jpeg(crop_region(image, region, int(labels[row]))))
        page.write_picture(
            f"bank/image-{image_index:06d}.jpg", encode_jpeg(draw_purification(image, pseudo, kept, _PICTURE))
        )
        return rows

    workers = work.cfg.evaluation.workers or min(MAX_AUTO_WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers, thread_name_prefix="report") as pool:
        done = pool.map(write, by_image.items())
        return sorted(row for rows in tqdm(done, "bank", len(by_image), unit="img", leave=False) for row in rows)


@torch.inference_mode()
def _neighbours(bank: Bank, retriever: RetrievalReplay, rows: list[int]) -> dict[str, Any]:
    """The nearest entries of each pictured one among those that are searched, itself left out."""
    searched = retriever.bank
    if not rows or not len(searched.rows):
        empty = np.zeros((len(rows), 0))
        return packed_neighbours(empty, empty)
    chosen = torch.tensor(rows)
    pooled = bank.pooled[chosen].to(searched.vectors.device)
    vectors = functional.normalize(pooled if searched.centre is None else pooled - searched.centre, dim=1)
    similarities, positions = search(vectors, searched.vectors, NEIGHBOURS + 1)
    found = searched.rows[positions].cpu().tolist()
    near = similarities.cpu().tolist()
    most = min(NEIGHBOURS, len(found[0]) - 1)
    # The entry itself goes, wherever equal ones rank it, however many prototypes it stands for.
    lists = [
        [(other, value) for other, value in zip(others, values, strict=True) if other != row][:most]
        for row, others, values in zip(rows, found, near, strict=True)
    ]
    filled = [entries + [(-1, 0.0)] * (most - len(entries)) for entries in lists]
    table = np.array(filled, dtype=np.float64).reshape(len(rows), most, 2)
    return packed_neighbours(table[:, :, 0].astype(np.int64), table[:, :, 1])


def _maps(cfg: Config, bank: Bank, retriever: RetrievalReplay) -> Mapping[str, Any]:
    """The bank on a plane: `pca`, and `umap` where it is asked for."""
    rows = retriever.bank.rows.cpu().numpy()
    vectors = retriever.bank.vectors.float()
    planes = {"pca": principal_plane(vectors)}
    if cfg.evaluation.report_map == "umap" and len(rows) > 3:
        planes["umap"] = unit_square(_umap(vectors.cpu().numpy(), cfg.runtime.seed))
    return {
        name: {"rows": packed(rows, "u4"), "x": _steps(points[:, 0]), "y": _steps(points[:, 1])}
        for name, points in planes.items()
    }


def _steps(values: np.ndarray) -> str:
    return packed(np.clip(np.round(values * _MAP_STEPS), 0, _MAP_STEPS), "u2")


def _umap(vectors: np.ndarray, seed: int) -> np.ndarray:
    try:
        import umap  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ConfigError(
            "evaluation.report_map: got 'umap', but the package umap-learn is not installed; pip install umap-learn, "
            "or set evaluation.report_map=pca"
        ) from error
    points = umap.UMAP(n_neighbors=min(15, len(vectors) - 1), metric="cosine", random_state=seed).fit_transform(vectors)
    return np.asarray(points, dtype=np.float64)
