"""Stage `scores`: training images + image-level labels -> class scores, in half precision and compressed.

The scores do not depend on what turns them into labels, so background rules and refiners are swept without a model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from moduseg.errors import DataError
from moduseg.evaluation.tags import score_tags
from moduseg.files import digest_of, file_digest, read_json, to_json_values, write_atomic, write_json
from moduseg.masks.encoded import WaitingProposals, decode
from moduseg.pipeline.batches import Files, Outcome
from moduseg.pipeline.forward import describe, is_out_of_memory
from moduseg.pipeline.manifests import StageFolder, name_supervision, stored_name
from moduseg.pipeline.preflight import HasDigest
from moduseg.pipeline.stage import Stage, skipped_images
from moduseg.pipeline.workspace import Workspace, log
from moduseg.progress import track
from moduseg.pseudo_masks.base import FitImages
from moduseg.pseudo_masks.class_tokens import ClassTokenGenerator
from moduseg.pseudo_masks.store import pack
from moduseg.report.heads import draw_heads
from moduseg.stages.propose import Propose
from moduseg.structures import Proposals, Sample
from moduseg.training.options import BOOKS

FIT_FILE = "fit.safetensors"
"""What a generator was fitted to, in the folder `fit`."""
FIT_PROPOSALS = "fit_propose"
"""What the proposals of the training split are called, where the scored split is another one."""
FIGURES = "figures"
"""Folder of a fit's pictures, `<title>.png`."""
CLASSIFIER = "classifier.json"
"""What a fitted classifier's tags of the training images are worth, beside the fit."""


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
        """Return `propose` on the same split and, for a fit, on the training split, if proposals are looked at."""
        generator, work = self.work.generator, self.work
        if not generator.needs_proposals:
            return {}
        is_elsewhere = generator.is_fitted and self.split != work.train_split
        fitted_on = {FIT_PROPOSALS: Propose(work, work.train_split)} if is_elsewhere else {}
        return {"propose": Propose(work, self.split), **fitted_on}

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
            "generator": _list_settings(self.work),
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
        # One image's masks are in memory at a time.
        return [self._score(sample, waiting) for sample, waiting in items]

    def _score(self, sample: Sample, waiting: WaitingProposals | None) -> Files:
        """Return the file of one image's scores."""
        settings = self.cfg.pseudo_masks
        proposals = None if waiting is None else decode(waiting)
        maps = self.work.generator.generate(sample, sample.labels or (), proposals)
        store = partial(pack, maps, bits=settings.score_bits, scale=settings.score_scale)
        return {stored_name("scores", sample.id): store}

    def reads(self, image_id: str) -> list[Path]:
        """Return the files of the image and, if the generator looks at them, its proposals."""
        proposals = self.input_folders.get("propose")
        files = [] if proposals is None else [proposals.file("proposals", image_id)]
        return [self.image_file(image_id), *files]

    def merge(self, outcome: Outcome) -> dict[str, Any]:
        """Return the split, what the generator was trained on, what the fit took, and the folder of its figures."""
        supervision = name_supervision(self.work.generator.supervision)
        if not self.work.generator.is_fitted:
            return {"split": self.split, **supervision}
        fit = StageFolder(self.work.finished_stages["fit", self.split])
        # The report shows what a fit drew.
        drawn = {"fit": str(fit.path)} if (fit.path / FIGURES).is_dir() else {}
        return {"split": self.split, "fit_seconds": fit.steps, **supervision, **drawn}

    @cached_property
    def fit_digest(self) -> str:
        """Digest of what the generator was fitted to, which an earlier run may have stored; empty without a fit."""
        work = self.work
        if not work.generator.is_fitted:
            return ""
        folder = self.input_folders.get(FIT_PROPOSALS, self.input_folders.get("propose"))
        proposals = folder if work.generator.fits_proposals else None
        skipped = {} if folder is None else skipped_images({"propose": folder})

        spent: Mapping[str, float] = {}
        if work.generator.fits_together and work.peers.world > 1 and ("fit", self.split) not in work.finished_stages:
            # What they compute together stays in the folder's checkpoint, where rank 0 then finds it.
            spent = _fit(work, skipped, proposals, is_stored=False).seconds

        def fit() -> None:
            if ("fit", self.split) not in work.finished_stages:
                work.finished_stages["fit", self.split] = _fit(work, skipped, proposals, spent=spent).path

        work.peers.leader_first("fit", fit)
        file = work.finished_stages["fit", self.split] / FIT_FILE
        work.generator.load_state(load_tensors(file.read_bytes()))
        return file_digest(file)


def _list_settings(work: Workspace) -> dict[str, Any]:
    """Return the settings of the generator for a key, without those of a training that decide no weight."""
    settings = dict(to_json_values(work.cfg.pseudo_masks.generator))
    training = settings.get("training")
    if isinstance(training, dict):
        settings["training"] = {name: value for name, value in training.items() if name not in BOOKS}
    return settings


class _Fit(NamedTuple):
    """Where a fit is stored, and the seconds (`wall`, `cpu`) that this process spent on it now; empty for none."""

    path: Path
    seconds: Mapping[str, float]


