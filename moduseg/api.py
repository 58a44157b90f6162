"""The method in three lines of Python.

from moduseg import Segmenter
segmenter = Segmenter.from_bank("outputs/miniature/build_bank/timm-train-1a2b3c4d")
prediction = segmenter.predict("photo.jpg")
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moduseg import backbones, proposers, pseudo_masks
from moduseg.backbones.base import Backbone
from moduseg.bank.aggregation import aggregate, harden, proposal_coverage
from moduseg.bank.store import Bank
from moduseg.config import Config, from_hydra
from moduseg.datasets.io import check_image_range, read_image
from moduseg.devices import Device, resolve_device
from moduseg.errors import ArtefactError
from moduseg.proposers.base import Proposer
from moduseg.pseudo_masks.clip_words import ClipWordsGenerator, as_region_encoder
from moduseg.retrieval.retriever import Retriever
from moduseg.structures import Prediction, Proposals, Sample, TokenMap


@dataclass(frozen=True)
class Observation:
    """What the models say of one image, before any bank is searched. All tensors are on the segmenter's device.

    Attributes:
        proposals: those that `retrieval.min_area` and `min_predicted_iou` let through, `N` of them.
        tokens: the image's patch tokens.
        pooled: `[N, C]` float32, the vector of each proposal before centring and normalisation.
        word_values: `[N, D]` float32, their CLIP features; `None` unless `retrieval.answer` is `words`.
    """

    proposals: Proposals
    tokens: TokenMap
    pooled: Tensor
    word_values: Tensor | None = None


class Segmenter:
    """Predicts label maps with a finished bank; threads may share it.

    The models keep state during a pass (SAM's predictor its image, a ViT its resampled positions), so that one image at
    a time goes through them, in this segmenter and in all that `with_bank` makes of it.

    Args:
        bank: the stored bank.
        proposer: says where things are.
        backbone: says what they look like; the one that the bank was made with.
        cfg: centring, outlier filter and retrieval settings.
        device: where the models and the search run.
        region_encoder: with `retrieval.answer=words`, gives regions their CLIP features, with the words of the bank's
            classes; built from `cfg` if omitted.

    Raises:
        ArtefactError: the bank was made with other weights of the backbone or, for words, of the CLIP.
        ConfigError: words are asked for, and `pseudo_masks.generator` compares none.
    """

    def __init__(
        self,
        bank: Bank,
        proposer: Proposer,
        backbone: Backbone,
        cfg: Config,
        device: Device,
        *,
        region_encoder: ClipWordsGenerator | None = None,
    ) -> None:
        bank.check_fits(backbone.digest, backbone.dim, bank.classes)
        words = None
        self._region_encoder = region_encoder if cfg.uses_words else None
        if cfg.uses_words:
            generator = region_encoder or pseudo_masks.build(
                cfg.pseudo_masks.generator, device=device, backbone=lambda: backbone, classes=bank.classes
            )
            self._region_encoder = as_region_encoder(generator)
            bank.check_words_fit(self._region_encoder.digest)
            words = self._region_encoder.words
        self.bank, self.proposer, self.backbone, self.cfg, self.device = bank, proposer, backbone, cfg, device
        self._model_lock = threading.RLock()
        self._retriever = Retriever(bank.configured(cfg.searched_bank).to(device.torch_device), cfg.retrieval, words)

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
        resolved = resolve_device(device, cfg.runtime.precision)
        return cls(
            bank, proposers.build(cfg.proposer, resolved), backbones.build(cfg.backbone, resolved), cfg, resolved
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, background first; the ids of a label map index it."""
        return self.bank.classes

    def predict(self, image: str | Path | np.ndarray) -> Prediction:
        """Label one image.

        Args:
            image: a file, or `[H, W, 3]` uint8 RGB.

        Returns:
            The label map `[H, W]` uint8, and the label, score and nearest bank entries (see `describe`) of each
            proposal of at least `retrieval.min_area` pixels.

        Raises:
            DataError: the image cannot be read.
            ValueError: the array is not `[H, W, 3]` uint8.
        """
        return self.label(self.observe(image))

    @torch.inference_mode()
    def observe(self, image: str | Path | np.ndarray) -> Observation:
        """Run the models on one image; `label` then costs little, whichever the bank.

        Args:
            image: a file, or `[H, W, 3]` uint8 RGB.

        Raises:
            DataError: the image cannot be read.
            ValueError: the array is not `[H, W, 3]` uint8.
        """
        pixels = image if isinstance(image, np.ndarray) else self.read_image(Path(image))
        sample = Sample("image" if isinstance(image, np.ndarray) else Path(image).stem, pixels)
        with self._model_lock:
            proposals, tokens = self.proposer.propose(sample), self.backbone.tokens([pixels])[0]
        # Proposals that retrieval would drop need no vector.
        proposals = proposals.select(self._retriever.is_searched(proposals)).to(self.device.torch_device)
        weights = proposal_coverage(proposals, tokens)
        if self.cfg.bank.aggregation == "hard":
            weights = harden(weights)
        word_values = None
        if self._region_encoder is not None:
            with self._model_lock:
                word_values = self._region_encoder.pool_regions(pixels, proposals.masks)
        return Observation(proposals, tokens, aggregate(tokens.tokens, weights, normalize=False), word_values)

    def read_image(self, path: Path) -> np.ndarray:
        """Read a photograph as the images of the bank were read, `[H, W, 3]` uint8.

        Raises:
            DataError: the file cannot be used.
        """
        return read_image(path, check_image_range(self.cfg.dataset.get("image_range")))

    def label(self, observation: Observation) -> Prediction:
        """Label an image that the models have seen; `predict` is `observe`, then this."""
        return self._retriever.predict(observation.proposals, observation.pooled, observation.word_values)

    @torch.inference_mode()
    def nearest(self, pooled: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the regions of the bank that are most similar to pooled vectors, whether they vote or not.

        Args:
            pooled: `[N, C]` float, rows of `Observation.pooled` that are not all zero.
            count: regions wanted, 1 or more.

        Returns:
            Rows of the stored bank `[N, k]` int64 and cosine similarities `[N, k]` float32, nearest first; `k` is
            `count`, or fewer if the bank has fewer.
        """
        return self._retriever.nearest(pooled, count)

    def with_bank(self, bank: Bank, cfg: Config | None = None) -> Segmenter:
        """Return a segmenter of the same models with another bank, or with other settings of retrieval.

        Raises:
            ArtefactError: the bank was made with other backbone weights.
        """
        # The words of other classes are other features.
        encoder = self._region_encoder if bank.classes == self.bank.classes else None
        segmenter = Segmenter(bank, self.proposer, self.backbone, cfg or self.cfg, self.device, region_encoder=encoder)
        segmenter._model_lock = self._model_lock
        return segmenter

    @property
    def searched_rows(self) -> tuple[int, ...]:
        """Rows of the stored bank that are searched: those that the outlier filter keeps."""
        return tuple(self._retriever.bank.rows.tolist())

    def describe(self, row: int) -> dict[str, Any]:
        """Return what a row of the bank is: `label` (name), `image` (training image id) and `area` (pixels)."""
        return {
            "label": self.bank.classes[int(self.bank.labels[row])],
            "image": self.bank.image_ids[int(self.bank.image_index[row])],
            "area": int(self.bank.areas[row]),
        }
