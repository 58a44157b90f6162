"""The method in three lines of Python.

from moduseg import Segmenter
segmenter = Segmenter.from_bank("outputs/miniature/build_bank/timm-train-1a2b3c4d")
prediction = segmenter.predict("photo.jpg")
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moduseg import backbones, proposers
from moduseg.backbones.base import Backbone
from moduseg.bank.aggregation import aggregate, harden, proposal_coverage
from moduseg.bank.store import Bank
from moduseg.config import Config, from_hydra
from moduseg.datasets.io import read_image
from moduseg.devices import Device, resolve_device
from moduseg.errors import ArtefactError
from moduseg.proposers.base import Proposer
from moduseg.retrieval.retriever import Retriever
from moduseg.retrieval.search import search
from moduseg.structures import Prediction, Proposals, Sample, TokenMap


@dataclass(frozen=True)
class Observation:
    """What the models say of one image, before any bank is asked.

    Attributes:
        proposals: those of at least `retrieval.min_area` pixels, `N` of them.
        tokens: the image's patch tokens.
        pooled: `[N, C]` float32, the pooled vector of each proposal.
    """

    proposals: Proposals
    tokens: TokenMap
    pooled: Tensor


class Segmenter:
    """Labels images with a finished bank.

    Args:
        bank: the stored bank.
        proposer: says where things are.
        backbone: says what they look like; the one the bank was made with.
        cfg: centring, outlier filter and retrieval settings.
        device: where tensors live.

    Raises:
        ArtefactError: the bank was made with other backbone weights.
    """

    def __init__(self, bank: Bank, proposer: Proposer, backbone: Backbone, cfg: Config, device: Device) -> None:
        bank.check_fits(backbone.digest, backbone.dim, bank.classes)
        self.bank, self.proposer, self.backbone, self.cfg, self.device = bank, proposer, backbone, cfg, device
        self._search = bank.configured(cfg.bank).to(device.torch_device)
        self._retriever = Retriever(self._search.vectors, self._search.labels, self._search.centre, cfg.retrieval)

    @classmethod
    def from_bank(
        cls, path: str | Path, device: str = "auto", overrides: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Segmenter:
        """Open the folder that `scripts/build_bank.py` names at its end.

        Args:
            path: the bank's folder.
            device: `auto`, `cpu`, `cuda`, ...
            overrides: groups to replace, e.g. `{"retrieval": {...}}` or `{"proposer": {...}}`; by default everything
                is as it was when the bank was built.

        Raises:
            ArtefactError: no bank is there, or it is damaged.
            ConfigError: an override is not allowed.
        """
        folder = Path(path)
        if not (folder / "bank.json").is_file():
            raise ArtefactError(
                f"{folder}: got no bank.json, expected a bank's folder; run scripts/build_bank.py first"
            )
        bank = Bank.load(folder)
        cfg = from_hydra({**bank.info["config"], **(overrides or {})})
        where = resolve_device(device, cfg.runtime.precision)
        return cls(bank, proposers.build(cfg.proposer, where), backbones.build(cfg.backbone, where), cfg, where)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, background first; a label map's ids index it."""
        return self.bank.classes

    def predict(self, image: str | Path | np.ndarray) -> Prediction:
        """Label one image.

        Args:
            image: a file, or `[H, W, 3]` uint8 RGB.

        Returns:
            The label map `[H, W]` uint8, and for each proposal of at least `retrieval.min_area` pixels its label, score
            and nearest bank entries (see `describe`).

        Raises:
            DataError: the image cannot be read.
            ValueError: the array is not `[H, W, 3]` uint8.
        """
        return self.label(self.observe(image))

    @torch.inference_mode()
    def observe(self, image: str | Path | np.ndarray) -> Observation:
        """What the models say of one image; `label` then costs little, whatever the bank. Arguments as of `predict`."""
        pixels = image if isinstance(image, np.ndarray) else read_image(Path(image))
        sample = Sample("image" if isinstance(image, np.ndarray) else Path(image).stem, pixels)
        settings, where = self.cfg.retrieval, self.device.torch_device
        found = self.proposer.propose(sample)
        found = found.select((found.areas >= settings.min_area) & (found.predicted_iou >= settings.min_predicted_iou))
        found = found.to(where)
        tokens = self.backbone.tokens([pixels])[0]
        weights = proposal_coverage(found, tokens)
        if self.cfg.bank.aggregation == "hard":
            weights = harden(weights)
        return Observation(found, tokens, aggregate(tokens.tokens, weights, normalize=False))

    @torch.inference_mode()
    def label(self, seen: Observation) -> Prediction:
        """Labels of what was observed; see `predict`."""
        bank = self._search
        labels, scores, neighbours, similarities = self._retriever.label(seen.pooled)
        label_map, kept = self._retriever.assemble(seen.proposals, seen.pooled, labels, scores)
        # Neighbours are rows of the stored bank, not of the filtered one.
        rows = (
            torch.where(neighbours >= 0, bank.rows[neighbours.clamp(min=0)], neighbours)
            if len(bank.rows)
            else neighbours
        )
        return Prediction(label_map.cpu().numpy(), seen.proposals, labels, scores, kept, rows, similarities)

    @torch.inference_mode()
    def nearest(self, pooled: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The regions of the bank that are most similar to pooled vectors `[N, C]`, as many as asked for vote or not.

        Returns:
            Rows of the stored bank `[N, k]` int64 and cosine similarities `[N, k]`, nearest first; `k` is `count`, or
            fewer where the bank has fewer.
        """
        bank = self._search
        queries = pooled if bank.centre is None else pooled - bank.centre
        similarities, found = search(queries, bank.vectors, count)
        return (bank.rows[found] if len(bank.rows) else found), similarities

    def with_bank(self, bank: Bank, cfg: Config | None = None) -> Segmenter:
        """The same models with another bank, or with other settings of retrieval.

        Raises:
            ArtefactError: the bank was made with other backbone weights.
        """
        return Segmenter(bank, self.proposer, self.backbone, cfg or self.cfg, self.device)

    @property
    def searched_rows(self) -> tuple[int, ...]:
        """Rows of the stored bank that are searched: those that the outlier filter keeps."""
        return tuple(self._search.rows.tolist())

    def describe(self, row: int) -> dict[str, Any]:
        """What a row of the bank is: `label` (name), `image` (training image id) and `area` (pixels)."""
        return {
            "label": self.bank.classes[int(self.bank.labels[row])],
            "image": self.bank.image_ids[int(self.bank.image_index[row])],
            "area": int(self.bank.areas[row]),
        }
