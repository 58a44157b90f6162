"""Our loaders against the names and shapes of the published checkpoints, and every preset of SAM at full size."""

from __future__ import annotations

import re
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moduseg.config import compose
from moduseg.devices import Device
from moduseg.errors import ArtefactError
from moduseg.proposers import build, sam
from moduseg.proposers.sam import PUBLISHED, SamProposer
from moduseg.proposers.sam_decoder import PackagedSam
from moduseg.proposers.sam_transformers import HubSam, SamTransformersOptions, SamTransformersProposer
from tests.proposers.contract import CPU, sample
from tests.proposers.test_mask_generation import agree
from tests.support import sam_manifests, tiny_models
from tests.support.key_names import META, read, shapes_of


@pytest.mark.parametrize("name", [*sam_manifests.SAM, *sam_manifests.HUB])
def test_bytes_are_those_of_the_published_file(name: str) -> None:
    """The one thing about a published file that is known without it: its size, which each missing tensor would move."""
    size = 4 * sum(int(torch.Size(shape).numel()) for shape in read(name).values())
    assert size == pytest.approx(sam_manifests.PUBLISHED_BYTES[name], rel=0.003)


def _proposer(name: str, path: Path, monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor]) -> SamProposer:
    """A proposer whose checkpoint holds `state`, without its gigabytes."""
    path.write_bytes(b"")
    monkeypatch.setattr(sam, "load_state", lambda _: state)
    proposer = build({"name": "sam", "model": name.removeprefix("sam_"), "checkpoint": str(path)}, CPU)
    assert isinstance(proposer, SamProposer)
    return proposer


