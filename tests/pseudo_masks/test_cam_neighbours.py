"""Class activation of regions, corrected by what other images have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moduseg.bank.aggregation import coverage
from moduseg.devices import Device
from moduseg.errors import ArtefactError, ConfigError, DataError
from moduseg.pseudo_masks import build, training_regions
from moduseg.pseudo_masks.cam_neighbours import NeighbourCamGenerator, NeighbourCamOptions
from moduseg.pseudo_masks.labels import make_label_map
from moduseg.pseudo_masks.training_regions import RegionCollector, TrainingRegions
from moduseg.structures import Proposals, Sample
from tests.pseudo_masks.contract import CLASSES, NUM_CLASSES, GeneratorContract, halves, sample
from tests.pseudo_masks.test_cam import CPU, ColourBackbone, world

RIDGE = {"ridge": 0.1}


def quarters(item: Sample) -> Proposals:
    masks = torch.zeros(4, *item.size, dtype=torch.bool)
    width = item.size[1] // 4
    for i in range(4):
        masks[i, :, i * width : (i + 1) * width if i < 3 else None] = True
    return Proposals(masks)


def fitted(device: torch.device = CPU, **arguments: Any) -> NeighbourCamGenerator:
    backbone = ColourBackbone(device)
    generator = NeighbourCamGenerator(NeighbourCamOptions(**RIDGE | arguments), lambda: backbone, CLASSES)
    generator.load_state(generator.fit(world, NUM_CLASSES, quarters))
    return generator


class TestContract(GeneratorContract):
    @pytest.fixture(params=[False, True], ids=["absolute", "relative"])
    def generator(self, device: torch.device, request: pytest.FixtureRequest) -> NeighbourCamGenerator:
        return fitted(device, relative=request.param)

    def test_labels_come_out_right(self, generator: NeighbourCamGenerator) -> None:
        """With proposals that fit the objects."""
        item = sample(name="24-2")
        labels = make_label_map(generator.generate(item, (2, 4), quarters(item)), "constant", 0.5).cpu().numpy()
        assert item.semantic is not None
        assert (labels == item.semantic).mean() > 0.9


def pooled(item: Sample, masks: Tensor, values: Tensor) -> Tensor:
    """Mean of `[h, w, n]` over each mask, by a loop."""
    token_map = ColourBackbone().tokens([item.image])[0]
    rows = []
    for mask in masks:
        weights = coverage(mask[None], token_map)[0]
        rows.append((weights[..., None] * values).sum((0, 1)) / weights.sum())
    return torch.stack(rows)


@pytest.mark.parametrize(("neighbours", "others", "weight"), [(8, 5, 5.0), (1, 1, 2.0), (2, 3, 0.0)])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("is_training_image", [True, False])
def test_equals_plain_loops(
    neighbours: int, others: int, weight: float, relative: bool, is_training_image: bool
) -> None:
    """Of an image of the training set, which is not asked about itself, and of another."""
    generator = NeighbourCamGenerator(
        NeighbourCamOptions(neighbours=neighbours, others=others, weight=weight, relative=relative, **RIDGE),
        ColourBackbone,
        CLASSES,
    )
    state = generator.fit(world, NUM_CLASSES, quarters)
    generator.load_state(state)
    items = world()
    item = items[2] if is_training_image else sample((24, 40), (2, 4), "unseen image")
    assert item.labels == (2, 4)
    proposals = quarters(item)

    tokens = {i.id: ColourBackbone().tokens([i.image])[0].tokens for i in [*items, item]}
    regions = {i.id: pooled(i, quarters(i).masks, tokens[i.id]) for i in items}
    centre = torch.cat(list(regions.values())).mean(0)
    torch.testing.assert_close(state["centre"], centre)
    activation = torch.stack(
        [(tokens[item.id] - state["mean"]) @ state["weights"][label - 1] for label in (2, 4)], dim=-1
    )
    means = pooled(item, proposals.masks, activation).clamp(min=0)
    means = means / means.amax(0)
    centred = pooled(item, proposals.masks, tokens[item.id]) - centre
    answers = torch.zeros(4, 2)
    for p in range(4):
        for column, label in enumerate((2, 4)):
            best_by_class: dict[bool, list[float]] = {True: [], False: []}
            for other in items:
                if other.id != item.id:
                    best = max(
                        float(torch.nn.functional.cosine_similarity(centred[p], r - centre, dim=0))
                        for r in regions[other.id]
                    )
                    best_by_class[label in (other.labels or ())].append(best)
            yes, no = (sorted(best_by_class[has])[::-1] for has in (True, False))
            answers[p, column] = float(np.mean(yes[:neighbours]) - np.mean(no[:others]))
    if relative:
        answers -= answers.sum() / 8
    expected = (means + weight * answers).clamp(min=0)
    expected = expected / expected.amax(0)
    scores = generator.generate(item, (2, 4), proposals).scores
    values = torch.stack([scores[:, mask][:, 0] for mask in proposals.masks])
    torch.testing.assert_close(values, expected, atol=5e-3, rtol=0)  # regions are stored in half precision
    for mask in proposals.masks:
        assert (scores[:, mask] == scores[:, mask][:, :1]).all()


def test_neighbours_tell_apart_what_always_occurs_together() -> None:
    """Every training image of class 2 has class 4 beside it, but one image has class 4 alone."""
    items = [sample((24, 40), (2, 4), "x" * (i + 1)) for i in range(5)] + [
        sample((24, 40), (4,), "four"),
        sample((24, 40), (), "none"),
    ]
    item = items[0]
    proposals = quarters(item)
    shares = []
    for weight in (0.0, 5.0):
        generator = NeighbourCamGenerator(
            NeighbourCamOptions(ridge=4.0, weight=weight, others=1), ColourBackbone, CLASSES
        )
        generator.load_state(generator.fit(lambda: items, NUM_CLASSES, quarters))
        scores = generator.generate(item, (2, 4), proposals).scores
        left, right = (scores[0][mask].mean() for mask in (proposals.masks[0], proposals.masks[3]))
        shares.append(float(right / left))  # of class 2, whose place is the left
    assert shares[1] < shares[0]
    assert shares[1] < 0.5


def test_smaller_proposals_decide_and_the_rest_scores_nothing() -> None:
    item = sample()
    masks = torch.zeros(2, *item.size, dtype=torch.bool)
    masks[0, :, :20] = True
    masks[1, 4:20, :10] = True
    scores = fitted().generate(item, (2, 4), Proposals(masks)).scores
    assert scores[0, 5, 5] > scores[0, 0, 15] > 0
    assert not scores[:, :, 20:].any()
    assert not fitted().generate(item, (2, 4), Proposals(masks[:0])).scores.any()


def test_training_regions_stay_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Part by part gives the same scores, and no more than a part is ever in float32."""
    item, generator = sample(name="24-2"), fitted()
    expected = generator.generate(item, (2, 4), quarters(item)).scores
    rows: list[int] = []
    to_float = Tensor.float

    def record(tensor: Tensor) -> Tensor:
        rows.extend([len(tensor)] * (tensor.dtype == torch.float16))
        return to_float(tensor)

    generator = fitted()
    monkeypatch.setattr(training_regions, "_CHUNK", 10)
    monkeypatch.setattr(Tensor, "float", record)
    scores = generator.generate(item, (2, 4), quarters(item)).scores
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    # Two images of four regions each; all images but the one itself.
    assert max(rows) == 8
    assert sum(rows) == 4 * sum(other.id != item.id for other in world())


