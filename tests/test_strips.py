"""Pictures of a few pixels by thousands cost no more than twice the memory of ordinary ones, and end no run."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from moduseg.backbones.upsample import upsample
from moduseg.bank.aggregation import aggregate, proposal_coverage
from moduseg.config import compose
from moduseg.errors import DataError
from moduseg.files import read_json
from moduseg.pipeline.workspace import Workspace
from moduseg.proposers.superpixels import SuperpixelProposer
from moduseg.stages.infer import Infer
from moduseg.structures import Proposals, Sample
from tests.support.odd_folders import write_picture

SQUARE, STRIPS = (480, 480), ((40, 5760), (5760, 40), (20, 11_520))
"""Pictures of equal area, `(height, width)`."""
PEAK = Path("/proc/self/clear_refs")
SLACK = 8.0
"""MB by which an allocator may be off."""

BACKBONES = {
    "timm": ["backbone=miniature_random", "backbone.short_side=96"],
    "CNN": ["backbone=mobilenetv2", "backbone.weights=random", "backbone.short_side=224"],
    "CLIP": ["backbone=clip_miniature", "backbone.short_side=96"],
}
PROPOSERS = {
    "superpixels": ["proposer=superpixels"],
    "SAM": ["proposer=sam_miniature", "proposer.engine=grid", "proposer.points_per_side=4"],
}


def draw(size: tuple[int, int]) -> np.ndarray:
    """Return a picture of squares of even colours, `[H, W, 3]` uint8."""
    rows, columns = np.ogrid[: size[0], : size[1]]
    tile = rows // 17 * 7 + columns // 17
    return np.stack([tile * step % 256 for step in (37, 59, 91)], 2).astype(np.uint8)


def measure_peak(action: Callable[[], object]) -> float:
    """Return the MB that an action takes beyond what the process has, at its highest.

    Other threads of the process and blocks that the allocator has not given back only add to it, so that the lowest
    of three runs is the nearest to what the action needs.
    """
    return min(_measure_peak_once(action) for _ in range(3))


def _measure_peak_once(action: Callable[[], object]) -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    PEAK.write_text("5")

    def read(name: str) -> float:
        return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(name)) / 1024

    before = read("VmRSS")
    action()
    return read("VmHWM") - before


def is_measurable() -> bool:
    """Return whether the peak can be set back, which Linux allows."""
    try:
        PEAK.write_text("5")
    except OSError:
        return False
    return hasattr(ctypes.CDLL(None), "malloc_trim")


def _check(run: Callable[[tuple[int, int]], object]) -> None:
    run((40, 48))  # loads the model
    ordinary = measure_peak(partial(run, SQUARE))
    peaks = [measure_peak(partial(run, size)) for size in STRIPS]
    assert max(peaks) <= 2 * ordinary + SLACK, (ordinary, peaks)


@pytest.mark.skipif(not is_measurable(), reason="peaks of memory are of Linux and its C library")
@pytest.mark.parametrize("options", [pytest.param(value, id=key) for key, value in BACKBONES.items()])
def test_tokens_of_a_strip(options: list[str], tmp_path: Path) -> None:
    work = Workspace(compose([*options, "runtime.device=cpu", f"runtime.outputs={tmp_path}"]))

    def run(size: tuple[int, int]) -> None:
        tokens = work.backbone.tokens([draw(size)])[0]
        assert upsample(tokens.tokens[:, :, :4].permute(2, 0, 1), tokens).shape == (4, *size)
        rows, columns = torch.arange(size[0])[:, None] * 4 // size[0], torch.arange(size[1]) * 4 // size[1]
        masks = (rows * 4 + columns) == torch.arange(16)[:, None, None]
        pooled = aggregate(tokens.tokens, proposal_coverage(Proposals(masks), tokens))
        assert pooled.isfinite().all()
        assert (pooled != 0).any(1).all()

    _check(run)


@pytest.mark.skipif(not is_measurable(), reason="peaks of memory are of Linux and its C library")
@pytest.mark.parametrize("options", [pytest.param(value, id=key) for key, value in PROPOSERS.items()])
def test_proposals_of_a_strip(options: list[str], tmp_path: Path) -> None:
    work = Workspace(compose([*options, "runtime.device=cpu", f"runtime.outputs={tmp_path}"]))

    def run(size: tuple[int, int]) -> None:
        if max(size) > 10_000 and not isinstance(work.proposer, SuperpixelProposer):
            with pytest.raises(DataError, match="are too thin for SAM's 128 pixel input"):
                work.proposer.propose(Sample("a", draw(size)))
            return
        assert work.proposer.propose(Sample("a", draw(size))).masks.shape[1:] == size

    _check(run)


def test_strips_end_no_run(tmp_path: Path) -> None:
    sizes = [(48, 64), (40, 2000), (3000, 4), (1, 5000), (60, 50)]
    rows = ["image,labels"]
    for number, size in enumerate(sizes):
        write_picture(tmp_path / "own" / "images" / f"{number}.png", draw(size))
        labels = np.zeros(size, np.uint8)
        labels[size[0] // 2 :, size[1] // 2 :] = 1
        write_picture(tmp_path / "own" / "masks" / f"{number}.png", labels)
        rows.append(f"{number}.png,disc")
    (tmp_path / "own" / "labels.csv").write_text("\n".join(rows))
    (tmp_path / "own" / "classes.txt").write_text("background\ndisc")
    folder = Infer.run(compose([
        "dataset=folder", f"dataset.root={tmp_path}/own", f"runtime.outputs={tmp_path}", "runtime.device=cpu",
        "proposer=superpixels", "backbone=miniature_random", "backbone.short_side=48", "pseudo_masks=ground_truth",
        "retrieval.top_k=1", "evaluation.bootstrap=0",
    ]))  # fmt: skip
    assert read_json(folder / "manifest.json")["failures"] == 0
    assert (folder / "report" / "index.html").is_file()
