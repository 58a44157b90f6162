"""Our mask generation against `SamAutomaticMaskGenerator`: the same masks, on trained and on random weights."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.models import match_masks
from moduseg import datasets
from moduseg.config import compose
from moduseg.devices import Device
from moduseg.errors import DataError
from moduseg.proposers import build, mask_generation, mask_upsampling
from moduseg.proposers.grid_options import GridOptions
from moduseg.proposers.mask_generation import Decoded, Promptable, generate, generate_batch
from moduseg.proposers.mask_upsampling import Embedded
from moduseg.proposers.sam import SamOptions, SamProposer
from moduseg.proposers.sam_decoder import PackagedSam
from moduseg.structures import Proposals, Sample
from tests.proposers.contract import CPU, ProposerContract, sample
from tests.proposers.test_sam import OPEN

MINIATURE = {k: v for k, v in compose(["proposer=sam_miniature"]).proposer.items() if k != "name"}


class TestContract(ProposerContract):
    def config(self, folder: Path, samples: Sequence[Sample]) -> dict[str, object]:
        return {"name": "sam", "engine": "grid", **OPEN}

    def test_finds_what_is_plain(self, tmp_path: Path) -> None:
        """With the weights of the miniature, whose world has objects of such colours."""
        picture = sample(96, 128)
        masks = build({"name": "sam", "engine": "grid", **MINIATURE}, CPU).propose(picture).masks.numpy()
        truth = picture.semantic == 1
        assert max((m & truth).sum() / (m | truth).sum() for m in masks) > 0.8


def both(picture: Sample, options: dict[str, Any], device: torch.device) -> tuple[Proposals, Proposals]:
    """Proposals of our engine and of the packaged one."""
    ours, theirs = (
        SamProposer(SamOptions(**{**options, "engine": engine}), Device(device)).propose(picture)
        for engine in ("grid", "packaged")
    )
    return ours, theirs


def agree(ours: Proposals, theirs: Proposals) -> None:
    assert len(theirs) > 1
    share, extra = match_masks(ours, theirs)
    assert share >= 0.98
    assert extra <= 0.02
    if len(ours) == len(theirs):
        torch.testing.assert_close(ours.predicted_iou, theirs.predicted_iou, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.stability_score, theirs.stability_score, rtol=0.02, atol=0.01)


@lru_cache
def scenes(count: int) -> list[Sample]:
    dataset = datasets.build(compose([f"dataset.val={count}", "dataset.train=1"]).dataset, "val")
    return [dataset.load(i) for i in dataset.ids]


def test_masks_of_the_miniature(device: torch.device) -> None:
    """The shipped weights and settings, on scenes of three shapes."""
    pictures = scenes(3)
    assert len({picture.size for picture in pictures}) > 1
    for picture in pictures:
        agree(*both(picture, MINIATURE, device))


@pytest.mark.parametrize(
    "options",
    [
        {"stability_score_thresh": 0.8, "pred_iou_thresh": 0.0},
        {"stability_score_thresh": 0.0, "pred_iou_thresh": 0.8, "points_per_batch": 7},
        {"stability_score_offset": 0.3, "stability_score_thresh": 0.9},
        {"box_nms_thresh": 0.5},
        {"crop_n_layers": 1, "crop_n_points_downscale_factor": 2},
        {"crop_n_layers": 1, "crop_overlap_ratio": 0.1, "crop_nms_thresh": 0.6, "points_per_side": 6},
        {"min_mask_region_area": 40},
        {"crop_n_layers": 1, "min_mask_region_area": 30, "points_per_side": 6},
    ],
    ids=lambda options: ",".join(options),
)
@pytest.mark.parametrize("times", [1, 2])
def test_every_filter_and_crop(device: torch.device, options: dict[str, Any], times: int) -> None:
    """On a scene as it is and at twice its size, larger than the model's input."""
    (picture,) = scenes(1)
    picture = Sample("a", np.kron(picture.image, np.ones((times, times, 1), np.uint8)))
    agree(*both(picture, {**MINIATURE, "points_per_side": 8, **options}, device))