def test_fitting_holds_one_image_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(count, 8, generator=generator) * 40 + 30 for count in (5, 0, 300, 2)]
    collector = RegionCollector(torch.full((8,), 25.0))
    for vectors in images:
        collector.add(vectors)
    assert {part.dtype for part in collector._directions} == {torch.float16}
    assert collector.counts.tolist() == [5, 0, 300, 2]
    vectors, centre = collector.centre()
    together = torch.cat(images)
    torch.testing.assert_close(centre, together.mean(0), rtol=1e-5, atol=0)
    expected = torch.nn.functional.normalize(together - together.mean(0), dim=1)
    assert vectors.dtype == torch.float16
    torch.testing.assert_close(vectors.float(), expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("max_images", "labels", "expected"),
    [
        pytest.param(9, (1, 2), [0, 1, 2, 3, 4, 6, 7], id="all with a region but itself"),
        pytest.param(3, (1, 2), [0, 4, 7], id="one of each class and of none"),
        pytest.param(6, (1, 2), [0, 1, 2, 4, 6, 7], id="the smallest ids of each"),
        pytest.param(4, (2,), [0, 4, 6, 7], id="other classes count as none"),
        pytest.param(2, (), [0, 4], id="no label"),
    ],
)
def test_so_many_images_are_compared(max_images: int, labels: tuple[int, ...], expected: list[int]) -> None:
    tags = torch.tensor([[1, 0], [0, 0], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1], [0, 0], [1, 1]], dtype=torch.uint8)
    image = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7])  # the last image has no region
    state = {
        "regions": torch.zeros(9, 3).half(),
        "centre": torch.zeros(3),
        "image": image,
        "ids": torch.tensor([3, 12, 6, 15, 1, 0, 9, 5, 2]),
        "tags": tags,
    }
    chosen = TrainingRegions(state, 2).choose_images(labels, max_images, without_id=0)
    assert chosen.tolist() == expected


