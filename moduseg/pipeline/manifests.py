"""The one reader of finished stages: manifests, failures, provenance, seconds, and the files of each image."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from moduseg.bank.store import read_vectors
from moduseg.datasets.io import read_label_png
from moduseg.datasets.labels import check_id
from moduseg.errors import ArtefactError, DataError
from moduseg.files import read_json
from moduseg.proposers import sa1b
from moduseg.pseudo_masks.store import SUFFIX, unpack
from moduseg.structures import Tags

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from moduseg.masks.encoded import WaitingProposals
    from moduseg.structures import Proposals, ScoreMaps

Kind = Literal["proposals", "scores", "label_map", "confidence", "vectors", "panel", "tags", "examples"]
"""What a stage stores for one image."""
_LAYOUT: dict[Kind, tuple[str, str]] = {
    "proposals": ("masks", ".json"),
    "scores": ("maps", SUFFIX),
    "label_map": ("labels", ".png"),
    "confidence": ("scores", ".png"),
    "vectors": ("vectors", ".safetensors"),
    "panel": ("panels", ".png"),
    "tags": ("tags", ".json"),
    "examples": ("examples", ".safetensors"),
}
"""Sub-folder and suffix of each kind of file."""


class StageFolder:
    """The folder of a finished stage: what its manifest says and what it stores for each image.

    Args:
        path: the folder. A bank that was made elsewhere may have no manifest; it then has no seconds and no inputs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        """The folder's own name, `<name>-<key8>`, which the keys of later stages hold."""
        return self.path.name

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The content of `manifest.json`; empty if the file does not exist.

        Raises:
            ArtefactError: the file is damaged.
        """
        file = self.path / "manifest.json"
        return dict(read_json(file)) if file.is_file() else {}

    @property
    def is_complete(self) -> bool:
        """Whether the stage has completed there; not where the manifest is damaged, since the stage then runs again."""
        try:
            return self.manifest.get("status") == "complete"
        except ArtefactError:
            return False

    @property
    def stage(self) -> str:
        """The stage that wrote the folder."""
        return str(self.manifest.get("stage", self.path.parent.name))

    @property
    def title(self) -> str:
        """The stage, with the split in brackets if the stage's key names one."""
        dataset = self.manifest.get("parts", {}).get("dataset")
        return f"{self.stage} ({dataset['split']})" if isinstance(dataset, dict) else self.stage

    @property
    def steps(self) -> dict[str, float]:
        """Seconds by step: `wall`, and what it holds or overlaps with (`load`, `work`, `model`, `write`, `cpu`)."""
        return dict(self.manifest.get("seconds", {}))

    @property
    def seconds(self) -> float:
        """The time that the stage took, see `wall_seconds`."""
        return wall_seconds(self.steps)

    @property
    def memory(self) -> dict[str, int]:
        """The most bytes held while the stage ran (`moduseg.pipeline.memory`); empty in an earlier version's folder."""
        return dict(self.manifest.get("memory", {}))

    @property
    def num_failures(self) -> int:
        """Number of images without a result in this folder and in those it was made from."""
        return int(self.manifest.get("failures", 0))

    @cached_property
    def failures(self) -> dict[str, str]:
        """Error of each image without a result, by id; of `failures.jsonl`."""
        file = self.path / "failures.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return {entry["id"]: entry["error"] for entry in map(json.loads, lines)}

    @cached_property
    def inputs(self) -> dict[str, StageFolder]:
        """The folders it was made from, by stage, as far as they still exist."""
        located = {stage: self.locate(str(text)) for stage, text in self.manifest.get("inputs", {}).items()}
        return {stage: StageFolder(path) for stage, path in located.items() if path is not None}

    def locate(self, text: str) -> Path | None:
        """Return the folder that the manifest names, or `None` if it is gone.

        Args:
            text: the path as it is written. A folder of that name beside this one comes first, because all outputs may
                have been moved together.
        """
        written = Path(text)
        for candidate in (self.path.resolve().parents[2].joinpath(*written.parts[-3:]), written):
            if (candidate / "manifest.json").is_file():
                return candidate
        return None

    def provenance(self) -> list[StageFolder]:
        """Return every folder that this one was made from and itself last, each once, in the order of the data.

        The bank comes before the queries.
        """
        folders: dict[Path, StageFolder] = {}

        def visit(folder: StageFolder) -> None:
            if folder.path.resolve() in folders:
                return
            for name in sorted(folder.inputs, key=lambda name: name != "build_bank"):
                visit(folder.inputs[name])
            folders[folder.path.resolve()] = folder

        visit(self)
        return list(folders.values())

    def nearest_inputs(self) -> dict[str, Path]:
        """Return the folders that this one was made from, by stage; the nearest one of a stage wins.

        So `propose` is that of the labelled split: the queries lead to it, bank and ranking to the training split.
        """
        nearest: dict[str, Path] = {}
        for name in sorted(self.inputs, key=lambda name: (name in ("build_bank", "fit_ranking"), name)):
            nearest.setdefault(name, self.inputs[name].path)
            for stage, path in self.inputs[name].nearest_inputs().items():
                nearest.setdefault(stage, path)
        return nearest

    def file(self, kind: Kind, image_id: str) -> Path:
        """Return the path of an image's file, whether it exists or not.

        Raises:
            DataError: the id names a path outside the folder.
        """
        return self.path / stored_name(kind, image_id)

    def proposals(self, image_id: str, size: tuple[int, int]) -> Proposals:
        """Return the stored proposals of an image of `(height, width)`.

        Raises:
            DataError: the file is missing, damaged, or of another size.
        """
        return sa1b.read_proposals(self.file("proposals", image_id), size)

    def waiting_proposals(self, image_id: str, size: tuple[int, int]) -> WaitingProposals:
        """Return the stored proposals of an image that waits for its turn; large ones are not decoded yet.

        Raises:
            DataError: as `proposals`.
        """
        return sa1b.read_waiting(self.file("proposals", image_id), size)

    def label_map(self, image_id: str) -> np.ndarray:
        """Return the stored label map of an image, `[H, W]` uint8.

        Raises:
            DataError: the file is missing or damaged.
        """
        return read_label_png(self.file("label_map", image_id))

    def confidence(self, image_id: str) -> np.ndarray | None:
        """Return how sure each pixel of an image's label map is, `[H, W]` uint8, 255 for certain; `None` if not stored.

        Raises:
            DataError: the file is damaged.
        """
        file = self.file("confidence", image_id)
        return read_label_png(file) if file.is_file() else None

    def vectors(self, image_id: str, names: tuple[str, ...] = ("pooled",)) -> dict[str, Tensor]:
        """Return the stored tensors of an image: `pooled`, and in a bank's folder also `labels` and `areas`.

        Raises:
            DataError: the file is missing or damaged, or lacks one of the names.
        """
        return read_vectors(self.file("vectors", image_id), names)

    def tags(self, image_id: str) -> Tags:
        """Return the stored tags of an image.

        Raises:
            DataError: the file is missing or damaged.
        """
        file = self.file("tags", image_id)
        try:
            content = json.loads(file.read_bytes())
            scores = content["scores"]
            return Tags(tuple(content["labels"]), None if scores is None else torch.tensor(scores))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{file}: not readable as tags ({error!r}); run scripts/tag.py again") from error

    def scores(self, image_id: str) -> ScoreMaps:
        """Return the stored class scores of an image.

        Raises:
            DataError: the file is missing or damaged.
        """
        file = self.file("scores", image_id)
        if not file.is_file():
            raise DataError(f"{file}: no such file; run scripts/pseudo_masks.py again")
        return unpack(file.read_bytes(), name=str(file))


