"""A small bank of tagged scenes, and a session with a picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from moduseg import Segmenter
from moduseg.app.session import Session
from moduseg.config import compose
from moduseg.stages.build_bank import BuildBank
from tests.support.tagged_world import CLIP, scene, settings, write_folder


@pytest.fixture(scope="package")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bank")
    write_folder(root / "own", range(12))
    return BuildBank.run(compose(settings(root / "own", root / "outputs", *CLIP, "retrieval.min_area=10")))


@pytest.fixture(scope="package")
def segmenter(bank: Path) -> Segmenter:
    return Segmenter.from_bank(bank, device="cpu")


@pytest.fixture
def session(segmenter: Segmenter, bank: Path) -> Session:
    made = Session(segmenter)
    made.show(scene(20).image)
    return made
