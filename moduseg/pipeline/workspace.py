"""One configuration with the objects that it names, which all stages of a run share."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moduseg import backbones, datasets, discovery, proposers, pseudo_masks, taggers
from moduseg.allocator import bound_arenas, look_at_all
from moduseg.backbones.base import Backbone
from moduseg.backbones.token_cache import TokenStore
from moduseg.config import Config
from moduseg.datasets.base import Dataset
from moduseg.datasets.vocabulary import RewordedDataset, WordList, read_word_list
from moduseg.devices import Device, resolve_device
from moduseg.discovery.base import Discoverer
from moduseg.files import to_json_values
from moduseg.pipeline.artefacts import Artefact
from moduseg.pipeline.batches import Shard
from moduseg.pipeline.estimate import RunEstimate, StageName
from moduseg.pipeline.peers import Peers
from moduseg.proposers.base import Proposer
from moduseg.pseudo_masks.base import PseudoMaskGenerator
from moduseg.pseudo_masks.clip_words import ClipWordsGenerator, as_region_encoder
from moduseg.taggers.base import Tagger

log = logging.getLogger("moduseg")
FinishedStages = dict[StageName, Path]
"""Stage and split -> the folder of its result."""


class Workspace:
    """One configuration and the objects it names, each built once, on first use.

    Args:
        cfg: the whole configuration.
        splits: data sets used in place of those that the configuration describes, by name of the split.
        finished_stages: stages that are complete, for a worker that processes batches of the next one.

    Attributes:
        has_own_splits: whether `splits` were given, which another process would not have.
        finished_stages: folder of each stage that has completed in this run.
        estimate: how long the stages take that the run was planned with.
        is_checked: whether what the run needs has been looked for; a worker's driver has done so.
    """

    def __init__(
        self, cfg: Config, splits: Mapping[str, Dataset] | None = None, finished_stages: FinishedStages | None = None
    ) -> None:
        self.cfg = cfg
        self.finished_stages: FinishedStages = dict(finished_stages or {})
        self._datasets: dict[str, Dataset] = dict(splits or {})
        self._reworded: dict[str, Dataset] = {}
        self._fingerprints: dict[str, str] = {}
        self.has_own_splits = bool(splits)
        self.estimate = RunEstimate()
        self.is_checked = finished_stages is not None
        shard = cfg.runtime.shard
        self.peers = Peers(shard.index, shard.count, alone=finished_stages is not None)
        torch.manual_seed(cfg.runtime.seed)
        bound_arenas()
        look_at_all()

    @property
    def shard(self) -> Shard:
        """The part of each stage that this process does."""
        runtime, peers = self.cfg.runtime, self.peers
        return Shard(
            index=peers.index,
            count=peers.count,
            workers=runtime.workers,
            verify=runtime.verify,
            quiet=not peers.is_leader,
            wait=runtime.shard.wait,
        )

    @cached_property
    def device(self) -> Device:
        """Where models and tensors live."""
        return resolve_device(self.cfg.runtime.device, self.cfg.runtime.precision)

    @property
    def outputs(self) -> Path:
        """Root of all artefacts."""
        return Path(self.cfg.runtime.outputs)

    @property
    def train_split(self) -> str:
        """Name of the split that the bank is built from."""
        return str(self.cfg.dataset.get("train_split", "train"))

    @property
    def eval_split(self) -> str:
        """Name of the split that is labelled and scored."""
        return str(self.cfg.dataset.get("val_split", "val"))

    def dataset(self, split: str) -> Dataset:
        """Return a split of the data set, opened on the first call."""
        if split not in self._datasets:
            dataset = datasets.build(self.cfg.dataset, split)
            if self.peers.world > 1:  # some data sets are drawn or unpacked when their ids are first read
                self.peers.leader_first(f"dataset/{split}", lambda: dataset.ids)
            self._datasets[split] = dataset
        return self._datasets[split]

    @cached_property
    def proposer(self) -> Proposer:
        """The mask proposer."""
        return proposers.build(self.cfg.proposer, self.device)

    @cached_property
    def train_proposer(self) -> Proposer:
        """The mask proposer of the training images: `proposer`, unless the configuration has a `train_proposer`."""
        settings = self.cfg.train_proposer
        return self.proposer if settings is None else proposers.build(settings, self.device)

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone of bank and queries."""
        gigabytes, folder = self.cfg.runtime.token_cache, self.outputs / self.dataset_name / "tokens"
        # A store without room for a single map rounds tokens all the same, as keys say.
        store = TokenStore(folder, int(gigabytes * 1e9)) if gigabytes else None
        return backbones.build(self.cfg.backbone, self.device, store=store)

    @cached_property
    def generator(self) -> PseudoMaskGenerator:
        """The pseudo-mask generator."""
        classes = self.dataset(self.train_split).classes
        return pseudo_masks.build(
            self.cfg.pseudo_masks.generator, device=self.device, backbone=lambda: self.backbone, classes=classes
        )

    @property
    def region_encoder(self) -> ClipWordsGenerator:
        """The generator as what gives regions their CLIP features, with `retrieval.answer=words`.

        Raises:
            ConfigError: it cannot.
        """
        return as_region_encoder(self.generator)

    @property
    def word_parts(self) -> dict[str, Any]:
        """The part of a key that stands for the CLIP features of regions; none if there are none."""
        if not self.cfg.uses_words:
            return {}
        generator = to_json_values(self.cfg.pseudo_masks.generator)
        return {"word_values": {"generator": generator, "digest": self.region_encoder.digest}}

    @cached_property
    def vocabulary(self) -> WordList | None:
        """The words that stand in place of the data set's classes; `None` if the configuration has none."""
        return read_word_list(self.cfg.vocabulary)

    def reworded_dataset(self, split: str) -> Dataset:
        """Return a split with the classes of the vocabulary, or as it is if there is none."""
        dataset = self.dataset(split)
        if self.vocabulary is None:
            return dataset
        if split not in self._reworded:
            self._reworded[split] = RewordedDataset(dataset, self.vocabulary)
        return self._reworded[split]

    @cached_property
    def word_generator(self) -> PseudoMaskGenerator:
        """The generator of `segment`: that of the pseudo masks, with the words of the vocabulary if there is one."""
        if self.vocabulary is None:
            return self.generator
        settings = pseudo_masks.set_words(self.cfg.pseudo_masks.generator, self.vocabulary.as_settings())
        classes = self.vocabulary.classes
        return pseudo_masks.build(settings, device=self.device, backbone=lambda: self.backbone, classes=classes)

    @property
    def tagger_settings(self) -> Mapping[str, Any]:
        """The configuration of the tagger; by default all classes compete."""
        return self.cfg.tagger if self.cfg.tagger is not None else {"name": "all"}

    @cached_property
    def tagger(self) -> Tagger:
        """What says which classes an image shows, with the words of the vocabulary if there is one."""
        classes = self.reworded_dataset(self.eval_split).classes
        return taggers.build(self.tagger_settings, self.device, classes, self.vocabulary)

    @property
    def discoverer_settings(self) -> Mapping[str, Any]:
        """The configuration of the discoverer; by default k-means of the backbone's tokens."""
        return self.cfg.discoverer if self.cfg.discoverer is not None else {"name": "kmeans"}

    @cached_property
    def discoverer(self) -> Discoverer:
        """What finds segments without names."""
        return discovery.build(self.discoverer_settings, self.device)

    def dataset_parts(self, split: str) -> dict[str, Any]:
        """Return the part of a key that stands for the data set: the split and a fingerprint of its content."""
        if split not in self._fingerprints:
            self._fingerprints[split] = self.dataset(split).fingerprint()
        return {"split": split, "fingerprint": self._fingerprints[split]}

    def backbone_parts(self) -> dict[str, Any]:
        """Return the part of a key that stands for the backbone: its configuration, weights, precision and device."""
        return {
            "config": to_json_values(self.cfg.backbone),
            "digest": self.backbone.digest,
            **self.device.key_parts(),
            **self.token_parts(),
        }

    def token_parts(self) -> dict[str, Any]:
        """Return the part of a key that says how tokens are rounded; none if they are not."""
        return {"tokens": "float16"} if self.cfg.runtime.token_cache else {}

    def artefact(self, stage: str, name: str, parts: Mapping[str, Any]) -> Artefact:
        """Return the folder for a stage's result, named by its key (see `Artefact`)."""
        return Artefact(self.outputs, self.dataset_name, stage, name, parts)

    @property
    def dataset_name(self) -> str:
        """Name of the data set, the first folder below `outputs`."""
        return self.dataset(self.train_split).name
