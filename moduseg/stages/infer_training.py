"""Stage `infer_training`: what the bank says of the very images that it was made from."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from moduseg.errors import ConfigError
from moduseg.pipeline.batches import Outcome
from moduseg.pipeline.stage import Stage
from moduseg.pipeline.workspace import Workspace
from moduseg.retrieval.retriever import Retriever
from moduseg.stages.infer import Infer
from moduseg.structures import SearchBank


class InferTraining(Infer):
    """Labels the training split by retrieval, for a student to learn from.

    With `student.held_out` the regions of an image do not vote on the image itself, whose pseudo mask they would give
    back. The mean and the outlier filter of the bank are still made with the image. The folder holds `labels/<id>.png`
    and, with `student.confidence` or `student.min_confidence`, `scores/<id>.png`.
    """

    name = "infer_training"

    def __init__(self, work: Workspace, split: str | None = None) -> None:
        # Proposals and queries of the split are asked for by its name: those of the evaluated one are others.
        super().__init__(work, split or work.train_split)
        student = self.cfg.student
        self._is_held_out = student is None or student.held_out
        self._retrieval = self.cfg.retrieval
        if student is not None and (student.confidence or student.min_confidence):
            self._retrieval = replace(self._retrieval, confidence=True)

    def inputs(self) -> dict[str, Stage[Any]]:
        """Return those of `infer`.

        Raises:
            ConfigError: prototypes, whose centres are made of the very images, where these are held out.
        """
        if self._is_held_out and self.cfg.bank.prototypes is not None:
            raise ConfigError(
                f"bank.prototypes: got {self.cfg.bank.prototypes}, expected null with student.labels=predictions, "
                "since a centre has vectors of many images, of the labelled one too; set bank.prototypes=null, or "
                "student.held_out=false"
            )
        return super().inputs()

    @cached_property
    def searched_bank(self) -> SearchBank:
        """The bank as the configuration reads it, on the device."""
        return self.stored_bank.configured(self.cfg.searched_bank).to(self.work.device.torch_device)

    @cached_property
    def image_of_vector(self) -> torch.Tensor:
        """`[M]` int64, the image of each vector of the searched bank, as an index into the bank's images."""
        return self.stored_bank.image_index.to(self.searched_bank.rows.device)[self.searched_bank.rows]

    @cached_property
    def index_of_image(self) -> dict[str, int]:
        """The position of each image in the bank, by id."""
        return {image_id: index for index, image_id in enumerate(self.stored_bank.image_ids)}

    def key(self) -> dict[str, Any]:
        """Return everything that decides the label maps."""
        parts = super().key()
        return {**parts, "retrieval": self._retrieval.key_parts(), "held_out": self._is_held_out}

    def retriever_of(self, image_id: str) -> Retriever:
        """Return what labels the proposals of an image: without its own regions if they are held out."""
        bank, index = self.searched_bank, self.index_of_image.get(image_id)
        if self._is_held_out and index is not None:
            bank = bank.select((self.image_of_vector != index).nonzero()[:, 0])
        words = self.work.region_encoder.words if self.cfg.uses_words else None
        return Retriever(bank, self._retrieval, words, self.ranking)

    def report(self, outcome: Outcome) -> None:
        """Write none: the report of a run is about its evaluated split."""