@pytest.mark.parametrize("options", [{}, {"stability_score_thresh": 0.5, "stability_score_offset": 0.002}])
@pytest.mark.parametrize("size", [(70, 100), (150, 90)])
def test_masks_of_random_weights(device: torch.device, options: dict[str, Any], size: tuple[int, int]) -> None:
    """Images smaller and larger than the input, upright and lying."""
    agree(*both(sample(*size), {**OPEN, **options}, device))


def test_filter_by_predicted_iou(device: torch.device) -> None:
    """At the median of what is predicted, half of the masks are never decoded."""
    picture = sample(80, 60)
    threshold = SamProposer(SamOptions(**OPEN), Device(device)).propose(picture).predicted_iou.median().item() + 1e-4
    ours, theirs = both(picture, {**OPEN, "pred_iou_thresh": threshold}, device)
    agree(ours, theirs)
    assert len(ours) < 27


@pytest.mark.parametrize("layers", [0, 1])
def test_nothing_passes(layers: int) -> None:
    proposals = SamProposer(
        SamOptions(
            **{**OPEN, "engine": "grid", "pred_iou_thresh": 1.0, "crop_n_layers": layers, "min_mask_region_area": 5}
        ),
        CPU,
    ).propose(sample(40, 56))
    assert proposals.masks.shape == (0, 40, 56)
    assert proposals.predicted_iou.shape == (0,)


def test_filters_run_while_the_model_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, the next points are decoded before the last ones' masks are filtered; the result is the same."""
    picture = scenes(1)[0]
    options = {**MINIATURE, "points_per_batch": 49}
    expected = SamProposer(SamOptions(**options), CPU).propose(picture)
    filtered, decoded = Event(), 0
    plain, model = mask_generation._Filters.prefilter, PackagedSam.decode

    def slow(*arguments: Any) -> Any:
        assert filtered.wait(60)
        return plain(*arguments)

    def counted(*arguments: Any) -> Decoded:
        nonlocal decoded
        decoded += 1
        if decoded == 3:
            filtered.set()  # had the filter been waited for, this would never be reached
        return model(*arguments)

    monkeypatch.setattr(mask_generation._Filters, "prefilter", slow)
    monkeypatch.setattr(PackagedSam, "decode", counted)
    found = SamProposer(SamOptions(**options), CPU).propose(picture)
    assert decoded == 4
    assert torch.equal(found.masks, expected.masks)
    assert torch.equal(found.predicted_iou, expected.predicted_iou)


def test_an_error_of_a_filter_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error arrives at the caller, whichever image it was, and no thread is left."""

    def broken(*_: Any) -> None:
        raise RuntimeError("no memory for boxes")

    monkeypatch.setattr(mask_upsampling, "measure_boxes", broken)
    for count in (1, 3):
        with pytest.raises(RuntimeError, match="no memory for boxes"):
            SamProposer(SamOptions(**MINIATURE), CPU).propose_batch(scenes(count))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("filter")]


def test_a_line_of_pixels_is_too_thin() -> None:
    with pytest.raises(DataError, match=r"folder/a: 1 x 400 pixels are too thin for SAM's 128"):
        SamProposer(SamOptions(**OPEN, engine="grid"), CPU).propose(sample(1, 400))


def test_lower_precision_is_for_the_encoder_only(device: torch.device) -> None:
    exact, rough = (
        SamProposer(SamOptions(**OPEN, engine="grid"), Device(device, precision)).propose(sample(48, 64))
        for precision in ("float32", "bfloat16")
    )
    assert rough.predicted_iou.dtype == torch.float32
    assert not torch.equal(rough.predicted_iou, exact.predicted_iou)
    assert rough.predicted_iou.max().item() == pytest.approx(exact.predicted_iou.max().item(), abs=0.05)


@pytest.mark.parametrize(("layers", "batches"), [(0, [2, 1]), (1, [2] * 7 + [1])])
def test_images_and_crops_embedded_together(
    layers: int, batches: list[int], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images differ in size and batches do not divide their number; with crops, images share batches."""
    pictures = [sample(48, 64), sample(70, 40), *scenes(1)]
    options = {**MINIATURE, "points_per_side": 6, "crop_n_layers": layers, "engine": "grid"}
    seen: list[int] = []
    embed_batch = PackagedSam.embed_batch

    def watched(model: PackagedSam, images: Sequence[np.ndarray]) -> list[Embedded]:
        seen.append(len(images))
        return embed_batch(model, images)

    alone = [SamProposer(SamOptions(**options), Device(device)).propose(picture) for picture in pictures]
    monkeypatch.setattr(PackagedSam, "embed_batch", watched)
    together = SamProposer(SamOptions(**options, images_per_batch=2), Device(device))
    found = together.propose_batch(pictures)
    assert seen == batches
    assert together.propose_batch([]) == []
    for one, ours in zip(alone, found, strict=True):
        assert ours.masks.shape == one.masks.shape
        torch.testing.assert_close(ours.predicted_iou, one.predicted_iou, rtol=1e-4, atol=1e-5)
        assert (ours.masks != one.masks).float().mean() < 1e-3


