"""Stage `build_bank`: training images + pseudo masks -> the feature bank (docs/method.md, steps 2 and 3)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moduseg.bank.parts import find_parts
from moduseg.bank.regions import labelled_regions, region_vectors, unlabelled_regions
from moduseg.bank.store import Bank, encode_vectors
from moduseg.devices import copy_arrays
from moduseg.errors import ArtefactError, DataError
from moduseg.files import file_digest, to_json_values
from moduseg.masks.encoded import WaitingProposals, decode
from moduseg.pipeline.batches import Files, Outcome
from moduseg.pipeline.manifests import StageFolder, name_supervision, stored_name
from moduseg.pipeline.preflight import HasDigest
from moduseg.pipeline.stage import Stage
from moduseg.pipeline.workspace import log
from moduseg.stages.propose import Propose
from moduseg.stages.pseudo_masks import PseudoMasks
from moduseg.structures import TokenMap


@dataclass(frozen=True)
class RegionSource:
    """Where an image's regions are.

    Attributes:
        label_map: `[H, W]` uint8 pseudo mask; `None` if the regions are proposals without labels.
        proposals: these, or with `bank.parts` those that may be parts of the pseudo mask's classes; else `None`.
    """

    label_map: np.ndarray | None = None
    proposals: WaitingProposals | None = None


class BuildBank(Stage[tuple[str, np.ndarray, RegionSource]]):
    """Builds the bank of the training split. An item is an image's id, the image and where its regions are.

    The folder holds `bank.safetensors`, `bank.json`, `vectors/<id>.safetensors` (what each image adds),
    `failures.jsonl` and `manifest.json`. If `bank.path` names a folder, that is returned and nothing is built. With
    `retrieval.answer=words` each region has its CLIP feature too; with `bank.regions=proposals` regions have no labels
    (0, the background's id), and no tag is read. With `bank.parts` proposals that lie in one class are regions of it.
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
        """Return `pseudo_masks`, `propose` on the training split if its proposals are regions, or both."""
        stages: dict[str, Stage[Any]] = {}
        if self._has_labels:
            stages["pseudo_masks"] = PseudoMasks(self.work)
        if not self._has_labels or self.cfg.bank.parts:
            stages["propose"] = Propose(self.work, self.split)
        return stages

    def models(self) -> dict[str, HasDigest]:
        """Return the backbone, and the CLIP if words are asked."""
        words = {"pseudo_masks.generator": self.work.region_encoder} if self.cfg.uses_words else {}
        return {"backbone": self.work.backbone, **words}

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
        if settings.parts:
            bank_parts["parts"] = settings.parts
        return {
            "dataset": self.work.dataset_parts(self.split),
            **{name: folder.name for name, folder in self.input_folders.items()},
            "backbone": self.work.backbone_parts(),
            "bank": bank_parts,
            **self.work.word_parts,
        }

    @property
    def _has_labels(self) -> bool:
        """Whether regions are those of pseudo masks."""
        return self.cfg.bank.regions == "pseudo_masks"

    @property
    def _supervision(self) -> str | None:
        """What the generator was trained on, if the bank holds anything of it."""
        return self.work.generator.supervision if self._has_labels or self.cfg.uses_words else None

    def load(self, image_id: str) -> tuple[str, np.ndarray, RegionSource]:
        """Return an image and its pseudo mask, its proposals, or both."""
        image = self.dataset.load(image_id).image
        proposals = None
        if "propose" in self.input_folders:
            proposals = self.input_folders["propose"].waiting_proposals(image_id, (image.shape[0], image.shape[1]))
        if not self._has_labels:
            return image_id, image, RegionSource(proposals=proposals)
        label_map = self.input_folders["pseudo_masks"].label_map(image_id)
        if label_map.shape != image.shape[:2]:
            raise DataError(
                f"{image_id}: pseudo mask is {label_map.shape}, expected the image's {image.shape[:2]}; make it again"
            )
        return image_id, image, RegionSource(label_map, proposals)

    def process(self, items: list[tuple[str, np.ndarray, RegionSource]]) -> list[Files]:
        """Return the vectors of several images, followed by those of their mirror images if `bank.flips` is set."""
        ids = [image_id for image_id, _, _ in items]
        images, sources = [image for _, image, _ in items], [source for _, _, source in items]
        entries = self._vectors(images, sources)
        if self.cfg.bank.flips:
            images = [np.ascontiguousarray(image[:, ::-1]) for image in images]
            mirrored = self._vectors(images, sources, is_mirrored=True)
            entries = [
                {name: torch.cat((entry[name], mirror[name])) for name in entry}
                for entry, mirror in zip(entries, mirrored, strict=True)
            ]
        return [{stored_name("vectors", i): partial(encode_vectors, e)} for i, e in zip(ids, entries, strict=True)]

    def reads(self, image_id: str) -> list[Path]:
        """Return the files of the image, its pseudo mask and its proposals."""
        folders = self.input_folders
        files = [self.image_file(image_id)]
        if "pseudo_masks" in folders:
            files.append(folders["pseudo_masks"].file("label_map", image_id))
        if "propose" in folders:
            files.append(folders["propose"].file("proposals", image_id))
        return files

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
        if missing and not self.cfg.uses_words:
            log.warning("build_bank: no vector for %s; no pixel can get these labels", ", ".join(missing))
        supervision = name_supervision(self._supervision)
        return {
            "vectors": len(bank),
            "bank_sha256": file_digest(bank_file),
            "config": self.cfg.as_dict(),
            **supervision,
        }

    def _vectors(
        self, images: list[np.ndarray], sources: list[RegionSource], *, is_mirrored: bool = False
    ) -> list[dict[str, torch.Tensor]]:
        """Return what images add to the bank; `is_mirrored` if `sources` are of their mirror images."""
        token_maps = self.work.backbone.tokens(images)
        device = token_maps[0].tokens.device
        label_maps = [source.label_map for source in sources if source.label_map is not None]
        if is_mirrored:
            label_maps = [label_map[:, ::-1].copy() for label_map in label_maps]
        maps_on_device = iter(copy_arrays(label_maps, device))
        # Masks of one image are in memory at a time.
        return [
            self._pool(
                image,
                source.proposals,
                tokens,
                label_map=None if source.label_map is None else next(maps_on_device),
                is_mirrored=is_mirrored,
            )
            for image, source, tokens in zip(images, sources, token_maps, strict=True)
        ]

    def _pool(
        self,
        image: np.ndarray,
        waiting: WaitingProposals | None,
        tokens: TokenMap,
        *,
        label_map: torch.Tensor | None,
        is_mirrored: bool,
    ) -> dict[str, torch.Tensor]:
        """Return what one image adds to the bank.

        Args:
            image: `[H, W, 3]` uint8.
            waiting: its proposals, if they are regions or may be parts of regions.
            tokens: of the image.
            label_map: `[H, W]` uint8 on the device of the tokens, if its regions are regions of the image.
            is_mirrored: whether image and label map are mirrored, which the proposals are not.
        """
        proposals = None if waiting is None else decode(waiting).to(tokens.tokens.device)
        regions = []
        if label_map is not None:
            regions.append(labelled_regions(label_map, self.cfg.bank))
            if proposals is not None:
                candidates = proposals.masks[: self.cfg.bank.parts]
                regions.append(find_parts(label_map, candidates.flip(-1) if is_mirrored else candidates))
        elif proposals is not None:
            regions.append(unlabelled_regions(proposals, self.cfg.bank, is_mirrored=is_mirrored))
        labels, masks = (torch.cat(tensors) for tensors in zip(*regions, strict=True))
        entry = region_vectors(labels, masks, tokens, self.cfg.bank)
        if self.cfg.uses_words:
            entry["word_values"] = self.work.region_encoder.pool_regions(image, masks)
        return entry

    def _bank(self, failed: dict[str, str]) -> Bank:
        """Return the vectors of all images in the order of the data set, whichever run made them."""
        ids, dataset, folder = self.image_ids(), self.dataset, StageFolder(self.artefact.path)
        names = ("pooled", "labels", "areas", *(("word_values",) if self.cfg.uses_words else ()))
        pooled = [torch.empty(0, self.work.backbone.dim)]
        labels, areas, index = ([torch.empty(0, dtype=torch.int64)] for _ in range(3))
        values: list[torch.Tensor] = []
        for position, image_id in enumerate(ids):
            if image_id in failed:
                continue
            entry = folder.vectors(image_id, names)
            pooled.append(entry["pooled"])
            labels.append(entry["labels"])
            areas.append(entry["areas"])
            values += [entry["word_values"]] if self.cfg.uses_words else []
            index.append(torch.full((len(entry["labels"]),), position, dtype=torch.int64))
        info = {
            "dataset": dataset.name,
            "split": self.split,
            "label_source": dataset.label_source,
            "backbone_digest": self.work.backbone.digest,
            "config": self.cfg.as_dict(),
        }
        info |= name_supervision(self._supervision)
        if dataset.class_colours:
            info["colours"] = dict(dataset.class_colours)
        if self.cfg.uses_words:
            info["word_values_digest"] = self.work.region_encoder.digest
            values = values or [torch.empty(0, self.work.region_encoder.words.features.shape[1])]
        return Bank(
            pooled=torch.cat(pooled),
            labels=torch.cat(labels),
            image_index=torch.cat(index),
            areas=torch.cat(areas),
            image_ids=tuple(ids),
            classes=tuple(dataset.classes),
            info=info,
            word_values=torch.cat(values) if self.cfg.uses_words else None,
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
