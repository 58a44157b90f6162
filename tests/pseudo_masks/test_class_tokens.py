"""Class tokens as a generator: fitted on tags, resumed, read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moduseg.devices import Device
from moduseg.errors import ArtefactError, ConfigError, DataError
from moduseg.evaluation.tags import score_tags
from moduseg.pseudo_masks import build
from moduseg.pseudo_masks.base import FitImages
from moduseg.pseudo_masks.class_token_data import Augmentation, TaggedImages, augment
from moduseg.pseudo_masks.class_tokens import ClassTokenGenerator
from moduseg.pseudo_masks.labels import make_label_map
from moduseg.structures import Sample
from moduseg.training.books import CHECKPOINT, LOG
from moduseg.training.data import BatchDraw
from tests.pseudo_masks.contract import CLASSES, NUM_CLASSES, GeneratorContract, sample

TINY: dict[str, Any] = {"img_size": 40, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
SETTINGS: dict[str, Any] = {
    "name": "class_tokens",
    "model": "vit_tiny_patch16_224",
    "model_kwargs": TINY,
    "augmentation": {"side": 40, "min_scale": 1.0, "max_scale": 1.0, "flips": "both"},
    "training": {"steps": 3, "batch": 4, "learning_rate": 0.01, "warmup": 1},
}
FUSED: dict[str, Any] = {
    "logits": "mean",
    "maps": "fused",
    "gates": False,
    "register": False,
    "diversity_weight": 0.0,
    "contrast_weight": 0.3,
    "training": {"steps": 150, "batch": 8, "learning_rate": 0.01, "warmup": 10},
}


def world() -> list[Sample]:
    """Pictures with class 2, class 4, both or none."""
    kinds: list[tuple[int, ...]] = [(2,), (4,), (2, 4), ()]
    return [sample((24, 40), kinds[i % 4], "x" * (i + 1)) for i in range(16)]


def make(device: torch.device | None = None, **more: Any) -> ClassTokenGenerator:
    where = Device(device or torch.device("cpu"))
    generator = build({**SETTINGS, **more}, where, lambda: pytest.fail("no backbone is needed"), CLASSES)
    assert isinstance(generator, ClassTokenGenerator)
    return generator


@pytest.fixture(scope="module")
def fused_state() -> dict[str, torch.Tensor]:
    """What a short training of class tokens and patches finds."""
    return make(**FUSED).fit(world, NUM_CLASSES)


class TestFused(GeneratorContract):
    @pytest.fixture
    def generator(self, device: torch.device, fused_state: dict[str, torch.Tensor]) -> ClassTokenGenerator:
        generator = make(device, **FUSED)
        generator.load_state(fused_state)
        return generator


def test_classes_are_learned_from_tags(fused_state: dict[str, torch.Tensor]) -> None:
    generator = make(**FUSED)
    generator.load_state(fused_state)
    true = torch.tensor([[label in (item.labels or ()) for label in (2, 4)] for item in world()])
    scores = torch.stack([generator.classify(item) for item in world()])[:, [1, 3]]
    quality = score_tags(true, scores > 0.5, scores)
    assert quality.mean_average_precision is not None
    assert quality.mean_average_precision > 95


def images_of(folder: Path) -> FitImages:
    items = {item.id: item for item in world()}
    return FitImages(tuple(items), items.__getitem__, lambda: iter(items.values()), folder)


def test_fit_keeps_its_checkpoint_and_is_read_again(tmp_path: Path) -> None:
    first = make().fit(images_of(tmp_path), NUM_CLASSES)
    (folder,) = tmp_path.iterdir()
    assert (folder / LOG).is_file()
    written = (folder / CHECKPOINT).stat().st_mtime_ns
    second = make(training={**SETTINGS["training"], "save_minutes": 1.0}).fit(images_of(tmp_path), NUM_CLASSES)
    assert (folder / CHECKPOINT).stat().st_mtime_ns == written
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    make(mask_rate=0.25).fit(images_of(tmp_path), NUM_CLASSES)
    assert len(list(tmp_path.iterdir())) == 2


def test_fit_of_passes_equals_that_of_indices(tmp_path: Path) -> None:
    by_index, in_passes = make().fit(images_of(tmp_path), NUM_CLASSES), make().fit(world, NUM_CLASSES)
    assert all(torch.equal(tensor, in_passes[name]) for name, tensor in by_index.items())


def test_class_tokens_start_as_prototypes() -> None:
    settings = {"class_start": "prototype", "training": {**SETTINGS["training"], "steps": 1, "learning_rate": 1e-9}}
    tokens = make(**settings).fit(world, NUM_CLASSES)["model.class_tokens"]
    # No image has the other classes, whose tokens stay zero.
    assert tokens.abs().sum(1).gt(1e-3).nonzero()[:, 0].tolist() == [1, 3]
    assert not torch.allclose(tokens[1], tokens[3], atol=1e-3)


def test_item_follows_from_its_seed() -> None:
    items = world()
    images = TaggedImages(
        [item.id for item in items],
        {item.id: item for item in items}.__getitem__,
        NUM_CLASSES,
        Augmentation(side=32),
        mask_rate=0.5,
        statistics=(torch.zeros(3, 1, 1), torch.ones(3, 1, 1)),
    )
    alone, together = images.load(BatchDraw(0, 0.0, (3,), (7,))), images.load(BatchDraw(0, 0.0, (1, 3), (6, 7)))
    for name, tensor in alone.items():
        assert torch.equal(tensor[0], together[name][1])
    assert together["tags"].tolist() == [[False, False, False, True, False], [False] * 5]
    assert images.name_of(3) == items[3].id


@pytest.mark.parametrize("size", [(24, 40), (40, 24), (80, 90), (5, 7)])
def test_augmented_images_have_one_size(size: tuple[int, int]) -> None:
    settings = Augmentation(side=32, min_scale=0.5, max_scale=2.0, flips="both", brightness=0.0)
    pixels = torch.ones(3, *size)
    for seed in range(20):
        view = augment(pixels, settings, torch.Generator().manual_seed(seed))
        assert view.shape == (3, 32, 32)
        assert view.amax() == pytest.approx(1.0, abs=1e-5)
        # What the image does not reach is the mean colour.
        filled = view[0] > 0.5
        assert torch.equal(filled, filled.any(1, keepdim=True) & filled.any(0, keepdim=True))


def test_mirroring_is_undone(fused_state: dict[str, torch.Tensor]) -> None:
    generator = make(**FUSED, mirrored=True)
    generator.load_state(fused_state)
    item = world()[2]
    mirrored = Sample("mirrored", np.ascontiguousarray(item.image[:, ::-1]), item.labels)
    scores = [generator.generate(each, (2, 4)).scores for each in (item, mirrored)]
    torch.testing.assert_close(scores[0], scores[1].flip(2), atol=1e-4, rtol=0)


def test_published_labels_have_no_background(fused_state: dict[str, torch.Tensor]) -> None:
    generator = make(**FUSED, ranked=True)
    generator.load_state(fused_state)
    maps = generator.generate(world()[2], (2, 4))
    assert set(make_label_map(maps, "given").unique().tolist()) == {2, 4}


def test_parameters_that_a_training_changes_are_counted(
    fused_state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = make(**FUSED)
    model = generator.build_model(NUM_CLASSES)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert generator.count_learnt(fused_state) == total
    model.blocks[0].requires_grad_(False)
    monkeypatch.setattr(generator, "build_model", lambda _: model)
    assert generator.count_learnt(fused_state) == total - sum(p.numel() for p in model.blocks[0].parameters())


def test_heads_are_shown_before_their_gates() -> None:
    generator = make()
    state = generator.fit(world, NUM_CLASSES)
    state["model.gates.log_alpha"] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    generator.load_state(state)
    heads, is_open = generator.observe_heads(world()[0])
    assert heads.shape == (2, 2, NUM_CLASSES, 6, 10)
    assert (heads.sum((3, 4)) > 0).all()
    assert is_open.tolist() == [[True, False], [False, True]]
    assert generator.describe_fit() == {"open_heads": 50.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_rate": 1.5}, "mask_rate: got 1.5"),
        ({"gate_weight": -1.0}, "gate_weight: got -1"),
        ({"new_rate": 0.0}, "new_rate: got 0"),
        ({"short_side": 0}, "short_side: got 0"),
        ({"map_blocks": 0}, "map_blocks: got 0"),
        ({"class_block": -1}, "class_block: got -1"),
        ({"prototype_share": 0.0}, "prototype_share: got 0"),
        ({"pool_decay": 0.0}, "pool_decay: got 0"),
        ({"augmentation": {"flips": "left"}}, "augmentation.flips: got 'left'"),
        ({"augmentation": {"min_scale": 2.0}}, "augmentation.min_scale, max_scale: got 2"),
        ({"training": {"steps": 0}}, "steps: got 0"),
        ({"training": {"stepz": 3}}, "did you mean pseudo_masks.generator.training.steps"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**settings)


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(DataError, match="no image to fit on"):
        make().fit(list, NUM_CLASSES)
    with pytest.raises(DataError, match="no image-level labels"):
        make().fit(lambda: [Sample("bare", sample().image)], NUM_CLASSES)
    with pytest.raises(ConfigError, match="expected a multiple of the patch of 4 pixels; try 32"):
        make(augmentation={"side": 30}).fit(world, NUM_CLASSES)
    with pytest.raises(ConfigError, match="expected a vision transformer"):
        make(model="mobilenetv2_035", model_kwargs={}).fit(world, NUM_CLASSES)


def test_state_that_does_not_fit(fused_state: dict[str, torch.Tensor]) -> None:
    generator = make()
    with pytest.raises(ArtefactError, match="not fitted"):
        generator.generate(sample(), (2,))
    with pytest.raises(ArtefactError, match="do not fit the model of 5 classes"):
        generator.load_state(fused_state)
    generator = make(**FUSED)
    generator.load_state(fused_state)
    with pytest.raises(DataError, match=r"labels \[6\], expected 1..5"):
        generator.generate(sample(), (2, 6))
