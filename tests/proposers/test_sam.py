"""The SAM proposer: the published generator on the miniature architecture, options, weights."""

from __future__ import annotations

import hashlib
import re
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moduseg.devices import Device
from moduseg.errors import ArtefactError, ConfigError, DataError, MissingError
from moduseg.miniature.models.sam import build_miniature_sam
from moduseg.proposers import build
from moduseg.proposers import sam as sam_module
from moduseg.proposers.sam import PUBLISHED, SHA256, SamOptions, SamProposer, make_single_precision_transform
from moduseg.structures import Sample
from tests.proposers.contract import CPU, ProposerContract, sample
from tests.support.serving import go_online, serve

# Random weights predict nothing of worth, so the filters are opened until masks survive.
OPEN: dict[str, Any] = {
    "model": "miniature",
    "checkpoint": "random",
    "points_per_side": 3,
    "pred_iou_thresh": 0.0,
    "stability_score_thresh": 0.0,
    "box_nms_thresh": 1.0,
    "crop_nms_thresh": 1.0,
}


class TestContract(ProposerContract):
    def config(self, folder: Path, samples: Sequence[Sample]) -> dict[str, object]:
        return {"name": "sam", **OPEN}

    def test_finds_what_is_plain(self, tmp_path: Path) -> None:
        """Random weights find nothing in particular: what is found is compared with the published generator."""
        from segment_anything import SamAutomaticMaskGenerator

        picture = sample(48, 64)
        proposer = SamProposer(SamOptions(**OPEN), CPU)
        proposals = proposer.propose(picture)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sam = build_miniature_sam()
        options = {k: v for k, v in OPEN.items() if k not in ("model", "checkpoint")}
        records = SamAutomaticMaskGenerator(sam, **options).generate(picture.image)
        records = [record for record in records if record["segmentation"].any()]
        assert len(proposals) == len(records) > 1
        assert proposals.predicted_iou.tolist() == pytest.approx([r["predicted_iou"] for r in records])
        assert proposals.stability_score.tolist() == pytest.approx([r["stability_score"] for r in records])
        for mask, record in zip(proposals.masks, records, strict=True):
            np.testing.assert_array_equal(mask.numpy(), record["segmentation"])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("points_per_batch", 3),
        ("pred_iou_thresh", 0.7),
        ("stability_score_thresh", 0.8),
        ("stability_score_offset", 0.5),
        ("box_nms_thresh", 0.3),
        ("crop_n_layers", 1),
        ("crop_nms_thresh", 0.4),
        ("crop_overlap_ratio", 0.25),
        ("crop_n_points_downscale_factor", 2),
        ("min_mask_region_area", 9),
    ],
)
def test_options_reach_the_generator(option: str, value: float) -> None:
    generator = SamProposer(SamOptions(**{**OPEN, option: value}), CPU).generator
    assert getattr(generator, option) == value


def test_points_and_layers_of_crops() -> None:
    generator = SamProposer(
        SamOptions(**{**OPEN, "crop_n_layers": 1, "crop_n_points_downscale_factor": 2}), CPU
    ).generator
    assert [len(points) for points in generator.point_grids] == [9, 1]


@pytest.mark.parametrize("layers", [0, 1])
def test_nothing_passes_the_filters(layers: int) -> None:
    picture = sample(40, 56)
    proposer = SamProposer(SamOptions(**{**OPEN, "pred_iou_thresh": 1.0, "crop_n_layers": layers}), CPU)
    assert proposer.propose(picture).masks.shape == (0, 40, 56)


def test_masks_of_crops_are_in_descending_predicted_iou() -> None:
    proposals = SamProposer(SamOptions(**{**OPEN, "crop_n_layers": 1, "points_per_side": 2}), CPU).propose(
        sample(64, 64)
    )
    assert len(proposals) > 1
    assert (proposals.predicted_iou.diff() <= 0).all()


def test_lower_precision_is_for_the_encoder_only(device: torch.device) -> None:
    exact = SamProposer(SamOptions(**OPEN), Device(device)).propose(sample(48, 64))
    rough = SamProposer(SamOptions(**OPEN), Device(device, "bfloat16")).propose(sample(48, 64))
    assert rough.predicted_iou.dtype == torch.float32
    assert len(rough)
    assert rough.predicted_iou.max().item() == pytest.approx(exact.predicted_iou.max().item(), abs=0.05)


