"""Matching of segments to classes, against scipy, brute force and counts by hand."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from moduseg.errors import DataError
from moduseg.evaluation.matching import UNMATCHED, MatchingProtocol, SegmentMatcher, match_segments

PROTOCOLS: tuple[MatchingProtocol, ...] = ("image", "set")


@pytest.mark.parametrize("seed", range(8))
def test_most_pixels_are_correct_on_five_by_five(seed: int) -> None:
    counts = np.random.default_rng(seed).integers(1, 1000, (5, 5))
    classes = match_segments(counts)
    best = max(itertools.permutations(range(5)), key=lambda order: counts[range(5), order].sum())
    assert classes.tolist() == list(best)
    assert classes.tolist() == linear_sum_assignment(-counts)[1].tolist()


@pytest.mark.parametrize(("counts", "expected"), [
    pytest.param([[9, 1], [8, 7]], [0, 1], id="the best of the whole, not row by row"),
    pytest.param([[5, 0], [3, 0], [0, 2]], [0, UNMATCHED, 1], id="more segments than classes"),
    pytest.param([[0, 4, 1]], [1], id="fewer segments than classes"),
    pytest.param([[5, 0, 0], [3, 0, 0]], [0, UNMATCHED], id="nothing in common with what is left"),
    pytest.param(np.zeros((0, 3), dtype=np.int64), [], id="no segment"),
])  # fmt: skip
def test_segments_that_stay_unmatched(counts: list[list[int]], expected: list[int]) -> None:
    assert match_segments(np.array(counts)).tolist() == expected


# Two images of 1 x 6 pixels: segments stand for classes the other way round in the second.
TRUTHS = np.array([[[0, 0, 0, 1, 1, 255]], [[0, 0, 1, 1, 1, 1]]])
SEGMENTS = np.array([[[0, 0, 1, 1, 1, 1]], [[1, 1, 1, 0, 0, 0]]])


@pytest.mark.parametrize(("protocol", "iou", "pixel_accuracy"), [
    # Class 0: 2 + 2 of 3 + 3 pixels; class 1: 2 + 3 of 3 + 4. Correct 9 of 11.
    pytest.param("image", [100 * 4 / 6, 100 * 5 / 7], 100 * 9 / 11, id="anew in every image"),
    # Cluster 0 has 2 + 0 pixels of class 0 and 0 + 3 of class 1, cluster 1 has 3 and 3: matched 1 and 0.
    pytest.param("set", [100 * 3 / 8, 100 * 3 / 8], 100 * 6 / 11, id="once for the set"),
])  # fmt: skip
def test_two_images_by_hand(protocol: MatchingProtocol, iou: list[float], pixel_accuracy: float) -> None:
    matcher = SegmentMatcher(2, protocol)
    for truth, segments in zip(TRUTHS, SEGMENTS, strict=True):
        matcher.update(truth, segments)
    scores = matcher.compute()
    assert scores.iou.tolist() == pytest.approx(iou)
    assert (scores.miou, scores.pixel_accuracy) == pytest.approx((sum(iou) / 2, pixel_accuracy))
    assert (scores.protocol, scores.num_images) == (protocol, 2)
    assert scores.to_json() == {
        "matching": protocol,
        "images": 2,
        f"miou_matched_by_{protocol}": scores.miou,
        f"pixel_accuracy_matched_by_{protocol}": scores.pixel_accuracy,
        "iou": scores.iou.tolist(),
    }


def test_unmatched_segments_are_misses_alone() -> None:
    """Half of class 0 is in a segment that no class is left for: it lowers the recall, and no precision."""
    truth, segments = np.array([[0, 0, 0, 0, 1, 1]]), np.array([[7, 7, 7, 9, 5, 5]])
    matcher = SegmentMatcher(2, "image")
    matcher.update(truth, segments)
    assert matcher.compute().iou.tolist() == pytest.approx([75.0, 100.0])


def make_image(rng: np.random.Generator, num_classes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """A truth of blocks with ignored pixels, and segments that follow it in nine of ten pixels."""
    truth = np.repeat(np.repeat(rng.integers(0, num_classes, (4, 5)), 6, 0), 6, 1)
    segments = np.where(rng.random(truth.shape) < 0.1, rng.integers(0, num_classes, truth.shape), truth)
    truth[rng.random(truth.shape) < 0.05] = 255
    return truth, segments


def test_protocols_agree_on_one_image() -> None:
    truth, segments = make_image(np.random.default_rng(0))
    by_protocol = {}
    for protocol in PROTOCOLS:
        matcher = SegmentMatcher(6, protocol)
        matcher.update(truth, segments)
        by_protocol[protocol] = matcher.compute()
    np.testing.assert_array_equal(by_protocol["image"].iou, by_protocol["set"].iou)
    assert by_protocol["image"].miou > 80


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_names_of_segments_do_not_matter(protocol: MatchingProtocol) -> None:
    rng = np.random.default_rng(1)
    plain, renamed = SegmentMatcher(6, protocol), SegmentMatcher(6, protocol)
    order = rng.permutation(6)
    for _ in range(3):
        truth, segments = make_image(rng)
        plain.update(truth, segments)
        renamed.update(truth, (rng.permutation(100) if protocol == "image" else order)[segments])
    np.testing.assert_array_equal(plain.compute().iou, renamed.compute().iou)


def test_a_set_may_have_more_clusters_than_classes() -> None:
    truth, segments = np.array([[0, 0, 0, 1]]), np.array([[0, 0, 2, 1]])
    matcher = SegmentMatcher(2, "set", num_clusters=3)
    matcher.update(truth, segments)
    assert matcher.compute().iou.tolist() == pytest.approx([100 * 2 / 3, 100.0])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_counted_is_no_figure(protocol: MatchingProtocol) -> None:
    matcher = SegmentMatcher(3, protocol)
    matcher.update(np.full((2, 2), 255), np.zeros((2, 2), dtype=np.int64))
    figures = matcher.compute().to_json()
    assert [figures[f"{name}_matched_by_{protocol}"] for name in ("miou", "pixel_accuracy")] == [None, None]
    assert figures["iou"] == [None] * 3


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_memory_does_not_grow_with_the_images(protocol: MatchingProtocol) -> None:
    """A thousand images of 27 classes hold no more than ten do, and a fraction of their label maps."""
    rng = np.random.default_rng(2)
    images = [make_image(rng, 27) for _ in range(10)]
    matcher = SegmentMatcher(27, protocol)
    tracemalloc.start()
    try:
        held = []
        for repeat in range(100):
            for truth, segments in images:
                matcher.update(truth, segments)
            if repeat in (0, 99):
                held.append(tracemalloc.get_traced_memory()[0])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert matcher.compute().num_images == 1000
    assert held[1] - held[0] < 10_000
    assert peak < 1_000_000


@pytest.mark.parametrize(("arguments", "message"), [
    pytest.param((3, "both"), "protocol: got 'both', expected one of image, set", id="protocol"),
    pytest.param((0, "set"), r"num_classes: got 0, expected 1\.\.255", id="classes"),
    pytest.param((3, "set", 0), "num_clusters: got 0, expected 1 or more", id="clusters"),
    pytest.param((3, "image", 4), "num_clusters: got 4, expected none for 'image'", id="clusters of an image"),
])  # fmt: skip
def test_bad_settings(arguments: tuple[int, MatchingProtocol], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentMatcher(*arguments)


@pytest.mark.parametrize(("protocol", "truth", "segments", "message"), [
    pytest.param("set", [[0, 1]], [[0]], r"image 'a': segments are \(1, 1\), expected the truth's \(1, 2\)", id="size"),
    pytest.param("image", [[0, 3]], [[0, 1]], r"image 'a': truth has id 3, expected 0\.\.2", id="truth"),
    pytest.param("set", [[0, 1]], [[0, 3]], r"image 'a': cluster has id 3, expected 0\.\.2", id="cluster"),
    pytest.param("set", [[0, 1]], [[0, -1]], r"image 'a': cluster has id -1, expected 0\.\.2", id="negative"),
])  # fmt: skip
def test_bad_maps(protocol: MatchingProtocol, truth: list[list[int]], segments: list[list[int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SegmentMatcher(3, protocol).update(np.array(truth), np.array(segments), "a")