def test_compiled_encoder(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as `torch.compile` traces it, run without a compiler: the same masks."""
    traced = []

    def run(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        traced.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=run))
    picture = sample(48, 64)
    plain, compiled = (
        SamProposer(SamOptions(**OPEN, engine="grid", compile=value), Device(device)).propose(picture)
        for value in (False, True)
    )
    agree(compiled, plain)
    assert traced


@pytest.mark.slow
def test_compiled_encoder_by_the_compiler(device: torch.device) -> None:
    picture = scenes(1)[0]
    compiled = SamProposer(SamOptions(**{**MINIATURE, "engine": "grid", "compile": True}), Device(device))
    assert compiled.promptable._sam.image_encoder._compiled_call_impl is not None
    agree(compiled.propose(picture), SamProposer(SamOptions(**MINIATURE), Device(device)).propose(picture))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"engine": "grid", "images_per_batch": 0}, "images_per_batch: got 0, expected 1 to 1024"),
        ({"images_per_batch": 2}, "engine: got 'packaged' with images_per_batch=2"),
        ({"compile": True}, "compile=True, skip_certain=None, which are of engine=grid"),
        ({"skip_certain": 0.9}, "skip_certain=0.9, which are of engine=grid"),
        (
            {"engine": "grid", "skip_certain": 1.5},
            r"skip_certain: got 1.5, expected null or a predicted IoU in \[0, 1\]",
        ),
    ],
)
def test_options_of_the_encoder(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SamProposer(SamOptions(**OPEN, **options), CPU)


# Each step against the code it replaces


@pytest.mark.parametrize("size", [(70, 100), (100, 70), (256, 256)])
def test_model_and_enlarging(device: torch.device, size: tuple[int, int]) -> None:
    """Embedding, predicted IoUs and masks at full size, against `SamPredictor` on the same random weights."""
    picture = sample(*size).image
    predictor = SamProposer(SamOptions(**OPEN), Device(device)).generator.predictor
    model = SamProposer(SamOptions(**OPEN, engine="grid"), Device(device)).promptable
    points = np.random.default_rng(0).random((40, 2)) * [size[1], size[0]]
    with torch.no_grad():
        predictor.set_image(picture)
        coordinates = torch.as_tensor(predictor.transform.apply_coords(points, size), device=device).float()
        labels = torch.ones(len(points), 1, device=device)
        masks, scores, _ = predictor.predict_torch(coordinates[:, None], labels, return_logits=True)
        embedded = model.embed(picture)
        decoded = model.decode(embedded, coordinates, 0.0)
        enlarged = torch.cat(list(mask_upsampling.enlarge(decoded.logits, embedded)))
    assert relative(embedded.features, predictor.features) < 1e-5
    assert relative(decoded.predicted_iou, scores.flatten()) < 1e-5
    assert relative(enlarged, masks.flatten(0, 1)) < 1e-4


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize(
    ("padded", "inner", "target"), [(128, 96, 375), (128, 128, 50), (1024, 768, 375), (None, 7, 90)]
)
def test_one_matrix_is_both_steps(padded: int | None, inner: int, target: int, device: torch.device) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 64, 64, device=device)
    large = logits[None]
    if padded is not None:
        large = F.interpolate(large, (padded, padded), mode="bilinear", align_corners=False)[..., :inner, :inner]
    expected = F.interpolate(large, (target, target), mode="bilinear", align_corners=False)[0]
    matrix = mask_upsampling.make_resize_matrix(64, padded, inner, target, device)
    torch.testing.assert_close(matrix @ logits @ matrix.T, expected, rtol=1e-4, atol=1e-5)


def blobs(count: int, device: torch.device) -> Tensor:
    """`[count, 64, 64]` logits of discs of all sizes and steepnesses."""
    torch.manual_seed(1)
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    centre, radius = torch.rand(count, 2, 1, 1) * 64, torch.rand(count, 1, 1) * 25
    steep = torch.rand(count, 1, 1) * 4 + 0.1
    distance = ((rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2).sqrt()
    return ((radius - distance) * steep + torch.randn(count, 64, 64) * 0.2).to(device)


@pytest.mark.parametrize("shape", [(0, 5, 5), (3, 1, 1), (2, 31, 33), (2, 32, 32), (4, 57, 64), (2, 300, 1000)])
def test_counts_above_a_level(shape: tuple[int, int, int], device: torch.device) -> None:
    """Logits have any size, are cut out of a larger tensor, and may all be above the level."""
    torch.manual_seed(0)
    logits = torch.randn(shape[0], shape[1], shape[2] + 3, device=device)[..., :-3]
    for level in (-10.0, 0.5):
        assert torch.equal(mask_upsampling.count_above(logits, level), (logits > level).sum((1, 2)))
    logits[:, 0, 0] = 0.5
    assert torch.equal(mask_upsampling.count_above(logits, 0.5), (logits > 0.5).sum((1, 2)))


SHAPES = {
    "whole input": Embedded(None, (90, 128), (90, 128), None),
    "padded": Embedded(None, (90, 128), (90, 128), (128, 128)),
    "padded, two steps": Embedded(None, (90, 128), (180, 256), (256, 256)),
}


@pytest.mark.parametrize("embedded", SHAPES.values(), ids=SHAPES)
def test_prefilter_loses_no_mask(embedded: Embedded) -> None:
    """Whatever is stable at full size passes at the decoder's."""
    logits = blobs(400, torch.device("cpu"))
    for threshold in (0.6, 0.9, 0.95):
        options = GridOptions(stability_score_thresh=threshold)
        exact = mask_upsampling.measure_stability(logits, embedded, 0.0, options) >= threshold
        hopeful = mask_upsampling.find_possibly_stable(logits, embedded, 0.0, options)
        assert set(exact.nonzero()[:, 0].tolist()) <= set(hopeful.tolist())
        assert 0 < exact.sum() < len(hopeful) < 400


@pytest.mark.parametrize("embedded", SHAPES.values(), ids=SHAPES)
def test_boxes_are_those_of_the_enlarged_masks(embedded: Embedded, device: torch.device) -> None:
    logits = blobs(60, device)
    logits[7] = -1.0
    chosen = torch.arange(0, 60, 2, device=device) + 1
    boxes, filled = mask_upsampling.measure_boxes(logits, chosen, embedded, 0.0)
    masks = torch.cat(list(mask_upsampling.enlarge(logits[chosen], embedded))).cpu() > 0
    assert masks.shape == (30, 90, 128)
    assert torch.equal(filled.cpu(), masks.any(2).any(1))
    assert 0 < filled.sum() < 30
    for mask, box in zip(masks[filled.cpu()], boxes[filled], strict=True):
        rows, columns = mask.nonzero(as_tuple=True)
        assert box.tolist() == [columns.min(), rows.min(), columns.max(), rows.max()]
    assert mask_upsampling.measure_boxes(logits, chosen[:0], embedded, 0.0)[0].shape == (0, 4)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("overlap", [0.3, 0.9])
@pytest.mark.parametrize("rounds", [0, 10])
def test_stability_measured_late_chooses_the_same(
    threshold: float, overlap: float, rounds: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is that of measuring every mask before NMS, with most masks stable, few or none, in both branches."""
    from torchvision.ops import nms

    monkeypatch.setattr(mask_generation, "MAX_UNSTABLE_ROUNDS", rounds)
    embedded = SHAPES["padded"]
    logits = blobs(300, device)
    boxes, filled = mask_upsampling.measure_boxes(logits, torch.arange(300, device=device), embedded, 0.0)
    logits, boxes = logits[filled], boxes[filled].cpu()
    scores = torch.rand(len(logits), generator=torch.Generator().manual_seed(0)).mul(20).round()  # ties
    options = GridOptions(stability_score_thresh=threshold, box_nms_thresh=overlap)
    stability = mask_upsampling.measure_stability(logits, embedded, 0.0, options).cpu()
    (stable,) = (stability >= threshold).nonzero(as_tuple=True)
    expected = stable[nms(boxes[stable], scores[stable], overlap)]
    masks = mask_generation._Masks(logits, scores, boxes, torch.full_like(scores, torch.nan))
    found = mask_generation._Filters(0.0, options).choose_stable(masks, embedded)
    assert torch.equal(found.boxes, boxes[expected])
    assert torch.equal(found.logits.cpu(), logits.cpu()[expected])
    torch.testing.assert_close(found.stability_score, stability[expected])
    assert (len(expected) == 0) == (threshold == 1)


class Squares(Promptable):
    """Each point gives the square of pixels around it, and an empty mask of a higher score."""

    threshold = 2.0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def embed(self, image: np.ndarray) -> Embedded:
        return Embedded(None, (image.shape[0], image.shape[1]), (image.shape[0], image.shape[1]), None)

    def decode(self, embedded: Embedded, points: Tensor, min_iou: float) -> Decoded:
        y, x = torch.meshgrid(*(torch.arange(float(side)) + 0.5 for side in embedded.size), indexing="ij")
        inside = ((x - points[:, 0, None, None]).abs() < 3) & ((y - points[:, 1, None, None]).abs() < 3)
        logits = torch.where(inside, 10.0, -10.0)
        scores = 0.9 - points.sum(1) / 1000
        return Decoded(torch.cat([logits, torch.full_like(logits, -10)]), torch.cat([scores, scores + 0.05]))


def test_points_boxes_and_the_empty_mask_by_hand() -> None:
    options = GridOptions(points_per_side=2, pred_iou_thresh=0.5)
    proposals = generate(Squares(), np.zeros((24, 40, 3), np.uint8), options)
    assert proposals.areas.tolist() == [36] * 4
    assert proposals.predicted_iou.tolist() == pytest.approx([0.9 - s / 1000 for s in (16, 28, 36, 48)])
    assert proposals.masks[0, 3:9, 7:13].all()
    assert (proposals.stability_score == 1).all()


@pytest.mark.parametrize(
    ("skip_certain", "skipped"),
    [
        pytest.param(None, [], id="none"),
        pytest.param(0.96, [], id="no mask is certain"),
        # Only the square of the point (1, 1), which covers the pixels from 0 to 4.
        pytest.param(0.895, [(1, 3), (3, 1), (3, 3)], id="inside one mask"),
        pytest.param(0.5, [p for p in itertools.product((1, 3, 5, 7), repeat=2) if 3 in p or 7 in p], id="all others"),
    ],
)
def test_points_inside_certain_masks_are_skipped(
    skip_certain: float | None, skipped: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, ...]] = []
    decode = Squares.decode

    def watched(model: Squares, embedded: Embedded, points: Tensor, min_iou: float) -> Decoded:
        seen.extend(map(tuple, points.tolist()))
        return decode(model, embedded, points, min_iou)

    monkeypatch.setattr(Squares, "decode", watched)
    options = GridOptions(points_per_side=4, points_per_batch=3, pred_iou_thresh=0.5)
    generate_batch(Squares(), [np.zeros((8, 8, 3), np.uint8)], options, skip_certain=skip_certain)
    assert sorted(seen) == sorted(set(itertools.product((1, 3, 5, 7), repeat=2)) - set(skipped))


def test_masks_that_a_crop_cuts_off_go() -> None:
    """Crops of 100 pixels in an image of 200: no square nearer than 20 pixels to the border of its crop is kept."""
    options = GridOptions(points_per_side=5, crop_n_layers=1, crop_overlap_ratio=0, pred_iou_thresh=0.5)
    proposals = generate(Squares(), np.zeros((200, 200, 3), np.uint8), options)
    corners = [(m.any(1).nonzero()[0].item(), m.any(0).nonzero()[0].item()) for m in proposals.masks]
    whole, crops = (17, 57, 97, 137, 177), (7, 27, 47, 67, 127, 147, 167, 187)
    assert sorted(corners) == sorted([*itertools.product(whole, whole), *itertools.product(crops, crops)])
