"""ARM beside every CLIP host: untrained it is the host, trained it fits one CLIP, and gradients reach it alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from moduseg import backbones, pseudo_masks
from moduseg.backbones.arm import Arm, ArmRecord, ArmShape, choose_blocks, load_arm, read_record, write_arm
from moduseg.backbones.clip_attention import VARIANTS
from moduseg.errors import ArtefactError, ConfigError, MissingError
from moduseg.pseudo_masks.clip_words import ClipWordsGenerator
from tests.backbones.test_clip import tiny_config
from tests.pseudo_masks.contract import NAMES, halves, sample
from tests.support.devices import CPU

VIT = {
    "name": "timm",
    "model": "vit_tiny_patch16_224",
    "model_kwargs": {"img_size": 24, "patch_size": 3, "embed_dim": 16, "depth": 2, "num_heads": 2},
    "facet": "qk",
}
SHAPE = ArmShape(deep_width=24, shallow_width=32, blocks=(1, 1), width=16, heads=2, mlp_width=16)
KEY = "pseudo_masks.generator.arm"
Make = Callable[..., ClipWordsGenerator]


@pytest.fixture
def make(words: tuple[Path, int, int]) -> Make:
    """A host on a random two-block CLIP of width 32, texts of 24, patch 4; proxies have another grid."""

    def inner(variant: str = "naclip", **options: Any) -> ClipWordsGenerator:
        settings = {
            "name": "clip_dense",
            "weights": "random",
            "config": tiny_config(words[1], words[2]),
            "tokenizer": str(words[0]),
            "templates": ["a {}"],
            "background_words": ["grass", "sky"],
            "window": None,
            "logit_scale": 5.0,
            **({"name": "corrclip", "affinity": VIT} if variant == "corrclip" else {"variant": variant}),
            **options,
        }
        generator = pseudo_masks.build(settings, CPU, lambda: backbones.build(VIT, CPU), NAMES)
        assert isinstance(generator, ClipWordsGenerator)
        return generator

    return inner


def make_arm(shape: ArmShape = SHAPE, *, is_trained: bool = False) -> Arm:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        arm = Arm(shape)
        if is_trained:
            torch.nn.init.normal_(arm.out.weight)
            torch.nn.init.constant_(arm.log_scale, 0.5)
    return arm


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The file of an untrained ARM."""
    path = tmp_path / "arm.safetensors"
    write_arm(make_arm(), ArmRecord(SHAPE, "pixel:pets", "random-0", ("naclip",)), path)
    return path


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "windows",
    [pytest.param({}, id="whole image"), pytest.param({"window": 16, "stride": 8, "padding": 8}, id="windows")],
)
def test_an_untrained_arm_is_the_host(make: Make, weights: Path, variant: str, windows: dict[str, Any]) -> None:
    for size in ((24, 40), (19, 33), (5, 3)):
        maps, refined = (
            make(variant, **windows, **arm).generate(sample(size), (2, 4), halves(size))
            for arm in ({}, {"arm": str(weights)})
        )
        assert torch.equal(maps.scores, refined.scores)
        assert maps.background is not None
        assert refined.background is not None
        assert torch.equal(maps.background, refined.background)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_trained_arm_changes_every_host(make: Make, variant: str) -> None:
    host = make(variant)
    for size in ((24, 40), (19, 33), (1, 1)):
        item = sample(size)
        host.use_arm(None)
        before = host.generate(item, (2, 4), halves(size))
        host.use_arm(make_arm(is_trained=True).eval().requires_grad_(False))
        after = host.generate(item, (2, 4), halves(size))
        assert after.scores.shape == before.scores.shape
        assert after.scores.isfinite().all()
        assert (after.scores - before.scores).abs().max() > 1e-3


