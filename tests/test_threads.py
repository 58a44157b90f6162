"""Threads share a segmenter: its models keep state during a pass, and get one image at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moduseg import backbones, proposers
from moduseg.api import Segmenter
from moduseg.bank.store import Bank
from moduseg.config import compose
from tests.support import tiny_models
from tests.support.devices import CPU
from tests.support.tiny_vit import TINY

THREADS = 4
SIZES = ((48, 64), (40, 40), (56, 32), (64, 48))
OPEN = {"points_per_side": 2, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 0.9}
SUPERPIXELS = {"name": "superpixels"}
VIT = {"name": "timm", "model": "vit_tiny_patch16_224", "model_kwargs": TINY, "weights": "random", "seed": 3}
PACKAGED = {"name": "sam", "engine": "packaged", "checkpoint": "random", **OPEN}


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def make_segmenter(proposer: dict[str, Any], backbone: dict[str, Any]) -> Segmenter:
    """Return a segmenter whose models are built when they are first used."""
    rng = np.random.default_rng(0)
    model = backbones.build(backbone, CPU)
    dim = backbones.build(backbone, CPU).dim
    bank = Bank(
        torch.from_numpy(rng.normal(size=(12, dim)).astype(np.float32)),
        torch.arange(12) % 3,
        torch.arange(12),
        torch.full((12,), 50),
        tuple(f"image-{i}" for i in range(12)),
        ("background", "disc", "square"),
        {"backbone_digest": model.digest},
    )
    cfg = compose(["retrieval.min_area=1", "retrieval.top_k=3", "bank.outliers.enabled=false"])
    return Segmenter(bank, proposers.build(proposer, CPU), model, cfg, CPU)


def describe(segmenter: Segmenter, image: np.ndarray) -> tuple[bytes, ...]:
    """Return the bytes of what a segmenter says of an image."""
    observation = segmenter.observe(image)
    prediction = segmenter.label(observation)  # what `predict` does
    tensors = (observation.proposals.masks, observation.pooled, prediction.labels, prediction.scores)
    return (prediction.label_map.tobytes(), *(tensor.numpy().tobytes() for tensor in tensors))


@pytest.mark.parametrize(
    ("proposer", "backbone"),
    [
        pytest.param(PACKAGED, VIT, id="packaged SAM"),
        pytest.param({**PACKAGED, "engine": "grid"}, VIT, id="grid SAM"),
        pytest.param("sam_hq", VIT, id="hooks of SAM-HQ"),
        pytest.param(SUPERPIXELS, {**VIT, "antialias": False}, id="resampled positions"),
        pytest.param(SUPERPIXELS, {**VIT, "facet": "qk"}, id="hooks of queries and keys"),
    ],
)
def test_four_threads_get_what_one_gets(
    proposer: dict[str, Any] | str, backbone: dict[str, Any], tmp_path: Path, rng: np.random.Generator
) -> None:
    if isinstance(proposer, str):
        folder = tiny_models.save(tiny_models.build_sam(proposer), tmp_path)
        proposer = {"name": "sam_transformers", "weights": folder, **OPEN}
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    alone = make_segmenter(proposer, backbone)
    expected = [describe(alone, image) for image in images]
    shared = make_segmenter(proposer, backbone)
    segmenters = [shared, shared, shared.with_bank(shared.bank), shared.with_bank(shared.bank)]

    def work(thread: int) -> Sequence[tuple[bytes, ...]]:
        return [describe(segmenters[thread], image) for image in images[thread:] + images[:thread]]

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(work, range(THREADS)))
    for thread, answers in enumerate(results):
        assert list(answers) == expected[thread:] + expected[:thread]
