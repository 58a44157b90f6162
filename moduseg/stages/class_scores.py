"""Stage `scores`: training images + image-level labels -> class scores, in half precision and compressed.

Nothing that turns scores into labels decides them, so that background rules and refiners are swept without a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from moduseg.config import Config
from moduseg.errors import DataError
from moduseg.files import digest_of, file_digest, write_atomic
from moduseg.pipeline.artefacts import Artefact
from moduseg.pipeline.batches import Files, Loop, sizes
from moduseg.pipeline.workspace import (
    Plan,
    Workspace,
    carry_out,
    failures_of,
    finish,
    image_file,
    log,
    plain,
    safe_name,
)
from moduseg.proposers import sa1b
from moduseg.pseudo_masks.store import SUFFIX, pack
from moduseg.stages import propose
from moduseg.structures import Proposals, Sample

_FIT = "fit.safetensors"


def run(cfg: Config, work: Workspace | None = None) -> Path:
    """Score the classes that the image-level labels name, at every pixel of the training images.

    Returns:
        The artefact's folder: `maps/<id>.safetensors.z` (see `moduseg.pseudo_masks.store`), `failures.jsonl`,
        `manifest.json`.
    """
    work = work or Workspace(cfg)
    split = work.train_split

    def make() -> Path:
        todo, total = plan(cfg, work), len(work.dataset(split).ids)
        return carry_out(
            work,
            todo,
            __name__,
            lambda outcome: finish(todo.loop.artefact, outcome, total, todo.inputs, split=split),
        )

    return work.once(cfg, "scores", split, make)


def plan(cfg: Config, work: Workspace) -> Plan:
    """What `run` does with each image."""
    split, generator = work.train_split, work.generator
    dataset = work.dataset(split)
    inputs = {"propose": propose.run(cfg, work, split)} if generator.needs_proposals else {}
    left_out = failures_of(inputs["propose"], "propose") if inputs else {}
    fit_digest = _fit(cfg, work, left_out, inputs.get("propose")) if generator.is_fitted else ""
    artefact = work.artefact(
        "scores",
        f"{cfg.pseudo_masks.generator['name']}-{split}",
        {
            "dataset": work.dataset_parts(split),
            "generator": plain(cfg.pseudo_masks.generator),
            "digest": generator.digest,
            "fit": fit_digest,
            "proposals": inputs["propose"].name if inputs else "",
            "precision": work.device.precision,
        },
    )

    def masks(image_id: str) -> list[Path]:
        return [path / safe_name(f"masks/{image_id}", ".json") for path in inputs.values()]

    def load(image_id: str) -> tuple[Sample, Proposals | None]:
        sample = dataset.load(image_id, truth=generator.needs_truth)
        if sample.labels is None:
            raise DataError(f"{image_id}: no image-level labels; add them, or take the image out of the {split} list")
        found = [sa1b.read_proposals(file, sample.size) for file in masks(image_id)]
        return sample, found[0] if found else None

    def process(items: list[tuple[Sample, Proposals | None]]) -> list[Files]:
        return [
            {safe_name(f"maps/{sample.id}", SUFFIX): pack(generator.generate(sample, sample.labels or (), proposals))}
            for sample, proposals in items
        ]

    loop = Loop(
        artefact,
        dataset.ids,
        load,
        process,
        cfg.runtime.batch_size,
        left_out,
        f"class scores {split}",
        stamp=lambda image_id: sizes(image_file(dataset, image_id), *masks(image_id)),
        spread=work.spread,
    )
    return Plan(loop, inputs)


def _fit(cfg: Config, work: Workspace, left_out: dict[str, str], proposals: Path | None) -> str:
    """Fit the generator on the training images that can be read, or load what an earlier run fitted; its digest.

    The images that took part are part of the key: when a broken image is mended, the fit is made anew.
    """

    def make() -> Path:
        return work.once(cfg, "fit", work.train_split, lambda: _fitted(cfg, work, left_out, proposals))

    work.peers.first("fit", make)
    file = make() / _FIT
    work.generator.load_state(load_tensors(file.read_bytes()))
    return file_digest(file)


def _fitted(cfg: Config, work: Workspace, left_out: dict[str, str], proposals: Path | None) -> Path:
    """The folder of the fit; see `_fit`."""
    dataset, generator = work.dataset(work.train_split), work.generator
    if not generator.fits_proposals:
        proposals = None
    usable = []
    for image_id in dataset.ids:
        if image_id in left_out:
            continue
        try:
            dataset.load(image_id)
        except DataError as error:
            log.warning("scores: fitted without %s: %s", image_id, error)
            continue
        usable.append(image_id)
    artefact = work.artefact(
        "fit",
        f"{cfg.pseudo_masks.generator['name']}-{work.train_split}",
        {
            "dataset": work.dataset_parts(work.train_split),
            "generator": plain(cfg.pseudo_masks.generator),
            "digest": generator.digest,
            "images": digest_of(usable),
            "precision": work.device.precision,
            **({"proposals": proposals.name} if proposals is not None else {}),
        },
    )
    file = artefact.path / _FIT
    if not (artefact.is_complete and _is_whole(artefact, file)):

        def samples() -> Iterator[Sample]:
            for image_id in usable:
                yield dataset.load(image_id)

        def proposals_of(sample: Sample) -> Proposals:
            return sa1b.read_proposals(Path(str(proposals)) / safe_name(f"masks/{sample.id}", ".json"), sample.size)

        state = generator.fit(samples, dataset.num_classes, proposals_of if proposals is not None else None)
        write_atomic(file, save_tensors({name: tensor.cpu().contiguous() for name, tensor in state.items()}))
        artefact.write_manifest(status="complete", images=len(usable), sha256=file_digest(file))
        log.info("fit: %d images -> %s", len(usable), artefact.path)
    return artefact.path


def _is_whole(artefact: Artefact, file: Path) -> bool:
    return file.is_file() and file_digest(file) == artefact.manifest.get("sha256")