def encode_tags(tags: Tags) -> bytes:
    """Return tags as the bytes of their JSON file."""
    scores = None if tags.scores is None else [round(float(score), 6) for score in tags.scores]
    return json.dumps({"labels": list(tags.class_ids), "scores": scores}).encode()


def stored_name(kind: Kind, image_id: str) -> str:
    """Return the path of an image's file inside a stage's folder.

    Raises:
        DataError: the id names a path outside the folder.
    """
    folder, suffix = _LAYOUT[kind]
    return safe_name(f"{folder}/{image_id}", suffix)


def name_supervision(supervision: str | None) -> dict[str, str]:
    """Return the field of a manifest or bank that says which masks a part was trained on; none where there is none."""
    return {} if supervision is None else {"supervision": supervision}


def safe_name(image_id: str, suffix: str) -> str:
    """Return the name of an image's file inside a folder; ids keep their sub-folders.

    Raises:
        DataError: the id names a path outside the folder.
    """
    return f"{check_id(image_id, 'artefact')}{suffix}"


def wall_seconds(steps: Mapping[str, float]) -> float:
    """Return the time that a stage took, given its seconds by step.

    The steps overlap and `wall` is the time on the clock. Folders written before there was `wall` give the sum of all.
    """
    return float(steps["wall"] if "wall" in steps else sum(steps.values()))


def steps_by_folder(path: Path) -> dict[str, dict[str, float]]:
    """Return the seconds by step of a folder and of all that it was made from, by `<stage>/<name>`."""
    folders = StageFolder(path).provenance()
    return {f"{f.path.parent.name}/{f.name}": f.steps for f in folders if f.manifest}


def stage_seconds(path: Path) -> list[tuple[str, float]]:
    """Return title and seconds of each stage behind a folder and its own, in the order of the data, for a report.

    What a generator was fitted in comes before the scores that it was fitted for, as `fit`.
    """
    rows = []
    for folder in StageFolder(path).provenance():
        fit = wall_seconds(folder.manifest.get("fit_seconds", {}))
        rows += [(folder.title.replace(folder.stage, "fit", 1), fit), (folder.title, folder.seconds)]
    return [(title, seconds) for title, seconds in rows if seconds]


def count_failures(path: Path) -> int:
    """Return the number of images without a result in a folder and in those it was made from."""
    return StageFolder(path).num_failures
