"""Write the bank of a report: pictures of its regions, their neighbours, the most misleading ones, and a map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moduseg.bank.derived import STAGE
from moduseg.bank.purification import purify
from moduseg.bank.store import Bank
from moduseg.config import PurifyConfig
from moduseg.datasets.colours import find_class_colours
from moduseg.errors import DataError
from moduseg.pipeline.workspace import Workspace, log
from moduseg.report.bank_map import make_maps
from moduseg.report.bank_regions import RegionPictures
from moduseg.report.finished_run import FinishedRun
from moduseg.report.image_data import RetrievalReplay, WrittenImages
from moduseg.report.packing import pack_neighbours, pack_numbers
from moduseg.report.page import Page
from moduseg.report.pictures import crop_region, draw_purification, encode_jpeg
from moduseg.report.threads import map_in_threads
from moduseg.retrieval.search import search
from moduseg.structures import IGNORE_INDEX, SearchBank

NUM_NEIGHBOURS = 12
"""At most this many neighbours of a pictured region are listed."""
NUM_WORST = 200
"""At most this many misleading regions are shown."""
_PICTURE_SIDE = 320
ImageAndMask = tuple[np.ndarray, np.ndarray]
"""A training image, `[H, W, 3]` uint8, and its pseudo mask in the bank's ids, `[H, W]` uint8."""
FindImage = Callable[[str], ImageAndMask | None]
"""Image id -> training image and pseudo mask; `None` if one of them is gone."""


def write_bank(
    work: Workspace,
    run: FinishedRun,
    page: Page,
    *,
    bank: Bank,
    digest: str,
    replay: RetrievalReplay,
    images: WrittenImages,
) -> None:
    """Write `data/bank.js` and the pictures below `bank/`.

    Args:
        work: settings.
        run: the run; its pseudo masks outline the regions.
        page: where it goes.
        bank: as stored, with the ids of the run's classes.
        digest: of the bank in its folder, which corrections name (`moduseg.bank.derived.digest_bank`).
        replay: holds the bank as it is searched.
        images: the images of the report.
    """
    searched = replay.bank
    rows = searched.rows.cpu().numpy()
    labels = bank.labels.clone()
    labels[searched.rows.cpu()] = searched.labels.cpu()
    is_searched = np.zeros(len(bank), dtype=bool)
    is_searched[rows] = True
    times_neighbour = np.zeros(len(bank), dtype=np.int64)
    times_neighbour[list(images.times_neighbour)] = list(images.times_neighbour.values())
    # Regions with a picture: first those that mislead, then those that voted most often, then the others.
    worst = images.attribution.list_worst(NUM_WORST)
    order = [*(entry["row"] for entry in worst), *np.argsort(-times_neighbour, kind="stable").tolist()]
    chosen = sorted(list(dict.fromkeys(order))[: work.cfg.evaluation.report_regions])
    named, scheme = run.dataset.class_colours, work.cfg.evaluation.report_colours
    colours = find_class_colours(bank.classes, named, scheme)
    find = _make_finder(work, run, bank)
    writer = _RegionWriter(page, bank, labels, _choose_purification(work, bank), find, colours)
    pictured = _write_pictures(work, writer, chosen)
    page.write_data(
        "bank",
        {
            "rows": len(bank),
            "digest": digest,
            "path": _name_folder(run.inputs["build_bank"].path),
            "labels": pack_numbers(labels.numpy(), "u2"),
            "image": pack_numbers(bank.image_index.numpy(), "u4"),
            "areas": pack_numbers(bank.areas.numpy(), "u4"),
            "used": pack_numbers(times_neighbour, "u4"),
            "searched": pack_numbers(is_searched, "u2"),
            "ids": list(bank.image_ids),
            "pictured": pictured,
            "neighbours": _find_neighbours(bank, searched, pictured),
            "worst": worst,
            "maps": make_maps(work.cfg, searched),
        },
    )


def _name_folder(path: Path) -> str:
    """Return what a command calls the folder of a bank: a report says nothing of the machine that it was made on."""
    # Below the folder of all artefacts, or wherever a person put it.
    return "/".join(("outputs", *path.parts[-3:])) if path.parent.name in ("build_bank", STAGE) else path.name


def _choose_purification(work: Workspace, bank: Bank) -> PurifyConfig:
    """Return the settings of docs/method.md, step 2, that the bank was made with."""
    stored = bank.info.get("config", {}).get("bank", {}).get("purify")
    return PurifyConfig(**stored) if isinstance(stored, Mapping) else work.cfg.bank.purify


def _make_finder(work: Workspace, run: FinishedRun, bank: Bank) -> FindImage:
    """Return the function that finds the images which the regions of a bank come from."""
    if work.cfg.bank.path is not None:
        # A bank that was made of others may hold images of no data set, and label maps with other ids.
        pictures = RegionPictures(run.inputs["build_bank"].path, bank)
        return lambda image_id: _find_through_bank(pictures, bank, image_id)
    dataset, pseudo_masks = work.dataset(work.train_split), run.inputs.get("pseudo_masks")

    def find_in_dataset(image_id: str) -> ImageAndMask | None:
        if pseudo_masks is None:
            return None
        try:
            label_map = pseudo_masks.label_map(image_id)
            return dataset.load(image_id, labels=False).image, label_map
        except DataError as error:
            log.warning("report: no picture of a bank region: %s", error)
            return None

    return find_in_dataset


