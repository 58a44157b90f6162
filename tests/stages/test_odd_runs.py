"""Two hundred odd inputs through whole runs: none is wrong in silence, and none ends a run in another library's words.

Images, label maps and names that are odd each in their own way make up one folder, which is built into a bank and
labelled at once. Each is a copy of a right image, whose vectors and labels are known from a run on the right ones. An
image that still shows the same has to give the same; any other has the same, or is named by the run or by
`check_data`. Folders with odd label files and class lists are runs of their own.
"""

from __future__ import annotations

import json
import logging
import random
import struct
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from safetensors.torch import load_file

from moduseg.config import compose
from moduseg.datasets.io import read_label_png
from moduseg.errors import ModusegError
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.infer import Infer
from moduseg.tools import check_data
from tests.support.deep_png import encode_deep_png
from tests.support.odd_folders import (
    CHANGES,
    CLASSES,
    SIZE,
    TAGS,
    Change,
    draw_semantic,
    list_told_ids,
    make_folder,
)

NUM_IMAGES, NUM_FOLDERS = 174, 26
BASES = {"disc": "disc", "square": "square", "both": "disc;square"}
"""The right images and their tags."""
Pixels = np.ndarray


def settings(root: Path, *more: str) -> list[str]:
    """Return the overrides of a run on a folder: graph superpixels, the given label maps, a small random backbone."""
    return [
        "dataset=folder", f"dataset.root={root}", f"runtime.outputs={root}/outputs", "runtime.device=cpu",
        "proposer=superpixels", "pseudo_masks=ground_truth", "backbone=miniature_random", "retrieval.top_k=1",
        "retrieval.min_area=10", "bank.min_area=1", "evaluation.panels=0", "evaluation.report=false",
        "evaluation.bootstrap=0", *more,
    ]  # fmt: skip


def draw_base(name: str) -> Pixels:
    """Return the picture of a right image, `[H, W, 3]` uint8: noise with a disc and a square of even colours."""
    rng = np.random.default_rng(len(name))
    pixels = rng.integers(90, 110, (*SIZE, 3), dtype=np.uint8)
    labels = draw_semantic(BASES[name])
    pixels[labels == 1], pixels[labels == 2] = (220, 40, 40), (40, 60, 220)
    return pixels


