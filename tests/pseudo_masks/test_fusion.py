"""Two generators weighed by their entropies."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from moduseg.config import compose
from moduseg.devices import Device
from moduseg.errors import ConfigError
from moduseg.pseudo_masks import build
from moduseg.pseudo_masks.base import PseudoMaskGenerator
from moduseg.pseudo_masks.fusion import FusionGenerator, FusionOptions, compute_entropy, fuse
from moduseg.structures import Sample, ScoreMaps
from tests.pseudo_masks.contract import CLASSES, GeneratorContract, sample
from tests.pseudo_masks.test_given_masks import no_backbone, write
from tests.support.devices import CPU

ORACLE = {"name": "ground_truth"}


class TestContract(GeneratorContract):
    @pytest.fixture
    def generator(self, device: torch.device, tmp_path: Path) -> PseudoMaskGenerator:
        for size in ((24, 40), (19, 33)):
            for labels in ((), (2,), (2, 4)):
                item = sample(size, labels, f"{size[0]}-{len(labels)}")
                assert item.semantic is not None
                write(tmp_path / f"{item.id}.png", item.semantic)
        files = {"name": "files", "folder": str(tmp_path)}
        return build({"name": "fusion", "first": ORACLE, "second": files}, Device(device), no_backbone, CLASSES)


def column(device: torch.device, *values: float) -> torch.Tensor:
    return torch.tensor(values, device=device)[:, None, None]


def test_weights_by_hand(device: torch.device) -> None:
    closed = torch.zeros(1, 1, dtype=torch.bool, device=device)
    first, second = column(device, 1.0, 0.0, 0.0), column(device, 0.2, 0.2, 0.2)
    assert compute_entropy(first).item() == 0
    assert compute_entropy(second * 5 / 3).item() == pytest.approx(torch.log(torch.tensor(3.0)).item())
    weight = torch.sigmoid(torch.log(torch.tensor(3.0, device=device)))
    expected = weight * first + (1 - weight) / 3
    torch.testing.assert_close(fuse(first, second, closed, closed), expected)
    torch.testing.assert_close(fuse(second, first, closed, closed), expected)


def test_equal_entropies_give_the_mean(device: torch.device) -> None:
    closed = torch.zeros(1, 1, dtype=torch.bool, device=device)
    first, second = column(device, 0.7, 0.2, 0.1), column(device, 0.1, 0.7, 0.2)
    torch.testing.assert_close(fuse(first, second, closed, closed), (first + second) / 2)
    torch.testing.assert_close(fuse(first, first, closed, closed), first)
    # Scores that do not sum to 1 are shares.
    torch.testing.assert_close(fuse(first * 3, second / 4, closed, closed), (first + second) / 2)
    nothing = torch.zeros_like(first)
    torch.testing.assert_close(fuse(nothing, nothing, closed, closed), torch.full_like(first, 1 / 3))


def test_what_one_leaves_open_is_the_others(device: torch.device) -> None:
    ignored, kept = (torch.full((1, 1), v, device=device) for v in (True, False))
    first, second = column(device, 0.9, 0.1), column(device, 0.3, 0.7)
    torch.testing.assert_close(fuse(first, second, ignored, kept), second)
    torch.testing.assert_close(fuse(first, second, kept, ignored), first)
    assert not torch.equal(fuse(first, second, ignored, ignored), second)


class Half(PseudoMaskGenerator):
    """Scores every class 0.5, learns its number, and gives no background."""

    is_fitted = True

    def __init__(self, number: float) -> None:
        self.number, self.state = number, {}  # type: ignore[var-annotated]

    def fit(self, samples: Any, num_classes: int, proposals: Any = None) -> dict[str, torch.Tensor]:
        return {"number": torch.tensor(self.number + num_classes + len(list(samples())))}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    def generate(self, sample: Sample, labels: tuple[int, ...], proposals: object = None) -> ScoreMaps:
        return ScoreMaps(labels, torch.full((len(labels), *sample.size), 0.5))


def test_parts_are_fitted_apart_and_lack_of_background_is_filled() -> None:
    parts = [Half(10.0), Half(20.0)]
    unbuilt = iter(parts)
    options = FusionOptions(first=ORACLE, second=ORACLE, rule="power", value=1.0)
    fusion = FusionGenerator(options, lambda cfg, where: next(unbuilt))

    def samples() -> Iterable[Sample]:
        return [sample()]

    state = fusion.fit(samples, 5)
    assert {k: v.item() for k, v in state.items()} == {"first.number": 16.0, "second.number": 26.0}
    assert fusion.count_learnt(state) == 2
    fusion.load_state(state)
    assert [p.state["number"].item() for p in parts] == [16.0, 26.0]
    maps = fusion.generate(sample(), (2, 4))
    assert maps.background is not None
    torch.testing.assert_close(maps.background, torch.full((24, 40), 1 / 3))


def test_what_the_parts_need_the_fusion_needs() -> None:
    cam, files = {"name": "cam", "region_scores": True}, {"name": "files", "folder": "nowhere"}
    fusion = build({"name": "fusion", "first": cam, "second": files}, CPU, no_backbone, CLASSES)
    assert (fusion.needs_truth, fusion.needs_proposals, fusion.is_fitted) == (False, True, True)
    oracle = build({"name": "fusion", "first": files, "second": ORACLE}, CPU, no_backbone, CLASSES)
    assert (oracle.needs_truth, oracle.needs_proposals, oracle.is_fitted) == (True, False, False)


def test_mistakes() -> None:
    for options, message in (
        ({"first": {"name": "clip"}, "second": ORACLE}, r"generator\.first\.name: got 'clip'"),
        ({"first": ORACLE, "second": {**ORACLE, "filter": 1}}, r"generator\.second\.filter: unknown key"),
        ({"first": ORACLE, "second": {"name": "fusion"}}, r"got a fusion"),
        ({"first": ORACLE}, r"second: missing"),
    ):
        with pytest.raises(ConfigError, match=message):
            build({"name": "fusion", **options}, CPU, no_backbone, CLASSES)
    cfg = {"name": "fusion", "first": ORACLE, "second": {**ORACLE, "filter_labels": False}}
    unlike = build(cfg, CPU, no_backbone, CLASSES)
    with pytest.raises(ConfigError, match=r"first scores classes \(2,\), second \(2, 4\)"):
        unlike.generate(sample(), (2,), None)


@pytest.mark.parametrize(("part", "preset"), [
    pytest.param("first", "corrclip_miniature", id="the best of CLIP's"),
    pytest.param("second", "iseg_miniature", id="the best of the diffusion model's"),
])  # fmt: skip
def test_the_miniatures_fusion_has_the_presets_parts(part: str, preset: str) -> None:
    def settings(name: str, *path: str) -> dict[str, Any]:
        cfg = compose([f"pseudo_masks={name}"]).as_dict()["pseudo_masks"]["generator"]
        chosen = cfg[path[0]] if path else cfg
        generator = build(chosen, CPU, no_backbone, CLASSES)
        return {**vars(generator)["_options"].__dict__}

    assert settings("fusion_miniature", part) == settings(preset)


def test_the_miniatures_fusion_has_isegs_background() -> None:
    fusion = compose(["pseudo_masks=fusion_miniature"]).pseudo_masks.generator
    background = compose(["pseudo_masks=iseg_miniature"]).pseudo_masks.background
    assert (fusion["rule"], fusion["value"]) == (background.rule, background.value)
