"""Presets at full size with random weights and one image; prints what each costs. The giants: `test_manifests.py`."""

from __future__ import annotations

import resource
import time

import numpy as np
import pytest
import torch

from moduseg.backbones import build
from moduseg.config import compose
from moduseg.devices import Device
from tests.support.key_names import CLIPS

ON_CPU = (
    "dinov2_vits14", "dinov2_vits14_reg4", "dinov2_vitb14", "dinov2_vitb14_reg4", "dinov3_vitb16", "siglip2_b16",
    "dino_vitb8", "clip_vit_b16", "clip_vit_b32", "metaclip_vit_b16",
)  # fmt: skip
GIANTS = (
    "dinov2_vitl14", "dinov2_vitl14_reg4", "dinov2_vitg14", "dinov2_vitg14_reg4", "dinov3_vitl16", "cradio_v4_so400m",
    "siglip2_so400m", "eva02_vitl14", "clip_vit_l14",
)  # fmt: skip


def run(name: str, device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = {**compose([f"backbone={name}"]).backbone, "weights": "random"}
    if name in CLIPS:
        cfg["config"] = CLIPS[name]
    started = time.perf_counter()
    backbone = build(cfg, Device(device))
    channels = backbone.dim
    built = time.perf_counter()
    (token_map,) = backbone.tokens([np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)])
    assert token_map.tokens.shape == (-(-150 // token_map.stride), -(-200 // token_map.stride), channels)
    assert token_map.tokens.isfinite().all()
    assert float(token_map.tokens.std()) > 0
    seconds = time.perf_counter() - built
    memory = (
        torch.cuda.max_memory_allocated(device) / 1e9
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    )
    with capsys.disabled():
        print(
            f"\n{name}, {device}: tokens {tuple(token_map.tokens.shape)}, built in {built - started:.1f} s, "
            f"150 x 200 pixels in {seconds:.1f} s, {memory:.2f} GB at most"
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_CPU)
def test_presets_run(name: str, device: torch.device, capsys: pytest.CaptureFixture[str]) -> None:
    run(name, device, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", GIANTS)
def test_giants_run_on_cuda(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device present; test_manifests.py builds it on the meta device")
    torch.cuda.reset_peak_memory_stats()
    run(name, torch.device("cuda"), capsys)
