"""SAM and its successors through `transformers`: agreement with `segment_anything`, each family, what can go wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moduseg.config import compose
from moduseg.devices import Device
from moduseg.errors import ArtefactError, ConfigError, DataError, MissingError
from moduseg.miniature.models.sam import build_miniature_sam
from moduseg.proposers import Proposer, build
from moduseg.proposers.inputs import IMAGENET_MEAN, fit_longest_side, prepare_images
from moduseg.proposers.sam_transformers import CLASSES, HubSam, SamTransformersOptions, SamTransformersProposer
from moduseg.structures import Sample
from tests.proposers.contract import CPU, ProposerContract, sample
from tests.proposers.test_mask_generation import MINIATURE, agree, scenes
from tests.support import tiny_models
from tests.support.agree_sam import hub_model
from tests.support.agreement import COMPARISONS, TOLERANCE, find_comparison, measure_relative_error, to_markdown

FAMILIES = ("sam", "sam_hq", "sam2", "sam3_tracker")
# Random weights predict nothing of worth, so the filters are opened until masks survive.
OPEN: dict[str, Any] = {
    "points_per_side": 2,
    "pred_iou_thresh": 0.0,
    "stability_score_thresh": 0.0,
    "box_nms_thresh": 1.0,
    "crop_nms_thresh": 1.0,
}


@pytest.fixture(scope="module", params=FAMILIES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model of one family, as `save_pretrained` writes it."""
    return tiny_models.save(tiny_models.build_sam(request.param), tmp_path_factory.mktemp(request.param))


