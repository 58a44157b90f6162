"""Stage `queries`: the pooled vector of every proposal of the evaluated split (docs/method.md, step 6), cached.

What follows (centring, search, vote, suppression) costs little, so ablations of it start here and run no model.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from moduseg.bank.aggregation import aggregate, harden, proposal_coverage
from moduseg.bank.store import encode_vectors
from moduseg.masks.encoded import WaitingProposals, decode
from moduseg.pipeline.batches import Files
from moduseg.pipeline.manifests import stored_name
from moduseg.pipeline.preflight import HasDigest
from moduseg.pipeline.stage import Stage
from moduseg.stages.propose import Propose
from moduseg.structures import Sample, TokenMap


class Queries(Stage[tuple[Sample, WaitingProposals]]):
    """Pools the patch tokens of the evaluated split under its proposals.

    The folder holds `vectors/<id>.safetensors` with `pooled` `[N, C]` float32, in the order of the proposals, and with
    `retrieval.answer=words` `word_values` `[N, D]` float32, their CLIP features.
    """

    name = "queries"
    uses = "eval"

    def inputs(self) -> dict[str, Stage[Any]]:
        """Return `propose` on the same split."""
        return {"propose": Propose(self.work, self._requested_split)}

    def models(self) -> dict[str, HasDigest]:
        """Return the backbone, and the CLIP if words are asked."""
        words = {"pseudo_masks.generator": self.work.region_encoder} if self.cfg.uses_words else {}
        return {"backbone": self.work.backbone, **words}

    def estimate_bytes(self, image_id: str) -> int:
        """Return the bytes of a hundred vectors of a large model."""
        return 400_000

    def folder_name(self) -> str:
        """Return the readable part of the folder's name."""
        return f"{self.cfg.backbone['name']}-{self.split}"

    def key(self) -> dict[str, Any]:
        """Return everything that decides the vectors."""
        return {
            "dataset": self.work.dataset_parts(self.split),
            "proposals": self.input_folders["propose"].name,
            "backbone": self.work.backbone_parts(),
            "aggregation": self.cfg.bank.aggregation,
            **self.work.word_parts,
        }

    def load(self, image_id: str) -> tuple[Sample, WaitingProposals]:
        """Return an image and its proposals."""
        sample = self.dataset.load(image_id)
        return sample, self.input_folders["propose"].waiting_proposals(image_id, sample.size)

    def process(self, items: list[tuple[Sample, WaitingProposals]]) -> list[Files]:
        """Return the vectors of several images' proposals."""
        maps = self.work.backbone.tokens([sample.image for sample, _ in items])
        # One image's masks are in memory at a time.
        return [self._pool(sample, waiting, tokens) for (sample, waiting), tokens in zip(items, maps, strict=True)]

    def _pool(self, sample: Sample, waiting: WaitingProposals, tokens: TokenMap) -> Files:
        """Return the file of the vectors of one image's proposals."""
        proposals = decode(waiting)
        weights = proposal_coverage(proposals, tokens)
        if self.cfg.bank.aggregation == "hard":
            weights = harden(weights)
        tensors = {"pooled": aggregate(tokens.tokens, weights, normalize=False)}
        if self.cfg.uses_words:
            tensors["word_values"] = self.work.region_encoder.pool_regions(sample.image, proposals.masks)
        return {stored_name("vectors", sample.id): partial(encode_vectors, tensors)}

    def reads(self, image_id: str) -> list[Path]:
        """Return the files of the image and its proposals."""
        return [self.image_file(image_id), self.input_folders["propose"].file("proposals", image_id)]
