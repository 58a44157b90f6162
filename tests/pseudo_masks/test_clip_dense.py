"""Pseudo masks from CLIP: words, label filter, windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from moduseg.backbones.base import Backbone
from moduseg.backbones.clip_attention import VARIANTS
from moduseg.backbones.timm_backbone import TimmBackbone, TimmOptions
from moduseg.devices import Device
from moduseg.errors import ConfigError, DataError, MissingError
from moduseg.pseudo_masks import build
from moduseg.pseudo_masks.clip_dense import ClipDenseGenerator, ClipDenseOptions
from moduseg.pseudo_masks.clip_windows import list_windows, resize_short_side
from moduseg.pseudo_masks.labels import make_label_map, region_vote
from moduseg.pseudo_masks.prompts import BACKGROUND_WORDS, IMAGENET_TEMPLATES, resolve_class_words
from moduseg.structures import Proposals, TokenMap
from tests.backbones.test_clip import tiny_config
from tests.pseudo_masks.contract import CLASSES, NAMES, GeneratorContract, sample
from tests.support.devices import CPU

Make = Callable[..., ClipDenseGenerator]


def proxy() -> Backbone:
    kwargs = {"img_size": 24, "patch_size": 3, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return TimmBackbone(TimmOptions("vit_tiny_patch16_224", model_kwargs=kwargs), CPU)


@pytest.fixture
def make(words: tuple[Path, int, int]) -> Make:
    """A generator on a random two-block CLIP, patch 4."""

    def inner(device: torch.device = CPU.torch_device, **options: Any) -> ClipDenseGenerator:
        settings: dict[str, Any] = {
            "classes": NAMES,
            "templates": ["a {}"],
            "background_words": ["grass", "sky"],
            "window": None,
            "logit_scale": 5.0,
            **options,
        }
        classes = settings.pop("classes")
        config = tiny_config(words[1], words[2])
        return ClipDenseGenerator(
            ClipDenseOptions(weights="random", config=config, tokenizer=str(words[0]), **settings),
            Device(device),
            proxy,
            classes,
        )

    return inner


class TestContract(GeneratorContract):
    @pytest.fixture
    def generator(self, make: Make, device: torch.device) -> ClipDenseGenerator:
        """Random weights know no words: each is given the mean feature of what it stands for in the picture."""
        generator = make(device, classes=CLASSES, variant="maskclip", logit_scale=60.0, background_words=["grass"])
        item = sample(name="24-2")
        assert item.semantic is not None
        tokens = generator._encoder.encode([item.image])[0].tokens
        truth = torch.from_numpy(item.semantic)[2::4, 2::4].to(device)
        means = [tokens[truth == label].mean(0) if label in (0, 2, 4) else -tokens.mean((0, 1)) for label in range(6)]
        generator.__dict__["_texts"] = F.normalize(torch.stack(means), dim=1), list(range(6))
        return generator


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "corrclip"])
def test_every_variant(make: Make, variant: str) -> None:
    generator = make(variant=variant)
    for size in ((24, 40), (19, 33), (5, 3), (1, 1), (1, 40)):
        maps = generator.generate(sample(size), (2, 4))
        assert maps.scores.shape == (2, *size)
        assert maps.background is not None
        assert maps.background.shape == size
        everything = torch.cat([maps.scores, maps.background[None]])
        assert everything.isfinite().all()
        assert not everything.is_inference()
        # Two background words: the better one's probability, the other's is lost.
        assert ((everything.sum(0) > 0.5) & (everything.sum(0) < 1)).all()


def test_scores_by_hand(make: Make) -> None:
    """Softmax over the present words, by plain arithmetic on the encoder's and the tokenizer's own output."""
    generator = make(variant="maskclip")
    item = sample((20, 24))
    maps = generator.generate(item, (2, 4))
    tokens = F.normalize(generator._encoder.encode([item.image])[0].tokens, dim=-1)
    texts = generator._source.text_features(["a grass", "a sky", "a blue ring", "a cyan cross"])
    logits = 5.0 * (tokens @ texts.T).permute(2, 0, 1)
    logits = F.interpolate(logits[None], scale_factor=4, mode="bilinear", align_corners=False)[0]
    expected = logits.softmax(0)
    torch.testing.assert_close(maps.scores, expected[2:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(maps.background, expected[:2].amax(0), atol=1e-5, rtol=1e-4)


def test_label_filter(make: Make) -> None:
    item = sample()
    few = make().generate(item, (2, 4))
    every = make(filter_labels=False).generate(item, (2, 4))
    assert few.class_ids == (2, 4)
    assert every.class_ids == (1, 2, 3, 4, 5)
    # Leaving words out of the softmax scales what remains, it changes no ratio.
    chosen = every.scores[[1, 3]]
    assert (few.scores > chosen).all()
    torch.testing.assert_close(few.scores / few.scores[:1], chosen / chosen[:1])


def test_no_labels_leave_the_background(make: Make) -> None:
    maps = make().generate(sample(labels=()), ())
    assert maps.scores.shape == (0, 24, 40)
    assert (make_label_map(maps, "given") == 0).all()


def test_no_background_words(make: Make) -> None:
    generator = make(background_words=[])
    maps = generator.generate(sample(), (2, 4))
    assert maps.background is None
    torch.testing.assert_close(maps.scores.sum(0), torch.ones(24, 40))
    with pytest.raises(ConfigError, match="name a background word"):
        generator.generate(sample(labels=()), ())


def test_several_words(make: Make) -> None:
    """`max`: each word competes and the best one counts. `mean`: one text of them all."""
    item = sample()
    both = {"blue ring": ["blue ring", "magenta ring"]}
    words = make(class_words={"blue ring": "blue ring", "green star": "magenta ring"}).generate(item, (2, 3))
    best = make(class_words=both).generate(item, (2,))
    torch.testing.assert_close(best.scores[0], words.scores.amax(0))
    torch.testing.assert_close(best.background, words.background)
    mean = make(class_words=both, word_merge="mean")
    texts, owner = mean._texts
    assert owner == [0, 0, 1, 2, 3, 4, 5]
    features = mean._source.text_features(["a blue ring", "a magenta ring"])
    torch.testing.assert_close(texts[3], F.normalize(features.mean(0), dim=0))
    same = make(class_words={"blue ring": ["blue ring", "blue ring"]}, word_merge="mean").generate(item, (2,))
    torch.testing.assert_close(same.scores, make().generate(item, (2,)).scores)


def test_templates_are_averaged(make: Make) -> None:
    generator = make(templates=["a {}", "one {}", "the {}."])
    features = generator._source.text_features(["a sky", "one sky", "the sky."])
    torch.testing.assert_close(generator._texts[0][1], F.normalize(features.mean(0), dim=0))


def test_proposals_of_every_kind(make: Make) -> None:
    """None, none at all, one that covers everything: scores do not depend on them, the vote works with each."""
    item = sample()
    generator = make()
    none, empty, whole = None, torch.zeros(0, 24, 40, dtype=torch.bool), torch.ones(1, 24, 40, dtype=torch.bool)
    maps = [generator.generate(item, (2, 4), p) for p in (none, Proposals(empty), Proposals(whole))]
    for other in maps[1:]:
        assert torch.equal(other.scores, maps[0].scores)
    labels = make_label_map(maps[0], "given")
    assert torch.equal(region_vote(labels, Proposals(empty)), labels)
    assert (region_vote(labels, Proposals(whole)) == labels.flatten().mode().values).all()


# Windows


@pytest.mark.parametrize(
    ("height", "width", "window", "stride", "tops", "lefts"),
    [
        (336, 448, 336, 112, [0], [0, 112]),
        (375, 500, 336, 112, [0, 39], [0, 112, 164]),
        (100, 80, 336, 112, [0], [0]),
        (7, 5, 3, 2, [0, 2, 4], [0, 2]),
        (8, 5, 3, 3, [0, 3, 5], [0, 2]),
    ],
)
def test_window_boxes(height: int, width: int, window: int, stride: int, tops: list[int], lefts: list[int]) -> None:
    boxes = list_windows(height, width, window, stride)
    assert [(b[0], b[2]) for b in boxes] == [(top, left) for top in tops for left in lefts]
    seen = np.zeros((height, width), int)
    for top, bottom, left, right in boxes:
        assert (bottom - top, right - left) == (min(window, height), min(window, width))
        seen[top:bottom, left:right] += 1
    assert seen.min() >= 1
    assert seen.shape == (height, width)


def test_one_window_is_the_whole_image(make: Make) -> None:
    item = sample((19, 33))
    whole = make().generate(item, (2, 4)).scores
    assert torch.equal(make(window=40, stride=8).generate(item, (2, 4)).scores, whole)
    assert not torch.equal(make(window=16, stride=8).generate(item, (2, 4)).scores, whole)


def test_average_of_a_constant_is_that_constant(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many windows hold a pixel, and however far their last patches reach over the border."""
    generator = make(window=14, stride=5)
    direction = F.normalize(torch.arange(1.0, 25.0), dim=0)

    def constant(images: list[np.ndarray], proxies: object = None) -> list[TokenMap]:
        grids = [(-(-image.shape[0] // 4), -(-image.shape[1] // 4)) for image in images]
        pairs = zip(images, grids, strict=True)
        return [TokenMap(direction.expand(*grid, -1), 4, i.shape[:2], i.shape[:2]) for i, grid in pairs]

    monkeypatch.setattr(generator._encoder, "encode", constant)
    texts = F.normalize(torch.randn(3, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    image = sample((19, 33)).image
    expected = (texts @ direction)[:, None, None].expand(3, 19, 33)
    torch.testing.assert_close(generator._compare(image, texts), expected)


def test_windows_are_averaged(make: Make) -> None:
    """A pixel of one window has that window's similarity; a pixel of two has their mean."""
    generator = make(window=16, stride=8)
    texts = generator._texts[0]
    image = sample((16, 24)).image
    ours = generator._compare(image, texts)
    left, right = (make()._compare(image[:, at : at + 16], texts) for at in (0, 8))
    torch.testing.assert_close(ours[:, :, :8], left[:, :, :8], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours[:, :, 8:16], (left[:, :, 8:] + right[:, :, :8]) / 2, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours[:, :, 16:], right[:, :, 8:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("size", "short", "expected"), [((40, 60), 20, (20, 30)), ((30, 20), 25, (38, 25))])
def test_short_side(make: Make, size: tuple[int, int], short: int, expected: tuple[int, int]) -> None:
    image = sample(size).image
    assert resize_short_side(image, short).shape[:2] == expected
    assert resize_short_side(image, None) is image
    for variant in ("naclip", "proxyclip"):
        maps = make(short_side=short, window=16, stride=8, variant=variant).generate(sample(size), (2, 4))
        assert maps.scores.shape == (2, *size)


# Words


def test_published_lists() -> None:
    assert len(IMAGENET_TEMPLATES) == len(set(IMAGENET_TEMPLATES)) == 80
    assert all(template.count("{}") == 1 for template in IMAGENET_TEMPLATES)
    assert len(set(BACKGROUND_WORDS["voc"])) == 26
    assert len(set(BACKGROUND_WORDS["coco"])) == 16
    assert set(BACKGROUND_WORDS["coco"]) < set(BACKGROUND_WORDS["voc"])
    voc = ("background", "aeroplane", "boat", "diningtable", "person")
    assert resolve_class_words("voc", voc) == (("aeroplane",), ("ship",), ("table",), ("people",))
    assert resolve_class_words("coco", ("background", "boat", "person")) == (("boat",), ("people",))
    assert resolve_class_words(None, ("background", "traffic_light")) == (("traffic light",),)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "dense"}, r"variant: got 'dense'.*one of plain, maskclip"),
        ({"templates": "voc"}, r"templates: got 'voc', expected one of imagenet"),
        ({"templates": ["a photo"]}, r"expected sentences with one \{\}"),
        ({"templates": []}, r"templates: got \[\]"),
        ({"class_words": "ade"}, r"class_words: got 'ade', expected one of names, voc, .*coco"),
        ({"class_words": {"zebra": "horse"}}, r"class_words: got 'zebra', which is no class"),
        ({"class_words": {"red disc": []}}, r"expected one word or more"),
        ({"background_words": "ade"}, r"background_words: got 'ade'"),
        ({"background_words": [""]}, r"remove the empty ones"),
        ({"word_merge": "sum"}, r"word_merge: got 'sum'"),
        ({"logit_scale": 0}, r"logit_scale: got 0"),
        ({"stride": 400}, r"stride: got 400, expected 1 to the window's 336"),
        ({"short_side": 0}, r"short_side: got 0"),
        ({"batch_size": 0}, r"batch_size: got 0"),
        ({"gamma": 0.0}, r"gamma: got 0"),
    ],
)
def test_wrong_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build({"name": "clip_dense", **options}, CPU, proxy, NAMES)


def test_labels_that_are_no_class(make: Make) -> None:
    with pytest.raises(DataError, match=r"got labels \[6\], expected 1\.\.5"):
        make().generate(sample(), (2, 6))


def test_digest_covers_the_proxy(make: Make) -> None:
    alone, with_proxy = make().digest, make(variant="proxyclip").digest
    assert with_proxy == f"{alone}+random-0"


def test_missing_weights_name_the_key() -> None:
    generator = ClipDenseGenerator(ClipDenseOptions(weights="./nowhere"), CPU, proxy, NAMES)
    with pytest.raises(MissingError, match=r"^pseudo_masks\.generator\.weights: got '\./nowhere'"):
        generator.generate(sample(), (2, 4))
