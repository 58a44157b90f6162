"""Options of automatic mask generation, checked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """Options of `SamAutomaticMaskGenerator`, under its names.

    Attributes:
        points_per_side: points along each side of the image.
        points_per_batch: points that share a pass of the mask decoder; changes speed and memory only.
        pred_iou_thresh: smallest predicted IoU, in [0, 1].
        stability_score_thresh: smallest stability, in [0, 1]: IoU between the mask at a higher and at a lower cut-off.
        stability_score_offset: by how much the cut-off is moved for it.
        box_nms_thresh: if the boxes of two masks overlap more, the mask with the lower predicted IoU is dropped.
        crop_n_layers: layers of crops that are segmented as well; layer `i` has `4 ** i` crops.
        crop_nms_thresh: the limit of `box_nms_thresh` between masks of different crops; masks of smaller crops win.
        crop_overlap_ratio: overlap of crops, as a fraction of the image.
        crop_n_points_downscale_factor: `points_per_side` is divided by this at each layer.
        min_mask_region_area: holes and islands smaller than this, in pixels, are removed; 0 leaves them.

    Raises:
        ValueError: a value out of range.
    """

    points_per_side: int = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    min_mask_region_area: int = 0

    def __post_init__(self) -> None:
        limits = {
            "points_per_side": (1, 1024),
            "points_per_batch": (1, 1 << 20),
            "stability_score_offset": (0, 100),
            "crop_n_layers": (0, 5),
            "crop_n_points_downscale_factor": (1, 64),
            "min_mask_region_area": (0, 1 << 30),
        }
        for name, number in self.grid_arguments().items():
            low, high = limits.get(name, (0, 1))
            if not low <= number <= high:
                raise ValueError(f"{name}: got {number}, expected {low} to {high}; leave it at the default")
        if self.points_per_side // self.crop_n_points_downscale_factor**self.crop_n_layers < 1:
            raise ValueError(
                f"crop_n_points_downscale_factor: got {self.crop_n_points_downscale_factor}, which leaves no point in "
                f"the last of {self.crop_n_layers} layers of crops; try 1 or a larger points_per_side"
            )

    def grid_arguments(self) -> dict[str, Any]:
        """Return the arguments of `SamAutomaticMaskGenerator` by name, without what a subclass adds."""
        values = asdict(self)
        return {field.name: values[field.name] for field in fields(GridOptions)}


@dataclass(frozen=True, kw_only=True)
class EncoderOptions(GridOptions):
    """Options of mask generation with our own engine, which runs the image encoder itself.

    Attributes:
        images_per_batch: images or crops that share a pass of the image encoder; changes speed and memory, and the last
            bits of the scores.
        compile: have `torch.compile` translate the image encoder: minutes at the first image, then faster.
        skip_certain: every second point a side is decoded first; of the others, those inside a stable mask whose
            predicted IoU is at least this are skipped. Fewer masks, in about half of the time; `null` skips none.
    """

    images_per_batch: int = 1
    compile: bool = False
    skip_certain: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.images_per_batch <= 1024:
            raise ValueError(
                f"images_per_batch: got {self.images_per_batch}, expected 1 to 1024; 1 needs the least memory"
            )
        if self.skip_certain is not None and not 0 <= self.skip_certain <= 1:
            raise ValueError(f"skip_certain: got {self.skip_certain}, expected null or a predicted IoU in [0, 1]")
