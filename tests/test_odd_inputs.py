"""Two hundred odd or mutilated folders: each is read rightly, or ends in one line of ours; none is wrong in silence.

Every case begins as a right folder of three photographs with tags and label maps, whose reading is known. It then
undergoes one to three changes of the kinds that people and programs make. A change says whether the folder still means
the same: then the reading has to be the same. Else each image is read as before, or its error, a warning or a line of
`check_data` says what is wrong.
"""

from __future__ import annotations

import json
import logging
import random
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moduseg import datasets
from moduseg.config import compose
from moduseg.datasets.base import Dataset
from moduseg.errors import DataError, ModusegError
from moduseg.tools import check_data

SIZE = (24, 32)
NUM_CASES = 200
TAGS = {"p0": "disc", "Größe 1": "square", "deep/it's #2": "disc;square"}
CLASSES = ("background", "disc", "square")


def _semantic(tags: str) -> np.ndarray:
    labels = np.zeros(SIZE, np.uint8)
    for column, name in enumerate(tags.split(";")):
        labels[4:20, 3 + 14 * column : 14 + 14 * column] = CLASSES.index(name)
    return labels


def _write(path: Path, array: np.ndarray, file_format: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, format=file_format)


def _make_folder(root: Path) -> None:
    rng = np.random.default_rng(0)
    for image_id, tags in TAGS.items():
        _write(root / "images" / f"{image_id}.png", rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8))
        _write(root / "masks" / f"{image_id}.png", _semantic(tags))
    (root / "classes.txt").write_text("\n".join(CLASSES), encoding="utf-8")
    (root / "labels.csv").write_text(_table(), encoding="utf-8")


def _table(delimiter: str = ",", end: str = "\n") -> str:
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
        _write(path, change(_semantic(TAGS[image_id])))

    return apply


def _decompose(root: Path, _: random.Random) -> None:
    for folder in ("images", "masks"):
        for path in list((root / folder).rglob("*.png")):
            path.rename(path.with_name(unicodedata.normalize("NFD", path.name)))


def _as_jpeg_mask(root: Path, rng: random.Random) -> None:
    path = _pick(root, "masks", rng)
    _write(path, np.asarray(Image.open(path)), "JPEG")


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
    Change("Excel's semicolons", lambda root, _: (root / "labels.csv").write_text(_table(";")) and None, True),
    Change("tabs", lambda root, _: (root / "labels.csv").write_text(_table("\t", "\r\n")) and None, True),
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


def _read(dataset: Dataset, image_id: str) -> tuple[tuple[int, ...] | None, bytes | None, bytes]:
    sample = dataset.load(image_id, truth=True)
    return sample.labels, None if sample.semantic is None else sample.semantic.tobytes(), sample.image.tobytes()


def _expected(image_id: str, pixels: dict[str, bytes]) -> tuple[tuple[int, ...] | None, bytes | None, bytes]:
    tags = tuple(sorted(CLASSES.index(name) for name in TAGS[image_id].split(";")))
    return tags, _semantic(TAGS[image_id]).tobytes(), pixels[image_id]


def _check_case(root: Path, changes: list[Change], caplog: pytest.LogCaptureFixture) -> str:
    """Read a folder after its changes; return what happened: `read`, `refused`, `told`."""
    pixels = {i: np.asarray(Image.open(root / "images" / f"{i}.png")).tobytes() for i in TAGS}
    rng = random.Random(str(root.name))
    for change in changes:
        change.apply(root, rng)
    caplog.clear()
    is_harmless = all(change.is_harmless for change in changes)
    messages: list[str] = []
    wrong: list[str] = []
    report = None
    try:
        dataset = datasets.build({"name": "folder", "root": str(root)}, "train")
        for image_id in dataset.ids:
            try:
                is_right = image_id in TAGS and _read(dataset, image_id) == _expected(image_id, pixels)
            except DataError as error:
                messages.append(str(error))
            else:
                wrong += [] if is_right else [image_id]
        wrong += sorted(set(TAGS) - set(dataset.ids))
        report = check_data.run(compose(["dataset=folder", f"dataset.root='{root}'", f"runtime.outputs='{root}/out'"]))
    except ModusegError as error:
        messages.append(str(error))
    assert not any("\n" in message for message in messages)
    if is_harmless:
        assert (wrong, messages) == ([], [])
        assert report is not None
        assert not report.is_broken, report.table
        return "read"
    if report is None:
        return "refused"
    lines = (report.path / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    told = {json.loads(line)["id"] for line in lines} | {word for word in (*TAGS, "copy") if word in caplog.text}
    for image_id in wrong:
        assert image_id in told or "fit no image" in caplog.text, (image_id, report.table, caplog.text)
    return "told"


def test_no_odd_folder_is_wrong_in_silence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(0)
    outcomes: dict[str, int] = {}
    with caplog.at_level(logging.WARNING):
        for case in range(NUM_CASES):
            # Each change alone first, then two or three of different kinds.
            changes = [CHANGES[case]] if case < len(CHANGES) else rng.sample(CHANGES, rng.choice((2, 3)))
            root = tmp_path / f"case {case}"
            _make_folder(root)
            try:
                outcome = _check_case(root, changes, caplog)
            except Exception as error:
                raise AssertionError(f"case {case}: {[change.name for change in changes]}: {error!r}") from error
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert sum(outcomes.values()) == NUM_CASES
    assert set(outcomes) == {"read", "refused", "told"}
