"""Mask2Former, OneFormer and EoMT as proposers: inputs and scores against those of `transformers`, disjoint masks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from moduseg.devices import Device
from moduseg.errors import ArtefactError, ConfigError, MissingError
from moduseg.masks.id_maps import to_disjoint
from moduseg.proposers import build
from moduseg.proposers.inputs import fit_shortest_side
from moduseg.proposers.universal import CLASSES, UniversalOptions, UniversalProposer
from moduseg.structures import Proposals, Sample
from tests.proposers.contract import CPU, ProposerContract, sample
from tests.support import tiny_models

SETTINGS: dict[str, dict[str, Any]] = {
    "mask2former": {"size": {"shortest_edge": 64, "longest_edge": 96}, "size_divisor": 32},
    "oneformer": {"size": {"shortest_edge": 64, "longest_edge": 96}},
    "eomt": {"size": {"shortest_edge": 64, "longest_edge": 64}, "do_pad": True},
    "eomt_dinov3": {"size": {"shortest_edge": 64, "longest_edge": 64}, "do_pad": True},
}
FAMILIES = tuple(SETTINGS)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model of each family, as `save_pretrained` writes it."""
    return {f: tiny_models.save_universal(f, tmp_path_factory.mktemp(f), SETTINGS[f]) for f in FAMILIES}


