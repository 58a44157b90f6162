"""Tokens that are kept on disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from moduseg import backbones
from moduseg.backbones import token_cache
from moduseg.backbones.base import Backbone
from moduseg.backbones.timm_backbone import TimmBackbone
from moduseg.backbones.token_cache import SUFFIX, CachedBackbone, TokenStore
from moduseg.config import compose
from moduseg.devices import Device
from moduseg.errors import ConfigError
from moduseg.files import _MACHINE
from moduseg.pipeline.workspace import Workspace
from moduseg.stages.infer import Infer
from moduseg.structures import TokenMap
from tests.support.pretend_cuda import CUDA, pretend_cuda, to_pretend
from tests.support.runs import overrides, result_bytes

CPU = Device(torch.device("cpu"))
SETTINGS = {"name": "means"}


class MeanBackbone(Backbone):
    """Tokens are means of 8 x 8 pixels times `scale`, and how many images shared the pass."""

    digest = "means"
    dim = 4

    def __init__(self, scale: float = 1 / 3) -> None:
        self.scale, self.num_passed = scale, 0

    def tokens(self, images: Sequence[np.ndarray]) -> list[TokenMap]:
        self.num_passed += len(images)
        maps = []
        for image in images:
            height, width = image.shape[:2]
            means = torch.from_numpy(image).float().view(height // 8, 8, width // 8, 8, 3).mean((1, 3)) * self.scale
            shared = torch.full((*means.shape[:2], 1), float(len(images)))
            maps.append(TokenMap(torch.cat([means, shared], 2), 4, (height, width), (height // 2, width // 2)))
        return maps


def make_images(rng: np.random.Generator, count: int = 3) -> list[np.ndarray]:
    return [rng.integers(0, 256, (16, 24, 3), dtype=np.uint8) for _ in range(count)]


def make_cached(folder: Path, max_bytes: int = 10**9, scale: float = 1 / 3) -> tuple[CachedBackbone, MeanBackbone]:
    plain = MeanBackbone(scale)
    return CachedBackbone(plain, TokenStore(folder, max_bytes), SETTINGS, CPU), plain


def list_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob(f"*{SUFFIX}"))


def assert_equal(maps: Sequence[TokenMap], expected: Sequence[TokenMap]) -> None:
    for found, wanted in zip(maps, expected, strict=True):
        assert torch.equal(found.tokens, wanted.tokens)
        assert found.tokens.dtype == torch.float32
        assert (found.stride, found.image_size, found.input_size) == (4, (16, 24), (8, 12))


class DeviceMeans(MeanBackbone):
    """`MeanBackbone` whose tokens are on the pretended GPU."""

    def tokens(self, images: Sequence[np.ndarray]) -> list[TokenMap]:
        return [
            TokenMap(to_pretend(found.tokens), found.stride, found.image_size, found.input_size)
            for found in super().tokens(images)
        ]


@pytest.mark.parametrize(
    ("num_stored", "num_waits", "num_copies"),
    [
        pytest.param(0, 1, 0, id="one wait stores a batch"),
        pytest.param(5, 0, 1, id="one copy brings a batch"),
        pytest.param(2, 1, 1, id="some are stored"),
    ],
)
def test_a_gpu_is_asked_once_a_batch(
    num_stored: int, num_waits: int, num_copies: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    images, expected = make_images(rng, 5), MeanBackbone()
    with pretend_cuda():
        cached = CachedBackbone(DeviceMeans(), TokenStore(tmp_path, 10**9), SETTINGS, Device(CUDA))
        if num_stored:
            cached.tokens(images[:num_stored])
        with pretend_cuda() as log:
            maps = cached.tokens(images)
        assert all(found.tokens.device == CUDA for found in maps)
    assert (log.waits.total(), log.copies.total()) == (num_waits, num_copies)
    for found, image in zip(maps, images, strict=True):
        wanted = expected.tokens([image])[0].tokens.half().float()
        assert torch.equal(found.tokens.cpu()[..., :3], wanted[..., :3])


def test_stored_tokens_are_those_of_the_first_pass(tmp_path: Path, rng: np.random.Generator) -> None:
    images = make_images(rng)
    cached, plain = make_cached(tmp_path)
    first = cached.tokens(images)
    rounded = [plain.tokens([image])[0].tokens.half().float() for image in images]
    assert all(torch.equal(found.tokens, tokens) for found, tokens in zip(first, rounded, strict=True))
    num_passed = plain.num_passed
    assert_equal(cached.tokens(images[::-1]), first[::-1])
    assert_equal(make_cached(tmp_path)[0].tokens(images[1:]), first[1:])
    assert plain.num_passed == num_passed
    # What shares a call does not show, whether it is stored or not.
    list_files(tmp_path)[0].unlink()
    assert_equal(cached.tokens(images), first)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[:-40], id="cut short"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:], id="one bit"),
    ],
)
def test_a_damaged_file_is_made_again(damage: object, tmp_path: Path, rng: np.random.Generator) -> None:
    assert callable(damage)
    images = make_images(rng, 1)
    cached, plain = make_cached(tmp_path)
    first = cached.tokens(images)
    file = list_files(tmp_path)[0]
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert_equal(cached.tokens(images), first)
    assert plain.num_passed == 2
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("max_files", "num_old", "expected"),
    [
        pytest.param(5, 0, 3, id="room for all"),
        pytest.param(2, 0, 2, id="what this run uses stays"),
        pytest.param(3, 3, 3, id="what it does not use goes"),
        pytest.param(4, 3, 4, id="the longest unused first"),
        pytest.param(0, 0, 0, id="no room at all"),
    ],
)
def test_the_folder_is_bounded(
    max_files: int, num_old: int, expected: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    make_cached(tmp_path)[0].tokens(make_images(rng, num_old))
    old = list_files(tmp_path)
    for age, file in enumerate(old):
        os.utime(file, (1000 - age, 1000 - age))
    images = make_images(rng)
    make_cached(tmp_path / "other")[0].tokens(images[:1])
    file_bytes = list_files(tmp_path / "other")[0].stat().st_size
    shutil.rmtree(tmp_path / "other")
    cached, plain = make_cached(tmp_path, max_files * file_bytes)
    cached.tokens(images)
    files = list_files(tmp_path)
    assert len(files) == expected
    kept = [file for file in old if file in files]
    assert kept == old[: len(kept)]  # the first one was used last
    cached.tokens(images)
    assert plain.num_passed == 3 + max(0, 3 - max_files)


def test_two_writers_see_each_others_files(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_SCAN_EVERY", 1)
    images = make_images(rng, 6)
    expected = make_cached(tmp_path / "alone")[0].tokens(images)
    file_bytes = list_files(tmp_path / "alone")[0].stat().st_size
    pairs = [make_cached(tmp_path / "shared", 4 * file_bytes) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        for maps in pool.map(lambda turn: pairs[turn % 2][0].tokens(images), range(12)):
            assert_equal(maps, expected)
    assert len(list_files(tmp_path / "shared")) <= 5  # one more than the bound, if both found room for the last one


def test_a_full_folder_is_seldom_looked_at(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_looks = 0
    scan = TokenStore._scan

    def count(store: TokenStore) -> list[tuple[float, int, Path]]:
        nonlocal num_looks
        num_looks += 1
        return scan(store)

    monkeypatch.setattr(TokenStore, "_scan", count)
    monkeypatch.setattr(token_cache, "_SCAN_EVERY", 10)
    make_cached(tmp_path, max_bytes=1)[0].tokens(make_images(rng, 20))
    assert num_looks == 2


def test_what_another_process_reads_or_removes_meanwhile(tmp_path: Path, rng: np.random.Generator) -> None:
    make_cached(tmp_path)[0].tokens(make_images(rng, 4))
    files = list_files(tmp_path)
    for age, file in enumerate(files):
        os.utime(file, (1000 + age, 1000 + age))
    file_bytes = files[0].stat().st_size
    cached, _ = make_cached(tmp_path, 4 * file_bytes)
    # The first new map takes the place of the longest unused one; then the next two are gone and read.
    cached.tokens(make_images(rng, 1))
    files[1].unlink()
    os.utime(files[2])
    cached.tokens(make_images(rng, 2))
    assert [file.is_file() for file in files] == [False, False, True, False]
    assert len(list_files(tmp_path)) == 4


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path, rng: np.random.Generator) -> None:
    leftover = tmp_path / "means-0" / f".image{SUFFIX}.{_MACHINE}.00000000.999999999.tmp"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    make_cached(tmp_path)[0].tokens(make_images(rng, 1))
    assert not leftover.exists()


def test_files_of_another_format_are_made_again(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, plain = make_cached(tmp_path)
    images = make_images(rng, 1)
    cached.tokens(images)
    monkeypatch.setattr(token_cache, "FORMAT", 0)
    cached.tokens(images)
    assert plain.num_passed == 2


def test_tokens_beyond_half_precision_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.token_cache: got tokens beyond 65504"):
        make_cached(tmp_path, scale=1e4)[0].tokens(make_images(rng, 1))
    assert not list_files(tmp_path)


def test_parts_are_stored_one_by_one(tmp_path: Path, rng: np.random.Generator) -> None:
    part = dict(compose(["backbone=miniature_random"]).backbone)
    both = {"name": "concat", "parts": [part, {**part, "seed": 1}], "context": 1.0}
    backbone = backbones.build(both, CPU, store=TokenStore(tmp_path, 10**9))
    assert backbone.tokens(make_images(rng, 1))[0].tokens.shape[2] == backbone.dim
    assert len({file.parent for file in list_files(tmp_path)}) == len(list_files(tmp_path)) == 2


def test_a_run_passes_each_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[int] = []
    tokens = TimmBackbone.tokens

    def count(backbone: TimmBackbone, images: Sequence[np.ndarray]) -> list[TokenMap]:
        passed.append(len(images))
        return tokens(backbone, images)

    monkeypatch.setattr(TimmBackbone, "tokens", count)
    arguments = overrides(tmp_path, "proposer=superpixels", "pseudo_masks=cam_photo", "runtime.token_cache=0.1")
    cfg = compose(arguments)
    Infer.run(cfg)
    assert passed == [1] * 10  # six images to train on, four to label
    expected = result_bytes(tmp_path)
    # Half of the cache is gone, and all results.
    files = list_files(tmp_path)
    assert len(files) == 10
    for file in files[::2]:
        file.unlink()
    for stage in (tmp_path / "miniature").iterdir():
        if stage.name not in ("tokens", "propose"):
            shutil.rmtree(stage)
    Infer.run(compose([*arguments, "runtime.token_cache=0.2"]))
    assert passed == [1] * 15
    assert result_bytes(tmp_path) == expected


def test_keys_say_whether_tokens_are_rounded(tmp_path: Path) -> None:
    off, on, more = (
        Workspace(compose(overrides(tmp_path, f"runtime.token_cache={size}"))).backbone_parts() for size in (0, 1, 2)
    )
    assert on == more == {**off, "tokens": "float16"}
    hardly = Workspace(compose(overrides(tmp_path, "runtime.token_cache=1e-10")))
    assert hardly.backbone_parts() == on
    assert isinstance(hardly.backbone, CachedBackbone)
    assert "tokens" not in off
