"""Steps that contain a model: SAM's proposals beside the packaged generator's, inference beside its backbone."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.common import Row, Setting, Times, interleave, make_unmeasured_row, require_faster, summarise
from moduseg import backbones, datasets
from moduseg.bank.aggregation import aggregate, coverage
from moduseg.config import RetrievalConfig, compose
from moduseg.devices import Device
from moduseg.proposers.sam import SamOptions, SamProposer
from moduseg.retrieval.retriever import Retriever
from moduseg.structures import Proposals, Sample, SearchBank
from tests import reference

BASE = "SamAutomaticMaskGenerator"
CUDA_MASKS = 100


def match_masks(ours: Proposals, theirs: Proposals) -> tuple[float, float]:
    """Return the share of their masks that ours match at IoU 0.98, and the share of ours that match none of theirs."""
    a, b = (proposals.masks.flatten(1).float() for proposals in (ours, theirs))
    shared = a @ b.T
    is_match = shared / (a.sum(1)[:, None] + b.sum(1)[None] - shared) >= 0.98
    return is_match.any(0).float().mean().item(), 1 - is_match.any(1).float().mean().item()


def sam_miniature(setting: Setting) -> list[Row]:
    """Measure SAM on the shipped weights, settings and scenes, both sides on one grid."""
    count = 1 if setting.is_small else 8
    dataset = datasets.build(compose([f"dataset.val={count}", "dataset.train=1"]).dataset, "val")
    scenes = [dataset.load(image_id) for image_id in dataset.ids]
    options = {key: value for key, value in compose(["proposer=sam_miniature"]).proposer.items() if key != "name"}
    if setting.is_small:
        options["points_per_side"] = 4
    device = Device(setting.device)
    packaged, grid = (
        SamProposer(SamOptions(**{**options, "engine": engine}), device) for engine in ("packaged", "grid")
    )
    agreement = [match_masks(grid.propose(scene), packaged.propose(scene)) for scene in scenes]
    matched, extra = (float(np.mean(values)) for values in zip(*agreement, strict=True))
    times = interleave(
        {
            BASE: lambda: [packaged.propose(scene) for scene in scenes],
            "ours": lambda: [grid.propose(scene) for scene in scenes],
        },
        setting.repeats,
        setting.device,
    )
    title = f"SAM proposals, miniature, same grid, {count} scenes"
    row = require_faster(title, 2, times, BASE, "ours", matched=matched, extra=extra)
    text = f"{row.result}; {100 * matched:.1f} % matched, {100 * extra:.1f} % extra"
    reached = bool(row.is_reached) and matched >= 0.98 and extra <= 0.02
    return [Row(title, f"{row.target}, 98 % matched", text, reached, row.details)]


def sam_vit_h(setting: Setting) -> list[Row]:
    """Measure ViT-H with random weights on a grid of 32 x 32: agreement in float32, speed in bfloat16."""
    title, target = "SAM ViT-H proposals, 32x32 grid, bfloat16", f"at least 3x {BASE}, 98 % matched"
    if setting.device.type != "cuda" and not setting.is_small:
        return [make_unmeasured_row(title, target, "no CUDA device")]
    options: dict[str, Any] = {
        "model": "miniature" if setting.is_small else "vit_h",
        "checkpoint": "random",
        "points_per_side": 4 if setting.is_small else 32,
        "points_per_batch": 256,
        "pred_iou_thresh": 0.0,
        "stability_score_thresh": 0.0,
    }
    rng = np.random.default_rng(0)
    image = np.kron(rng.integers(0, 256, (24, 32, 3)), np.ones((16, 16, 1))).astype(np.uint8)[:375, :500]
    sample = Sample("noise", image)
    exact = Device(setting.device)
    scores = SamProposer(SamOptions(**options, engine="grid"), exact).propose(sample).predicted_iou
    # NMS goes from the best score down, so that the best hundred stay whatever is cut off below them.
    options["pred_iou_thresh"] = float(scores[min(CUDA_MASKS, len(scores)) - 1]) - 1e-6
    with _WithoutTf32():
        ours, theirs = (
            SamProposer(SamOptions(**options, engine=engine), exact).propose(sample) for engine in ("grid", "packaged")
        )
    matched, extra = match_masks(ours, theirs)
    bfloat16 = Device(setting.device, "bfloat16")
    packaged, grid = (SamProposer(SamOptions(**options, engine=engine), bfloat16) for engine in ("packaged", "grid"))
    times = interleave(
        {BASE: lambda: packaged.propose(sample), "ours": lambda: grid.propose(sample)}, setting.repeats, setting.device
    )
    row = require_faster(title, 3, times, BASE, "ours", matched=matched, extra=extra, masks=len(theirs))
    text = f"{row.result}; {len(theirs)} masks, {100 * matched:.1f} % matched, {100 * extra:.1f} % extra in float32"
    return [Row(title, target, text, bool(row.is_reached) and matched >= 0.98 and extra <= 0.02, row.details)]


class _WithoutTf32:
    """Context in which float32 products are computed in float32."""

    def __enter__(self) -> None:
        self._before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *exception: object) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self._before


@torch.inference_mode()
def inference(setting: Setting) -> list[Row]:
    """Measure all after the proposer: DINOv2-B with random weights, 60 proposals an image, a bank of 20,000 vectors."""
    title, target = "inference without the proposer, DINOv2-B at 500x375", "backbone at least 50 % of the time"
    if setting.device.type != "cuda" and not setting.is_small:
        return [make_unmeasured_row(title, target, "no CUDA device")]
    name, bank_size = ("miniature_random", 300) if setting.is_small else ("dinov2_vitb14", 20_000)
    cfg = compose([f"backbone={name}", "backbone.weights=random"])
    backbone = backbones.build(cfg.backbone, Device(setting.device, "float32" if setting.is_small else "bfloat16"))
    rng = np.random.default_rng(0)
    batch, size = cfg.runtime.batch_size, (48, 64) if setting.is_small else (375, 500)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(batch)]
    proposals = Proposals(torch.from_numpy(reference.random_masks(rng, 60, *size)).to(setting.device))
    bank = SearchBank(
        torch.randn(bank_size, backbone.dim, device=setting.device),
        torch.randint(0, 21, (bank_size,), device=setting.device),
        torch.arange(bank_size, device=setting.device),
    )
    retriever = Retriever(bank, RetrievalConfig(top_k=25, min_area=0))
    times = {"backbone": Times(), "all": Times()}
    for round_ in range(setting.repeats + 1):
        start = _now(setting.device)
        maps = backbone.tokens(images)
        between = _now(setting.device)
        for tokens in maps:
            pooled = aggregate(tokens.tokens, coverage(proposals.masks, tokens), normalize=False)
            retriever.predict(proposals, pooled)
        end = _now(setting.device)
        if round_:
            times["backbone"].wall.append(between - start)
            times["all"].wall.append(end - start)
    shares = [a / b for a, b in zip(times["backbone"].wall, times["all"].wall, strict=True)]
    rate = batch / median(times["all"].wall)
    text = f"{rate:.1f} images a second in batches of {batch}, backbone {100 * median(shares):.0f} % of the time"
    details = {"images_per_second": rate, "share_of_backbone": summarise(shares), "batch": batch}
    return [Row(title, target, text, median(shares) >= 0.5, details)]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
