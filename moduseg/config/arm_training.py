"""Settings of the training of an ARM (`configs/train_arm.yaml`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ArmTraining:
    """What an ARM is, and what it is trained beside.

    Attributes:
        hosts: ways to run the CLIP's last block, one drawn for each step.
        width: channels inside the module.
        heads: of its attentions.
        mlp_width: channels inside its MLP.
        blocks: first and last block, counted from 1, of the shallow features; 3..6 of 12 and as deep in other encoders
            if omitted.
        flip: whether half of the windows are mirrored.
        label_stride: every so-manyth row and column of pixels counts in the loss.
        check_images: images of the evaluated split that a measurement labels, the first ones.
        output: file of the weights; inside the run's folder if omitted.

    Raises:
        ValueError: a value out of range.
    """

    hosts: tuple[str, ...] = ("plain", "maskclip", "sclip", "clearclip", "naclip", "proxyclip", "corrclip")
    width: int = 256
    heads: int = 8
    mlp_width: int = 1024
    blocks: tuple[int, int] | None = None
    flip: bool = True
    label_stride: int = 2
    check_images: int = 40
    output: str | None = None

    def __post_init__(self) -> None:
        if not self.hosts or len(set(self.hosts)) < len(self.hosts):
            raise ValueError(f"hosts: got {list(self.hosts)}, expected one or more, each once; try [clearclip,naclip]")
        for name in ("width", "heads", "mlp_width", "label_stride", "check_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 1 or more; leave it out")
