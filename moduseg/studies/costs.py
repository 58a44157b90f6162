"""What a label map of a finished run costs: seconds of an image, and the most memory, as its stages recorded them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moduseg.evaluation.measures import Figure
from moduseg.pipeline.manifests import StageFolder
from moduseg.stages.class_scores import FIT_PROPOSALS
from moduseg.stages.fit_ranking import FitRanking

Cost = dict[str, float | None]
"""`wall` and `cpu`, seconds an image; `memory`, the most a stage held, in GB (2^30 bytes). `None`: not recorded."""

COST_FIGURES: dict[str, Figure] = {
    f"{kind} {name}": Figure(
        name=f"{part}.{key}", title=f"{kind} {name}", unit=unit, decimals=2, is_larger_better=False
    )
    for kind, part in (("mask", "masks"), ("prediction", "prediction"))
    for name, key, unit in (("time", "wall", "s"), ("CPU time", "cpu", "s"), ("memory", "memory", "GB"))
}
"""Columns of the costs of a pseudo mask and of a label map by retrieval, and where `measure_costs` has them."""
_MADE_ONCE = ("build_bank", FIT_PROPOSALS, FitRanking.name)
"""Inputs of a stage through which no picture passes that is labelled."""


def measure_costs(path: Path) -> dict[str, Cost]:
    """Return what labelling an image cost, with all that was made for it.

    Args:
        path: a finished folder of stage `evaluate`.

    Returns:
        `masks`: of a pseudo mask, from the image and its tags (proposals if it needs them, scores, labels, its share
        of the generator's fit). `prediction`: of a label map by retrieval (proposals, queries, search), without the
        bank. Time on the clock grows with what else the machine does; CPU time does not.
    """
    inputs = StageFolder(path).inputs
    masks = _list_labelling(inputs["pseudo_masks"]) if "pseudo_masks" in inputs else []
    prediction = _list_labelling(inputs["infer"]) if "infer" in inputs else []
    return {"masks": _add_up(masks), "prediction": _add_up(prediction)}


@dataclass(frozen=True)
class LabellingCost:
    """What label maps cost, apart from what had to be made once.

    Attributes:
        picture: of labelling one picture.
        preparation: seconds of all that was made before the first picture: fits, masks of the training images, a bank,
            the training of a student; `memory` is the most that one of these stages held.
    """

    picture: Cost
    preparation: Cost


def measure_labelling(path: Path) -> LabellingCost:
    """Return what a finished folder's label maps cost, a picture and in preparation.

    Args:
        path: of stage `pseudo_masks` (a picture costs its proposals if it needs them, scores and labels), `infer`
            (proposals, queries and search) or `predict_student` (one pass of the network).
    """
    folder = StageFolder(path)
    everything = folder.provenance()
    labelling = [folder] if folder.stage == "predict_student" else _list_labelling(folder)
    paths = {each.path.resolve() for each in labelling}
    prepared = [each for each in everything if each.path.resolve() not in paths]
    fits = [each.manifest["fit_seconds"] for each in everything if each.manifest.get("fit_seconds") is not None]
    return LabellingCost(
        picture=_add_up(labelling, has_fits=False),
        preparation={
            "wall": _sum_totals([*(each.steps for each in prepared), *fits], "wall"),
            "cpu": _sum_totals([*(each.steps for each in prepared), *fits], "cpu"),
            "memory": _find_peak(prepared),
        },
    )


def _list_labelling(folder: StageFolder) -> list[StageFolder]:
    """Return a folder and those behind it that a picture passes, each once: without the bank and what a fit saw."""
    sources = [source for name, source in folder.inputs.items() if name not in _MADE_ONCE]
    passed = {each.path.resolve(): each for source in sources for each in _list_labelling(source)}
    return [*passed.values(), folder]


def _add_up(folders: Sequence[StageFolder], *, has_fits: bool = True) -> Cost:
    """Return the cost of an image over several stages; `None` for what one of them did not record.

    Args:
        folders: of the stages.
        has_fits: whether an image's share of what a generator's fit took counts.
    """
    return {
        "wall": _sum_seconds(folders, "wall", has_fits),
        "cpu": _sum_seconds(folders, "cpu", has_fits),
        "memory": _find_peak(folders),
    }


def _find_peak(folders: Sequence[StageFolder]) -> float | None:
    """Return the most memory that one of the stages held, in GB; `None` if one did not record it, or without stages."""
    peaks = [max(folder.memory.values()) for folder in folders if folder.memory]
    return max(peaks) / 2**30 if peaks and len(peaks) == len(folders) else None


def _sum_totals(steps: Sequence[Mapping[str, float]], step: str) -> float | None:
    """Return the seconds of a step over several stages; `None` if one did not record it."""
    return None if any(step not in seconds for seconds in steps) else sum(seconds[step] for seconds in steps)


def _sum_seconds(folders: Sequence[StageFolder], step: str, has_fits: bool) -> float | None:
    total = 0.0
    for folder in folders:
        # A generator that was fitted first has the seconds of its fit beside those of its scores.
        fit: Mapping[str, float] | None = folder.manifest.get("fit_seconds") if has_fits else None
        parts = [folder.steps, *([] if fit is None else [fit])]
        if any(step not in seconds for seconds in parts):
            return None
        total += sum(seconds[step] for seconds in parts) / int(folder.manifest["images"])
    return total if folders else None