def test_features_are_those_of_a_plain_reading() -> None:
    """The module again, head by head, from its own matrices."""
    arm = make_arm(is_trained=True).double()
    features, shallow = torch.randn(2, 3, 5, 24).double(), torch.randn(2, 3, 5, 32).double()

    def attend(block: Any, queries: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        query, (key, value) = block.query(queries), block.key_value(context).chunk(2, -1)
        heads = []
        for columns in (slice(0, 8), slice(8, 16)):
            logits = query[..., columns] @ key[..., columns].mT / 8**0.5
            heads.append(logits.softmax(-1) @ value[..., columns])
        return block.out(torch.cat(heads, -1))

    deep = arm.deep(arm.deep_norm(features.flatten(1, 2)))
    hidden = arm.shallow(arm.shallow_norm(shallow.flatten(1, 2)))
    hidden = hidden + attend(arm.cross, arm.query_norm(hidden), deep)
    hidden = hidden + attend(arm.mix, arm.self_norm(hidden), arm.self_norm(hidden))
    hidden = hidden + arm.mlp(arm.mlp_norm(hidden))
    change = arm.out(arm.out_norm(hidden)).view_as(features) * features.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(arm(features, shallow), features + change)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_the_arm_alone(make: Make, variant: str) -> None:
    host, arm = make(variant), make_arm(is_trained=True)
    host.use_arm(arm)
    item = sample((24, 40))
    assert item.semantic is not None
    windows, labels, regions = zip(*host.cut_windows(item, item.semantic, halves(item.size)), strict=True)
    cosines = host.compare_windows(list(windows), list(regions) if host.needs_proposals else None)[0]
    loss = F.cross_entropy(
        (5.0 * arm.scale_factor * cosines).flatten(1).T, torch.from_numpy(labels[0]).long().flatten()
    )
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in arm.parameters())
    assert all(float(p.grad.abs().max()) > 0 for p in arm.parameters() if p is not arm.deep_norm.bias)  # type: ignore[union-attr]
    assert all(p.grad is None for p in host.source.model.parameters())


def test_windows_of_a_training_are_those_of_the_host(make: Make) -> None:
    host, item = make("naclip", window=16, stride=8, short_side=20), sample((24, 40))
    assert item.semantic is not None
    cut = list(host.cut_windows(item, item.semantic, None))
    assert len(cut) == 2 * 4
    assert {(image.shape, mask.shape) for image, mask, _ in cut} == {((16, 16, 3), (16, 16))}
    assert np.unique(np.concatenate([mask.ravel() for _, mask, _ in cut])).tolist() == [0, 2, 4]
    assert all(regions is None for _, _, regions in cut)


def test_the_file_says_what_it_is(make: Make, weights: Path) -> None:
    record = read_record(weights, KEY)
    assert record == ArmRecord(SHAPE, "pixel:pets", "random-0", ("naclip",))
    assert load_arm(weights, KEY).num_parameters == make_arm().num_parameters
    host = make(arm=str(weights))
    assert host.supervision == "pixel:pets"
    assert host.digest.startswith(f"{make().digest}+")
    assert make().supervision is None


def test_another_clip_is_warned_of(make: Make, weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(arm=str(weights), seed=1).generate(sample(), (2,), None)
    assert "trained beside a CLIP of other weights" in caplog.text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param(lambda path: path.unlink(), MissingError, "no such file", id="missing"),
        pytest.param(lambda path: path.write_bytes(b"text"), ArtefactError, "no safetensors file", id="no tensors"),
        pytest.param(lambda path: replace_shape(path, width=8), ArtefactError, "its own sizes", id="other sizes"),
        pytest.param(lambda path: write_other(path), ArtefactError, "holds no ARM", id="another model"),
        pytest.param(
            lambda path: write_fitting(path, deep_width=512, shallow_width=768),
            ConfigError,
            "a CLIP of width 768 with texts of 512, got one of width 32 with texts of 24",
            id="other widths",
        ),
        pytest.param(lambda path: write_fitting(path, blocks=(3, 6)), ConfigError, "takes blocks 3..6", id="depth"),
    ],
)
def test_files_that_do_not_fit(
    make: Make, weights: Path, change: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    change(weights)
    with pytest.raises(error, match=message) as caught:
        make(arm=str(weights)).generate(sample(), (2,), None)
    assert "\n" not in str(caught.value)
    assert KEY in str(caught.value)


def write_fitting(path: Path, **changes: Any) -> None:
    shape = dataclasses.replace(SHAPE, **changes)
    write_arm(Arm(shape), ArmRecord(shape, "pixel:pets", ""), path)


def replace_shape(path: Path, **changes: Any) -> None:
    write_arm(make_arm(), ArmRecord(dataclasses.replace(SHAPE, **changes), "pixel:pets", ""), path)


def write_other(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, path)


@pytest.mark.parametrize(("depth", "blocks"), [(12, (3, 6)), (24, (6, 12)), (6, (2, 3)), (2, (1, 1)), (1, (1, 1))])
def test_blocks_follow_the_depth(depth: int, blocks: tuple[int, int]) -> None:
    assert choose_blocks(depth) == blocks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "divisor"),
        ({"width": 0}, "1 or more"),
        ({"blocks": (0, 2)}, "from 1 on"),
        ({"blocks": (3, 2)}, ""),
    ],
)
def test_wrong_sizes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SHAPE, **changes)
