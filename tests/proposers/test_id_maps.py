"""Maps of ids as proposals: both formats, scores, damage; the converter; the exporter's own part."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import sys
import tracemalloc
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moduseg.errors import DataError, MissingError
from moduseg.proposers import build, sa1b
from moduseg.proposers.id_maps import read_id_map
from moduseg.structures import Sample
from moduseg.tools.convert import convert_folder
from tests.proposers.contract import CPU, ProposerContract, sample
from tests.support.grey_png import encode_grey_png

ROOT = Path(__file__).parents[2]
IDS = np.array([[0, 1, 1, 4], [2, 2, 1, 4], [0, 0, 0, 300]])


def write_npz(path: Path, ids: Any = IDS, **others: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, instance_mask=ids, **others)
    return path


def write_png(path: Path, ids: np.ndarray = IDS, dtype: Any = np.uint16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(ids.astype(dtype)).save(path)
    return path


class _Contract(ProposerContract):
    suffix: str

    def config(self, folder: Path, samples: Sequence[Sample]) -> dict[str, object]:
        for picture in samples:
            assert picture.instances is not None
            # One region more than the objects: the rest of the image.
            write = write_npz if self.suffix == ".npz" else write_png
            write(folder / f"{picture.id}{self.suffix}", picture.instances + 1)
        return {"name": "files", "folder": str(folder), "pattern": f"{{id}}{self.suffix}"}


class TestNpz(_Contract):
    suffix = ".npz"


class TestPng(_Contract):
    suffix = ".png"


@pytest.mark.parametrize("suffix", [".npz", ".png"])
def test_one_mask_for_each_id(tmp_path: Path, suffix: str) -> None:
    path = write_npz(tmp_path / "a.npz") if suffix == ".npz" else write_png(tmp_path / "a.png")
    for size in (None, (3, 4)):
        proposals = read_id_map(path, size)
        assert proposals.areas.tolist() == [3, 2, 2, 1]
        for mask, region in zip(proposals.masks, (1, 2, 4, 300), strict=True):
            np.testing.assert_array_equal(mask.numpy(), region == IDS)
        assert proposals.predicted_iou.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint64, bool])
def test_types_of_the_array(tmp_path: Path, kind: Any) -> None:
    proposals = read_id_map(write_npz(tmp_path / "a.npz", np.minimum(IDS, 5).astype(kind)))
    assert proposals.areas.sum() == 8


def test_no_region(tmp_path: Path) -> None:
    for ids in (np.zeros((2, 5), int), np.full((2, 5), -1)):
        assert read_id_map(write_npz(tmp_path / "a.npz", ids, scores=np.ones(3))).masks.shape == (0, 2, 5)


@pytest.mark.parametrize(
    ("ids", "scores", "expected"),
    [
        ([[1, 2, 4]], [0.1, 0.2, 0.4], [0.1, 0.2, 0.4]),
        ([[1, 2, 4]], [0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.4]),
        ([[1, 2, 3]], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),
        ([[0, 7, 9]], [0.7, 0.9], [0.7, 0.9]),
        ([[2]], [0.1, 0.2, 0.3], [0.2]),
    ],
)
def test_scores(tmp_path: Path, ids: list[list[int]], scores: list[float], expected: list[float]) -> None:
    proposals = read_id_map(write_npz(tmp_path / "a.npz", np.array(ids), scores=np.array(scores)))
    assert proposals.predicted_iou.tolist() == pytest.approx(expected)
    assert proposals.predicted_iou.dtype == torch.float32


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_png_of_few_bits(tmp_path: Path, bits: int) -> None:
    """Ids are what the file stores, not what a viewer shows."""
    import cv2

    ids = (np.arange(12).reshape(3, 4) % 2**bits).astype(np.uint8)
    picture = Image.fromarray(ids)
    picture.putpalette([0, 0, 0] * 256)
    picture.save(tmp_path / "p.png", bits=bits)
    np.testing.assert_array_equal(sorted(_values(tmp_path / "p.png", ids)), sorted(set(ids.flat) - {0}))
    cv2.imwrite(str(tmp_path / "g.png"), ids)
    np.testing.assert_array_equal(sorted(_values(tmp_path / "g.png", ids)), sorted(set(ids.flat) - {0}))


def _values(path: Path, ids: np.ndarray) -> set[int]:
    """The one id that lies under each mask."""
    values = [set(ids[mask.numpy()].tolist()) for mask in read_id_map(path).masks]
    assert all(len(v) == 1 for v in values)
    return {v.pop() for v in values}


def test_grey_of_four_bits(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_grey_png(np.array([[0, 1, 2, 15], [0, 0, 15, 0]]), 4))
    assert read_id_map(tmp_path / "a.png").areas.tolist() == [1, 1, 2]


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.abort, ())


def _bomb(path: Path) -> None:
    """A small file whose header states a large array."""
    with zipfile.ZipFile(path, "w") as archive, archive.open("instance_mask.npy", "w") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<i8", "fortran_order": False, "shape": (1 << 20, 1 << 20)}
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: write_npz(p, np.zeros((3, 4))), r"'instance_mask' is \[3, 4\] float64, expected \[H, W\] whole"),
        (lambda p: write_npz(p, np.zeros((1, 3, 4), int)), r"'instance_mask' is \[1, 3, 4\] int64"),
        (lambda p: write_npz(p, np.zeros((0, 4), int)), r"'instance_mask' is \[0, 4\]"),
        (lambda p: write_npz(p, np.array([[Trap()]], object)), r"'instance_mask' is \[1, 1\] object"),
        (lambda p: write_npz(p, np.full((3, 4), 1 << 40)), r"got id 1099511627776"),
        (lambda p: write_npz(p, scores=np.ones(2)), r"got 2 'scores' for 4 regions with ids up to 300"),
        (lambda p: write_npz(p, scores=np.ones((4, 1))), r"'scores' is \[4, 1\]"),
        (lambda p: write_npz(p, scores=np.array([1, np.nan, 1, 1])), r"'scores' holds values that are no numbers"),
        (lambda p: np.savez(p, masks=IDS), r"holds masks, expected an array 'instance_mask'"),
        (lambda p: write_npz(p, scores=np.ones(1 << 21)), r"'scores' is \[2097152\], expected 1048576 values at most"),
        (_bomb, r"'instance_mask' is \[1048576, 1048576\], expected 100000000 values at most"),
        (lambda p: p.write_bytes(b""), r"not readable as \.npz"),
        (lambda p: p.write_bytes(write_npz(p).read_bytes()[:150]), r"not readable as \.npz"),
        (lambda p: None, r"no such file"),
    ],
)
def test_bad_npz_is_one_line(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "a.npz")
    with pytest.raises(DataError, match=message) as caught:
        read_id_map(tmp_path / "a.npz")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Image.new("RGB", (4, 3)).save(p), r"got RGB pixels, expected a grey or indexed PNG"),
        (lambda p: Image.new("L", (4, 3)).save(p, "BMP"), r"not readable as a PNG \(a BMP file\)"),
        (lambda p: p.write_bytes(write_png(p).read_bytes()[:60]), r"not readable as a PNG"),
        (lambda p: p.write_bytes(b"x"), r"not readable as a PNG"),
        (lambda p: None, r"no such file"),
    ],
)
def test_bad_png_is_one_line(tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "a.png")
    with pytest.raises(DataError, match=message) as caught:
        read_id_map(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".npz", ".png"])
def test_a_map_far_larger_than_its_image_is_not_decoded(tmp_path: Path, suffix: str) -> None:
    ids = np.zeros((6000, 6000), np.uint16)
    path = tmp_path / f"a{suffix}"
    if suffix == ".npz":
        np.savez_compressed(path, instance_mask=ids.astype(np.int64))
    else:
        Image.fromarray(ids).save(path)
    assert path.stat().st_size < 300_000
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="the map is 6000 x 6000"):
            read_id_map(path, (4, 3))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize("suffix", [".npz", ".png"])
def test_of_another_size(tmp_path: Path, suffix: str) -> None:
    path = write_npz(tmp_path / "a.npz") if suffix == ".npz" else write_png(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"the map is 3 x 4 .* the image is 4 x 3"):
        build({"name": "files", "folder": str(tmp_path), "pattern": f"{{id}}{path.suffix}"}, CPU).propose(
            Sample("a", np.zeros((4, 3, 3), np.uint8))
        )


# The converter


def test_conversion_reads_back(tmp_path: Path) -> None:
    source, out = tmp_path / "maps", tmp_path / "json"
    write_npz(source / "trip/a b.npz", scores=np.array([0.1, 0.2, 0.3, 0.4]))
    write_png(source / "b.png")
    (source / "notes.txt").write_text("no map")
    done = convert_folder(source, out)
    assert (done.written, done.kept, done.failed) == (2, 0, {})
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.json")) == ["b.json", "trip/a b.json"]
    for name in ("trip/a b.npz", "b.png"):
        expected = read_id_map(source / name)
        read = sa1b.read_proposals((out / name).with_suffix(".json"), (3, 4))
        assert torch.equal(read.masks, expected.masks)
        assert torch.equal(read.predicted_iou, expected.predicted_iou)


def test_conversion_goes_on_where_it_was(tmp_path: Path) -> None:
    source, out = tmp_path / "maps", tmp_path / "json"
    for name in ("a", "b", "c"):
        write_npz(source / f"{name}.npz")
    convert_folder(source, out)
    (out / "b.json").unlink()
    write_npz(source / "c.npz", np.ones((2, 2), int))
    later = (out / "c.json").stat().st_mtime_ns + 10**9
    os.utime(source / "c.npz", ns=(later, later))
    done = convert_folder(source, out)
    assert (done.written, done.kept) == (2, 1)
    assert len(sa1b.read_proposals(out / "c.json")) == 1
    assert not [p for p in out.iterdir() if p.suffix != ".json"]


def test_conversion_leaves_out_what_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script: what is good is written, what is not is named, and the exit code says so."""
    source, out = tmp_path / "maps", tmp_path / "json"
    write_npz(source / "a.npz")
    (source / "b.npz").write_bytes(b"no")
    assert _script(monkeypatch, source, out) == 1
    printed = capsys.readouterr()
    assert "left out: " in printed.err
    assert "b.npz: not readable as .npz" in printed.err
    assert "1 written, 0 kept, 1 left out" in printed.out
    assert [p.name for p in out.iterdir()] == ["a.json"]