class _Contract(ProposerContract):
    family: str
    directory: str

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _save(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        cls.directory = tiny_models.save(tiny_models.build_sam(cls.family), tmp_path_factory.mktemp(cls.family))

    def config(self, folder: Path, samples: Sequence[Sample]) -> dict[str, object]:
        return {"name": "sam_transformers", "weights": self.directory, **OPEN}

    def test_finds_what_is_plain(self, tmp_path: Path) -> None:
        """Random weights find nothing in particular; that they find as many masks as there are prompts is tested."""
        proposals = self.make(tmp_path, []).propose(sample(48, 64))
        assert 4 < len(proposals) <= 12
        assert len({m.numpy().tobytes() for m in proposals.masks}) > 4


class TestSam(_Contract):
    family = "sam"


class TestSamHq(_Contract):
    family = "sam_hq"


class TestSam2(_Contract):
    family = "sam2"


class TestSam3(_Contract):
    family = "sam3_tracker"


def test_no_mask_survives(directory: str) -> None:
    proposals = SamTransformersProposer(
        SamTransformersOptions(weights=directory, **{**OPEN, "pred_iou_thresh": 1.0, "crop_n_layers": 1}), CPU
    ).propose(sample(40, 56))
    limit = torch.tensor(1.0)
    assert proposals.masks.shape[1:] == (40, 56)
    assert (proposals.predicted_iou > limit).all()
    stable = {**OPEN, "stability_score_thresh": 1.0, "stability_score_offset": 100.0}
    assert SamTransformersProposer(SamTransformersOptions(weights=directory, **stable), CPU).propose(
        sample(40, 56)
    ).masks.shape == (0, 40, 56)


def test_batches_of_points(directory: str) -> None:
    """How many points share a pass changes speed and memory only."""
    picture = sample(60, 90)
    plain = SamTransformersProposer(SamTransformersOptions(weights=directory, **OPEN), CPU).propose(picture)
    split = SamTransformersProposer(SamTransformersOptions(weights=directory, **OPEN, points_per_batch=3), CPU).propose(
        picture
    )
    torch.testing.assert_close(plain.predicted_iou, split.predicted_iou)
    assert (plain.masks == split.masks).float().mean() > 0.999


def test_images_embedded_together(directory: str) -> None:
    pictures = [sample(48, 64), sample(64, 40), sample(33, 33)]
    options = {"name": "sam_transformers", "weights": directory, **OPEN}
    together = build({**options, "images_per_batch": 2}, CPU).propose_batch(pictures)
    for picture, ours in zip(pictures, together, strict=True):
        alone = build(options, CPU).propose(picture)
        assert ours.masks.shape == alone.masks.shape
        torch.testing.assert_close(ours.predicted_iou, alone.predicted_iou, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sam", "sam2"])
def test_compiled_encoder(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Traced as `torch.compile` traces it, run without a compiler: the same scores."""
    traced = []

    def run(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        traced.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=run))
    weights = tiny_models.save(tiny_models.build_sam(family), tmp_path)
    plain, compiled = (
        build({"name": "sam_transformers", "weights": weights, **OPEN, "compile": value}, CPU).propose(sample(48, 64))
        for value in (False, True)
    )
    assert traced
    torch.testing.assert_close(compiled.predicted_iou, plain.predicted_iou, rtol=1e-4, atol=1e-5)


def test_lower_precision_is_for_the_encoder_only(directory: str, device: torch.device) -> None:
    exact, rough = (
        SamTransformersProposer(SamTransformersOptions(weights=directory, **OPEN), Device(device, precision)).propose(
            sample(48, 64)
        )
        for precision in ("float32", "bfloat16")
    )
    assert rough.predicted_iou.dtype == torch.float32
    assert not torch.equal(rough.predicted_iou, exact.predicted_iou)
    assert rough.predicted_iou.max().item() == pytest.approx(exact.predicted_iou.max().item(), abs=0.2)


# Agreement with `segment_anything` on the same weights


@pytest.mark.parametrize("name", [name for name in COMPARISONS if "agree_sam" in name])
def test_implementations_agree(name: str, tmp_path: Path) -> None:
    rows = find_comparison(name)(tmp_path)
    assert len({row.size for row in rows}) >= 3
    assert {row.output for row in rows} == {"image embedding", "predicted IoU", "masks"}
    assert not [row for row in rows if not row.error < TOLERANCE], to_markdown(rows)


def test_the_miniature_gives_the_same_proposals_through_transformers(tmp_path: Path) -> None:
    """The shipped weights under their names in `transformers`, from a directory, against proposer `sam`."""
    from moduseg.miniature.models.weights import load_weights
    from moduseg.weights.sources import find_weights

    sam = build_miniature_sam()
    load_weights(sam, find_weights("miniature/sam.safetensors", "checkpoint"))
    directory = tiny_models.save(hub_model(sam.state_dict()), tmp_path)
    options = {k: v for k, v in MINIATURE.items() if k not in ("model", "checkpoint", "seed", "engine")}
    (picture,) = scenes(1)
    ours = build({"name": "sam_transformers", "weights": directory, **options}, CPU).propose(picture)
    agree(ours, build({"name": "sam", **MINIATURE}, CPU).propose(picture))


def test_the_token_of_sam_hq_counts() -> None:
    model = tiny_models.build_sam("sam_hq")
    image = sample(96, 128).image
    points = torch.tensor([[30.0, 40.0]])
    results = []
    for scale in (1.0, 2.0):
        for parameter in model.mask_decoder.hq_mask_mlp.proj_out.parameters():
            parameter.data.mul_(scale)
        hub = HubSam(tiny_models.build_sam("sam_hq"), CPU, {})
        hub._model.load_state_dict(model.state_dict())
        with torch.no_grad():
            results.append(hub.decode(hub.embed(image), points, 0.0).logits)
    assert measure_relative_error(*results) > 0.01


# Preprocessing


def test_mean_and_deviation_come_from_the_directory(tmp_path: Path) -> None:
    directory = tiny_models.save(tiny_models.build_sam("sam2"), tmp_path)
    first = SamTransformersProposer(SamTransformersOptions(weights=directory, **OPEN), CPU)
    assert first.promptable._mean == IMAGENET_MEAN
    before = first.digest
    settings = {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}}
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    second = SamTransformersProposer(SamTransformersOptions(weights=directory, **OPEN), CPU)
    assert second.promptable._mean == [0.1, 0.2, 0.3]
    assert second.digest != before


def test_prepare_by_hand() -> None:
    image = np.full((2, 4, 3), 255, np.uint8)
    pixels = prepare_images(
        [image], [(1, 2)], (2, 3), mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0), device=torch.device("cpu")
    )
    expected = torch.zeros(1, 3, 2, 3)
    expected[0, :, 0, :2] = torch.tensor([1.0, 2.0, 0.5])[:, None]
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize(
    ("size", "expected"), [((375, 500), (768, 1024)), ((1, 5000), (1, 1024)), ((1024, 1024), (1024, 1024))]
)
def test_longest_side(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fit_longest_side(size, 1024) == expected


# Weights


def proposer(directory: str) -> Proposer:
    return build({"name": "sam_transformers", "weights": directory, **OPEN}, CPU)


def test_video_checkpoints_give_their_image_model(tmp_path: Path) -> None:
    """The published files of SAM 2 hold the video model; tensors that only video needs are dropped, none is missing."""
    import transformers

    image_model = tiny_models.build_sam("sam2")
    config = transformers.Sam2VideoConfig(
        **tiny_models._sam2_parts(),
        memory_attention_hidden_size=32,
        memory_attention_num_layers=1,
        memory_attention_num_attention_heads=1,
        memory_attention_feed_forward_hidden_size=32,
        memory_encoder_hidden_size=32,
        memory_encoder_output_channels=8,
        mask_downsampler_embed_dim=32,
        memory_fuser_embed_dim=32,
        memory_fuser_intermediate_dim=32,
    )
    video = transformers.Sam2VideoModel(config)
    video.load_state_dict(image_model.state_dict(), strict=False)
    directory = tiny_models.save(video, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "sam2_video"
    loaded = SamTransformersProposer(
        SamTransformersOptions(weights=directory, **OPEN), CPU
    ).promptable._model.state_dict()
    for name, tensor in image_model.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


def test_hub_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = build({"name": "sam_transformers", "weights": "facebook/no-such-sam", "revision": "abc"}, CPU)
    for use in (lambda: made.digest, lambda: made.propose(sample(48, 64))):
        with pytest.raises(
            MissingError, match=r"^proposer\.weights: got hub id 'facebook/no-such-sam' at revision abc.*hf download"
        ) as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"1 missing, 0 unexpected, 0 mismatched tensors, first mask_decoder\.iou_token\.weight"),
        ("left over", r"0 missing, 1 unexpected, 0 mismatched tensors, first extra"),
        ("shape", r"first mask_decoder\.iou_token\.weight|not readable as"),
        ("cut off", r"not readable as a SAM"),
        ("model", r"config\.json names model_type 'clip', expected one of sam, sam_hq"),
        ("config", r"config\.json: not JSON"),
    ],
)
def test_damaged_directories_are_one_line(tmp_path: Path, change: str, message: str) -> None:
    from safetensors.torch import load_file, save_file

    tiny_models.save(tiny_models.build_sam("sam2"), tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    state = load_file(file)
    if change == "missing":
        del state["mask_decoder.iou_token.weight"]
    elif change == "left over":
        state["extra"] = torch.zeros(1)
    elif change == "shape":
        state["mask_decoder.iou_token.weight"] = torch.zeros(1, 3)
    save_file(state, file, {"format": "pt"})
    if change == "cut off":
        file.write_bytes(file.read_bytes()[:1000])
    elif change == "model":
        config.write_text(json.dumps({"model_type": "clip"}))
    elif change == "config":
        config.write_text("{")
    with pytest.raises(ArtefactError, match=message) as caught:
        proposer(str(tmp_path)).propose(sample(48, 64))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("nowhere/at/all", r"proposer\.weights: got 'nowhere/at/all', no such file"),
        ("$MODUSEG_NO_SUCH/sam", r"environment variable MODUSEG_NO_SUCH is not set"),
    ],
)
def test_missing_directories(weights: str, message: str) -> None:
    with pytest.raises(MissingError, match=message):
        proposer(weights).propose(sample(48, 64))


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"holds no config\.json with model\.safetensors"):
        proposer(str(tmp_path)).propose(sample(48, 64))


@pytest.mark.parametrize(("key", "value"), [("weights", ""), ("points_per_side", 0), ("box_nms_thresh", 2.0)])
def test_wrong_values(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: got"):
        build({"name": "sam_transformers", "weights": "a/b", key: value}, CPU)


def test_too_thin_where_the_shape_is_kept(directory: str) -> None:
    made = SamTransformersProposer(SamTransformersOptions(weights=directory, **OPEN), CPU)
    if made.promptable.squash:
        assert made.propose(sample(1, 400)).masks.shape[1:] == (1, 400)
    else:
        with pytest.raises(DataError, match=r"1 x 400 pixels are too thin for SAM's 128"):
            made.propose(sample(1, 400))


def test_every_family_has_its_class() -> None:
    import transformers

    for name in CLASSES.values():
        assert hasattr(transformers, name), name


@pytest.mark.parametrize("family", FAMILIES)
def test_one_mask_a_point(family: str, tmp_path: Path) -> None:
    """The decoder's first mask, as the model gives it; SAM 2 does not replace it by a more stable one."""
    directory = tiny_models.save(tiny_models.build_sam(family), tmp_path)
    options = SamTransformersOptions(weights=directory, **OPEN, multimask_output=False)
    hub = SamTransformersProposer(options, CPU).promptable
    embedded = hub.embed(sample(96, 128).image)
    points = torch.tensor([[30.0, 40.0], [90.0, 60.0], [10.0, 12.0]])
    with torch.no_grad():
        single = hub.decode(embedded, points, 0.0)
        hub._multimask_output = True
        three = hub.decode(embedded, points, 0.0)
    assert (len(single.logits), len(three.logits)) == (3, 9)
    assert not (single.predicted_iou[:, None] == three.predicted_iou).any()
    assert len(SamTransformersProposer(options, CPU).propose(sample(96, 128))) <= 4


def test_the_preset_of_regions_is_corrclips() -> None:
    settings = compose(["proposer=sam_regions"]).proposer
    numbers = [
        settings[k] for k in ("points_per_side", "pred_iou_thresh", "stability_score_thresh", "multimask_output")
    ]
    assert numbers == [8, 0.4, 0.4, False]
    generator = compose(["pseudo_masks=corrclip_sam_regions"]).pseudo_masks.generator
    assert (generator["region_order"], generator["min_score"]) == ("largest", 0.0)
