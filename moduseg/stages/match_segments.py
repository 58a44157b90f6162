"""Match segments and clusters to the truth, and write what that gives: figures, a table, panels."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moduseg.errors import DataError
from moduseg.evaluation.matching import (
    UNMATCHED,
    MatchedScores,
    MatchingProtocol,
    SegmentMatcher,
    count_pixels,
    match_segments,
)
from moduseg.evaluation.measures import format_value
from moduseg.evaluation.tables import markdown_table, versions
from moduseg.files import write_atomic, write_json
from moduseg.pipeline.batches import Outcome
from moduseg.pipeline.manifests import StageFolder, stored_name, wall_seconds
from moduseg.pipeline.workspace import log
from moduseg.progress import track
from moduseg.report.overlay import overlay_labels, resize_image, resize_labels
from moduseg.report.panel import choose_display_size, draw_panel, make_class_legend
from moduseg.structures import IGNORE_INDEX

if TYPE_CHECKING:
    from moduseg.datasets.base import Dataset
    from moduseg.stages.discover import Discover

PROTOCOLS: tuple[MatchingProtocol, ...] = ("image", "set")
_MAX_COLOURS = 254


@dataclass(frozen=True)
class Matchings:
    """What both protocols give.

    Attributes:
        scores: the figures of each.
        cluster_classes: `[K]` int64, the class of each cluster of the set, or `UNMATCHED`.
        num_segments: of all scored images together.
        left_out: images without usable ground truth.
    """

    scores: Mapping[MatchingProtocol, MatchedScores]
    cluster_classes: np.ndarray
    num_segments: int
    left_out: tuple[str, ...]


def list_truth_classes(dataset: Dataset) -> tuple[str, ...]:
    """Return the classes that segments are matched to: the background is one where it is a class of the truth."""
    return dataset.classes if dataset.has_background else dataset.classes[1:]


def to_matched_ids(semantic: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Return a label map `[H, W]` uint8 in the ids of `list_truth_classes`, from 0, 255 where ignored."""
    if dataset.has_background:
        return semantic
    return np.where(semantic == IGNORE_INDEX, semantic, semantic - np.uint8(1))


def match_split(stage: Discover, outcome: Outcome) -> Matchings:
    """Match the stored segments, image by image, and the stored clusters of the set.

    Raises:
        DataError: no image has usable ground truth, or a size does not fit.
    """
    dataset, folder = stage.dataset, StageLabels(stage)
    num_classes = len(list_truth_classes(dataset))
    matchers = {
        "image": SegmentMatcher(num_classes, "image"),
        "set": SegmentMatcher(num_classes, "set", num_clusters=stage.num_clusters),
    }
    left_out, num_segments = [], 0
    labelled = [image_id for image_id in dataset.ids if image_id not in outcome.failed]
    for image_id in track(labelled, "match segments", len(labelled)):
        try:
            semantic = dataset.semantic_of(image_id)
        except DataError as error:
            log.warning("not scored: %s", error)
            semantic = None
        if semantic is None:
            left_out.append(image_id)
            continue
        truth, segments = to_matched_ids(semantic, dataset), folder.segments(image_id)
        matchers["image"].update(truth, segments, image_id)
        matchers["set"].update(truth, folder.clusters(image_id), image_id)
        num_segments += int(segments.max()) + 1
    if len(left_out) == len(labelled):
        raise DataError(
            f"{dataset.name} {dataset.split}: got no usable ground truth for {len(labelled)} images, expected label "
            "maps; scripts/check_data.py says what is wrong with each"
        )
    scores = {protocol: matchers[protocol].compute() for protocol in PROTOCOLS}
    return Matchings(scores, matchers["set"].match(), num_segments, tuple(left_out))


def match_and_write(stage: Discover, outcome: Outcome) -> Matchings:
    """Match the segments of a run, write `results.json` and `results.md` and log the table."""
    matchings = match_split(stage, outcome)
    record = make_record(stage, outcome, matchings)
    table = make_table(stage, matchings)
    path = stage.artefact.path
    write_json(path / "results.json", record)
    write_atomic(path / "results.md", table.encode())
    log.info("%s\nresults: %s", table.rstrip(), path / "results.json")
    return matchings


def make_record(stage: Discover, outcome: Outcome, matchings: Matchings) -> dict[str, Any]:
    """Return what `results.json` holds; every figure is named by its protocol."""
    dataset = stage.dataset
    classes = list_truth_classes(dataset)
    num_images = matchings.scores["image"].num_images
    clusters = [None if c == UNMATCHED else classes[c] for c in matchings.cluster_classes]
    return {
        "unit": "percent",
        "dataset": dataset.name,
        "split": dataset.split,
        "images": num_images,
        "left_out": sorted([*outcome.failed, *matchings.left_out]),
        "label_source": "none, segments are matched to the truth",
        "picture": str(getattr(dataset, "picture", "whole")),
        "segments_per_image": round(matchings.num_segments / num_images, 3),
        "clusters": stage.num_clusters,
        "class_of_cluster": clusters,
        **{f"matched_by_{protocol}": _name_classes(matchings.scores[protocol], classes) for protocol in PROTOCOLS},
        "seconds": {"segments": stage.segments.seconds, stage.name: round(wall_seconds(outcome.seconds), 3)},
        "versions": versions(),
        "config": stage.cfg.as_dict(),
    }


