"""Stage `discover`: segments without names -> clusters of the whole set, and how well both match the truth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.bank.store import encode_vectors
from moduseg.config.schemas import MAX_CLUSTERS
from moduseg.datasets.io import write_label_png
from moduseg.discovery.clustering import find_nearest, k_means
from moduseg.errors import ConfigError
from moduseg.files import read_json, write_atomic
from moduseg.pipeline.batches import Files, Outcome
from moduseg.pipeline.manifests import StageFolder, stored_name
from moduseg.pipeline.stage import Stage
from moduseg.report import build
from moduseg.stages.match_segments import choose_pictured, draw_matched_panels, match_and_write
from moduseg.stages.segments import Segments

MAX_SAMPLED = 20_000
"""Segments that the clusters of a set are made from; of larger sets every n-th one is taken."""
CENTRES = "centres.safetensors"
"""The centres of the clusters, `pooled` `[K, C]`."""


class Discover(Stage[tuple[str, np.ndarray, Tensor]]):
    """Joins the segments of all images to clusters and scores both. An item is an image's id, segments and vectors.

    There are `num_clusters` of them, by default as many as the data set has classes, its background included if that is
    one: those of k-means on the segments' mean tokens, brought to length 1. A small segment counts as much as a large
    one, so that the textures of large surfaces do not take all clusters. Truth is read for scores alone.

    The folder holds `labels/<id>.png` (1 + the cluster of every pixel), `centres.safetensors`, `failures.jsonl` and
    `manifest.json`; if the split has ground truth, also `results.json`, `results.md` (both matching protocols of
    `moduseg.evaluation.matching`) and `panels/`. `report/index.html` shows the clusters (`evaluation.report`).
    """

    name = "discover"
    uses = "eval"

    @property
    def title(self) -> str:
        """Text of the progress bar."""
        return f"discover {self.split}"

    def inputs(self) -> dict[str, Stage[Any]]:
        """Return `segments`."""
        return {"segments": Segments(self.work, self._requested_split)}

    @property
    def segments(self) -> StageFolder:
        """The folder of the segments."""
        return self.input_folders["segments"]

    @property
    def has_known_key(self) -> bool:
        """Whether the segments are there, whose content is part of the key."""
        return self.segments.is_complete

    @property
    def num_clusters(self) -> int:
        """Clusters of the set.

        Raises:
            ConfigError: none are given, and there is no class list.
        """
        if self.cfg.num_clusters is not None:
            return self.cfg.num_clusters
        if not self.dataset.has_classes:
            raise ConfigError(
                f"num_clusters: got null on {self.dataset.name}, which has no class list, expected 1 to "
                f"{MAX_CLUSTERS}; set num_clusters=20"
            )
        return self.dataset.num_classes + int(self.dataset.has_background)

    def folder_name(self) -> str:
        """Return the readable part of the folder's name."""
        return f"{self.work.discoverer_settings['name']}-{self.split}"

    def key(self) -> dict[str, Any]:
        """Return everything that decides the clusters; they are those of all images together."""
        return {
            "dataset": self.work.dataset_parts(self.split),
            "segments": self.segments.name,
            "content": self.segments.manifest.get("content"),
            "clusters": self.num_clusters,
        }

    def load(self, image_id: str) -> tuple[str, np.ndarray, Tensor]:
        """Return an image's segments and their vectors."""
        return image_id, self.segments.label_map(image_id), self.segments.vectors(image_id)["pooled"]

    def process(self, items: list[tuple[str, np.ndarray, Tensor]]) -> list[Files]:
        """Return the clusters of several images."""
        files: list[Files] = []
        for image_id, segments, vectors in items:
            clusters, _ = find_nearest(F.normalize(vectors, dim=1), self._centres)
            label_map = (clusters + 1).to(torch.uint8).numpy()[segments]
            files.append({stored_name("label_map", image_id): partial(write_label_png, label_map)})
        return files

    def reads(self, image_id: str) -> list[Path]:
        """Return the files of the segments and their vectors."""
        return [self.segments.file("label_map", image_id), self.segments.file("vectors", image_id)]

    def merge(self, outcome: Outcome) -> dict[str, Any]:
        """Score segments and clusters and draw panels, unless that is done."""
        path = self.artefact.path
        if outcome.changed or not (path / CENTRES).is_file():
            write_atomic(path / CENTRES, encode_vectors({"pooled": self._centres}))
        if self._needs_results(outcome):
            matchings = match_and_write(self, outcome) if self.dataset.has_truth else None
            draw_matched_panels(self, outcome, matchings)
        fields = {"split": self.split, "clusters": self.num_clusters, "label_source": "none"}
        return {**fields, "config": self.cfg.as_dict()}

    def report(self, outcome: Outcome) -> None:
        """Write the report."""
        build.write_report_of_run(self.work, self.artefact.path, outcome.changed)

    def _needs_results(self, outcome: Outcome) -> bool:
        """Return whether scores are missing or panels are other ones than the configuration asks for."""
        file = self.artefact.path / "results.json"
        if outcome.changed or (self.dataset.has_truth and not file.is_file()):
            return True
        if not self.dataset.has_truth:
            wanted = (stored_name("panel", image_id) for image_id in choose_pictured(self, outcome.failed))
            return not all(self.artefact.file(name).is_file() for name in wanted)
        evaluation: Mapping[str, Any] = read_json(file)["config"]["evaluation"]
        return evaluation.get("panels", self.cfg.evaluation.panels) != self.cfg.evaluation.panels

    @cached_property
    def _centres(self) -> Tensor:
        """The centres `[K, C]` of the clusters, which depend on the stored segments alone.

        They are found on the CPU, so that every process and every shard has the same.
        """
        return k_means(sample_vectors(self._list_vectors(), MAX_SAMPLED), self.num_clusters)

    def _list_vectors(self) -> Iterator[Tensor]:
        """Yield the vectors `[S, C]` of each image's segments, of length 1."""
        for image_id in self.dataset.ids:
            if image_id not in self.segments.failures:
                yield F.normalize(self.segments.vectors(image_id)["pooled"], dim=1)


def sample_vectors(images: Iterator[Tensor], max_count: int) -> Tensor:
    """Return at most `max_count` rows, evenly spaced over all, while hardly more of them are held.

    Args:
        images: `[S, C]` vectors of each image.
        max_count: rows that are returned at most.

    Returns:
        `[M, C]`: every row, or every second, fourth, ... of them.

    Raises:
        ValueError: no row.
    """
    step, num_seen, num_held = 1, 0, 0
    vectors: list[Tensor] = []
    for image_vectors in images:
        # Rows whose number in the whole sequence is a multiple of `step` are held.
        first = -num_seen % step
        vectors.append(image_vectors[first::step].clone())
        num_seen += len(image_vectors)
        num_held += len(vectors[-1])
        while num_held > max_count:
            step *= 2
            vectors = [torch.cat(vectors)[::2].clone()]
            num_held = len(vectors[0])
    if not num_held:
        raise ValueError("clusters: got no segment, expected one or more")
    return torch.cat(vectors)