def test_coordinates_in_single_precision() -> None:
    from segment_anything.utils.transforms import ResizeLongestSide

    points = np.array([[3.0, 5.0], [50.5, 20.25]])
    coordinates = make_single_precision_transform(128).apply_coords(points, (48, 64))
    assert coordinates.dtype == np.float32
    np.testing.assert_allclose(coordinates, ResizeLongestSide(128).apply_coords(points, (48, 64)), rtol=1e-6)


def test_a_line_of_pixels_is_too_thin() -> None:
    with pytest.raises(DataError, match=r"folder/a: 1 x 400 pixels are too thin for SAM's 128"):
        SamProposer(SamOptions(**OPEN), CPU).propose(sample(1, 400))


# Weights


def test_checkpoint_is_loaded_and_named_by_its_digest(tmp_path: Path) -> None:
    torch.manual_seed(7)
    sam = build_miniature_sam()
    files = [tmp_path / "sam.safetensors", tmp_path / "sam.pth"]
    save_file(sam.state_dict(), files[0])
    torch.save(sam.state_dict(), files[1])
    proposers = [SamProposer(SamOptions(**{**OPEN, "checkpoint": str(file)}), CPU) for file in files]
    first, second = (proposer.propose(sample(48, 64)) for proposer in proposers)
    assert torch.equal(first.masks, second.masks)
    assert len(first)
    for name, tensor in proposers[0].generator.predictor.model.state_dict().items():
        assert torch.equal(tensor, sam.state_dict()[name]), name
    assert proposers[0].digest != proposers[1].digest
    assert len(proposers[0].digest) == 64


def test_seed_of_random_weights() -> None:
    state = torch.random.get_rng_state()
    masks = [
        SamProposer(SamOptions(**OPEN, seed=seed), CPU).propose(sample(48, 64)).predicted_iou for seed in (0, 0, 1)
    ]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("change", ["missing", "left over", "shape"])
def test_weights_of_another_model(tmp_path: Path, change: str) -> None:
    state = dict(build_miniature_sam().state_dict())
    if change == "missing":
        del state["mask_decoder.iou_token.weight"]
    elif change == "left over":
        state["mask_decoder.extra"] = torch.zeros(1)
    else:
        state["mask_decoder.iou_token.weight"] = torch.zeros(1, 3)
    save_file(state, tmp_path / "sam.safetensors")
    proposer = SamProposer(SamOptions(**{**OPEN, "checkpoint": str(tmp_path / "sam.safetensors")}), CPU)
    with pytest.raises(ArtefactError, match=r"not weights of SAM 'miniature'.*first mask_decoder\.") as caught:
        proposer.propose(sample(48, 64))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [*PUBLISHED, "miniature"])
def test_missing_checkpoint_says_what_to_fetch(model: str) -> None:
    proposer = build({"name": "sam", "model": model, "checkpoint": "nowhere/sam.pth"}, CPU)
    expected = (
        f"fetch {PUBLISHED[model]} from https://dl.fbaipublicfiles.com/segment_anything/{PUBLISHED[model]}"
        if model in PUBLISHED
        else "train_miniature.py model=sam"
    )
    for use in (lambda: proposer.digest, lambda: proposer.propose(sample(48, 64))):
        with pytest.raises(MissingError, match=r"^proposer\.checkpoint: got 'nowhere/sam\.pth'") as caught:
            use()
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)


def test_published_checkpoints_are_fetched_from_their_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODUSEG_HOME", str(tmp_path))
    content = b"a checkpoint"
    with serve() as site:
        go_online(monkeypatch)
        monkeypatch.setattr(sam_module, "ADDRESS", f"{site.address}/segment_anything/")
        monkeypatch.setitem(SHA256, "vit_b", hashlib.sha256(content).hexdigest())
        for model in ("vit_b", "vit_l"):
            site.files[f"/segment_anything/{PUBLISHED[model]}"] = content
        proposer = SamProposer(SamOptions(model="vit_b", checkpoint="published"), CPU)
        assert not site.asked
        assert proposer.digest == proposer.digest == SHA256["vit_b"]
        assert len(site.asked) == 1
        with pytest.raises(ArtefactError, match=rf"proposer\.checkpoint: .*expected {SHA256['vit_l']}"):
            _ = SamProposer(SamOptions(model="vit_l", checkpoint="published"), CPU).digest


