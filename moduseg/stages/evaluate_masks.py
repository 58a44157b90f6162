"""Score label maps on disk against ground truth: figures, table and panels, written beside the label maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from moduseg.config import Config, EvaluationConfig
from moduseg.datasets.base import Dataset
from moduseg.datasets.colours import find_class_colours
from moduseg.devices import count_workers
from moduseg.errors import ConfigError, DataError
from moduseg.evaluation.bootstrap import bootstrap
from moduseg.evaluation.counts import FILE, SplitCounts
from moduseg.evaluation.measures import LabelMapCounts, missing_measures
from moduseg.evaluation.pairs import Pair, count_pairs
from moduseg.evaluation.tables import ContourWidth, ScoredRun, results_markdown, results_record
from moduseg.files import read_json, write_atomic, write_json
from moduseg.masks.encoded import decoded
from moduseg.pipeline.artefacts import Artefact
from moduseg.pipeline.batches import Outcome
from moduseg.pipeline.manifests import StageFolder, steps_by_folder, stored_name, wall_seconds
from moduseg.pipeline.workspace import Workspace, log
from moduseg.progress import track
from moduseg.report.panel import draw_image_panel
from moduseg.structures import IGNORE_INDEX

Reader = Callable[[str, tuple[int, int]], np.ndarray]
"""Id and `(H, W)` of the truth -> `[H, W]` uint8 label map."""
_MAY_IGNORE = ("pseudo_masks", "segment", "student_labels")
"""Stages whose label maps may hold 255."""
NO_REFINEMENT = "none (no CRF, no test-time augmentation)"


def scoring_settings(cfg: Config) -> dict[str, Any]:
    """Return what of the configuration decides a score: the group `evaluation` without the workers and the report."""
    return _deciding(cfg.as_dict()["evaluation"])


def needs_scoring(work: Workspace, artefact: Artefact, outcome: Outcome, dataset: Dataset) -> bool:
    """Return whether `results.json` is missing or out of date.

    It is out of date if label maps changed, if it was made with other evaluation settings, its panels in other colours
    or, where it has an interval, with another seed, or if it lacks a measure that applies, as results of an older
    version may.
    """
    file, settings = artefact.path / "results.json", work.cfg.evaluation
    if outcome.changed or not file.is_file():
        return True
    record = read_json(file)
    if _deciding(record["config"]["evaluation"]) != scoring_settings(work.cfg):
        return True
    if settings.bootstrap and record["config"]["runtime"]["seed"] != work.cfg.runtime.seed:
        return True
    # Colours change no score, but the panels beside it.
    if record["config"]["evaluation"].get("report_colours", "auto") != settings.report_colours:
        return True
    return lacks_measures(record, dataset, settings)


def lacks_measures(record: Mapping[str, Any], dataset: Dataset, settings: EvaluationConfig) -> bool:
    """Return whether results lack a measure that applies to the data set, as those of an older version may."""
    confusion = np.asarray(record["confusion"])
    # Whether contours were counted decides which measures apply, not how many of their pixels are right.
    contours = np.zeros((3, len(confusion)), np.int64) if settings.boundary_width else None
    return bool(
        missing_measures(record, LabelMapCounts(confusion, contours, dataset.has_background, settings.uncovered))
    )


def _deciding(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in evaluation.items() if key != "workers" and not key.startswith("report")}


@dataclass(frozen=True)
class LabelOrigin:
    """What label maps were made from, as results say it.

    Attributes:
        label_source: where the tags come from; that of the training split if omitted.
        supervision: masks that a part of the run was trained on, `pixel:<data set>`; `None` for none.
    """

    label_source: str | None = None
    supervision: str | None = None


def score_or_draw(
    work: Workspace,
    artefact: Artefact,
    outcome: Outcome,
    dataset: Dataset,
    *,
    proposals: StageFolder | None = None,
    inputs: Mapping[str, StageFolder] | None = None,
    origin: LabelOrigin | None = None,
) -> None:
    """Score a stage's label maps and draw panels of them; without ground truth only draw. Do nothing if that is done.

    Arguments as those of `score_label_maps`.
    """
    if dataset.has_truth:
        if needs_scoring(work, artefact, outcome, dataset):
            score_label_maps(work, artefact, outcome, dataset, proposals=proposals, inputs=inputs, origin=origin)
        return
    ids = [image_id for image_id in dataset.ids if image_id not in outcome.failed]
    wanted = [artefact.file(stored_name("panel", i)) for i in _spread_evenly(ids, work.cfg.evaluation.panels)]
    if outcome.changed or not all(file.is_file() for file in wanted):
        draw_panels(artefact, dataset, ids, work.cfg.evaluation, proposals=proposals)
        if work.cfg.evaluation.panels:
            log.info("panels:  %s", artefact.path / "panels")


def score_label_maps(
    work: Workspace,
    artefact: Artefact,
    outcome: Outcome,
    dataset: Dataset,
    *,
    proposals: StageFolder | None = None,
    inputs: Mapping[str, StageFolder] | None = None,
    origin: LabelOrigin | None = None,
) -> dict[str, Any]:
    """Score `labels/*.png` of an artefact; write `results.json`, `results.md`, the counts of each image and `panels/`.

    Pixels that a pseudo mask leaves open (255) count as background, as they would on a screen; retrieval leaves none.
    Images without ground truth are left out and named.

    Args:
        work: configuration and data sets.
        artefact: holds the label maps.
        outcome: of the stage that made them.
        dataset: the split they belong to.
        proposals: the folder of stage `propose`, for the panels; that column is left out if omitted.
        inputs: folders it was made from, by stage; their seconds are listed.
        origin: what the label maps were made from; tags of the training split, and no masks, if omitted.

    Returns:
        What `results.json` holds.
    """
    folder, what, origin = StageFolder(artefact.path), _kind_of(artefact), origin or LabelOrigin()

    def read(image_id: str, expected: tuple[int, int]) -> np.ndarray:
        labels = folder.label_map(image_id)
        # Rules of pseudo masks may leave pixels open in `segment` too.
        return labels if artefact.stage not in _MAY_IGNORE else np.where(labels == IGNORE_INDEX, np.uint8(0), labels)

    labelled = [image_id for image_id in dataset.ids if image_id not in outcome.failed]
    counts, unscored = count_split(work, dataset, labelled, read, f"score {what}s")
    seconds = {artefact.stage: wall_seconds(outcome.seconds)}
    steps = {f"{artefact.stage}/{artefact.path.name}": dict(outcome.seconds)}
    for stage, source in (inputs or {}).items():
        steps.update(steps_by_folder(source.path))
        seconds[stage] = source.seconds
    run = ScoredRun(
        dataset.name,
        dataset.split,
        len(counts),
        label_source=origin.label_source or work.dataset(work.train_split).label_source,
        config=work.cfg.as_dict(),
        seconds=seconds,
        failures=[*outcome.failed, *unscored],
        supervision=origin.supervision,
        extra={"refinement": _describe_refinement(work, artefact), "seed": work.cfg.runtime.seed, **timing(steps)},
    )
    record = make_record(work, dataset, counts, run)
    table = results_markdown(record)
    write_atomic(artefact.path / FILE, counts.to_bytes())
    write_json(artefact.path / "results.json", record)
    write_atomic(artefact.path / "results.md", table.encode())
    draw_panels(artefact, dataset, counts.ids, work.cfg.evaluation, proposals=proposals)
    log.info("%s\nresults: %s", table.rstrip(), artefact.path / "results.json")
    if work.cfg.evaluation.panels:
        log.info("panels:  %s", artefact.path / "panels")
    return record


def _describe_refinement(work: Workspace, artefact: Artefact) -> str:
    """Return what changed the label maps after the scores, or after the retrieval from a bank."""
    steps: list[str] = []
    stage, student = artefact.stage, work.cfg.student
    if stage == "student_labels" and student is not None:
        # What a student learns is what another stage made.
        stage = {"pseudo_masks": "pseudo_masks", "predictions": "infer"}.get(student.labels, stage)
    if stage in ("segment", "pseudo_masks") and work.cfg.pseudo_masks.refine != "none":
        steps = [work.cfg.pseudo_masks.refine]
    elif stage in ("infer", "infer_training"):
        steps = [f"{name}={value}" for name, value in work.cfg.retrieval.tidying.items() if value]
    elif stage == "predict_student" and student is not None and student.views:
        return f"none (no CRF); test-time augmentation: {student.views}"
    return f"{', '.join(steps)} (no CRF, no test-time augmentation)" if steps else NO_REFINEMENT


def timing(steps: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """What results say of time.

    Args:
        steps: seconds by step (`load`, `work`, `model`, `write`, `wall`) of each artefact that a result took.

    Returns:
        `steps`, rounded, and `model_share`: of the time on the clock, the share that models' forward passes took
        (on CUDA as seen from the CPU); `None` where nothing was timed.
    """
    wall = sum(seconds.get("wall", 0.0) for seconds in steps.values())
    model = sum(seconds.get("model", 0.0) for seconds in steps.values())
    rounded = {name: {step: round(value, 3) for step, value in seconds.items()} for name, seconds in steps.items()}
    return {"steps": rounded, "model_share": round(model / wall, 3) if wall else None}


def count_split(
    work: Workspace, dataset: Dataset, ids: Sequence[str], read: Reader, title: str
) -> tuple[SplitCounts, list[str]]:
    """Count the pixels of label maps against the truth, image by image.

    Args:
        work: for the settings of evaluation.
        dataset: the split.
        ids: the images that have a label map.
        read: gives it.
        title: what the progress bar says.

    Returns:
        The counts, and the images left out because they have no usable ground truth.

    Raises:
        DataError: a label map does not fit its truth, no image has ground truth, or no class occurs in it.
        ConfigError: uncovered pixels are to be ignored where they are background.
    """
    settings = work.cfg.evaluation
    if settings.uncovered == "ignore" and dataset.has_background:
        raise ConfigError(
            f"evaluation.uncovered: got 'ignore', expected 'wrong' on {dataset.name}, whose label 0 is a class "
            "(background); 'ignore' is for data sets without one"
        )

    counts, left_out = SplitCounts(len(dataset.classes)), []
    load = partial(_load_pair, dataset, read)
    pairs = count_pairs(ids, load, counts.num_labels, boundary_width=settings.boundary_width, workers=settings.workers)
    for image_id, found in track(pairs, title, len(ids)):
        if found is None:
            left_out.append(image_id)
            continue
        if not dataset.has_background and found.confusion[0].any():
            raise DataError(
                f"image {image_id!r}: its truth has {int(found.confusion[0].sum())} pixels of label 0, expected 1.."
                f"{dataset.num_classes} or 255 on {dataset.name}, which has no background; correct the label map"
            )
        counts.append(image_id, found)
    _check_truth(dataset, counts, len(ids))
    return counts, left_out


def _load_pair(dataset: Dataset, read: Reader, image_id: str) -> Pair | None:
    """Return the truth of an image and its label map; `None` if it has no usable truth."""
    try:
        truth = dataset.semantic_of(image_id)
    except DataError as error:
        log.warning("not scored: %s", error)
        return None
    if truth is None:
        return None
    labels = read(image_id, (truth.shape[0], truth.shape[1]))
    if labels.shape != truth.shape and dataset.image_size(image_id) != truth.shape:
        log.warning(
            "not scored: image %r: its label map is %s, expected the image's %s; make it again at that size",
            image_id,
            truth.shape,
            dataset.image_size(image_id),
        )
        return None
    return truth, labels


def _check_truth(dataset: Dataset, counts: SplitCounts, num_images: int) -> None:
    """Refuse a split of which no image has ground truth, or in whose truth no class occurs."""
    where = f"{dataset.name} {dataset.split}"
    if not len(counts):
        raise DataError(
            f"{where}: got no usable ground truth for {num_images} images, expected label maps of ids "
            f"0..{dataset.num_classes} or 255; scripts/check_data.py says what is wrong with each"
        )
    # A truth without classes, such as masks of 0 and 255, would score 100 % for a prediction of background alone.
    if not counts.matrix()[1:].any():
        raise DataError(
            f"{where}: got {len(counts)} label maps in which no class occurs, only 0 (background) and 255 (ignored), "
            f"expected ids 1..{dataset.num_classes}; store the id of its class where an object is"
        )


def make_record(work: Workspace, dataset: Dataset, counts: SplitCounts, run: ScoredRun) -> dict[str, Any]:
    """Return what `results.json` holds, from the counts of a split.

    Args:
        work: for the settings of evaluation.
        dataset: the split.
        counts: of its images.
        run: what was scored.
    """
    settings = work.cfg.evaluation
    interval = None
    if settings.bootstrap:
        by_label = counts.label_counts(dataset.has_background, settings.uncovered)
        interval = bootstrap(by_label, settings.bootstrap, seed=work.cfg.runtime.seed)
    contours, width = None, None
    if counts.has_boundary:
        contours = counts.boundary_counts(dataset.has_background).sum(0)
        width = ContourWidth(settings.boundary_width, counts.widths)
    totals = LabelMapCounts(counts.matrix(), contours, dataset.has_background, settings.uncovered)
    return results_record(totals, dataset.classes, run, interval=interval, contours=width)


def draw_panels(
    artefact: Artefact,
    dataset: Dataset,
    scored: Sequence[str],
    settings: EvaluationConfig,
    *,
    proposals: StageFolder | None = None,
    read: Callable[[str], np.ndarray] | None = None,
) -> None:
    """Draw panels of images spread evenly over the split; without truth, the columns of truth and errors are left out.

    Args:
        artefact: the pictures go to its `panels/`.
        dataset: the images.
        scored: ids to choose from.
        settings: the number of panels, and the colours of the classes.
        proposals: the folder of stage `propose`; that column is left out if omitted.
        read: id -> label map; the artefact's own `labels/<id>.png` if omitted.
    """
    chosen = _spread_evenly(scored, settings.panels)
    colours = find_class_colours(dataset.classes, dataset.class_colours, settings.report_colours)
    read_labels, what = read or StageFolder(artefact.path).label_map, _kind_of(artefact)

    def draw(image_id: str) -> bytes:
        sample = dataset.load(image_id, truth=True, labels=False)
        draw_with = partial(
            draw_image_panel,
            sample.image,
            dataset.classes,
            labels=read_labels(image_id),
            truth=sample.semantic,
            titles=(image_id, what),
            colours=colours,
        )
        if proposals is None:
            return draw_with()
        with decoded(proposals.waiting_proposals(image_id, sample.size)) as shown:
            return draw_with(proposals=shown.masks)

    with ThreadPoolExecutor(count_workers(), thread_name_prefix="panel") as pool:
        for image_id, picture in zip(chosen, pool.map(draw, chosen), strict=True):
            write_atomic(artefact.file(stored_name("panel", image_id)), picture)


def _spread_evenly(ids: Sequence[str], count: int) -> list[str]:
    """Return at most `count` ids, the first and the last one among them."""
    return [ids[i] for i in sorted({int(i) for i in np.linspace(0, len(ids) - 1, min(count, len(ids)))})]


def _kind_of(artefact: Artefact) -> str:
    """Return what the label maps of a stage are called in titles."""
    return {"pseudo_masks": "pseudo mask", "student_labels": "training label"}.get(artefact.stage, "prediction")
