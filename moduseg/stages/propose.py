"""Stage `propose`: images -> class-agnostic masks, one SA-1B JSON each (docs/method.md, step 5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from moduseg.files import to_json_values
from moduseg.masks import encoded
from moduseg.pipeline.batches import Files, Outcome
from moduseg.pipeline.manifests import stored_name
from moduseg.pipeline.preflight import HasDigest
from moduseg.pipeline.records import StoredFile, is_same_file, list_stored_files, read_batch_size
from moduseg.pipeline.stage import Stage
from moduseg.pipeline.workspace import Workspace, log
from moduseg.proposers import sa1b
from moduseg.proposers.base import Proposer
from moduseg.structures import Proposals, Sample


@dataclass(frozen=True)
class StoredProposals:
    """The proposals of an image that another split has as well.

    Attributes:
        id: of the image.
        content: of the file of its proposals.
    """

    id: str
    content: bytes


class Propose(Stage[Sample | StoredProposals]):
    """Proposes masks for a split, the evaluated one if none is named.

    If the training split is named, `train_proposer` makes them, where the configuration has one. Proposals are written
    unfiltered; each reader applies its own thresholds. An image that the other split of this run has as well, with the
    same proposer, gets the file that was made there.

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

    def load(self, image_id: str) -> Sample | StoredProposals:
        """Return the stored proposals of an image, or the image, with its ground truth if the proposer needs it."""
        stored = self._stored_files.get(image_id)
        if stored is not None and self._is_same_image(image_id, stored) and (content := stored.read()) is not None:
            return StoredProposals(image_id, content)
        return self._load_image(image_id)

    def process(self, items: list[Sample | StoredProposals]) -> list[Files]:
        """Return the proposals of several images."""
        if self.proposer.shares_passes:
            return self._process_together(items)
        # One by one, so that the masks of one image are in memory at a time.
        return [
            {stored_name("proposals", item.id): item.content}
            if isinstance(item, StoredProposals)
            else _encode(item.id, self.proposer.propose(item))
            for item in items
        ]

    def _process_together(self, items: list[Sample | StoredProposals]) -> list[Files]:
        """Return the proposals of images that share passes: all as they are stored, or all from the model."""
        stored = [item for item in items if isinstance(item, StoredProposals)]
        if len(stored) == len(items):
            return [{stored_name("proposals", item.id): item.content} for item in stored]
        samples = [self._load_image(item.id) if isinstance(item, StoredProposals) else item for item in items]
        lists = self.proposer.propose_batch(samples)
        return [_encode(sample.id, proposals) for sample, proposals in zip(samples, lists, strict=True)]

    def _load_image(self, image_id: str) -> Sample:
        return self.dataset.load(image_id, truth=self.proposer.needs_truth)

    @cached_property
    def _stored_files(self) -> dict[str, StoredFile]:
        """Files of images that another split has as well, made in this run's configuration; by id."""
        if not self.proposer.sees_image_alone:
            return {}
        files: dict[str, StoredFile] = {}
        ids = tuple(self.image_ids())
        for other in (Propose(self.work), Propose(self.work, self.work.train_split)):
            folder = self.work.finished_stages.get((other.cache_name, other.split))
            is_alike = to_json_values(other.settings) == to_json_values(self.settings)
            if folder is None or other.split == self.split or not is_alike:
                continue
            # Most splits share no image: the records of a large one are not read for nothing.
            if set(ids).isdisjoint(other.image_ids()):
                continue
            if other.dataset.image_range == self.dataset.image_range:
                files |= list_stored_files(folder, partial(stored_name, "proposals"))
        if self.proposer.shares_passes:
            # The last bits depend on the images that share a pass, so that a batch must be one there too.
            size = read_batch_size(self.artefact, ids) or self.cfg.runtime.record_size
            batches = {ids[start : start + size] for start in range(0, len(ids), size)}
            files = {image_id: file for image_id, file in files.items() if file.companions in batches}
        count = sum(image_id in files for image_id in ids)
        if count:
            log.info("%s: %d images are as in the other split, whose proposals serve here too", self.title, count)
        return files

    def _is_same_image(self, image_id: str, stored: StoredFile) -> bool:
        """Return whether stored proposals were made from this split's image, by its content.

        Each split may have a folder with another image of this name: files without compression are equally large, and
        those of one archive equally old. Stamps that are a size alone, of earlier versions, say too little.
        """
        paths = self.reads(image_id)
        return len(paths) == len(stored.stamps) and all(
            not isinstance(stamp, int) and is_same_file(path, stamp, verify=True)
            for path, stamp in zip(paths, stored.stamps, strict=True)
        )

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
