"""Stage `build_bank`: training images + pseudo masks -> the feature bank (docs/method.md, steps 2 and 3)."""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moduseg.bank.aggregation import aggregate, coverage, harden
from moduseg.bank.purification import class_regions, purify
from moduseg.bank.store import Bank, encode_vectors
from moduseg.config import BankConfig
from moduseg.devices import copy_arrays
from moduseg.errors import ArtefactError, DataError
from moduseg.files import file_digest, to_json_values
from moduseg.pipeline.batches import Files, Outcome
from moduseg.pipeline.manifests import StageFolder, stored_name
from moduseg.pipeline.preflight import HasDigest
from moduseg.pipeline.stage import Stage
from moduseg.pipeline.workspace import log
from moduseg.stages.pseudo_masks import PseudoMasks
from moduseg.structures import TokenMap


class BuildBank(Stage[tuple[str, np.ndarray, np.ndarray]]):
    """Builds the bank of the training split. An item is an image's id, the image and its pseudo mask.

    The folder holds `bank.safetensors`, `bank.json`, `vectors/<id>.safetensors` (what each image adds),
    `failures.jsonl` and `manifest.json`. If `bank.path` names a folder, that is returned and nothing is built.
    """

    name = "build_bank"
    uses = "train"

    def existing_folder(self) -> Path | None:
        """Return the folder that `bank.path` names.

        Raises:
            ArtefactError: it holds no finished bank.
        """
        return None if self.cfg.bank.path is None else existing_bank_folder(self.cfg.bank.path)

    def inputs(self) -> dict[str, Stage[Any]]:
        """Return `pseudo_masks`."""
        return {"pseudo_masks": PseudoMasks(self.work)}

    def models(self) -> dict[str, HasDigest]:
        """Return the backbone."""
        return {"backbone": self.work.backbone}

    def cost(self) -> Hashable:
        """Return what is equal for stages of the same cost: the backbone, twice where mirrored images pass it too."""
        return (id(self.work.backbone),) * (2 if self.cfg.bank.flips else 1)

    def folder_name(self) -> str:
        """Return the readable part of the folder's name."""
        return f"{self.cfg.backbone['name']}-{self.split}"

    def key(self) -> dict[str, Any]:
        """Return everything that decides the vectors; what filters them when the bank is read is not part of it."""
        settings = self.cfg.bank
        bank_parts = {
            "purify": to_json_values(self.cfg.as_dict()["bank"]["purify"]) if settings.purify.enabled else None,
            "min_area": settings.min_area,
            "aggregation": settings.aggregation,
        }
        if settings.flips:
            bank_parts["flips"] = True
        return {
            "dataset": self.work.dataset_parts(self.split),
            "pseudo_masks": self.input_folders["pseudo_masks"].name,
            "backbone": self.work.backbone_parts(),
            "bank": bank_parts,
        }

    def load(self, image_id: str) -> tuple[str, np.ndarray, np.ndarray]:
        """Return an image and its pseudo mask."""
        image = self.dataset.load(image_id).image
        label_map = self.input_folders["pseudo_masks"].label_map(image_id)
        if label_map.shape != image.shape[:2]:
            raise DataError(
                f"{image_id}: pseudo mask is {label_map.shape}, expected the image's {image.shape[:2]}; make it again"
            )
        return image_id, image, label_map

    def process(self, items: list[tuple[str, np.ndarray, np.ndarray]]) -> list[Files]:
        """Return the vectors of several images, followed by those of their mirror images if `bank.flips` is set."""
        ids = [image_id for image_id, _, _ in items]
        entries = self._vectors([image for _, image, _ in items], [label_map for _, _, label_map in items])
        if self.cfg.bank.flips:
            mirrored = self._vectors(
                [np.ascontiguousarray(image[:, ::-1]) for _, image, _ in items],
                [label_map[:, ::-1].copy() for _, _, label_map in items],
            )
            entries = [
                {name: torch.cat((entry[name], mirror[name])) for name in entry}
                for entry, mirror in zip(entries, mirrored, strict=True)
            ]
        return [{stored_name("vectors", i): partial(encode_vectors, e)} for i, e in zip(ids, entries, strict=True)]

    def reads(self, image_id: str) -> list[Path]:
        """Return the files of the image and its pseudo mask."""
        return [self.image_file(image_id), self.input_folders["pseudo_masks"].file("label_map", image_id)]

    def merge(self, outcome: Outcome) -> dict[str, Any]:
        """Put the vectors of all images together as the bank, unless that is done."""
        path, artefact = self.artefact.path, self.artefact
        bank_file = path / "bank.safetensors"
        is_intact = bank_file.is_file() and artefact.manifest.get("bank_sha256") == file_digest(bank_file)
        if outcome.changed or not is_intact or not (path / "bank.json").is_file():
            self._bank(outcome.failed).save(path)
            artefact.write_manifest(status="running")
        bank = Bank.load(path)
        missing = [name for name, count in bank.counts.items() if count == 0]
        if missing:
            log.warning("build_bank: no vector for %s; no pixel can get these labels", ", ".join(missing))
        return {"vectors": len(bank), "bank_sha256": file_digest(bank_file), "config": self.cfg.as_dict()}

    def _vectors(self, images: list[np.ndarray], label_maps: list[np.ndarray]) -> list[dict[str, torch.Tensor]]:
        token_maps = self.work.backbone.tokens(images)
        return [
            image_vectors(label_map, tokens, self.cfg.bank)
            for label_map, tokens in zip(copy_arrays(label_maps, token_maps[0].tokens.device), token_maps, strict=True)
        ]

    def _bank(self, failed: dict[str, str]) -> Bank:
        """Return the vectors of all images in the order of the data set, whichever run made them."""
        ids, dataset, folder = self.image_ids(), self.dataset, StageFolder(self.artefact.path)
        pooled = [torch.empty(0, self.work.backbone.dim)]
        labels, areas, index = ([torch.empty(0, dtype=torch.int64)] for _ in range(3))
        for position, image_id in enumerate(ids):
            if image_id in failed:
                continue
            entry = folder.vectors(image_id, ("pooled", "labels", "areas"))
            pooled.append(entry["pooled"])
            labels.append(entry["labels"])
            areas.append(entry["areas"])
            index.append(torch.full((len(entry["labels"]),), position, dtype=torch.int64))
        info = {
            "dataset": dataset.name,
            "split": self.split,
            "label_source": dataset.label_source,
            "backbone_digest": self.work.backbone.digest,
            "config": self.cfg.as_dict(),
        }
        return Bank(
            pooled=torch.cat(pooled),
            labels=torch.cat(labels),
            image_index=torch.cat(index),
            areas=torch.cat(areas),
            image_ids=tuple(ids),
            classes=tuple(dataset.classes),
            info=info,
        )


def existing_bank_folder(path: str) -> Path:
    """Return the folder of a finished bank.

    Raises:
        ArtefactError: it holds no finished bank.
    """
    folder = Path(path).expanduser()
    if not all((folder / name).is_file() for name in ("bank.json", "bank.safetensors", "manifest.json")):
        raise ArtefactError(
            f"bank.path: got '{path}', expected a folder with bank.json, bank.safetensors and manifest.json; name one "
            "that scripts/build_bank.py or scripts/bank.py made"
        )
    return folder


def image_vectors(label_map: torch.Tensor, tokens: TokenMap, bank: BankConfig) -> dict[str, torch.Tensor]:
    """Return what one labelled image adds to the bank (docs/method.md, steps 2 and 3).

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