class _Contract(ProposerContract):
    family: str
    directory: str

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _save(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        folder = tmp_path_factory.mktemp(cls.family)
        cls.directory = tiny_models.save_universal(cls.family, folder, SETTINGS[cls.family])

    def config(self, folder: Path, samples: Sequence[Sample]) -> dict[str, object]:
        return {"name": "universal", "weights": self.directory, "score_thresh": 0.0}

    def test_finds_what_is_plain(self, tmp_path: Path) -> None:
        """Random weights find nothing in particular; that each query gives a mask of its own is tested."""
        proposals = self.make(tmp_path, []).propose(sample(48, 64))
        assert 4 < len(proposals) <= 8
        assert len({m.numpy().tobytes() for m in proposals.masks}) > 4
        assert (proposals.predicted_iou.diff() <= 0).all()
        assert proposals.predicted_iou.min() > 0
        assert proposals.predicted_iou.max() < 1


class TestMask2Former(_Contract):
    family = "mask2former"


class TestOneFormer(_Contract):
    family = "oneformer"


class TestEomt(_Contract):
    family = "eomt"


class TestEomtDinov3(_Contract):
    family = "eomt_dinov3"


@pytest.mark.parametrize("size", [(48, 64), (90, 50)])
def test_scores_of_eomt_agree_with_its_post_processing(size: tuple[int, int], directories: dict[str, str]) -> None:
    import transformers

    proposer = UniversalProposer(UniversalOptions(weights=directories["eomt"], score_thresh=0.0), CPU)
    picture = sample(*size)
    with torch.no_grad():
        output = proposer.model(pixel_values=proposer.prepare_input(picture.image)[0])
    theirs = transformers.EomtImageProcessor(**SETTINGS["eomt"]).post_process_instance_segmentation(
        output, [size], threshold=0.0
    )
    expected = sorted((s["score"] for s in theirs[0]["segments_info"]), reverse=True)
    assert proposer.propose(picture).predicted_iou.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", ["mask2former", "oneformer"])
def test_scores_and_masks_agree_with_the_post_processing(family: str, tmp_path: Path) -> None:
    """On an image of 384 x 384, at which `transformers` post-processes Mask2Former whatever its size."""
    import transformers

    settings = {"size": {"height": 384, "width": 384}}
    directory = tiny_models.save_universal(family, tmp_path, settings, classes=1)
    proposer = UniversalProposer(UniversalOptions(weights=directory, score_thresh=0.0), CPU)
    picture = sample(384, 384)
    ours = proposer.propose(picture)
    with torch.no_grad():
        output = proposer.model(pixel_values=proposer.prepare_input(picture.image)[0], **proposer.extra_inputs)
    if family == "mask2former":
        processor = transformers.Mask2FormerImageProcessor(**settings)
        theirs = processor.post_process_instance_segmentation(output, threshold=0.0, return_binary_maps=True)[0]
        scores = torch.tensor([s["score"] for s in theirs["segments_info"]])
        order = scores.argsort(descending=True)
        assert ours.predicted_iou.tolist() == pytest.approx(scores[order].tolist(), abs=1e-4)
        assert (ours.masks == (theirs["segmentation"][order] > 0)).float().mean() > 0.9999
    else:
        probabilities = output.class_queries_logits[0].softmax(-1)[:, 0]
        assert ours.predicted_iou.max() <= probabilities.max()
        assert len(ours) == 8


def test_the_task_changes_what_oneformer_says(directories: dict[str, str]) -> None:
    scores = [
        UniversalProposer(UniversalOptions(weights=directories["oneformer"], score_thresh=0.0, task=task), CPU)
        .propose(sample(48, 64))
        .predicted_iou
        for task in ("panoptic", "instance", "panoptic")
    ]
    assert torch.equal(scores[0], scores[2])
    assert not torch.equal(scores[0], scores[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_thresholds(family: str, directories: dict[str, str]) -> None:
    picture = sample(48, 64)
    whole = UniversalProposer(UniversalOptions(weights=directories[family], score_thresh=0.0), CPU).propose(picture)
    middle = whole.predicted_iou.median().item()
    half = UniversalProposer(UniversalOptions(weights=directories[family], score_thresh=middle), CPU).propose(picture)
    assert torch.equal(half.predicted_iou, whole.predicted_iou[whole.predicted_iou >= middle])
    assert torch.equal(half.masks, whole.masks[whole.predicted_iou >= middle])
    none = UniversalProposer(UniversalOptions(weights=directories[family], score_thresh=1.0), CPU).propose(picture)
    assert none.masks.shape == (0, 48, 64)
    small = UniversalProposer(
        UniversalOptions(weights=directories[family], score_thresh=0.0, mask_thresh=0.9), CPU
    ).propose(picture)
    assert small.areas.sum() < whole.areas.sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_disjoint(family: str, directories: dict[str, str], device: torch.device) -> None:
    picture = sample(60, 80)
    overlapping, disjoint = (
        UniversalProposer(
            UniversalOptions(weights=directories[family], score_thresh=0.0, disjoint=d), Device(device)
        ).propose(picture)
        for d in (False, True)
    )
    assert (overlapping.masks.sum(0) > 1).any()
    assert disjoint.masks.sum(0).max() == 1
    assert torch.equal(disjoint.masks.any(0), overlapping.masks.any(0))
    assert torch.equal(disjoint.masks[0], overlapping.masks[0])


def test_disjoint_by_hand() -> None:
    masks = torch.tensor([[[1, 1, 0, 0]], [[0, 1, 1, 0]], [[1, 1, 0, 0]], [[0, 0, 1, 1]]], dtype=torch.bool)
    left = to_disjoint(Proposals(masks, torch.tensor([0.9, 0.8, 0.7, 0.6])))
    assert left.masks.int().tolist() == [[[1, 1, 0, 0]], [[0, 0, 1, 0]], [[0, 0, 0, 1]]]
    assert left.predicted_iou.tolist() == pytest.approx([0.9, 0.8, 0.6])
    empty = Proposals(torch.zeros((0, 2, 3), dtype=torch.bool))
    assert to_disjoint(empty).masks.shape == (0, 2, 3)


@pytest.mark.parametrize(
    ("size", "long", "expected"),
    [
        ((375, 500), 1333, (800, 1066)),
        ((500, 375), 1333, (1066, 800)),
        ((100, 400), 1333, (333, 1333)),
        ((1, 4000), 1333, (1, 1333)),
        ((30, 30), None, (800, 800)),
        ((100, 400), None, (800, 3200)),
        ((40, 2000), None, (64, 3200)),  # a strip
    ],
)
def test_shortest_side(size: tuple[int, int], long: int | None, expected: tuple[int, int]) -> None:
    assert fit_shortest_side(size, 800, long) == expected


def test_old_settings_and_none(tmp_path: Path) -> None:
    """A size that is a number, as older files have it; a directory without settings has the processor's defaults."""
    directory = tiny_models.save_universal("oneformer", tmp_path, {"size": 40, "max_size": 50})

    def input_size() -> tuple[int, int]:
        proposer = UniversalProposer(UniversalOptions(weights=directory), CPU)
        return proposer.prepare_input(sample(60, 90).image)[1].input_size

    assert input_size() == (33, 50)
    (tmp_path / "preprocessor_config.json").unlink()
    assert input_size() == (800, 1200)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({"short_side": 32}, (32, 48), id="short side"),
        pytest.param({"short_side": 96}, (64, 96), id="the settings' limit holds"),
        pytest.param({"short_side": 96, "max_long_side": 192}, (96, 144), id="another limit"),
        pytest.param({"max_long_side": 48}, (32, 48), id="the limit alone"),
    ],
)
@pytest.mark.parametrize("family", ["mask2former", "oneformer"])
def test_size_of_the_input(
    family: str, options: dict[str, int], expected: tuple[int, int], directories: dict[str, str]
) -> None:
    """Mask2Former's is stretched to a multiple of 32 in addition."""
    proposer = UniversalProposer(UniversalOptions(weights=directories[family], **options), CPU)  # type: ignore[arg-type]
    input_size = proposer.prepare_input(sample(60, 90).image)[1].input_size
    assert input_size == (tuple(-(-side // 32) * 32 for side in expected) if family == "mask2former" else expected)


@pytest.mark.parametrize("family", ["eomt", "eomt_dinov3"])
def test_eomt_takes_no_other_size(family: str, directories: dict[str, str]) -> None:
    proposer = UniversalProposer(UniversalOptions(weights=directories[family], short_side=32), CPU)
    with pytest.raises(
        ConfigError, match=rf"proposer\.short_side: got a size for {family}, which has positions for one"
    ):
        proposer.prepare_input(sample(60, 90).image)


# Weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"1 missing, 0 unexpected, 0 mismatched tensors, first class_predictor\.weight"),
        ("model", r"config\.json names model_type 'clip', expected one of mask2former"),
        ("windows", r"a model for semantic segmentation in windows"),
    ],
)
def test_wrong_directories_are_one_line(tmp_path: Path, change: str, message: str) -> None:
    from safetensors.torch import load_file, save_file

    settings = {**SETTINGS["eomt"], "do_split_image": change == "windows"}
    directory = tiny_models.save_universal("eomt", tmp_path, settings)
    if change == "missing":
        state = load_file(tmp_path / "model.safetensors")
        del state["class_predictor.weight"]
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    elif change == "model":
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ArtefactError, match=message) as caught:
        UniversalProposer(UniversalOptions(weights=directory), CPU).propose(sample(48, 64))
    assert "\n" not in str(caught.value)


def test_tensors_of_training_may_be_absent_or_extra(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = tiny_models.save_universal("mask2former", tmp_path, SETTINGS["mask2former"])
    before = UniversalProposer(UniversalOptions(weights=directory), CPU).propose(sample(48, 64))
    state = load_file(tmp_path / "model.safetensors")
    del state["criterion.empty_weight"]
    state["model.encoder.layers.0.attn.relative_position_index"] = torch.zeros(4)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(
        UniversalProposer(UniversalOptions(weights=directory), CPU).propose(sample(48, 64)).masks, before.masks
    )


def test_oneformer_without_a_tokenizer(tmp_path: Path) -> None:
    directory = tiny_models.save_universal("oneformer", tmp_path, SETTINGS["oneformer"])
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (tmp_path / name).unlink()
    with pytest.raises(ArtefactError, match=r"no tokenizer, with which OneFormer reads its task"):
        UniversalProposer(UniversalOptions(weights=directory), CPU).propose(sample(48, 64))


def test_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = build({"name": "universal", "weights": "facebook/no-such-mask2former"}, CPU)
    with pytest.raises(MissingError, match=r"hub id 'facebook/no-such-mask2former'.*hf download"):
        made.propose(sample(48, 64))


@pytest.mark.parametrize(
    ("key", "value"),
    [("weights", ""), ("score_thresh", 1.5), ("mask_thresh", 0.0), ("task", "depth"), ("short_side", 0)],
)
def test_wrong_values(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: got"):
        build({"name": "universal", "weights": "a/b", key: value}, CPU)


def test_every_family_has_its_class() -> None:
    import transformers

    for name in CLASSES.values():
        assert hasattr(transformers, name), name
