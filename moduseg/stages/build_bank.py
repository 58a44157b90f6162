"""Stage `build_bank`: training images + pseudo masks -> the feature bank (METHOD, stage 1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as save_tensors

from moduseg.bank.aggregation import aggregate, coverage, harden
from moduseg.bank.purification import class_regions, purify
from moduseg.bank.store import Bank, read_vectors
from moduseg.config import BankConfig, Config
from moduseg.datasets.io import read_label_png
from moduseg.errors import ArtefactError, DataError
from moduseg.files import file_digest
from moduseg.pipeline.artefacts import Artefact
from moduseg.pipeline.batches import Files, Loop, Outcome, sizes
from moduseg.pipeline.workspace import (
    Plan,
    Workspace,
    carry_out,
    failures_of,
    finish,
    image_file,
    log,
    plain,
    safe_name,
)
from moduseg.stages import pseudo_masks
from moduseg.structures import TokenMap


def run(cfg: Config, work: Workspace | None = None) -> Path:
    """Build the bank of the training split.

    Returns:
        The artefact's folder: `bank.safetensors`, `bank.json`, `vectors/<id>.safetensors` (what each image gave),
        `failures.jsonl`, `manifest.json`. With `bank.path` that folder, and nothing is built.

    Raises:
        ArtefactError: `bank.path` holds no bank.
    """
    if cfg.bank.path is not None:
        return given(cfg.bank.path)
    work = work or Workspace(cfg)

    def make() -> Path:
        todo = plan(cfg, work)
        return carry_out(work, todo, __name__, lambda outcome: _finish(cfg, work, todo, outcome))

    return work.once(cfg, "build_bank", work.train_split, make)


def plan(cfg: Config, work: Workspace) -> Plan:
    """What `run` does with each image."""
    dataset = work.dataset(work.train_split)
    masks = pseudo_masks.run(cfg, work)
    bank_parts = {
        "purify": plain(cfg.as_dict()["bank"]["purify"]) if cfg.bank.purify.enabled else None,
        "min_area": cfg.bank.min_area,
        "aggregation": cfg.bank.aggregation,
    }
    if cfg.bank.flips:
        bank_parts["flips"] = True
    artefact = work.artefact(
        "build_bank",
        f"{cfg.backbone['name']}-{work.train_split}",
        {
            "dataset": work.dataset_parts(work.train_split),
            "pseudo_masks": masks.name,
            "backbone": work.backbone_parts(),
            "bank": bank_parts,
        },
    )

    def load(image_id: str) -> tuple[str, np.ndarray, np.ndarray]:
        image = dataset.load(image_id).image
        labels = read_label_png(masks / safe_name(f"labels/{image_id}", ".png"))
        if labels.shape != image.shape[:2]:
            raise DataError(
                f"{image_id}: pseudo mask is {labels.shape}, expected the image's {image.shape[:2]}; make it again"
            )
        return image_id, image, labels

    def entry_of(labels: np.ndarray, tokens: TokenMap) -> dict[str, torch.Tensor]:
        return image_vectors(torch.from_numpy(labels).to(tokens.tokens.device), tokens, cfg.bank)

    def process(items: list[tuple[str, np.ndarray, np.ndarray]]) -> list[Files]:
        maps = work.backbone.tokens([image for _, image, _ in items])
        files: list[Files] = []
        entries = [entry_of(labels, tokens) for (_, _, labels), tokens in zip(items, maps, strict=True)]
        if cfg.bank.flips:
            maps = work.backbone.tokens([np.ascontiguousarray(image[:, ::-1]) for _, image, _ in items])
            mirrored = [entry_of(labels[:, ::-1].copy(), t) for (_, _, labels), t in zip(items, maps, strict=True)]
            entries = [
                {name: torch.cat((own[name], other[name])) for name in own}
                for own, other in zip(entries, mirrored, strict=True)
            ]
        for (image_id, _, _), entry in zip(items, entries, strict=True):
            stored = {name: tensor.cpu().contiguous() for name, tensor in entry.items()}
            files.append({safe_name(f"vectors/{image_id}", ".safetensors"): save_tensors(stored)})
        return files

    def stamp(image_id: str) -> list[int]:
        return sizes(image_file(dataset, image_id), masks / safe_name(f"labels/{image_id}", ".png"))

    left_out = failures_of(masks, "pseudo_masks")
    loop = Loop(
        artefact, dataset.ids, load, process, cfg.runtime.batch_size, left_out, "build bank", stamp, work.spread
    )
    return Plan(loop, {"pseudo_masks": masks})


def _finish(cfg: Config, work: Workspace, todo: Plan, outcome: Outcome) -> Path:
    """Merge the vectors of all images, unless that is done."""
    dataset, artefact = work.dataset(work.train_split), todo.loop.artefact
    bank_file = artefact.path / "bank.safetensors"
    whole = bank_file.is_file() and artefact.manifest.get("bank_sha256") == file_digest(bank_file)
    if outcome.changed or not whole or not (artefact.path / "bank.json").is_file():
        _merge(artefact, dataset.ids, outcome.failed, dataset.classes, work.backbone.dim, _info(cfg, work)).save(
            artefact.path
        )
        artefact.write_manifest(status="running")
    bank = Bank.load(artefact.path)
    missing = [name for name, count in bank.counts.items() if count == 0]
    if missing:
        log.warning("build_bank: no vector for %s; no pixel can get these labels", ", ".join(missing))
    return finish(
        artefact,
        outcome,
        len(dataset.ids),
        todo.inputs,
        vectors=len(bank),
        bank_sha256=file_digest(bank_file),
        config=cfg.as_dict(),
    )


def given(path: str) -> Path:
    """The folder of a finished bank.

    Raises:
        ArtefactError: it holds no bank.
    """
    folder = Path(path).expanduser()
    if not all((folder / name).is_file() for name in ("bank.json", "bank.safetensors", "manifest.json")):
        raise ArtefactError(
            f"bank.path: got '{path}', expected a folder with bank.json, bank.safetensors and manifest.json; name one "
            "that scripts/build_bank.py or scripts/bank.py made"
        )
    return folder


def image_vectors(label_map: torch.Tensor, tokens: TokenMap, bank: BankConfig) -> dict[str, torch.Tensor]:
    """What one labelled image adds to the bank (METHOD, stage 1, steps 2 and 3).

    Args:
        label_map: `[H, W]` uint8 pseudo mask, 255 ignore.
        tokens: the image's patch tokens.
        bank: purification, minimum area and aggregation.

    Returns:
        `pooled` `[R, C]` float32, `labels` `[R]` int64, `areas` `[R]` int64, ascending label.
    """
    if bank.purify.enabled:
        label_map = purify(label_map, bank.purify.kernel_size, bank.purify.iterations)
    class_ids, masks = class_regions(label_map, bank.min_area)
    weights = coverage(masks, tokens)
    if bank.aggregation == "hard":
        weights = harden(weights)
    pooled = aggregate(tokens.tokens, weights, normalize=False)
    return {"pooled": pooled, "labels": class_ids, "areas": masks.flatten(1).sum(1)}


def _info(cfg: Config, work: Workspace) -> dict[str, Any]:
    dataset = work.dataset(work.train_split)
    return {
        "dataset": dataset.name,
        "split": work.train_split,
        "label_source": dataset.label_source,
        "backbone_digest": work.backbone.digest,
        "config": cfg.as_dict(),
    }


def _merge(
    artefact: Artefact,
    ids: tuple[str, ...],
    failed: dict[str, str],
    classes: tuple[str, ...],
    dim: int,
    info: dict[str, Any],
) -> Bank:
    """The vectors of all images in the order of the data set, whoever made them when."""
    pooled = [torch.empty(0, dim)]
    labels, areas, index = ([torch.empty(0, dtype=torch.int64)] for _ in range(3))
    for position, image_id in enumerate(ids):
        if image_id in failed:
            continue
        file = artefact.file(safe_name(f"vectors/{image_id}", ".safetensors"))
        entry = read_vectors(file, ("pooled", "labels", "areas"))
        pooled.append(entry["pooled"])
        labels.append(entry["labels"])
        areas.append(entry["areas"])
        index.append(torch.full((len(entry["labels"]),), position, dtype=torch.int64))
    return Bank(
        torch.cat(pooled), torch.cat(labels), torch.cat(index), torch.cat(areas), tuple(ids), tuple(classes), info
    )