def _find_through_bank(pictures: RegionPictures, bank: Bank, image_id: str) -> ImageAndMask | None:
    image, stored = pictures.find_image(image_id), pictures.find_label_map(image_id)
    if image is None or stored is None:
        return None
    label_map, classes = stored
    table = np.full(256, IGNORE_INDEX, np.uint8)
    for label, name in enumerate(classes):
        if name in bank.classes:
            table[label] = bank.classes.index(name)
    return image, table[label_map]


@dataclass(frozen=True)
class _RegionWriter:
    """Draws the regions of a bank.

    Attributes:
        page: where the pictures go.
        bank: as stored.
        labels: `[M]` the label that each row votes with.
        purification: how the bank's pseudo masks were purified.
        find: finds their images.
        colours: `[256, 3]` uint8 of the classes, row = label id.
    """

    page: Page
    bank: Bank
    labels: Tensor
    purification: PurifyConfig
    find: FindImage
    colours: np.ndarray

    def write(self, item: tuple[int, list[int]]) -> list[int]:
        """Write the image of an index, and a crop for each of the rows from it; return the rows if it was found."""
        image_index, rows = item
        found = self.find(self.bank.image_ids[image_index])
        if found is None or found[0].shape[:2] != found[1].shape:
            return []
        image, pseudo_mask = found
        purified = pseudo_mask
        if self.purification.enabled:
            settings = self.purification
            purified = purify(torch.from_numpy(pseudo_mask), settings.kernel_size, settings.iterations).numpy()
        for row in rows:
            # The region is that of the stored label, even if the control experiment shuffles the labels.
            region = find_region(purified, int(self.bank.labels[row]), int(self.bank.areas[row]))
            crop = crop_region(image, region, int(self.labels[row]), colours=self.colours)
            self.page.write_picture(f"bank/{row:06d}.jpg", encode_jpeg(crop))
        picture = draw_purification(image, pseudo_mask, purified, _PICTURE_SIDE, colours=self.colours)
        self.page.write_picture(f"bank/image-{image_index:06d}.jpg", encode_jpeg(picture))
        return rows


def find_region(purified: np.ndarray, label: int, area: int) -> np.ndarray:
    """Return the region of a row of the bank in its image, `[H, W]` bool.

    It is that of the row's label. Where that has another area and a single other label has the row's, the row's label
    was corrected, and the pseudo mask still has the one before.

    Args:
        purified: `[H, W]` uint8, the purified pseudo mask, 255 where nothing is.
        label: of the row.
        area: of the row, in pixels.
    """
    counts = np.bincount(purified.ravel(), minlength=256)
    if counts[label] != area:
        matching = np.flatnonzero(counts[:IGNORE_INDEX] == area)
        label = int(matching[0]) if len(matching) == 1 else label
    return np.asarray(purified == label)


def _write_pictures(work: Workspace, writer: _RegionWriter, chosen: list[int]) -> list[int]:
    """Write the pictures of rows, image by image, and return the rows that have one, ascending."""
    rows_by_image: dict[int, list[int]] = {}
    for row in chosen:
        rows_by_image.setdefault(int(writer.bank.image_index[row]), []).append(row)
    written = map_in_threads(work.cfg, writer.write, rows_by_image.items(), "bank")
    return sorted(row for rows in written for row in rows)


@torch.inference_mode()
def _find_neighbours(bank: Bank, searched: SearchBank, rows: list[int]) -> dict[str, Any]:
    """Return the nearest searched entries of each of the rows without itself, packed."""
    if not rows or not len(searched.rows):
        empty = np.zeros((len(rows), 0))
        return pack_neighbours(empty, empty)
    pooled = bank.pooled[torch.tensor(rows)].to(searched.vectors.device)
    queries = functional.normalize(pooled if searched.centre is None else pooled - searched.centre, dim=1)
    similarities, positions = search(queries, searched.vectors, NUM_NEIGHBOURS + 1)
    neighbours = searched.rows[positions].cpu().tolist()
    count = min(NUM_NEIGHBOURS, len(neighbours[0]) - 1)
    table = np.zeros((len(rows), count, 2))
    table[:, :, 0] = -1
    for index, row in enumerate(rows):
        # The entry itself is skipped wherever equal ones rank it, however many prototypes it stands for.
        pairs = zip(neighbours[index], similarities[index].tolist(), strict=True)
        others = [pair for pair in pairs if pair[0] != row][:count]
        table[index, : len(others)] = np.array(others).reshape(-1, 2)
    return pack_neighbours(table[:, :, 0].astype(np.int64), table[:, :, 1])
