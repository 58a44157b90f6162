"""Scores survive being stored, up to half precision; what is not a score file is refused."""

from __future__ import annotations

import zlib

import pytest
import torch
from safetensors.torch import save

from moduseg.errors import DataError
from moduseg.pseudo_masks.store import pack, unpack
from moduseg.structures import ScoreMaps


def maps(device: torch.device, background: bool = True, ignore: bool = True) -> ScoreMaps:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 9, 13, generator=generator).to(device)
    return ScoreMaps((3, 7), scores, 1 - scores.amax(0) if background else None, scores[0] > 0.9 if ignore else None)


@pytest.mark.parametrize(("background", "ignore"), [(True, True), (False, False), (True, False)])
def test_what_comes_back(background: bool, ignore: bool, device: torch.device) -> None:
    before = maps(device, background, ignore)
    after = unpack(pack(before), device)
    assert after.class_ids == (3, 7)
    assert after.scores.dtype == torch.float32
    assert after.scores.device.type == device.type
    assert torch.equal(after.scores, before.scores.half().float())
    assert (after.scores - before.scores).abs().max() < 3e-4
    assert (after.background is None) is not background
    assert (after.ignore is None) is not ignore
    if before.background is not None and after.background is not None:
        assert torch.equal(after.background, before.background.half().float())
    if before.ignore is not None and after.ignore is not None:
        assert torch.equal(after.ignore, before.ignore)


@pytest.mark.parametrize(("bits", "scale", "share", "tolerance"), [
    pytest.param(16, 1, 1.0, 3e-4, id="as it was"),
    pytest.param(8, 1, 0.6, 2.1e-3, id="8 bits"),
    pytest.param(16, 2, 0.4, 0.04, id="half resolution"),
    pytest.param(8, 2, 0.2, 0.04, id="8 bits at half resolution"),
])  # fmt: skip
def test_less_space_costs_little(bits: int, scale: int, share: float, tolerance: float, device: torch.device) -> None:
    """Waves, which noise on top keeps from being compressed away."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(101) / 20, torch.arange(131) / 20, indexing="ij")
    waves = torch.stack([y.sin() * x.cos(), x.sin()]) * 0.45 + 0.5
    scores = (waves + 0.002 * torch.rand(2, 101, 131, generator=generator)).to(device)
    before = ScoreMaps((3, 7), scores, 1 - scores.amax(0), scores[0] > 0.9)
    data = pack(before, bits=bits, scale=scale)
    after = unpack(data, device)
    assert len(data) <= share * len(pack(before))
    assert (after.scores - scores).abs().max() < tolerance
    assert before.background is not None
    assert after.background is not None
    assert (after.background - before.background).abs().max() < tolerance
    assert before.ignore is not None
    assert after.ignore is not None
    assert torch.equal(after.ignore, before.ignore)


@pytest.mark.parametrize("scale", [2, 8])
def test_no_class_keeps_its_size(scale: int, device: torch.device) -> None:
    empty = ScoreMaps((), torch.zeros(0, 5, 7, device=device))
    assert unpack(pack(empty, bits=8, scale=scale)).scores.shape == (0, 5, 7)


def test_the_fast_compression_is_written_and_any_is_read() -> None:
    data = pack(maps(torch.device("cpu")))
    assert data[1] >> 6 == 0  # the header's level, of which the default is 2
    slower = zlib.compress(zlib.decompress(data), 6)
    assert torch.equal(unpack(slower).scores, unpack(data).scores)


def test_no_class_and_equal_bytes(device: torch.device) -> None:
    empty = ScoreMaps((), torch.zeros(0, 4, 5, device=device))
    assert unpack(pack(empty)).scores.shape == (0, 4, 5)
    assert pack(maps(device)) == pack(maps(device))
    flat = ScoreMaps((1,), torch.zeros(1, 100, 100, device=device))
    assert len(pack(flat)) < 1000


@pytest.mark.parametrize(
    "data",
    [b"", b"x" * 40, zlib.compress(b"not tensors"), zlib.compress(save({"scores": torch.zeros(1, 2, 2)})),
     zlib.compress(save({"scores": torch.zeros(1, 2, 2), "class_ids": torch.tensor([1, 2])}))],
    ids=["empty", "noise", "no tensors", "no ids", "too many ids"],
)  # fmt: skip
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(DataError, match=r"a\.z: not readable as class scores .*run again"):
        unpack(data, name="a.z")


def test_a_truncated_file_is_refused(device: torch.device) -> None:
    with pytest.raises(DataError, match="not readable"):
        unpack(pack(maps(device))[:-5])
