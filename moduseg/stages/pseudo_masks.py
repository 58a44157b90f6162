"""Stage `pseudo_masks`: training images + image-level labels -> label maps, as PNG with the VOC palette."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from moduseg.config import Config
from moduseg.datasets.io import write_label_png
from moduseg.errors import DataError
from moduseg.proposers import sa1b
from moduseg.pseudo_masks.labels import label_map, region_vote
from moduseg.runtime.artefacts import Artefact, digest_of, write_atomic
from moduseg.runtime.engine import Files, Loop, sizes
from moduseg.runtime.weights import file_digest
from moduseg.stages import propose
from moduseg.stages.common import Workspace, failures_of, finish, image_file, log, plain, safe_name
from moduseg.stages.scoring import draw_panels, needs_scoring, score_label_maps
from moduseg.structures import Proposals, Sample


def run(cfg: Config, work: Workspace | None = None) -> Path:
    """Label the training images from their image-level labels.

    Returns:
        The artefact's folder: `labels/<id>.png`, `failures.jsonl`, `manifest.json`; where the split has ground truth,
        also `results.json`, `results.md` and `panels/`.
    """
    work = work or Workspace(cfg)
    split, settings, generator = work.train_split, cfg.pseudo_masks, work.generator
    dataset = work.dataset(split)
    inputs: dict[str, Path] = {}
    wants_proposals = generator.needs_proposals or settings.refine == "region_vote"
    if wants_proposals:
        inputs["propose"] = propose.run(cfg, work, split)
    left_out = failures_of(inputs["propose"], "propose") if wants_proposals else {}
    fit_digest = _fit(cfg, work, left_out) if generator.is_fitted else ""
    artefact = work.artefact(
        "pseudo_masks",
        f"{settings.generator['name']}-{split}",
        {
            "dataset": work.dataset_parts(split),
            "pseudo_masks": {
                "generator": plain(settings.generator),
                "background": {"rule": settings.background.rule, "value": settings.background.value},
                "refine": settings.refine,
            },
            "digest": generator.digest,
            "fit": fit_digest,
            "proposals": inputs["propose"].name if wants_proposals else "",
            "precision": work.device.precision,
        },
    )

    def load(image_id: str) -> tuple[Sample, Proposals | None]:
        sample = dataset.load(image_id, truth=generator.needs_truth)
        if sample.labels is None:
            raise DataError(f"{image_id}: no image-level labels; add them, or take the image out of the {split} list")
        proposals = None
        if wants_proposals:
            file = inputs["propose"] / safe_name(f"masks/{image_id}", ".json")
            proposals = sa1b.read_proposals(file, sample.size)
        return sample, proposals

    def process(items: list[tuple[Sample, Proposals | None]]) -> list[Files]:
        files: list[Files] = []
        for sample, proposals in items:
            scores = generator.generate(sample, sample.labels or (), proposals)
            labels = label_map(scores, settings.background.rule, settings.background.value)
            if settings.refine == "region_vote" and proposals is not None:
                labels = region_vote(labels, proposals.to(labels.device))
            files.append({safe_name(f"labels/{sample.id}", ".png"): write_label_png(labels.cpu().numpy())})
        return files

    def stamp(image_id: str) -> list[int]:
        masks = [inputs["propose"] / safe_name(f"masks/{image_id}", ".json")] if wants_proposals else []
        return sizes(image_file(dataset, image_id), *masks)

    outcome = Loop(
        artefact, dataset.ids, load, process, cfg.runtime.batch_size, left_out, f"pseudo masks {split}", stamp
    ).run()
    if dataset.has_truth and needs_scoring(work, artefact, outcome):
        score_label_maps(work, artefact, outcome, dataset, inputs.get("propose"), "pseudo mask")
    elif not dataset.has_truth and outcome.changed:
        done = [image_id for image_id in dataset.ids if image_id not in outcome.failed]
        draw_panels(artefact, dataset, done, inputs.get("propose"), "pseudo mask", cfg.evaluation.panels)
    return finish(artefact, outcome, len(dataset.ids), inputs, split=split)


def _fit(cfg: Config, work: Workspace, left_out: dict[str, str]) -> str:
    """Fit the generator on the training images that can be read, or load what an earlier run fitted; its digest.

    The images that took part are part of the key: when a broken image is mended, the fit is made anew.
    """
    dataset, generator = work.dataset(work.train_split), work.generator
    usable = []
    for image_id in dataset.ids:
        if image_id in left_out:
            continue
        try:
            dataset.load(image_id)
        except DataError as error:
            log.warning("pseudo_masks: fitted without %s: %s", image_id, error)
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
        },
    )
    file = artefact.path / "fit.safetensors"
    if not (artefact.is_complete and _is_whole(artefact, file)):

        def samples() -> Iterator[Sample]:
            for image_id in usable:
                yield dataset.load(image_id)

        state = generator.fit(samples, dataset.num_classes)
        write_atomic(file, save_tensors({name: tensor.cpu().contiguous() for name, tensor in state.items()}))
        artefact.write_manifest(status="complete", images=len(usable), sha256=file_digest(file))
        log.info("fit: %d images -> %s", len(usable), artefact.path)
    generator.load_state(load_tensors(file.read_bytes()))
    return file_digest(file)


def _is_whole(artefact: Artefact, file: Path) -> bool:
    return file.is_file() and file_digest(file) == artefact.manifest.get("sha256")
