from __future__ import annotations

import numpy as np
import pytest
import torch

from moduseg.evaluation import proposals as module
from moduseg.evaluation.proposals import ProposalQuality, best_ious, find_objects


def _scene() -> np.ndarray:
    semantic = np.zeros((30, 40), dtype=np.uint8)
    semantic[0:10, 0:10] = 2
    semantic[10:20, 10:20] = 2  # touches the first across a corner: one component
    semantic[0:10, 25:37] = 1
    semantic[25:28, 0:3] = 1  # 9 pixels
    semantic[20:30, 30:40] = 255
    return semantic


def test_components_join_across_corners() -> None:
    class_ids, masks = find_objects(_scene(), 100)
    assert class_ids.tolist() == [1, 2]
    assert masks.sum((1, 2)).tolist() == [120, 200]
    assert find_objects(_scene(), 9)[0].tolist() == [1, 1, 2]
    assert find_objects(_scene(), 10)[0].tolist() == [1, 2]


def test_instances_separate_what_touches() -> None:
    semantic, instances = _scene(), np.zeros((30, 40), dtype=np.int32)
    instances[0:10, 0:10] = 4
    instances[10:20, 10:20] = 300
    instances[20:30, 30:40] = 7  # ignored pixels only
    class_ids, masks = find_objects(semantic, 100, instances)
    assert class_ids.tolist() == [2, 2]
    assert masks.sum((1, 2)).tolist() == [100, 100]
    with pytest.raises(ValueError, match="instances: got"):
        find_objects(semantic, 100, instances[:5])


def test_no_object() -> None:
    class_ids, masks = find_objects(np.full((4, 5), 255, dtype=np.uint8))
    assert (class_ids.shape, masks.shape) == ((0,), (0, 4, 5))


def test_best_iou_matches_a_plain_loop(
    device: torch.device, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK", 3)
    objects, offered = rng.random((4, 9, 11)) > 0.6, rng.random((8, 9, 11)) > 0.5
    ignore = rng.random((9, 11)) > 0.8
    for ignored in (None, ignore):
        kept = np.ones((9, 11), bool) if ignored is None else ~ignored
        expected = [max((o & p & kept).sum() / ((o | p) & kept).sum() for p in offered) for o in objects]
        ignore_on_device = None if ignored is None else torch.from_numpy(ignored).to(device)
        best = best_ious(torch.from_numpy(objects).to(device), torch.from_numpy(offered).to(device), ignore_on_device)
        assert best.device.type == device.type
        np.testing.assert_allclose(best.cpu(), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="proposals: got masks"):
        best_ious(torch.zeros(1, 2, 2, dtype=torch.bool), torch.zeros(1, 2, 3, dtype=torch.bool))


def test_recall_over_images(device: torch.device) -> None:
    semantic = _scene()
    half = torch.zeros(2, 30, 40, dtype=torch.bool, device=device)
    half[0, 0:10, 25:31] = True  # exactly half of the object of class 1
    half[1, 0:10, 0:9] = True  # 90 of 200
    quality = ProposalQuality()
    np.testing.assert_allclose(quality.update(semantic, half).cpu(), [0.5, 0.45])
    assert quality.update(semantic, half[:0]).tolist() == [0, 0]
    quality.update(np.zeros((30, 40), dtype=np.uint8), half)
    summary = quality.summary()
    assert summary["recall"] == 25.0
    assert summary["mean_best_iou"] == pytest.approx(100 * 0.95 / 4)
    assert (summary["objects"], summary["images"]) == (4, 3)
    assert summary["proposals_per_image"] == pytest.approx(4 / 3)
    assert quality.recall_per_class() == {1: 50.0, 2: 0.0}


def test_ignored_pixels_do_not_count(device: torch.device) -> None:
    semantic = np.zeros((10, 20), dtype=np.uint8)
    semantic[:, :10], semantic[:, 10:] = 1, 255
    everything = torch.ones(1, 10, 20, dtype=torch.bool, device=device)
    assert ProposalQuality().update(semantic, everything).tolist() == [1.0]


def test_without_objects_there_is_no_recall() -> None:
    assert ProposalQuality().summary()["recall"] is None
    assert ProposalQuality().recall_per_class() == {}
    with pytest.raises(ValueError, match="threshold, min_area"):
        ProposalQuality(threshold=0)
