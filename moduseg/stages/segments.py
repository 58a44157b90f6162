"""Stage `segments`: the segments of every image of the evaluated split, without names, and a vector of each."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moduseg.bank.aggregation import aggregate, id_map_coverage, proposal_coverage
from moduseg.bank.store import encode_vectors
from moduseg.discovery import Discoverer
from moduseg.files import to_json_values
from moduseg.pipeline.batches import Files
from moduseg.pipeline.manifests import stored_name
from moduseg.pipeline.preflight import HasDigest
from moduseg.pipeline.stage import Stage
from moduseg.stages.pseudo_masks import encode_label_map
from moduseg.structures import Proposals, Sample, TokenMap


class Segments(Stage[Sample]):
    """Finds segments by the configuration's discoverer, and pools the backbone's tokens under each.

    The folder holds `labels/<id>.png`, ids 0..S-1 of an image's segments, the largest first, and
    `vectors/<id>.safetensors` with `pooled` `[S, C]` float32, the mean token of each.
    """

    name = "segments"
    uses = "eval"

    @property
    def title(self) -> str:
        """Text of the progress bar."""
        return f"segments {self.split}"

    @property
    def discoverer(self) -> Discoverer:
        """What finds the segments."""
        return self.work.discoverer

    def models(self) -> dict[str, HasDigest]:
        """Return the discoverer and the backbone."""
        return {"discoverer": self.discoverer, "backbone": self.work.backbone}

    def estimate_bytes(self, image_id: str) -> int:
        """Return the bytes of ten vectors of a large model and of a label map."""
        return 60_000

    def folder_name(self) -> str:
        """Return the readable part of the folder's name."""
        return f"{self.work.discoverer_settings['name']}-{self.split}"

    def key(self) -> dict[str, Any]:
        """Return everything that decides segments and vectors."""
        return {
            "dataset": self.work.dataset_parts(self.split),
            "discoverer": to_json_values(self.work.discoverer_settings),
            "digest": self.discoverer.digest,
            "backbone": self.work.backbone_parts(),
        }

    def load(self, image_id: str) -> Sample:
        """Return an image."""
        return self.dataset.load(image_id, labels=False)

    def process(self, items: list[Sample]) -> list[Files]:
        """Return segments and vectors of several images."""
        files: list[Files] = []
        for sample, tokens in zip(items, self.work.backbone.tokens([item.image for item in items]), strict=True):
            segments, areas = sort_segments(self.discoverer.find_segments(sample, tokens))
            vectors = {"pooled": pool_segments(segments, len(areas), tokens)}
            files.append(
                {
                    stored_name("label_map", sample.id): partial(encode_label_map, segments.to(torch.uint8)),
                    stored_name("vectors", sample.id): partial(encode_vectors, vectors),
                }
            )
        return files

    def reads(self, image_id: str) -> list[Path]:
        """Return the image's file."""
        return [self.image_file(image_id)]


def sort_segments(segments: Tensor) -> tuple[Tensor, Tensor]:
    """Return segments with ids 0..S-1 by descending area, equal ones by the id they had, and their areas.

    Args:
        segments: `[H, W]` integers, 0 or more.

    Returns:
        `[H, W]` int64 and `[S]` int64 pixels.
    """
    _, positions, areas = torch.unique(segments, return_inverse=True, return_counts=True)
    order = areas.sort(descending=True, stable=True).indices
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device)
    return ranks[positions], areas[order]


def pool_segments(segments: Tensor, count: int, tokens: TokenMap) -> Tensor:
    """Return the mean token `[S, C]` float32 of each segment, weighted by how much of each patch it covers.

    Args:
        segments: `[H, W]` int64, ids below `count`.
        count: segments `S`.
        tokens: of the image.
    """
    ids = segments.to(tokens.tokens.device)
    if tuple(tokens.input_size) == tuple(tokens.image_size):
        weights = id_map_coverage(ids, count, tokens.stride)
    else:
        weights = proposal_coverage(Proposals.of_id_map(ids, count), tokens)
    return aggregate(tokens.tokens, weights, normalize=False)
