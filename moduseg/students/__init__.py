"""Networks that are trained on label maps and then need neither bank nor proposals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moduseg.backbones.base import Backbone
from moduseg.config.construct import build_named
from moduseg.devices import Device
from moduseg.students.base import Outputs, Student
from moduseg.students.token_student import TokenStudent
from moduseg.students.trunks import SegformerStudent, TimmStudent, TorchvisionStudent

STUDENTS: dict[str, type[Student]] = {
    "segformer": SegformerStudent,
    "timm": TimmStudent,
    "tokens": TokenStudent,
    "torchvision": TorchvisionStudent,
}

__all__ = ["STUDENTS", "Outputs", "Student", "build", "needs_backbone"]


def build(cfg: Mapping[str, Any], device: Device, outputs: Outputs, backbone: Callable[[], Backbone]) -> Student:
    """Return the student that `cfg["name"]` names; its network is built on first use.

    Args:
        cfg: its configuration, `student.model`.
        device: where the network is.
        outputs: what its channels stand for.
        backbone: gives the frozen backbone to students that see tokens.

    Raises:
        ConfigError: unknown name or key, or a value that the student refuses.
    """
    return build_named("student.model", STUDENTS, cfg, device=device, outputs=outputs, backbone=backbone)


def needs_backbone(cfg: Mapping[str, Any]) -> bool:
    """Return whether the student that a configuration names sees the tokens of a frozen backbone."""
    return cfg.get("name") == "tokens"
