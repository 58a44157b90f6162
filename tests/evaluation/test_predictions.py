"""Whatever is wrong with somebody's PNG, one line says which file, what it is, what it should be and what to do."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moduseg.datasets.io import write_label_png
from moduseg.errors import DataError, MissingError, ModusegError
from moduseg.evaluation.predictions import PredictionFolder

IDS = ("a", "trip/b", "c")
LABELS = np.array([[0, 1, 2], [2, 2, 0]], dtype=np.uint8)


def _saved(array: np.ndarray, kind: str = "PNG", mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(array)
    (picture.convert(mode) if mode else picture).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for image_id in IDS:
        path = tmp_path / "theirs" / f"{image_id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_saved(LABELS))
    return tmp_path / "theirs"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(_saved(LABELS), id="grey"),
        pytest.param(write_label_png(LABELS), id="indexed"),
        pytest.param(_saved(LABELS.astype(np.uint16)), id="16 bits"),
        pytest.param(_saved(LABELS, mode="LA"), id="grey and alpha"),
    ],
)
def test_ids_are_read_however_they_are_stored(folder: Path, content: bytes) -> None:
    (folder / "a.png").write_bytes(content)
    labels_read = PredictionFolder(folder, IDS, 3).read("a", (2, 3))
    np.testing.assert_array_equal(labels_read, LABELS)
    assert labels_read.dtype == np.uint8


def _with(value: int, dtype: type = np.uint8) -> bytes:
    labels = LABELS.astype(dtype)
    labels[1, 1:] = value
    return _saved(labels)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(
            _with(255),
            r"a\.png: got 255 \(ignored\) in 2 pixels, the first at row 1, column 1; expected class ids 0\.\.2, a "
            "prediction labels every pixel; write 0 where nothing is predicted",
            id="255",
        ),
        pytest.param(
            _with(3),
            r"a\.png: got label id 3 in 2 pixels, the first at row 1, column 1; expected class ids 0\.\.2 as there "
            r"are 2 classes beside background; map its ids to the data set's",
            id="an id out of range",
        ),
        pytest.param(_with(300, np.uint16), r"a\.png: got label id 300 in 2 pixels", id="a 16-bit id out of range"),
        pytest.param(
            _saved(LABELS[:, :2]),
            r"a\.png: got 2 x 2 pixels, expected 3 x 2 as its image has; resize it with nearest neighbour",
            id="another size",
        ),
        pytest.param(
            _saved(np.stack([LABELS] * 3, -1)),
            r"a\.png: got a colour picture \(RGB\), expected class ids 0\.\.2, not colours; store the class ids as an "
            "indexed or 8-bit grey PNG",
            id="RGB",
        ),
        pytest.param(_saved(np.stack([LABELS] * 4, -1)), r"a\.png: got a colour picture \(RGBA\)", id="RGBA"),
        pytest.param(
            _saved(LABELS, "JPEG"),
            r"a\.png: got a file that is not a PNG, expected class ids 0\.\.2; store the class ids",
            id="a JPEG",
        ),
        pytest.param(b"", r"a\.png: got a file that is not a PNG", id="an empty file"),
        pytest.param(_saved(LABELS)[:45], r"a\.png: unreadable as an image \(damaged", id="a damaged PNG"),
    ],
)
def test_every_mistake_names_file_value_range_and_remedy(folder: Path, content: bytes, message: str) -> None:
    (folder / "a.png").write_bytes(content)
    predictions = PredictionFolder(folder, IDS, 3)
    with pytest.raises(DataError, match=message) as caught:
        predictions.read("a", (2, 3))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def _without_some(folder: Path) -> Path:
    (folder / "trip" / "b.png").unlink()
    (folder / "c.png").unlink()
    return folder


def _deeper(folder: Path) -> Path:
    inner = folder.parent / "labels"
    folder.rename(inner)
    return inner.parent


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (
            _without_some,
            DataError,
            r"trip/b\.png: no such file; got predictions for 1 of 3 images of the split, expected one <id>\.png for "
            r"each; missing trip/b, c; write them",
        ),
        (_deeper, DataError, r"missing a, trip/b, c; try predictions=.*/labels"),
        (lambda f: f / "no", MissingError, r"predictions: got '.*/no', no such folder; expected a folder of <id>\.png"),
        (lambda f: f / "a.png", MissingError, r"a\.png', a file; expected a folder of <id>\.png; set predictions="),
    ],
)
def test_a_folder_that_lacks_something(
    folder: Path, prepare: Callable[[Path], Path], error: type[ModusegError], message: str
) -> None:
    with pytest.raises(error, match=message):
        PredictionFolder(prepare(folder), IDS, 3)
