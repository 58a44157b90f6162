"""Stage `scores`: training images + image-level labels -> class scores, in half precision and compressed.

The scores do not depend on what turns them into labels, so background rules and refiners are swept without a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from moduseg.errors import DataError
from moduseg.files import digest_of, file_digest, to_json_values, write_atomic
from moduseg.masks.encoded import WaitingProposals, decode
from moduseg.pipeline.batches import Files, Outcome
from moduseg.pipeline.forward import describe, is_out_of_memory
from moduseg.pipeline.manifests import StageFolder, stored_name
from moduseg.pipeline.preflight import HasDigest
from moduseg.pipeline.stage import Stage
from moduseg.pipeline.workspace import Workspace, log
from moduseg.progress import track
from moduseg.pseudo_masks.store import pack
from moduseg.stages.propose import Propose
from moduseg.structures import Proposals, Sample

_FIT = "fit.safetensors"


class ClassScores(Stage[tuple[Sample, WaitingProposals | None]]):
    """Scores the classes that the image-level labels name, at every pixel of the training images.

    The folder holds `maps/<id>.safetensors.z` (format: `moduseg.pseudo_masks.store`), `failures.jsonl` and
    `manifest.json`.
    """

    name = "scores"
    uses = "train"

    @property
    def title(self) -> str:
        """Text of the progress bar."""
        return f"class scores {self.split}"

    def inputs(self) -> dict[str, Stage[Any]]:
        """Return `propose` on the training split, if the generator looks at proposals."""
        return {"propose": Propose(self.work, self.split)} if self.work.generator.needs_proposals else {}

    def models(self) -> dict[str, HasDigest]:
        """Return the generator."""
        return {"pseudo_masks.generator": self.work.generator}

    def estimate_bytes(self, image_id: str) -> int:
        """Return the bytes of a map for each tag and for the background, which hardly compress."""
        height, width = self.dataset.image_size(image_id)
        settings, num_maps = self.cfg.pseudo_masks, 1 + len(self.dataset.labels_of(image_id) or ())
        return settings.score_bits // 8 * height * width // settings.score_scale**2 * num_maps

    @property
    def has_known_key(self) -> bool:
        """Whether nothing has to be fitted, whose result is part of the key."""
        return not self.work.generator.is_fitted

    def folder_name(self) -> str:
        """Return the readable part of the folder's name."""
        return f"{self.cfg.pseudo_masks.generator['name']}-{self.split}"

    def key(self) -> dict[str, Any]:
        """Return everything that decides the scores; a generator that is fitted first has its fit in the key."""
        proposals, settings = self.input_folders.get("propose"), self.cfg.pseudo_masks
        storage = {"score_bits": settings.score_bits, "score_scale": settings.score_scale}
        return {
            **(storage if storage != {"score_bits": 16, "score_scale": 1} else {}),
            "dataset": self.work.dataset_parts(self.split),
            "generator": to_json_values(self.cfg.pseudo_masks.generator),
            "digest": self.work.generator.digest,
            "fit": self.fit_digest,
            "proposals": proposals.name if proposals is not None else "",
            **self.work.device.key_parts(),
            **self.work.token_parts(),
        }

    def load(self, image_id: str) -> tuple[Sample, WaitingProposals | None]:
        """Return an image with its labels, and its proposals if the generator looks at them."""
        sample = self.dataset.load(image_id, truth=self.work.generator.needs_truth)
        if sample.labels is None:
            raise DataError(
                f"{image_id}: no image-level labels; add them, or take the image out of the {self.split} list"
            )
        proposals = self.input_folders.get("propose")
        return sample, None if proposals is None else proposals.waiting_proposals(image_id, sample.size)

    def process(self, items: list[tuple[Sample, WaitingProposals | None]]) -> list[Files]:
        """Return the scores of several images."""
        generate, settings = self.work.generator.generate, self.cfg.pseudo_masks
        store = partial(pack, bits=settings.score_bits, scale=settings.score_scale)
        files: list[Files] = []
        for sample, waiting in items:
            # One image's masks are in memory at a time.
            proposals = None if waiting is None else decode(waiting)
            maps = generate(sample, sample.labels or (), proposals)
            files.append({stored_name("scores", sample.id): partial(store, maps)})
        return files

    def reads(self, image_id: str) -> list[Path]:
        """Return the files of the image and, if the generator looks at them, its proposals."""
        proposals = (folder.file("proposals", image_id) for folder in self.input_folders.values())
        return [self.image_file(image_id), *proposals]

    def merge(self, outcome: Outcome) -> dict[str, Any]:
        """Return the split, for the manifest."""
        return {"split": self.split}

    @cached_property
    def fit_digest(self) -> str:
        """Digest of what the generator was fitted to, which an earlier run may have stored; empty without a fit."""
        work = self.work
        if not work.generator.is_fitted:
            return ""
        proposals = self.input_folders.get("propose") if work.generator.fits_proposals else None

        def fit() -> None:
            if ("fit", self.split) not in work.finished_stages:
                work.finished_stages["fit", self.split] = _fit(work, self.skipped(), proposals)

        work.peers.leader_first("fit", fit)
        file = work.finished_stages["fit", self.split] / _FIT
        work.generator.load_state(load_tensors(file.read_bytes()))
        return file_digest(file)


def _fit(work: Workspace, skipped: Mapping[str, str], proposals: StageFolder | None) -> Path:
    """Fit the generator on the training images that can be read, or find what an earlier run fitted.

    The images that took part are in the key: when a broken image is mended, the generator is fitted again.

    Returns:
        The folder with the fitted tensors.
    """
    dataset, generator = work.dataset(work.train_split), work.generator
    usable = []
    for image_id in track(dataset.ids, "read training images"):
        if image_id in skipped:
            continue
        try:
            dataset.load(image_id)
        except Exception as error:
            if not isinstance(error, DataError) and not is_out_of_memory(error):
                raise
            log.warning("scores: fitted without %s: %s", image_id, describe(error))
            continue
        usable.append(image_id)
    artefact = work.artefact(
        "fit",
        f"{work.cfg.pseudo_masks.generator['name']}-{work.train_split}",
        {
            "dataset": work.dataset_parts(work.train_split),
            "generator": to_json_values(work.cfg.pseudo_masks.generator),
            "digest": generator.digest,
            "images": digest_of(usable),
            **work.device.key_parts(),
            **work.token_parts(),
            **({"proposals": proposals.name} if proposals is not None else {}),
        },
    )
    file = artefact.path / _FIT
    if artefact.is_complete and file.is_file() and file_digest(file) == artefact.manifest.get("sha256"):
        return artefact.path

    passes = count(1)

    def samples() -> Iterator[Sample]:
        title = f"fit, pass {next(passes)} of {generator.num_fit_passes}"
        return (dataset.load(image_id) for image_id in track(usable, title))

    def proposals_of(sample: Sample) -> Proposals:
        if proposals is None:
            raise DataError(f"{sample.id}: got no proposals, expected those of stage propose; run it first")
        return proposals.proposals(sample.id, sample.size)

    state = generator.fit(samples, dataset.num_classes, None if proposals is None else proposals_of)
    write_atomic(file, save_tensors({name: tensor.cpu().contiguous() for name, tensor in state.items()}))
    artefact.write_manifest(status="complete", images=len(usable), sha256=file_digest(file))
    log.info("fit: %d images -> %s", len(usable), artefact.path)
    return artefact.path
