"""Features of regions by hand and beside loops over pixels; the network that ranks them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moduseg.errors import ArtefactError
from moduseg.masks.region_tree import build_graph, merge_regions
from moduseg.proposers.contours import RANKING, RULES
from moduseg.proposers.region_features import MAPS, NAMES, RegionRanker, describe_nodes, make_leaf_table
from tests.masks.test_region_tree import draw_graph, list_leaves_plainly


def describe(labels: np.ndarray, colours: np.ndarray, maps: np.ndarray) -> dict[str, np.ndarray]:
    """Return the features of the nodes of the first tree, by name."""
    graph = build_graph(labels, colours, maps)
    features = describe_nodes(make_leaf_table(graph, colours), merge_regions(graph, RULES[0]))
    return dict(zip(NAMES, features.T, strict=True))


def test_features_of_a_rectangle_by_hand() -> None:
    """A red rectangle of 4 x 6 pixels on a black ground of 10 x 10, touching the left side of the image."""
    labels = np.zeros((10, 10), int)
    labels[2:6, :6] = 1
    colours = np.zeros((10, 10, 3), np.float32)
    colours[2:6, :6] = (0.5, 0.3, 0.4)
    maps = np.zeros((10, 10, len(MAPS)), np.float32)
    maps[2:6, 5, MAPS.index("fused")] = 0.8
    features = {name: column[1] for name, column in describe(labels, colours, maps).items()}
    # 16 sides touch the ground (6 above, 6 below, 4 at the right), 4 the frame; of these, the right column is strong,
    # with its ends above and below.
    expected = {
        "area": np.log(0.24), "length": np.log(1.6), "roundness": np.log(400 / 24), "fill": 1.0, "width": 0.6,
        "height": 0.4, "shape": np.log(1.5), "frame": 0.2, "top": 0.2, "bottom": 0.6, "middle": 0.2,
        "fused": 6 * 0.8 / 16, "gradient": 0.0, "inside_fused": 0.0, "spread": 0.0, "leaves": 0.0,
        "sibling_size": np.log(76 / 24), "sibling_colour": np.sqrt(0.5), "image_colour": 0.76 * np.sqrt(0.5),
        "chroma": 0.5, "lightness": 0.5,
    }  # fmt: skip
    for name, value in expected.items():
        assert features[name] == pytest.approx(value, abs=1e-6), name


def test_features_are_those_of_loops_over_pixels() -> None:
    rng = np.random.default_rng(0)
    labels = draw_graph(1).labels
    colours, maps = rng.random((*labels.shape, 3)), rng.random((*labels.shape, len(MAPS)))
    graph = build_graph(labels, colours, maps)
    tree = merge_regions(graph, RULES[0])
    features = describe(labels, colours, maps)
    height, width = labels.shape
    sides = [((i, j), (i + 1, j)) for i in range(height - 1) for j in range(width)]
    sides += [((i, j), (i, j + 1)) for i in range(height) for j in range(width - 1)]
    for node, leaves in enumerate(list_leaves_plainly(tree)):
        mask = np.isin(labels, list(leaves))
        around, inside = [], []
        for here, there in sides:
            strength = np.maximum(maps[here], maps[there])[MAPS.index("fused")]
            if mask[here] != mask[there]:
                around.append(strength)
            elif mask[here] and labels[here] != labels[there]:
                inside.append(strength)
        assert features["area"][node] == pytest.approx(np.log(mask.mean()))
        assert features["fused"][node] == pytest.approx(np.mean(around) if around else 0, abs=1e-9)
        assert features["inside_fused"][node] == pytest.approx(np.mean(inside) if inside else 0, abs=1e-9)
        assert features["spread"][node] == pytest.approx(np.sqrt(colours[mask].var(0).sum()), abs=1e-6)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert features["top"][node] == rows[0] / mask.shape[0]
        assert features["width"][node] == (columns[-1] + 1 - columns[0]) / mask.shape[1]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1)])
def test_features_of_tiny_images_are_numbers(size: tuple[int, int]) -> None:
    labels = np.arange(size[0] * size[1]).reshape(size) // 3
    features = describe(labels, np.ones((*size, 3)), np.ones((*size, len(MAPS))))
    assert np.isfinite(np.stack(list(features.values()))).all()


def test_score_is_that_of_the_network(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    count = len(NAMES)
    tensors = {
        "mean": rng.random(count), "scale": rng.random(count) + 0.5,
        "weight_0": rng.normal(size=(4, count)), "bias_0": rng.normal(size=4),
        "weight_1": rng.normal(size=(1, 4)), "bias_1": rng.normal(size=1),
    }  # fmt: skip
    save_file({name: torch.from_numpy(array) for name, array in tensors.items()}, tmp_path / "a.safetensors")
    features = rng.normal(size=(7, count))
    features[0, 0] = 1e9  # an outlier counts as five deviations
    inputs = np.minimum((features - tensors["mean"]) / tensors["scale"], 5)
    hidden = np.maximum(inputs @ tensors["weight_0"].T + tensors["bias_0"], 0)
    logits = (hidden @ tensors["weight_1"].T + tensors["bias_1"])[:, 0]
    np.testing.assert_allclose(
        RegionRanker(tmp_path / "a.safetensors").score(features), 1 / (1 + np.exp(-logits)), atol=1e-9
    )


def test_a_ranking_of_other_features_is_refused(tmp_path: Path) -> None:
    save_file({"mean": torch.zeros(3), "scale": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(
        ArtefactError, match=f"got a ranking by 3 features, expected {len(NAMES)}; install the package again"
    ):
        RegionRanker(tmp_path / "a.safetensors").score(np.zeros((1, len(NAMES))))


def test_the_shipped_ranking_prefers_what_stands_out() -> None:
    """A disc whose outline is a contour all around, against a piece of ground without any."""
    y, x = np.mgrid[:90, :120]
    disc = np.hypot(y - 45, x - 60) < 25
    labels = np.where(disc, 1, np.where(x < 20, 2, 0))
    colours = np.where(disc[..., None], (0.6, 0.4, 0.3), (0.4, 0.0, 0.0)).astype(np.float32)
    maps = np.zeros((90, 120, len(MAPS)), np.float32)
    maps[np.abs(np.hypot(y - 45, x - 60) - 25) < 1.5] = 0.9
    graph = build_graph(labels, colours, maps)
    table = make_leaf_table(graph, colours)
    features = describe_nodes(table, merge_regions(graph, RULES[0]))
    scores = RegionRanker(RANKING).score(features)
    assert scores.shape == (5,)
    assert scores[1] > 2 * scores[2]
