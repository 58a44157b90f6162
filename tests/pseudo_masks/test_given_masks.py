"""Pseudo masks from files and from ground truth."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch
from PIL import Image

from moduseg.backbones.base import Backbone
from moduseg.config import compose
from moduseg.devices import Device
from moduseg.errors import ArtefactError, ConfigError, DataError, MissingError
from moduseg.files import file_digest
from moduseg.masks.palette import voc_palette
from moduseg.pseudo_masks import build
from moduseg.pseudo_masks.base import PseudoMaskGenerator
from moduseg.pseudo_masks.files import FilePseudoMasks, read_label_map
from moduseg.pseudo_masks.ground_truth import GroundTruthPseudoMasks
from moduseg.pseudo_masks.labels import make_label_map
from moduseg.structures import Sample
from tests.pseudo_masks.contract import CLASSES, GeneratorContract, sample
from tests.support.devices import CPU
from tests.support.grey_png import encode_grey_png


def no_backbone() -> Backbone:
    raise LookupError("a backbone was asked for")


def write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    picture.putpalette(voc_palette().tobytes())
    picture.save(path)


class TestFiles(GeneratorContract):
    @pytest.fixture
    def generator(self, tmp_path: Path, device: torch.device) -> FilePseudoMasks:
        for size in ((24, 40), (19, 33)):
            for labels in ((), (2,), (2, 4)):
                item = sample(size, labels, f"{size[0]}-{len(labels)}")
                assert item.semantic is not None
                write(tmp_path / f"{item.id}.png", item.semantic)
        return FilePseudoMasks(str(tmp_path), Device(device), CLASSES)


class TestGroundTruth(GeneratorContract):
    @pytest.fixture
    def generator(self, device: torch.device) -> GroundTruthPseudoMasks:
        return GroundTruthPseudoMasks(Device(device))

    def test_needs_truth(self, generator: GroundTruthPseudoMasks) -> None:
        assert generator.needs_truth
        with pytest.raises(DataError, match="no ground truth"):
            generator.generate(Sample("a", sample().image), (2,))


MAP = np.array([[0, 1, 2, 255], [5, 5, 0, 2]], np.uint8)


def from_file(folder: Path, **arguments: Any) -> PseudoMaskGenerator:
    write(folder / "sub" / "a.png", MAP)
    return FilePseudoMasks(str(folder), CPU, CLASSES, **arguments)


def from_truth(folder: Path, **arguments: Any) -> PseudoMaskGenerator:
    return GroundTruthPseudoMasks(CPU, **arguments)


@pytest.mark.parametrize("make", [from_file, from_truth])
@pytest.mark.parametrize(
    ("filter_labels", "labels", "ids", "expected"),
    [
        (True, (2, 5), (2, 5), [[0, 0, 2, 255], [5, 5, 0, 2]]),
        (True, (), (), [[0, 0, 0, 255], [0, 0, 0, 0]]),
        (True, (3, 5), (3, 5), [[0, 0, 0, 255], [5, 5, 0, 0]]),
        (False, (3,), (1, 2, 5), MAP.tolist()),
    ],
)
def test_label_filter(
    make: Callable[..., PseudoMaskGenerator],
    filter_labels: bool,
    labels: tuple[int, ...],
    ids: tuple[int, ...],
    expected: list[list[int]],
    tmp_path: Path,
) -> None:
    item = Sample("sub/a", np.zeros((2, 4, 3), np.uint8), labels, MAP)
    maps = make(tmp_path, filter_labels=filter_labels).generate(item, labels, None)
    assert maps.class_ids == ids
    assert make_label_map(maps, "given").tolist() == expected


def test_pattern_and_digest(tmp_path: Path) -> None:
    item = Sample("a", np.zeros((2, 4, 3), np.uint8), (2,))
    write(tmp_path / "a_mask.png", MAP)
    generator = FilePseudoMasks(str(tmp_path), CPU, CLASSES, pattern="{id}_mask.png")
    assert make_label_map(generator.generate(item, (2,)), "given").tolist() == [[0, 0, 2, 255], [0, 0, 0, 2]]
    before = generator.digest
    write(tmp_path / "a_mask.png", MAP[::-1].copy())
    assert generator.digest != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (np.zeros((4, 2), np.uint8), r"got \(4, 2\) pixels, expected the image's \(2, 4\)"),
        (np.full((2, 4), 6, np.uint8), r"got class ids \[6\], expected 0..5 or 255"),
        (np.full((2, 4, 3), 9, np.uint8), r"got a colour picture with 1 colours outside the VOC palette"),
        (np.full((2, 4), 300, np.uint16), r"got label id 300, expected ids 0\.\.255"),
        (b"", "got an empty file"),
        (b"\x89PNG\r\n\x1a\n broken", "unreadable as an image"),
    ],
    ids=["absent", "size", "id", "rgb", "16 bit", "empty", "broken"],
)
def test_bad_files(tmp_path: Path, content: np.ndarray | bytes | None, message: str) -> None:
    file = tmp_path / "a.png"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        Image.fromarray(content).save(file)
    with pytest.raises(DataError, match=message):
        FilePseudoMasks(str(tmp_path), CPU, CLASSES).generate(Sample("a", np.zeros((2, 4, 3), np.uint8)), (2,))


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param(MAP, id="8-bit grey"),
        pytest.param(MAP.astype(np.uint16), id="16-bit grey"),
        pytest.param(voc_palette()[MAP], id="colours of the VOC palette"),
    ],
)
def test_label_maps_of_any_tool_are_read(stored: np.ndarray) -> None:
    content = BytesIO()
    Image.fromarray(stored).save(content, "PNG")
    np.testing.assert_array_equal(read_label_map(content.getvalue(), "a.png", 5), MAP)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_of_few_bits_keeps_its_ids(tmp_path: Path, bits: int) -> None:
    ids = np.array([[0, 1, 0, 1], [0, 0, min(2**bits - 1, 5), 1]], np.uint8)
    content = encode_grey_png(ids, bits)
    (tmp_path / "a.png").write_bytes(content)
    archive = packed(tmp_path / "masks.zip", {"a.png": content})
    item = Sample("a", np.zeros((2, 4, 3), np.uint8))
    for folder in (tmp_path, archive):
        generator = FilePseudoMasks(str(folder), CPU, CLASSES, filter_labels=False)
        np.testing.assert_array_equal(make_label_map(generator.generate(item, ()), "given"), ids)


def test_an_archive_that_inflates_without_end(tmp_path: Path) -> None:
    archive = tmp_path / "masks.zip"
    with ZipFile(archive, "w", ZIP_DEFLATED) as file:
        file.writestr("a.png", b"\0" * (64 << 20))
    assert archive.stat().st_size < 300_000
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"a\.png: got 67108864 bytes, expected at most 1048640"):
            FilePseudoMasks(str(archive), CPU, CLASSES).generate(Sample("a", np.zeros((2, 4, 3), np.uint8)), (2,))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize("packs", [False, True], ids=["folder", "archive"])
def test_a_name_with_a_nul_byte(tmp_path: Path, packs: bool) -> None:
    folder = packed(tmp_path / "masks.zip", {}) if packs else tmp_path
    item = Sample("a\0b", np.zeros((2, 4, 3), np.uint8))
    with pytest.raises(DataError, match=r"no such file|cannot be read"):
        FilePseudoMasks(str(folder), CPU, CLASSES).generate(item, (2,))


def test_truncated_file(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    write(file, np.random.default_rng(0).integers(0, 6, (80, 80)).astype(np.uint8))
    file.write_bytes(file.read_bytes()[:-900])
    with pytest.raises(DataError, match="unreadable as an image"):
        FilePseudoMasks(str(tmp_path), CPU, CLASSES).generate(Sample("a", np.zeros((80, 80, 3), np.uint8)), (2,))


def packed(path: Path, files: dict[str, bytes]) -> Path:
    with ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_an_archive_is_read_as_its_folder_would_be(tmp_path: Path) -> None:
    """Whatever lies beside the label maps is no concern of theirs."""
    write(tmp_path / "maps" / "pseudo" / "a.png", MAP)
    content = (tmp_path / "maps" / "pseudo" / "a.png").read_bytes()
    files = {
        "pseudo/a.png": content,
        "pseudo/b.png": content[: len(content) // 2],
        "pseudo/": b"",
        "__MACOSX/pseudo/._a.png": b"?",
    }
    archive = packed(tmp_path / "masks.zip", files)
    item = Sample("a", np.zeros((2, 4, 3), np.uint8), (2, 5))
    both = [
        FilePseudoMasks(str(folder), CPU, CLASSES, pattern="pseudo/{id}.png") for folder in (tmp_path / "maps", archive)
    ]
    label_maps = [make_label_map(generator.generate(item, (2, 5)), "given").tolist() for generator in both]
    assert label_maps[0] == label_maps[1] == [[0, 0, 2, 255], [5, 5, 0, 2]]
    assert both[1].digest == file_digest(archive)
    for name, message in (
        ("c", r"masks\.zip/pseudo/c\.png: no such file.*pattern"),
        ("b", "unreadable as an image"),
    ):
        with pytest.raises(DataError, match=message):
            both[1].generate(Sample(name, item.image, (2,)), (2,))


def test_a_damaged_archive(tmp_path: Path) -> None:
    write(tmp_path / "a.png", MAP)
    archive = packed(tmp_path / "masks.zip", {"a.png": (tmp_path / "a.png").read_bytes()})
    item, content = Sample("a", np.zeros((2, 4, 3), np.uint8), (2,)), archive.read_bytes()
    archive.write_bytes(content[:-20])
    with pytest.raises(ArtefactError, match=r"masks\.zip: not readable as a zip archive .*fetch it again"):
        FilePseudoMasks(str(archive), CPU, CLASSES).generate(item, (2,))
    archive.write_bytes(content[:60] + b"\x00\x00\x00" + content[63:])
    with pytest.raises(DataError, match=r"a\.png: cannot be read \(Bad CRC"):
        FilePseudoMasks(str(archive), CPU, CLASSES).generate(item, (2,))


@pytest.mark.parametrize(("name", "folder", "image_id", "inside"), [
    ("published_voc", "VOC2012", "2007_000032", "pseudo/corrclip/2007_000032.png"),
    ("published_coco", "COCO2014", "COCO_train2014_000000000009",
     "pseudo/corrclip/train2014/COCO_train2014_000000000009.png"),
    ("published_ade20k", "ADEChallengeData2016", "ADE_train_00000001",
     "pseudo/corrclip/training/ADE_train_00000001.png"),
    ("published_cityscapes", "CityScapes", "aachen/aachen_000000_000019",
     "pseudo/corrclip/train/aachen_000000_000019_leftImg8bit.png"),
    ("published_cityscapes", "CityScapes", "aachen/aachen_000000_000019", "aachen_000000_000019_leftImg8bit.png"),
])  # fmt: skip
def test_the_published_masks_say_what_to_fetch(
    name: str, folder: str, image_id: str, inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archive is found where it is put, at the place that the message names."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("MODUSEG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    for data in ("VOC", "COCO", "ADE20K", "CITYSCAPES"):
        monkeypatch.delenv(f"MODUSEG_{data}_MASKS", raising=False)
    settings = compose([f"pseudo_masks={name}"]).pseudo_masks.generator
    home = tmp_path / "home" / "huggingface.co" / "datasets" / "QZing007" / "ModuSeg-Pseudo-Masks" / "main"
    with pytest.raises(MissingError, match=r"pseudo_masks\.generator\.folder: got .hf://datasets/QZing007") as caught:
        _ = build(settings, CPU, no_backbone, CLASSES).digest
    page = "https://huggingface.co/datasets/QZing007/ModuSeg-Pseudo-Masks"
    assert f"fetch {folder}/pseudo.zip from {page} into {home}" in str(caught.value)
    (home / folder).mkdir(parents=True)
    write(tmp_path / "a.png", MAP)
    packed(home / folder / "pseudo.zip", {inside: (tmp_path / "a.png").read_bytes()})
    item = Sample(image_id, np.zeros((2, 4, 3), np.uint8))
    maps = build(settings, CPU, no_backbone, CLASSES).generate(item, (2,), None)
    assert make_label_map(maps, "given").tolist() == [[0, 0, 2, 255], [0, 0, 0, 2]]


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_a_file_is_found_in_any_folder(kind: str, tmp_path: Path) -> None:
    root = tmp_path / "masks"
    for name in ("deep/er/x_1.png", "x_2.png", "a/x_3.png", "b/x_3.png"):
        write(root / name, MAP)
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.png")}
    packed(tmp_path / "masks.zip", files)
    where = root if kind == "folder" else tmp_path / "masks.zip"
    generator = FilePseudoMasks(str(where), CPU, CLASSES, "**/{name}.png")
    for image_id in ("city/x_1", "x_2"):
        maps = generator.generate(Sample(image_id, np.zeros((2, 4, 3), np.uint8)), (2,))
        assert make_label_map(maps, "given").tolist() == [[0, 0, 2, 255], [0, 0, 0, 2]]
    for image_id, message in (("x_3", r"got 2 files x_3\.png \(a/x_3\.png, b/x_3\.png\)"), ("x_4", "x_4.png: no such")):
        with pytest.raises(DataError, match=message):
            generator.generate(Sample(image_id, np.zeros((2, 4, 3), np.uint8)), (2,))


def test_missing_folder(tmp_path: Path) -> None:
    generator = build({"name": "files", "folder": str(tmp_path / "no")}, CPU, no_backbone, CLASSES)
    message = "pseudo_masks.generator.folder: got .*no such folder"
    with pytest.raises(MissingError, match=message):
        generator.generate(sample(), (2,), None)
    with pytest.raises(MissingError, match=message):
        _ = generator.digest


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"name": "files", "folder": "x", "pattern": "a.png"}, "pattern: got 'a.png'"),
        ({"name": "files"}, "pseudo_masks.generator.folder: missing"),
        ({"name": "ground_truth", "folder": "x"}, "folder: unknown key"),
    ],
)
def test_bad_settings(cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(cfg, CPU, no_backbone, CLASSES)


CONFIGS = Path(__file__).parents[2] / "configs" / "pseudo_masks"


@pytest.mark.parametrize("name", ["cam", "cam_photo", "files", "ground_truth"])
def test_shipped_configurations_build(name: str) -> None:
    from omegaconf import OmegaConf

    cfg = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"), resolve=True)
    assert isinstance(cfg, dict)
    assert set(cfg) <= {"generator", "background", "refine"}
    assert isinstance(build(cfg["generator"], CPU, no_backbone, CLASSES), PseudoMaskGenerator)