def _name_classes(scores: MatchedScores, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return the figures of a protocol with the IoU by class."""
    record = scores.to_json()
    return {**record, "iou": dict(zip(classes, record["iou"], strict=True))}  # type: ignore[call-overload]


def make_table(stage: Discover, matchings: Matchings) -> str:
    """Return the figures as Markdown: a row for each class, a column for each protocol."""
    dataset, scores = stage.dataset, matchings.scores
    num_images = scores["image"].num_images
    miou, accuracy = (
        [format_value(getattr(scores[protocol], name)) for protocol in PROTOCOLS] for name in ("miou", "pixel_accuracy")
    )
    head = (
        f"**mIoU {miou[0]} % matched by image, {miou[1]} % matched by set** (pixel accuracy {accuracy[0]} % and "
        f"{accuracy[1]} %), on {dataset.name} {dataset.split}, {num_images} images, "
        f"{matchings.num_segments / num_images:.1f} segments an image, {stage.num_clusters} clusters of the set. The "
        "protocols are not to be compared."
    )
    names = list_truth_classes(dataset)
    rows = [(name, *(format_value(float(scores[p].iou[i])) for p in PROTOCOLS)) for i, name in enumerate(names)]
    return f"{head}\n\n{markdown_table(('IoU of class', 'matched by image', 'matched by set'), rows)}"


class StageLabels:
    """Reads the label maps behind a run of `discover`.

    Args:
        stage: the run.
    """

    def __init__(self, stage: Discover) -> None:
        self._stage = stage

    def segments(self, image_id: str) -> np.ndarray:
        """Return the segments of an image, `[H, W]` uint8, ids from 0."""
        return self._stage.segments.label_map(image_id)

    def clusters(self, image_id: str) -> np.ndarray:
        """Return the clusters of an image, `[H, W]` uint8, ids from 0."""
        return StageFolder(self._stage.artefact.path).label_map(image_id) - np.uint8(1)


def choose_pictured(stage: Discover, left_out: Collection[str]) -> list[str]:
    """Return the images that have a panel, spread evenly over the split.

    Args:
        stage: the run.
        left_out: images that can have none.
    """
    ids = [image_id for image_id in stage.dataset.ids if image_id not in left_out]
    count = min(stage.cfg.evaluation.panels, len(ids))
    return [ids[i] for i in sorted({int(i) for i in np.linspace(0, len(ids) - 1, count)})] if count else []


def draw_matched_panels(stage: Discover, outcome: Outcome, matchings: Matchings | None) -> None:
    """Draw panels of images spread evenly over the split.

    A panel shows photograph, segments and clusters; with truth also the classes that each protocol gives them, and the
    truth. What no class was left for is cream like ignored pixels.

    Args:
        stage: the run.
        outcome: of its images.
        matchings: both protocols; `None` without ground truth.
    """
    chosen = choose_pictured(stage, {*outcome.failed, *(matchings.left_out if matchings else ())})
    for image_id in chosen:
        write_atomic(stage.artefact.file(stored_name("panel", image_id)), _draw(stage, image_id, matchings))
    if chosen:
        log.info("panels:  %s", stage.artefact.path / "panels")


def _draw(stage: Discover, image_id: str, matchings: Matchings | None) -> bytes:
    """Return the panel of an image as PNG."""
    dataset, folder = stage.dataset, StageLabels(stage)
    sample = dataset.load(image_id, truth=matchings is not None, labels=False)
    segments, clusters = folder.segments(image_id), folder.clusters(image_id)
    maps = [
        (f"{int(segments.max()) + 1} segments", segments % _MAX_COLOURS + np.uint8(1)),
        ("clusters of the set", clusters + np.uint8(1)),
    ]
    legend = []
    if matchings is not None and sample.semantic is not None:
        truth = to_matched_ids(sample.semantic, dataset)
        counts = count_pixels(segments, truth, len(list_truth_classes(dataset)))
        named = [
            ("matched by image", _to_classes(match_segments(counts), segments, dataset)),
            ("matched by set", _to_classes(matchings.cluster_classes, clusters, dataset)),
            ("truth", sample.semantic),
        ]
        legend = [
            ("ignored or unmatched" if name == "ignored" else name, colour)
            for name, colour in make_class_legend(dataset.classes, *(each for _, each in named))
        ]
        maps += named
    size = choose_display_size(sample.size)
    photograph = resize_image(sample.image, size)
    shown = [(title, overlay_labels(photograph, resize_labels(labels, size))) for title, labels in maps]
    return draw_panel([(image_id, photograph), *shown], legend)


def _to_classes(classes: np.ndarray, ids: np.ndarray, dataset: Dataset) -> np.ndarray:
    """Return the label map `[H, W]` uint8 of matched ids, in the ids of the data set; 255 for what is unmatched."""
    first = 0 if dataset.has_background else 1
    table = np.where(classes == UNMATCHED, IGNORE_INDEX, classes + first).astype(np.uint8)
    return table[ids]
