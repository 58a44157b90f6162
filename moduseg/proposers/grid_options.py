"""Options of automatic mask generation, checked."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class GridOptions:
    """Options of `SamAutomaticMaskGenerator`, by its names; what they mean is said in `moduseg.proposers.sam`.

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
        for field in fields(self):
            number, (low, high) = getattr(self, field.name), limits.get(field.name, (0, 1))
            if not low <= number <= high:
                raise ValueError(f"{field.name}: got {number}, expected {low} to {high}; leave it at the default")
        if self.points_per_side // self.crop_n_points_downscale_factor**self.crop_n_layers < 1:
            raise ValueError(
                f"crop_n_points_downscale_factor: got {self.crop_n_points_downscale_factor}, which leaves no point in "
                f"the last of {self.crop_n_layers} layers of crops; try 1 or a larger points_per_side"
            )


def check_images_per_batch(count: int) -> int:
    """`count`.

    Raises:
        ValueError: it is out of range.
    """
    if not 1 <= count <= 1024:
        raise ValueError(f"images_per_batch: got {count}, expected 1 to 1024; 1 needs the least memory")
    return count