def test_a_checkpoint_by_address_and_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODUSEG_HOME", str(tmp_path / "home"))
    torch.manual_seed(7)
    sam = build_miniature_sam()
    save_file(sam.state_dict(), tmp_path / "sam.safetensors")
    with serve() as site:
        go_online(monkeypatch)
        site.files["/sam.safetensors"] = (tmp_path / "sam.safetensors").read_bytes()
        digest = hashlib.sha256(site.files["/sam.safetensors"]).hexdigest()
        checkpoint = f"{site.address}/sam.safetensors#sha256={digest}"
        proposer = SamProposer(SamOptions(**{**OPEN, "checkpoint": checkpoint}), CPU)
        for name, tensor in proposer.generator.predictor.model.state_dict().items():
            assert torch.equal(tensor, sam.state_dict()[name]), name
        assert proposer.digest == digest
        with pytest.raises(MissingError, match=r"^proposer\.checkpoint: got 'http.*404"):
            _ = SamProposer(SamOptions(**{**OPEN, "checkpoint": f"{site.address}/none.safetensors"}), CPU).digest


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_offline(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODUSEG_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = PUBLISHED[model]
    with pytest.raises(MissingError, match=r"^proposer\.checkpoint: got 'published', but .* is not here") as caught:
        _ = build({"name": "sam", "model": model, "checkpoint": "published"}, CPU).digest
    for text in (
        f"https://dl.fbaipublicfiles.com/segment_anything/{file}",
        f"into {tmp_path}/dl.fbaipublicfiles.com/segment_anything",
        f"proposer.checkpoint=<path of {file}>",
    ):
        assert text in str(caught.value)


def test_published_checkpoints_have_digests() -> None:
    assert SHA256.keys() == PUBLISHED.keys()
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in SHA256.values())
    with pytest.raises(ConfigError, match="got 'published', but the package carries model=miniature"):
        build({"name": "sam", "model": "miniature", "checkpoint": "published"}, CPU)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "vit_x"),
        ("checkpoint", ""),
        ("points_per_side", 0),
        ("points_per_batch", 0),
        ("pred_iou_thresh", 1.1),
        ("stability_score_thresh", -0.1),
        ("box_nms_thresh", 2.0),
        ("crop_n_layers", -1),
        ("crop_overlap_ratio", 1.5),
        ("crop_n_points_downscale_factor", 0),
        ("min_mask_region_area", -1),
    ],
)
def test_wrong_values(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{key}.*got"):
        build({"name": "sam", key: value}, CPU)


def test_crops_without_a_point() -> None:
    with pytest.raises(ConfigError, match=r"no point in the last of 2 layers"):
        build({"name": "sam", "points_per_side": 4, "crop_n_layers": 2, "crop_n_points_downscale_factor": 4}, CPU)


@pytest.mark.slow
def test_vit_b_runs(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    """The published ViT-B architecture at 1024 pixels, random weights, 16 points."""
    options = {**OPEN, "model": "vit_b", "points_per_batch": 16}
    proposer = SamProposer(SamOptions(**options), Device(device))
    encoder = proposer.generator.predictor.model.image_encoder
    picture = sample(375, 500)
    started = time.perf_counter()
    proposals = proposer.propose(picture)
    seconds = time.perf_counter() - started
    assert encoder.img_size == 1024
    assert proposals.masks.shape[1:] == (375, 500)
    assert len(proposals)
    with capsys.disabled():
        parameters = sum(p.numel() for p in proposer.generator.predictor.model.parameters())
        print(
            f"\nSAM vit_b, {parameters / 1e6:.1f} M parameters, {device}: masks {tuple(proposals.masks.shape)}, "
            f"{seconds:.1f} s, {peak_memory(device):.2f} GB at most"
        )


def peak_memory(device: torch.device) -> float:
    """GB of the device, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