@pytest.mark.parametrize("relative", [True, False])
def test_a_class_that_no_other_image_has_keeps_its_activation(relative: bool) -> None:
    items = [sample((24, 40), (2, 4), "own"), sample((24, 40), (4,), "four"), sample((24, 40), (), "none")]
    with_answer, without = (
        NeighbourCamGenerator(NeighbourCamOptions(weight=weight, relative=relative, **RIDGE), ColourBackbone, CLASSES)
        for weight in (5.0, 0.0)
    )
    state = with_answer.fit(lambda: items, NUM_CLASSES, quarters)
    scores = []
    for generator in (with_answer, without):
        generator.load_state(state)
        scores.append(generator.generate(items[0], (2, 4), quarters(items[0])).scores)
    assert torch.equal(scores[0][0], scores[1][0])
    if not relative:  # measured from the mean, the answer leaves class 4 the one region that it had
        assert not torch.equal(scores[0][1], scores[1][1])


def test_bad_input() -> None:
    generator = NeighbourCamGenerator(NeighbourCamOptions(), ColourBackbone, CLASSES)
    with pytest.raises(ArtefactError, match="not fitted"):
        generator.generate(sample(), (2,), halves((24, 40)))
    with pytest.raises(DataError, match="no proposals to fit on"):
        generator.fit(world, NUM_CLASSES)
    with pytest.raises(DataError, match="no region in any training image"):
        generator.fit(world, NUM_CLASSES, lambda item: Proposals(torch.zeros((0, *item.size), dtype=torch.bool)))
    with pytest.raises(DataError, match="no image-level labels"):
        generator.fit(lambda: [Sample("bare", sample().image)], NUM_CLASSES, quarters)
    with pytest.raises(DataError, match="no proposals, which cam_neighbours needs"):
        fitted().generate(sample(), (2,), None)
    with pytest.raises(DataError, match=r"labels \[6\], expected 1..5"):
        fitted().generate(sample(), (6,), quarters(sample()))


def test_bad_state() -> None:
    generator = NeighbourCamGenerator(NeighbourCamOptions(**RIDGE), ColourBackbone, CLASSES)
    state = generator.fit(world, NUM_CLASSES, quarters)
    changes: list[dict[str, Tensor | None]] = [
        {"tags": None},
        {"centre": torch.zeros(5)},
        {"tags": torch.zeros(16, 4)},
        {"image": state["image"] + 16},
        {"image": state["image"][:-1]},
        {"image": state["image"].flip(0)},
    ]
    for change in changes:
        wrong = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
        with pytest.raises(ArtefactError, match=r"expected regions \(M, C\).*tags \(N, 5\); remove the fit"):
            generator.load_state(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"neighbours": 0}, "neighbours: got 0"),
        ({"others": 0}, "others: got 0"),
        ({"weight": -1.0}, r"weight: got -1\.0"),
        ({"max_images": 1}, "max_images: got 1"),
        ({"ridge": 0}, "ridge: got 0"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({"name": "cam_neighbours"} | arguments, Device(CPU), ColourBackbone, CLASSES)
