"""Two hundred odd or mutilated folders: each is read rightly, or ends in one line of ours; none is wrong in silence.

Every case begins as a right folder of three photographs with tags and label maps, whose reading is known. It then
undergoes one to three changes of the kinds that people and programs make. A change says whether the folder still means
the same: then the reading has to be the same. Else each image is read as before, or its error, a warning or a line of
`check_data` says what is wrong.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moduseg import datasets
from moduseg.config import compose
from moduseg.datasets.base import Dataset
from moduseg.errors import DataError, ModusegError
from moduseg.tools import check_data
from tests.support.odd_folders import CHANGES, CLASSES, TAGS, Change, draw_semantic, list_told_ids, make_folder

NUM_CASES = 200


def _read(dataset: Dataset, image_id: str) -> tuple[tuple[int, ...] | None, bytes | None, bytes]:
    sample = dataset.load(image_id, truth=True)
    return sample.labels, None if sample.semantic is None else sample.semantic.tobytes(), sample.image.tobytes()


def _expected(image_id: str, pixels: dict[str, bytes]) -> tuple[tuple[int, ...] | None, bytes | None, bytes]:
    tags = tuple(sorted(CLASSES.index(name) for name in TAGS[image_id].split(";")))
    return tags, draw_semantic(TAGS[image_id]).tobytes(), pixels[image_id]


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
    told = list_told_ids(report.path) | {word for word in (*TAGS, "copy") if word in caplog.text}
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
            make_folder(root)
            try:
                outcome = _check_case(root, changes, caplog)
            except Exception as error:
                raise AssertionError(f"case {case}: {[change.name for change in changes]}: {error!r}") from error
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    assert sum(outcomes.values()) == NUM_CASES
    assert set(outcomes) == {"read", "refused", "told"}
