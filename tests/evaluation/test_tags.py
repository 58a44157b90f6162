"""Quality of tags, against figures counted by hand."""

from __future__ import annotations

import pytest
import torch

from moduseg.evaluation.tags import score_tags

TRUE = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize(("predicted", "precision", "recall"), [
    pytest.param([[1, 0, 1], [0, 0, 1], [1, 0, 0]], 100.0, 100.0, id="right"),
    pytest.param([[1, 1, 0], [0, 0, 1], [0, 1, 0]], 50.0, 50.0, id="half of them"),
    pytest.param([[0, 0, 0]] * 3, 0.0, 0.0, id="none"),
])  # fmt: skip
def test_tags_are_counted_over_all_images(predicted: list[list[int]], precision: float, recall: float) -> None:
    quality = score_tags(TRUE, torch.tensor(predicted, dtype=torch.bool))
    assert (quality.precision, quality.recall, quality.mean_average_precision) == (precision, recall, None)
    assert quality.f1 == precision  # both are equal in every row


def test_average_precision_is_over_classes_that_occur() -> None:
    # Class 0 is ranked first and third: (1 + 2/3) / 2. Class 2 is ranked second and third: (1/2 + 2/3) / 2.
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.2, 0.1], [0.4, 0.3, 0.3]])
    expected = 100 * ((1 + 2 / 3) / 2 + (1 / 2 + 2 / 3) / 2) / 2
    assert score_tags(TRUE, TRUE, scores).mean_average_precision == pytest.approx(expected)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"tags: got \(3, 2\) for \(3, 3\)"):
        score_tags(TRUE, TRUE[:, :2])
