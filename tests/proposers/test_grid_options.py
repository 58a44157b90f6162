"""Options of mask generation: those of the published generator, and what our engine adds."""

from __future__ import annotations

import inspect

import pytest

from moduseg.config import compose
from moduseg.proposers.grid_options import EncoderOptions, GridOptions
from moduseg.proposers.sam import SamOptions


def test_grid_arguments_are_the_generators() -> None:
    from segment_anything import SamAutomaticMaskGenerator

    parameters = inspect.signature(SamAutomaticMaskGenerator.__init__).parameters
    published = {name: p.default for name, p in parameters.items() if name not in ("self", "model")}
    not_offered = {"point_grids", "output_mode"}
    expected = {name: default for name, default in published.items() if name not in not_offered}
    assert SamOptions(engine="grid", images_per_batch=4).grid_arguments() == expected


@pytest.mark.parametrize(("options", "message"), [
    pytest.param({"points_per_side": 0}, "points_per_side: got 0, expected 1 to 1024", id="grid"),
    pytest.param({"images_per_batch": 1025}, "images_per_batch: got 1025, expected 1 to 1024", id="encoder"),
])  # fmt: skip
def test_values_out_of_range_name_their_key(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderOptions(**options)


def test_points_reach_the_last_crops() -> None:
    options = GridOptions(points_per_side=4, crop_n_layers=1, crop_n_points_downscale_factor=4)
    assert options.grid_arguments()["crop_n_layers"] == 1
    with pytest.raises(ValueError, match="no point in the last of 2 layers"):
        GridOptions(points_per_side=4, crop_n_layers=2, crop_n_points_downscale_factor=4)


@pytest.mark.parametrize(
    "overrides",
    [
        *([f"proposer={name}"] for name in ("sam", "sam_vit_b", "sam_vit_l", "sam_vit_h", "sam_cpu", "sam_grid")),
        ["proposer=sam_miniature"],
        ["experiment=voc"],
        ["experiment=coco"],
    ],
    ids=str,
)
def test_presets_of_sam_take_our_engine(overrides: list[str]) -> None:
    """The packaged generator waits for a GPU thousands of times an image."""
    assert compose(overrides).proposer["engine"] == "grid"