def _encode(pixels: Pixels, kind: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def _encode_tiff(pixels: Pixels, **options: object) -> bytes:
    buffer = BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


def _lie_down(pixels: Pixels) -> bytes:
    """Return a picture that lies on its side, with the EXIF orientation that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encode(np.ascontiguousarray(np.rot90(pixels, 1)), exif=exif)


def _claim(width: int, height: int) -> Callable[[Pixels], bytes]:
    """Return what makes a PNG whose header claims a size."""

    def change(pixels: Pixels) -> bytes:
        data = bytearray(_encode(pixels))
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
        return bytes(data)

    return change


def _resized(height: int, width: int) -> Callable[[Pixels], bytes]:
    return lambda pixels: _encode(np.asarray(Image.fromarray(pixels).resize((width, height))))


def _with_opacity(pixels: Pixels, opacity: int) -> bytes:
    return _encode(np.concatenate([pixels, np.full((*SIZE, 1), opacity, np.uint8)], 2))


def _animate(pixels: Pixels, kind: str) -> bytes:
    return _encode(pixels, kind, save_all=True, append_images=[Image.fromarray(255 - pixels)], lossless=True)


def _damage(position: int) -> Callable[[Pixels], bytes]:
    def change(pixels: Pixels) -> bytes:
        data = bytearray(_encode(pixels))
        data[position % len(data)] ^= 0xFF
        return bytes(data)

    return change


@dataclass(frozen=True)
class OddImage:
    """A right image of which one thing is odd.

    Attributes:
        kind: what is odd.
        image: picture -> content of the image's file.
        mask: label map -> content of its file.
        suffix: of the image's file.
        name: of the image, in place of one of its number.
        shows: whether it shows the `same` as before, something `else` (told, or as before), or a picture of its own
            (`own`), of which only the size is known.
    """

    kind: str
    image: Callable[[Pixels], bytes] = _encode
    mask: Callable[[Pixels], bytes] = _encode
    suffix: str = ".png"
    name: str = ""
    shows: Literal["same", "else", "own"] = "same"


IMAGES = [
    *(OddImage(f"PNG called {suffix}", suffix=suffix) for suffix in (".jfif", ".JPG", ".jpe", ".tif", ".Png", ".webp")),
    OddImage("BMP", lambda p: _encode(p, "BMP"), suffix=".bmp"),
    OddImage("TIFF", lambda p: _encode(p, "TIFF"), suffix=".tiff"),
    OddImage("lossless WebP", lambda p: _encode(p, "WEBP", lossless=True), suffix=".webp"),
    OddImage("animated PNG", lambda p: _animate(p, "PNG"), shows="else"),
    OddImage("animated WebP", lambda p: _animate(p, "WEBP"), suffix=".webp", shows="own"),
    OddImage("GIF", lambda p: _encode(p, "GIF"), suffix=".gif", shows="own"),
    OddImage("JPEG", lambda p: _encode(p, "JPEG"), suffix=".jpg", shows="own"),
    OddImage("16-bit PNG", lambda p: encode_deep_png(p.astype(np.uint16) * 257)),
    OddImage("16-bit TIFF", lambda p: _encode_tiff(p.astype(np.uint16) * 257, photometric="rgb"), suffix=".tif"),
    OddImage("dark 16-bit PNG", lambda p: encode_deep_png(p.astype(np.uint16) * 8), shows="else"),
    OddImage("dark 16-bit grey", lambda p: _encode(p[:, :, 0].astype(np.uint16) * 8), shows="else"),
    OddImage("16 bits in planes", lambda p: _encode_tiff(
        p.transpose(2, 0, 1).astype(np.uint16) * 257, photometric="rgb", planarconfig="separate"), suffix=".tif",
        shows="else"),
    OddImage("float TIFF", lambda p: _encode_tiff(p[:, :, 0] / np.float32(255)), suffix=".tif", shows="else"),
    OddImage("32-bit TIFF", lambda p: _encode_tiff(p[:, :, 0].astype(np.int32) << 20), suffix=".tif", shows="else"),
    OddImage("opaque", lambda p: _with_opacity(p, 255)),
    OddImage("invisible", lambda p: _with_opacity(p, 0), shows="own"),
    OddImage("grey", lambda p: _encode(p[:, :, 0]), shows="own"),
    OddImage("bits", lambda p: _encode(p[:, :, 0] > 100), shows="own"),
    OddImage("on its side", _lie_down),
    OddImage("empty", lambda p: b"", shows="else"),
    OddImage("a web page", lambda p: b"<html>404 not found</html>", shows="else"),
    OddImage("a header of 100000 x 100000", _claim(100_000, 100_000), shows="else"),
    OddImage("a header of 0 x 9", _claim(0, 9), shows="else"),
    *(OddImage(f"cut at {length}", lambda p, length=length: _encode(p)[:length], shows="else")
      for length in (4, 20, 40, 200, 900)),
    *(OddImage(f"a byte at {position}", _damage(position), shows="else") for position in (1, 13, 18, 25, 60, 500, -6)),
    *(OddImage(f"{height} x {width}", _resized(height, width), shows="else")
      for height, width in ((1, 1), (1, 900), (900, 1), (2, 3000), (7, 5), (24, 31))),
]  # fmt: skip
NAMES = (
    "Größe", "it's", "a b", "tag#1", "a,b", "x=y", "me@work", "日本", "(1)", "[2]", "{3}", "a&b", "100%", "%20", "🐈",
       "v1.2.png", "~tilde", "$HOME", "a;b", '"quoted"', "sub/deep/name", "-dash", "x" * 180, "ｆｕｌｌ", "é́",
)  # fmt: skip
MASKS = [
    OddImage("binary mask", mask=lambda m: _encode(np.where(m > 0, 255, 0).astype(np.uint8)), shows="else"),
    OddImage("one value", mask=lambda m: _encode(np.full_like(m, 2)), shows="else"),
    OddImage("ids out of range", mask=lambda m: _encode(np.where(m > 0, 77, 0).astype(np.uint8)), shows="else"),
    OddImage("all ignored", mask=lambda m: _encode(np.full_like(m, 255)), shows="else"),
    OddImage("other colours", mask=lambda m: _encode(np.stack([m * 90] * 3, 2)), shows="else"),
    OddImage("16-bit ids", mask=lambda m: _encode(m.astype(np.uint16)), shows="same"),
    OddImage("16-bit ids, stretched", mask=lambda m: _encode(m.astype(np.uint16) * 300), shows="else"),
    OddImage("JPEG mask", mask=lambda m: _encode(m, "JPEG"), shows="else"),
    OddImage("no mask", mask=lambda m: b"", shows="else"),
    OddImage("half a mask", mask=lambda m: _encode(m)[:50], shows="else"),
    OddImage("a smaller mask", mask=lambda m: _encode(m[:-3]), shows="else"),
    OddImage("a mask on its side", mask=lambda m: _encode(np.ascontiguousarray(m.T)), shows="else"),
    OddImage("a mask with opacity", mask=lambda m: _encode(np.stack([m, np.full_like(m, 255)], 2)), shows="same"),
]  # fmt: skip


def list_odd_images() -> list[OddImage]:
    """Return every kind once, names of all forms, and pairs of an odd image with an odd mask up to the number."""
    rng = random.Random(0)
    odd = [*IMAGES, *MASKS, *(OddImage(f"called {name}", name=name) for name in NAMES)]
    while len(odd) < NUM_IMAGES:
        image, mask = rng.choice(IMAGES), rng.choice(MASKS)
        shows = "same" if image.shows == mask.shows == "same" else "own" if image.shows == "own" else "else"
        odd.append(OddImage(f"{image.kind}, {mask.kind}", image.image, mask.mask, image.suffix, shows=shows))
    return odd


def _write_folder(root: Path, images: dict[str, tuple[str, OddImage]]) -> None:
    """Write a folder of odd images: id -> name of the right image, and what is odd."""
    rows = ["image,labels"]
    for image_id, (base, odd) in images.items():
        for path, content in (
            (root / "images" / f"{image_id}{odd.suffix}", odd.image(draw_base(base))),
            (root / "masks" / f"{image_id}.png", odd.mask(draw_semantic(BASES[base]))),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        quoted = f"{image_id}{odd.suffix}".replace('"', '""')
        rows.append(f'"{quoted}",{BASES[base]}')
    (root / "labels.csv").write_text("\n".join([*rows, ""]), encoding="utf-8")
    (root / "classes.txt").write_text("\n".join(CLASSES), encoding="utf-8")


def _vectors_of(bank: Path, image_id: str) -> dict[str, torch.Tensor] | None:
    file = bank / "vectors" / f"{image_id}.safetensors"
    return load_file(file) if file.is_file() else None


def _is_same_bank_entry(bank: Path, image_id: str, clean: Path, base: str) -> bool:
    found, expected = _vectors_of(bank, image_id), _vectors_of(clean, base)
    assert expected is not None
    return found is not None and all(
        found[name].shape == expected[name].shape
        and torch.allclose(found[name].float(), expected[name].float(), atol=1e-4)
        for name in expected
    )


def test_no_odd_image_is_wrong_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clean, odd_root = tmp_path / "clean", tmp_path / "odd"
    _write_folder(clean, {name: (name, OddImage("right")) for name in BASES})
    clean_bank = BuildBank.run(compose(settings(clean)))
    clean_labels = Infer.run(compose(settings(clean, f"bank.path={clean_bank}"))) / "labels"
    images = {
        unicodedata.normalize("NFC", odd.name or f"case {number}"): (list(BASES)[number % 3], odd)
        for number, odd in enumerate(list_odd_images())
    }
    assert len(images) == NUM_IMAGES
    _write_folder(odd_root, images)
    # The runs come to their end, whatever is in the folder.
    with caplog.at_level(logging.WARNING):
        bank = BuildBank.run(compose(settings(odd_root)))
        predictions = Infer.run(compose(settings(odd_root, f"bank.path={clean_bank}")))
        report = check_data.run(compose(settings(odd_root)))
    failures = (odd_root / "outputs").rglob("failures.jsonl")
    lines = [line for path in failures for line in path.read_text(encoding="utf-8").splitlines()]
    told = list_told_ids(report.path) | {json.loads(line)["id"] for line in lines}
    wrong, counts = [], Counter[str]()
    for image_id, (base, odd) in images.items():
        file = predictions / "labels" / f"{image_id}.png"
        is_labelled = file.is_file() and np.array_equal(
            read_label_png(file), read_label_png(clean_labels / f"{base}.png")
        )
        is_same = is_labelled and _is_same_bank_entry(bank, image_id, clean_bank, base)
        is_told = odd.shows != "same" and (image_id in told or f"{image_id}{odd.suffix}" in caplog.text)
        has_own = odd.shows == "own" and file.is_file() and _vectors_of(bank, image_id) is not None
        outcome = "same" if is_same else "told" if is_told else "own" if has_own else "wrong"
        counts[outcome] += 1
        if outcome == "wrong":
            wrong.append((image_id, odd.kind, is_labelled, image_id in told))
    assert wrong == []
    assert min(counts[outcome] for outcome in ("same", "told", "own")) > 3, counts


def _list_folder_changes() -> list[list[Change]]:
    """Return what happens to label files and class lists: each alone, then pairs."""
    changes = [change for change in CHANGES if not any(word in change.name for word in ("mask", "image", "JFIF"))]
    rng = random.Random(1)
    return [[change] for change in changes] + [rng.sample(changes, 2) for _ in range(NUM_FOLDERS - len(changes))]


def _label_folder(root: Path) -> dict[str, bytes] | str:
    """Build a bank of a folder and label it; return the label maps by id, or the error that ended the run."""
    try:
        labels = Infer.run(compose(settings(root))) / "labels"
    except ModusegError as error:
        return str(error)
    return {path.relative_to(labels).as_posix(): path.read_bytes() for path in labels.rglob("*.png")}


def test_no_odd_folder_is_wrong_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path / "clean")
    expected = _label_folder(tmp_path / "clean")
    assert len(expected) == len(TAGS)
    outcomes = Counter[str]()
    for number, changes in enumerate(_list_folder_changes()):
        root, names = tmp_path / f"case {number}", [change.name for change in changes]
        make_folder(root)
        rng = random.Random(number)
        for change in changes:
            change.apply(root, rng)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            labels = _label_folder(root)
        if isinstance(labels, str):
            assert "\n" not in labels
            outcome = "refused"
        else:
            is_told = bool(caplog.text or list_told_ids(check_data.run(compose(settings(root))).path))
            outcome = "read" if labels == expected else "told" if is_told else "wrong"
        outcomes[outcome] += 1
        assert outcome != "wrong", names
        if all(change.is_harmless for change in changes):
            assert outcome == "read", (names, labels)
    assert outcomes.total() == NUM_FOLDERS
    assert set(outcomes) >= {"read", "refused"}
