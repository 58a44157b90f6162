"""Steps of DiffSeg against plain loops in float64, and on maps whose segments are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moduseg.devices import Device
from moduseg.diffusion.layers import MapRequest, list_layers
from moduseg.diffusion.prompts import Prompt
from moduseg.discovery import build, merging
from moduseg.discovery.diffseg import DiffSegDiscoverer
from moduseg.discovery.merging import (
    aggregate_levels,
    choose_anchors,
    compute_divergences,
    label_pixels,
    merge_maps,
)
from moduseg.errors import ConfigError
from tests.pseudo_masks.contract import sample
from tests.support.devices import CPU
from tests.support.tiny_diffusion import share_model, tiny_diffusion


def stretch_plainly(grid: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return `[s, s]` values at another size: bilinear between centres, borders repeated."""
    result = grid
    for axis, length in enumerate(size):
        position = np.clip((np.arange(length) + 0.5) * grid.shape[axis] / length - 0.5, 0, grid.shape[axis] - 1)
        low = np.floor(position).astype(int)
        high = np.minimum(low + 1, grid.shape[axis] - 1)
        share = (position - low).reshape([-1 if a == axis else 1 for a in range(2)])
        result = np.take(result, low, axis) * (1 - share) + np.take(result, high, axis) * share
    return result


def diverge_plainly(first: np.ndarray, second: np.ndarray) -> float:
    quotient = np.log(first / second)
    return float(((first * quotient).sum() - (second * quotient).sum()) / 2)