def _fit(
    work: Workspace,
    skipped: Mapping[str, str],
    proposals: StageFolder | None,
    *,
    is_stored: bool = True,
    spent: Mapping[str, float] | None = None,
) -> _Fit:
    """Fit the generator on the training images that can be read, or find what an earlier run fitted.

    The images that took part are in the key: when a broken image is mended, the generator is fitted again.

    Args:
        work: the run.
        skipped: images that an earlier stage lost.
        proposals: those that the fit looks at.
        is_stored: whether this process writes the result.
        spent: seconds that it took before, with other processes.
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
            "generator": _list_settings(work),
            "digest": generator.digest,
            "images": digest_of(usable),
            **work.device.key_parts(),
            **work.token_parts(),
            **({"proposals": proposals.name} if proposals is not None else {}),
        },
    )
    file = artefact.path / FIT_FILE
    if artefact.is_complete and file.is_file() and file_digest(file) == artefact.manifest.get("sha256"):
        return _Fit(artefact.path, {})

    passes = count(1)

    def samples() -> Iterator[Sample]:
        title = f"fit, pass {next(passes)} of {generator.num_fit_passes}"
        return (dataset.load(image_id) for image_id in track(usable, title))

    def proposals_of(sample: Sample) -> Proposals:
        if proposals is None:
            raise DataError(f"{sample.id}: got no proposals, expected those of stage propose; run it first")
        return proposals.proposals(sample.id, sample.size)

    images = FitImages(tuple(usable), dataset.load, samples, artefact.path)
    start, cpu_start = time.perf_counter(), time.process_time()
    state = generator.fit(images, dataset.num_classes, None if proposals is None else proposals_of)
    now = {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu_start}
    seconds = {step: value + (spent or {}).get(step, 0.0) for step, value in now.items()}
    seconds["wall"] = max(seconds["wall"], generator.fit_seconds)
    if not is_stored:
        return _Fit(artefact.path, seconds)
    if generator.is_classifier:
        generator.load_state(state)
        write_json(artefact.path / CLASSIFIER, _score_classifier(work, usable))
        _draw_heads(work, usable, artefact.path / FIGURES)
    write_atomic(file, save_tensors({name: tensor.cpu().contiguous() for name, tensor in state.items()}))
    artefact.write_manifest(status="complete", images=len(usable), seconds=seconds, sha256=file_digest(file))
    log.info("fit: %d images -> %s", len(usable), artefact.path)
    return _Fit(artefact.path, seconds)


def measure_classifier(work: Workspace) -> dict[str, Any] | None:
    """Return the figures of the classifier that the pseudo masks were read from; `None` if they come from none.

    Beside its own figures they are `train` and `val`: its tags of the training and of the evaluated split, absent where
    no image has known labels. Runs that share a fit may have other evaluated splits, so each of these has a file.
    """
    fit = work.finished_stages.get(("fit", work.train_split))
    if fit is None or not (fit / CLASSIFIER).is_file():
        return None
    key = digest_of(work.dataset_parts(work.eval_split))[:8]
    file = fit / f"classifier-{work.eval_split}-{key}.json"
    if not file.is_file():
        write_json(file, _score_tags(work, work.eval_split, work.dataset(work.eval_split).ids))
    quality = read_json(file)
    return {**read_json(fit / CLASSIFIER), **({"val": quality} if quality is not None else {})}


def _score_classifier(work: Workspace, usable: Sequence[str]) -> dict[str, Any]:
    """Return the figures of a fitted generator that classifies: its own, and its tags on the training images."""
    quality = _score_tags(work, work.train_split, usable)
    return {**work.generator.describe_fit(), **({"train": quality} if quality is not None else {})}


def _score_tags(work: Workspace, split: str, ids: Sequence[str]) -> dict[str, Any] | None:
    """Return how well a fitted generator names the classes of images, those above a half; `None` without known labels.

    Args:
        work: the run.
        split: of the images.
        ids: the images; those that cannot be read or have no labels do not count.
    """
    dataset, generator = work.dataset(split), work.generator
    true, probabilities = [], []
    for image_id in track(ids, f"classify {split}"):
        try:
            sample = dataset.load(image_id)
        except DataError as error:
            log.warning("scores: classified without %s: %s", image_id, error)
            continue
        if sample.labels is not None:
            true.append([label in sample.labels for label in range(1, dataset.num_classes + 1)])
            probabilities.append(generator.classify(sample).cpu())
    if not true:
        return None
    scores = torch.stack(probabilities)
    quality = score_tags(torch.tensor(true), scores > 0.5, scores)
    log.info("fit: classes of %s: %s", split, quality.describe())
    return quality.as_dict()


def _draw_heads(work: Workspace, usable: Sequence[str], folder: Path) -> None:
    """Draw where the heads of each class token look, on the first training image of the class, if there are tokens."""
    generator, dataset = work.generator, work.dataset(work.train_split)
    if not isinstance(generator, ClassTokenGenerator):
        return
    missing = set(range(1, dataset.num_classes + 1))
    for image_id in usable:
        if not missing:
            return
        fitting = missing.intersection(dataset.labels_of(image_id) or ())
        if not fitting:
            continue
        sample = dataset.load(image_id)
        attention, is_open = generator.observe_heads(sample)
        first_block = 1 + generator.fitted_model.settings.class_block
        for label in sorted(fitting):
            picture = draw_heads(sample.image, attention[:, :, label - 1], is_open, first_block=first_block)
            write_atomic(folder / f"heads_{label:03d}.png", picture)
        missing -= fitting