def _script(monkeypatch: pytest.MonkeyPatch, *arguments: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["convert_proposals.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "scripts" / "convert_proposals.py"), run_name="__main__")
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_conversion_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _script(monkeypatch, tmp_path / "none", tmp_path / "json") == 2
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(MissingError, match=r"no \.npz or \.png file"):
        convert_folder(tmp_path, tmp_path / "json")


def test_two_maps_of_one_image(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz")
    write_png(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a second map of 'a' beside a\.npz"):
        convert_folder(tmp_path, tmp_path / "json")


# The exporter for EntitySeg


@pytest.fixture(scope="module")
def exporter() -> Any:
    """The example as a module, imported from its file."""
    spec = importlib.util.spec_from_file_location("entityseg_export", ROOT / "examples" / "entityseg_export.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _instances(kind: torch.dtype = torch.bool) -> SimpleNamespace:
    masks = torch.from_numpy(np.stack([IDS == 1, IDS == 4, IDS == 99, IDS == 2])).to(kind)
    return SimpleNamespace(pred_masks=masks, scores=torch.tensor([0.9, 0.3, 0.8, 0.01]))


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.uint8])
def test_exported_masks_read_back(exporter: Any, tmp_path: Path, kind: torch.dtype) -> None:
    instances = _instances(kind)
    path = tmp_path / "trip" / "a.json"
    exporter.write_json(path, exporter.to_proposals(instances, "trip/a", min_score=0.05))
    proposals = sa1b.read_proposals(path, (3, 4))
    assert torch.equal(proposals.masks, _instances().pred_masks[:2])
    assert torch.equal(proposals.predicted_iou, instances.scores[:2])
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_exported_fields_are_ours(exporter: Any) -> None:
    ours = sa1b.to_annotations(sa1b.from_annotations(exporter.to_proposals(_instances(), "a"), (3, 4), "a"), "a")
    theirs = json.loads(json.dumps(exporter.to_proposals(_instances(), "a")))
    assert theirs["image"] == ours["image"]
    for a, b in zip(theirs["annotations"], ours["annotations"], strict=True):
        assert {**a, "predicted_iou": pytest.approx(b["predicted_iou"]), "stability_score": 1.0} == b


def test_the_exporter_stands_alone() -> None:
    text = (ROOT / "examples" / "entityseg_export.py").read_text(encoding="utf-8")
    assert "import moduseg" not in text
    assert "from moduseg" not in text


def test_export_of_an_empty_folder(
    exporter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config-file", "c.yaml", "--images", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["entityseg_export.py", *arguments])
    with pytest.raises(SystemExit):
        exporter.main()
    assert "no image in it" in capsys.readouterr().err


def test_export_goes_on_where_it_was(exporter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With detectron2's two entrances replaced: images that have their file are not predicted again."""
    for name in ("a", "sub/b"):
        path = tmp_path / "images" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sample(3, 4).image).save(path)
    seen: list[str] = []
    reader = SimpleNamespace(read_image=lambda path, format: seen.append(path) or np.zeros((3, 4, 3), np.uint8))
    for name in ("detectron2", "detectron2.data", "detectron2.data.detection_utils"):
        monkeypatch.setitem(sys.modules, name, reader)
    monkeypatch.setattr(exporter, "build_predictor", lambda *_: lambda image: {"instances": _instances()})
    arguments = ["--config-file", "c", "--images", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["entityseg_export.py", *arguments])
    assert exporter.main() == 0
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.json")) == [
        "a.json",
        "sub/b.json",
    ]
    (tmp_path / "out" / "sub" / "b.json").unlink()
    assert exporter.main() == 0
    assert len(seen) == 3
    assert seen[-1].endswith("b.png")
    read = build({"name": "files", "folder": str(tmp_path / "out")}, CPU).propose(sample(3, 4, "sub/b"))
    assert len(read) == 2