@pytest.mark.parametrize("name", sam_manifests.SAM)
def test_published_names_load(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read(name)
    state = {tensor: torch.empty(shape, device="meta") for tensor, shape in manifest.items()}
    proposer = _proposer(name, tmp_path / PUBLISHED[name.removeprefix("sam_")], monkeypatch, state)
    with torch.device("meta"):
        assert shapes_of(proposer.build_model().state_dict()) == manifest


@pytest.mark.parametrize("name", sam_manifests.SAM)
def test_a_checkpoint_without_one_tensor_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = "image_encoder.blocks.5.attn.rel_pos_h"
    manifest = read(name)
    state = {tensor: torch.empty(shape, device="meta") for tensor, shape in manifest.items() if tensor != lost}
    proposer = _proposer(name, tmp_path / "sam.pth", monkeypatch, state)
    with (
        torch.device("meta"),
        pytest.raises(ArtefactError, match=rf"\(1 tensors missing, 0 left over, 0 .*{lost}") as caught,
    ):
        proposer.build_model()
    assert "\n" not in str(caught.value)


def test_the_models_of_transformers_have_the_published_names() -> None:
    """SAM-HQ exactly; of SAM 2.1's video model all that the image model has, the rest being declared as not needed."""
    import transformers

    assert shapes_of(sam_manifests.build("sam_hq_vit_h").state_dict()) == read("sam_hq_vit_h")
    published = read("sam2.1_hiera_large")
    assert shapes_of(sam_manifests.build("sam2.1_hiera_large").state_dict()) == published
    with torch.device("meta"):
        image = transformers.Sam2Model(transformers.Sam2Config(vision_config=sam_manifests.SAM2_LARGE))
    needed = shapes_of(image.state_dict())
    assert {name: published.get(name) for name in needed} == needed
    declared = image._keys_to_ignore_on_load_unexpected
    assert not [name for name in published if name not in needed and not any(re.search(p, name) for p in declared)]


def test_sam_in_both_libraries_names() -> None:
    """ViT-B: each of `segment_anything`'s tensors has its place, and its shape, in `SamModel`."""
    import transformers

    with torch.device("meta"):
        model = transformers.SamModel(transformers.SamConfig())
    renamed = {tiny_models.transformers_name(n): shape for n, shape in read("sam_vit_b").items()}
    other = shapes_of(model.state_dict())
    shared = "prompt_encoder.shared_embedding.positional_embedding"
    assert renamed == {name: shape for name, shape in other.items() if name != shared}


@pytest.mark.slow
def test_the_published_file_of_sam_2_loads(tmp_path: Path) -> None:
    """A file of its names and its size, all zeros, through our loader; and the same without one tensor."""
    published = read("sam2.1_hiera_large")
    sam_manifests.build("sam2.1_hiera_large").config.save_pretrained(tmp_path)
    sam_manifests.write_sparse(tmp_path / "model.safetensors", published)
    model = SamTransformersProposer(SamTransformersOptions(weights=str(tmp_path)), CPU).promptable._model
    assert type(model).__name__ == "Sam2Model"
    assert model.vision_encoder.backbone.blocks[40].attn.qkv.weight.device.type == "cpu"
    del model, published["vision_encoder.backbone.blocks.40.attn.qkv.weight"]
    sam_manifests.write_sparse(tmp_path / "model.safetensors", published)
    with pytest.raises(ArtefactError, match=r"1 missing, 0 unexpected.*blocks\.40\.attn\.qkv\.weight"):
        _ = SamTransformersProposer(SamTransformersOptions(weights=str(tmp_path)), CPU).promptable


# Full size


def _on_meta(preset: str) -> Any:
    """The promptable model of a shipped preset, at full size and without weights."""
    cfg = compose([f"proposer={preset}"]).proposer
    if cfg["name"] == "sam":
        with torch.device("meta"):
            model = sam._get_builders()[cfg["model"]]().to("meta").eval()
        return model, PackagedSam(model, META)
    import transformers

    with torch.device("meta"):
        if preset == "sam_transformers":
            config = transformers.SamConfig(vision_config=sam_manifests.HUGE)
            model = transformers.SamModel(config).eval()
        elif preset == "sam_hq":
            model = sam_manifests.build("sam_hq_vit_h").eval()
        elif preset == "sam2":
            model = transformers.Sam2Model(transformers.Sam2Config(vision_config=sam_manifests.SAM2_LARGE)).eval()
        else:
            model = transformers.Sam3TrackerModel(transformers.Sam3TrackerConfig()).eval()
    return model, HubSam(model, META, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "millions", "side", "grid"),
    [
        ("sam_vit_b", 93.7, 1024, 64),
        ("sam_vit_l", 312.3, 1024, 64),
        ("sam_vit_h", 641.1, 1024, 64),
        ("sam_transformers", 641.1, 1024, 64),
        ("sam_hq", 642.7, 1024, 64),
        ("sam2", None, 1024, 64),
        ("sam3", None, 1008, 72),
    ],
)
def test_every_preset_at_full_size_without_weights(
    preset: str, millions: float | None, side: int, grid: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the `meta` device: the architecture builds, and an image of 375 x 500 goes through its encoder."""
    started = time.perf_counter()
    model, promptable = _on_meta(preset)
    with torch.no_grad(), torch.device("meta"):
        embedded = promptable.embed(np.zeros((375, 500, 3), np.uint8))
    seconds = time.perf_counter() - started
    features = embedded.features
    last = features if isinstance(features, Tensor) else features[0] if preset == "sam_hq" else features[-1]
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert promptable.side == side
    assert last.shape == (1, 256, grid, grid)
    assert millions is None or count == pytest.approx(millions, rel=0.01)
    with capsys.disabled():
        print(f"\n{preset}: {count:.1f} M parameters, input {side}, {seconds:.1f} s on meta")


@pytest.mark.slow
def test_vit_b_in_both_engines(device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    """The published ViT-B at 1024 pixels, random weights, 9 points, 375 x 500: the same masks, seconds and memory."""
    options = {"points_per_side": 3, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0}
    results, seconds, where = {}, {}, Device(device)
    for engine in ("grid", "packaged"):
        proposer = build({"name": "sam", "model": "vit_b", "checkpoint": "random", "engine": engine, **options}, where)
        assert isinstance(proposer, SamProposer)
        _ = proposer.promptable if engine == "grid" else proposer.generator
        started = time.perf_counter()
        results[engine] = proposer.propose(sample(375, 500))
        seconds[engine] = time.perf_counter() - started
    agree(results["grid"], results["packaged"])
    with capsys.disabled():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        spent = ", ".join(f"{engine} {value:.1f} s" for engine, value in seconds.items())
        print(f"\nvit_b, {device}: {len(results['grid'])} masks, {spent} an image, {peak:.2f} GB at most")
