"""Stage `propose`: images -> class-agnostic masks, one SA-1B JSON each (docs/method.md, step 5)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from moduseg.files import to_json_values
from moduseg.masks import encoded
from moduseg.pipeline.batches import Files, Outcome
from moduseg.pipeline.manifests import stored_name
from moduseg.pipeline.preflight import HasDigest
from moduseg.pipeline.stage import Stage
from moduseg.pipeline.workspace import Workspace
from moduseg.proposers import sa1b
from moduseg.proposers.base import Proposer
from moduseg.structures import Proposals, Sample


class Propose(Stage[Sample]):
    """Proposes masks for a split, the evaluated one if none is named.

    If the training split is named, `train_proposer` makes them, where the configuration has one. Proposals are written
    unfiltered; each reader applies its own thresholds.

    The folder holds `masks/<id>.json`, `failures.jsonl` and `manifest.json`.
    """

    name = "propose"
    uses = "eval"

    def __init__(self, work: Workspace, split: str | None = None) -> None:
        super().__init__(work, split)
        # A training split that is also the evaluated one counts as training images only where it is named.
        self._uses_train_proposer = split == work.train_split and self.cfg.train_proposer is not None

    @property
    def settings(self) -> Mapping[str, Any]:
        """The configuration of the proposer."""
        train_proposer = self.cfg.train_proposer
        return train_proposer if self._uses_train_proposer and train_proposer is not None else self.cfg.proposer

    @property
    def proposer(self) -> Proposer:
        """The proposer."""
        return self.work.train_proposer if self._uses_train_proposer else self.work.proposer

    @property
    def title(self) -> str:
        """Text of the progress bar."""
        return f"propose {self.split}"

    @property
    def cache_name(self) -> str:
        """Name under which the workspace remembers the folder: one split may have proposals of two proposers."""
        return "propose with train_proposer" if self._uses_train_proposer else self.name

    def folder_name(self) -> str:
        """Return the readable part of the folder's name."""
        return f"{self.settings['name']}-{self.split}"

    def key(self) -> dict[str, Any]:
        """Return everything that decides the proposals."""
        return {
            "dataset": self.work.dataset_parts(self.split),
            "proposer": to_json_values(self.settings),
            "digest": self.proposer.digest,
            **self.work.device.key_parts(),
        }

    def models(self) -> dict[str, HasDigest]:
        """Return the proposer."""
        return {"train_proposer" if self._uses_train_proposer else "proposer": self.proposer}

    def estimate_bytes(self, image_id: str) -> int:
        """Return the bytes of a hundred masks."""
        return 100_000

    def load(self, image_id: str) -> Sample:
        """Return an image, with its ground truth if the proposer needs it."""
        return self.dataset.load(image_id, truth=self.proposer.needs_truth)

    def process(self, items: list[Sample]) -> list[Files]:
        """Return the proposals of several images."""
        proposer = self.proposer
        # A proposer that takes images one by one leaves the masks of one image in memory.
        lists = proposer.propose_batch(items) if proposer.shares_passes else map(proposer.propose, items)
        return [_encode(sample.id, proposals) for sample, proposals in zip(items, lists, strict=True)]

    def reads(self, image_id: str) -> list[Path]:
        """Return the image's file."""
        return [self.image_file(image_id)]

    def merge(self, outcome: Outcome) -> dict[str, Any]:
        """Return the split, for the manifest."""
        return {"split": self.split}


def _encode(image_id: str, proposals: Proposals) -> Files:
    """Return the file of one image's proposals; many masks are encoded here, as they would fill the memory."""
    encode = partial(sa1b.encode_proposals, proposals, image_id)
    name = stored_name("proposals", image_id)
    return {name: encode() if proposals.masks.numel() > encoded.MAX_WAITING_PIXELS else encode}
