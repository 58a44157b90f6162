"""Folders of photographs, tags and label maps as people and programs make them: right ones, odd ones, broken ones."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HARMLESS = ("masks not indexed with the VOC palette", "images listed in both splits")
"""What `check_data` says of images that are right."""
SIZE = (24, 32)
TAGS = {"p0": "disc", "Größe 1": "square", "deep/it's #2": "disc;square"}
CLASSES = ("background", "disc", "square")


def draw_semantic(tags: str) -> np.ndarray:
    labels = np.zeros(SIZE, np.uint8)
    for column, name in enumerate(tags.split(";")):
        labels[4:20, 3 + 14 * column : 14 + 14 * column] = CLASSES.index(name)
    return labels


def write_picture(path: Path, array: np.ndarray, file_format: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, format=file_format)


def make_folder(root: Path) -> None:
    rng = np.random.default_rng(0)
    for image_id, tags in TAGS.items():
        write_picture(root / "images" / f"{image_id}.png", rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8))
        write_picture(root / "masks" / f"{image_id}.png", draw_semantic(tags))
    (root / "classes.txt").write_text("\n".join(CLASSES), encoding="utf-8")
    (root / "labels.csv").write_text(write_table(), encoding="utf-8")


def write_table(delimiter: str = ",", end: str = "\n") -> str:
    rows = [f"{image_id}.png{delimiter}{tags}" for image_id, tags in TAGS.items()]
    return end.join([f"image{delimiter}labels", *rows, ""])


def _edit(name: str, change: Callable[[str], str]) -> Callable[[Path, random.Random], None]:
    def apply(root: Path, _: random.Random) -> None:
        path = root / name
        path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")

    return apply


def _pick(root: Path, folder: str, rng: random.Random) -> Path:
    return rng.choice(sorted(path for path in (root / folder).rglob("*.png") if path.is_file()))


def _on_mask(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path, random.Random], None]:
    def apply(root: Path, rng: random.Random) -> None:
        path = _pick(root, "masks", rng)
        name = unicodedata.normalize("NFC", path.relative_to(root / "masks").as_posix())
        image_id = name.removesuffix(".png").removesuffix("_mask").removesuffix(" copy").removesuffix("_mask")
        write_picture(path, change(draw_semantic(TAGS[image_id])))

    return apply


def _decompose(root: Path, _: random.Random) -> None:
    for folder in ("images", "masks"):
        for path in list((root / folder).rglob("*.png")):
            path.rename(path.with_name(unicodedata.normalize("NFD", path.name)))


def _as_jpeg_mask(root: Path, rng: random.Random) -> None:
    path = _pick(root, "masks", rng)
    write_picture(path, np.asarray(Image.open(path)), "JPEG")


def _cut(folder: str) -> Callable[[Path, random.Random], None]:
    def apply(root: Path, rng: random.Random) -> None:
        path = _pick(root, folder, rng)
        path.write_bytes(path.read_bytes()[: rng.randrange(60)])

    return apply


def _rename(folder: str, suffix: str) -> Callable[[Path, random.Random], None]:
    def apply(root: Path, rng: random.Random) -> None:
        path = _pick(root, folder, rng)
        path.rename(path.with_name(path.stem + suffix))

    return apply


def _add(name: str, content: bytes = b"x") -> Callable[[Path, random.Random], None]:
    return lambda root, _: (root / name).write_bytes(content) and None


@dataclass(frozen=True)
class Change:
    """One thing that happens to a folder; `is_harmless` if it then still means the same."""

    name: str
    apply: Callable[[Path, random.Random], None]
    is_harmless: bool


CHANGES = [
    Change("Excel's semicolons", lambda root, _: (root / "labels.csv").write_text(write_table(";")) and None, True),
    Change("tabs", lambda root, _: (root / "labels.csv").write_text(write_table("\t", "\r\n")) and None, True),
    Change("rows of commas", _edit("labels.csv", lambda text: text.replace("\n", "\n,\n", 1) + ",\n,,\n"), True),
    Change("byte order mark", _edit("labels.csv", lambda text: "\ufeff" + text.lstrip("\ufeff")), True),
    Change("background as a tag", _edit("labels.csv", lambda text: text.replace("disc", "_background_;disc", 1)), True),
    Change("LabelMe's classes", _edit("classes.txt", lambda _: "__ignore__\n_background_\ndisc\nsquare\n"), True),
    Change("decomposed names", _decompose, True),
    Change("decomposed tags", _edit("labels.csv", lambda text: unicodedata.normalize("NFD", text)), True),
    Change("_mask.png", _rename("masks", "_mask.png"), True),
    Change("a loop of links", lambda root, _: (root / "images" / "again").symlink_to(root / "images"), True),
    Change("other files", _add("images/p1.psd"), True),
    Change("JFIF", _rename("images", ".jfif"), True),
    Change("ids in place of names", _edit("labels.csv", lambda t: t.replace("disc", "1").replace("square", "2")), True),
    Change("another case", _edit("labels.csv", lambda text: text.replace("disc", "Disc", 1)), False),
    Change("an unknown tag", _edit("labels.csv", lambda text: text.replace("square", "triangle", 1)), False),
    Change("another header", _edit("labels.csv", lambda text: text.replace("image", "file", 1)), False),
    Change("a surplus cell", _edit("labels.csv", lambda text: text.replace("disc", "disc,7", 1)), False),
    Change("no background", _edit("classes.txt", lambda text: text.replace("background\n", "")), False),
    Change("binary mask", _on_mask(lambda labels: np.where(labels > 0, 255, 0).astype(np.uint8)), False),
    Change("ids of another list", _on_mask(lambda labels: np.where(labels > 0, 77, 0).astype(np.uint8)), False),
    Change("one value", _on_mask(lambda labels: np.full_like(labels, 2)), False),
    Change("colours", _on_mask(lambda labels: np.stack([labels * 90] * 3, 2)), False),
    Change("another size", _on_mask(lambda labels: labels[:-3]), False),
    Change("16-bit ids", _on_mask(lambda labels: labels.astype(np.uint16) * 300), False),
    Change("JPEG mask", _as_jpeg_mask, False),
    Change("half a mask", _cut("masks"), False),
    Change("half an image", _cut("images"), False),
    Change("a mask of no image", _rename("masks", " copy.png"), False),
    Change("an image of another name", _rename("images", " copy.png"), False),
]  # fmt: skip


def list_told_ids(report_folder: Path) -> set[str]:
    """Return the images of which `check_data` says that something is wrong."""
    lines = (report_folder / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    return {problem["id"] for problem in map(json.loads, lines) if problem["check"] not in HARMLESS}