def segment_plainly(
    layers: list[np.ndarray], anchors: list[int], tau: float, rounds: int, size: tuple[int, int]
) -> np.ndarray:
    """DiffSeg with every layer's map stored: each is brought up on its own and weighted by its side."""
    side = max(round(len(layer) ** 0.5) for layer in layers)
    merged, total = np.zeros((side * side, side * side)), 0.0
    for layer in layers:
        own = round(len(layer) ** 0.5)
        for cell in range(side * side):
            row = (cell // side) * own // side * own + (cell % side) * own // side
            flat = stretch_plainly(layer[row].reshape(own, own), (side, side)).ravel()
            merged[cell] += own * flat / flat.sum()
        total += own
    merged /= total
    maps = [np.mean([m for m in merged if diverge_plainly(merged[a], m) < tau], axis=0) for a in anchors]
    for _ in range(rounds - 1):
        taken: set[int] = set()
        kept = []
        for index, anchor in enumerate(maps):
            if index in taken:
                continue
            near = [i for i, other in enumerate(maps) if diverge_plainly(anchor, other) < tau]
            taken.update(near)
            kept.append(np.mean([maps[i] for i in near], axis=0))
        maps = kept
    return np.stack([stretch_plainly(m.reshape(side, side), size) for m in maps]).argmax(0)


@pytest.mark.parametrize("quantile", [0.03, 0.08, 0.5])
def test_segments_are_those_of_stored_maps(quantile: float, words: tuple[Path, int, int]) -> None:
    """One pass with running means gives what a plain version makes of the stored maps of every layer."""
    settings = {**tiny_diffusion(words), "name": "diffseg", "grid": 6, "steps": [200]}
    discoverer = build(settings, CPU)
    assert isinstance(discoverer, DiffSegDiscoverer)
    share_model(discoverer._source)
    item, source = sample(name="24-2"), discoverer._source
    latents = source.encode_images([item.image])
    places = [layer for layer in list_layers(source.model.unet, latents.shape[-1]) if layer.kind == "self"]
    requests = [MapRequest(kind="self", places=(layer.place,)) for layer in places]
    attention = source.collect(latents, source.encode_prompts([Prompt("")]).states, requests, steps=[200])
    layers = [each[0].double().numpy() for each in attention.maps]
    sizes = sorted({len(layer) for layer in layers})
    assert sizes == [4, 16, 64, 256]
    # A limit between two divergences, so that rounding does not decide.
    levels = [torch.stack([x[0] for x in attention.maps if x.shape[-1] == size]).mean(0) for size in sizes]
    weights = [float(sum(layer.side for layer in places if layer.side**2 == size)) for size in sizes]
    merged = aggregate_levels(levels, weights)
    values = compute_divergences(merged, merged).flatten().sort().values
    start = int(quantile * len(values))
    gaps = values[start : start + 500].diff()
    tau = float(values[start + int(gaps.argmax())] + gaps.max() / 2)
    expected = segment_plainly(layers, choose_anchors(16, 6).tolist(), tau, 3, item.size)
    changed = build({**settings, "tau": tau}, CPU)
    assert isinstance(changed, DiffSegDiscoverer)
    share_model(changed._source)
    found = changed.find_segments(item, None)  # type: ignore[arg-type]
    assert (found.numpy() == expected).mean() > 0.99
    assert len(np.unique(expected)) > (1 if quantile < 0.5 else 0)


def make_blocks(side: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Cells of the left and of the right half look at their own half alone; return the maps and the halves."""
    halves = (torch.arange(side * side, device=device) % side >= side // 2).long()
    maps = (halves[:, None] == halves).float()
    return maps / maps.sum(1, keepdim=True), halves.view(side, side)


def test_halves_that_look_at_themselves_are_two_segments() -> None:
    maps, halves = make_blocks(8)
    segments = merge_maps(maps, choose_anchors(8, 4), tau=1.0, rounds=3)
    assert len(segments) == 2
    assert torch.equal(label_pixels(segments, (8, 8)), halves)
    assert len(merge_maps(maps, choose_anchors(8, 4), tau=1e6, rounds=3)) == 1
    assert len(merge_maps(maps, choose_anchors(8, 4), tau=0, rounds=3)) == 16


def test_levels_are_weighted_and_brought_up() -> None:
    fine, _ = make_blocks(8)
    coarse, _ = make_blocks(4)
    assert torch.equal(aggregate_levels([fine], [3.0]), fine)
    merged = aggregate_levels([coarse, fine], [4.0, 8.0])
    torch.testing.assert_close(merged.sum(1), torch.ones(64))
    brought_up = aggregate_levels([coarse, fine], [1.0, 0.0])
    torch.testing.assert_close(merged, (4 * brought_up + 8 * fine) / 12)
    # A coarse cell stands for the four it covers.
    assert torch.equal(brought_up[0], brought_up[9])


def test_memory_in_parts_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    coarse, fine = (torch.rand(n, n, generator=generator).softmax(1) for n in (16, 64))
    maps = torch.rand(7, 64, generator=generator)
    whole = aggregate_levels([coarse, fine], [1.0, 2.0]), label_pixels(maps, (9, 13))
    monkeypatch.setattr(merging, "_BLOCK", 200)
    parts = aggregate_levels([coarse, fine], [1.0, 2.0]), label_pixels(maps, (9, 13))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize(("side", "grid", "line"), [
    pytest.param(64, 16, range(1, 62, 4), id="as published"),
    pytest.param(16, 16, range(16), id="every cell"),
    pytest.param(16, 6, [0, 3, 6, 9, 12, 15], id="from border to border"),
    pytest.param(4, 16, range(4), id="no more than there are"),
    pytest.param(5, 1, [2], id="one, in the middle"),
])  # fmt: skip
def test_anchors_lie_on_a_grid(side: int, grid: int, line: list[int]) -> None:
    assert choose_anchors(side, grid).tolist() == [row * side + column for row in line for column in line]


def test_divergences_are_those_of_plain_sums() -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.rand(n, 30, generator=generator).softmax(1) for n in (3, 4))
    expected = [[diverge_plainly(a, b) for b in second.double().numpy()] for a in first.double().numpy()]
    assert compute_divergences(first, second).tolist() == [pytest.approx(row, abs=1e-6) for row in expected]
    with_zeros = torch.eye(3)
    assert compute_divergences(with_zeros, with_zeros).isfinite().all()
    assert compute_divergences(with_zeros, with_zeros).diagonal().max() < 1e-6


def test_more_segments_than_a_label_map_holds_are_refused(words: tuple[Path, int, int]) -> None:
    discoverer = build({**tiny_diffusion(words), "name": "diffseg"}, Device(torch.device("cpu")))
    assert isinstance(discoverer, DiffSegDiscoverer)
    with pytest.raises(
        ConfigError, match=r"discoverer\.tau: got 1\.1, which leaves 256 segments, expected 255 at most"
    ):
        discoverer._label(torch.eye(256), (16, 16))
