"""A trained student on disk: its tensors, and what it takes to build the network again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from moduseg import backbones, students
from moduseg.backbones.base import Backbone
from moduseg.devices import Device
from moduseg.errors import ArtefactError
from moduseg.files import read_json, write_atomic, write_json
from moduseg.students.base import Outputs, Student

WEIGHTS, DESCRIPTION = "student.safetensors", "student.json"


@dataclass(frozen=True)
class StudentDescription:
    """What a trained student is, beside its tensors.

    Attributes:
        model: its configuration, `student.model`.
        backbone: the configuration of the frozen backbone; `None` if it sees images.
        digest: of the weights that training started from, frozen ones included.
        classes: names by class id, background first.
        has_background: whether id 0 is a class.
    """

    model: Mapping[str, Any]
    backbone: Mapping[str, Any] | None
    digest: str
    classes: tuple[str, ...]
    has_background: bool = True

    @property
    def outputs(self) -> Outputs:
        """What the network's channels stand for."""
        return Outputs(self.classes, self.has_background)


def save_student(folder: Path, student: Student, description: StudentDescription) -> None:
    """Write a trained student.

    Raises:
        StorageError: it cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in student.network.state_dict().items()}
    write_json(folder / DESCRIPTION, vars(description))
    write_atomic(folder / WEIGHTS, save_tensors(tensors))


def load_student(
    folder: Path, device: Device, backbone: Callable[[], Backbone] | None = None
) -> tuple[Student, StudentDescription]:
    """Read a trained student.

    Args:
        folder: that `scripts/train_student.py` names at its end.
        device: where the network is put.
        backbone: gives the frozen backbone; built from the student's description if omitted.

    Raises:
        ArtefactError: there is none, it is damaged, or the frozen backbone has other weights now.
    """
    file = folder / WEIGHTS
    if not file.is_file() or not (folder / DESCRIPTION).is_file():
        raise ArtefactError(
            f"{folder}: got no {WEIGHTS} with {DESCRIPTION}, expected both; run scripts/train_student.py"
        )
    stored = read_json(folder / DESCRIPTION)
    try:
        description = StudentDescription(**{**stored, "classes": tuple(stored["classes"])})
    except (KeyError, TypeError) as error:
        raise ArtefactError(
            f"{folder / DESCRIPTION}: got no description of a student ({error}), expected its model, digest and "
            "classes; restore the file, or train again"
        ) from error

    def build_backbone() -> Backbone:
        return backbones.build(description.backbone or {}, device)

    student = students.build(description.model, device, description.outputs, backbone or build_backbone)
    if student.digest != description.digest:
        raise ArtefactError(
            f"{folder}: was trained from weights {description.digest[:16]}, but student.model or the backbone has "
            f"{student.digest[:16]} now; restore them, or train again"
        )
    try:
        student.network.load_state_dict(load_tensors(file.read_bytes()))
    except (SafetensorError, RuntimeError) as error:
        raise ArtefactError(f"{file}: not the weights of this student ({error}); train again") from error
    student.network.eval()
    return student, description
