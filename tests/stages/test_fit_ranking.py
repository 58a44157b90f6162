"""The stage that fits a ranking: where its labels come from, what it leaves behind, who reads that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moduseg import Segmenter
from moduseg.bank import edit
from moduseg.bank.derived import write_derived
from moduseg.bank.store import Bank
from moduseg.config import compose
from moduseg.datasets.base import Dataset
from moduseg.datasets.io import read_label_png
from moduseg.errors import ArtefactError, ConfigError
from moduseg.pipeline.workspace import Workspace
from moduseg.retrieval.ranking import RANKING_FILE, Ranking
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.fit_ranking import FitRanking
from moduseg.stages.infer import Infer
from moduseg.stages.queries import Queries
from tests.support import runs

LEARNT = "retrieval.selection=learnt"


def overrides(outputs: Path, *more: str, world: Path | None = None) -> list[str]:
    quick = ("evaluation.panels=0", "evaluation.bootstrap=0", "evaluation.boundary_width=0", "proposer=superpixels")
    return runs.overrides(outputs, *quick, *more, train=10, val=3, world=world)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with overlapping proposals and a ranking."""
    outputs = tmp_path_factory.mktemp("ranking")
    Infer.run(compose(overrides(outputs, LEARNT)))
    return outputs


def test_no_ground_truth_is_read(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once bank and queries are there, true masks may be gone: the ranking has the same bytes."""
    shutil.copytree(finished, tmp_path / "copy")
    cfg = compose(overrides(tmp_path / "copy", LEARNT, world=finished))
    before = FitRanking.run(cfg)
    content = (before / RANKING_FILE).read_bytes()
    shutil.rmtree(before)
    work = Workspace(cfg)
    BuildBank.run(cfg, work)
    Queries.run(cfg, work, "train")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("ground truth was read")

    monkeypatch.setattr(Dataset, "semantic_of", refuse)
    monkeypatch.setattr(Dataset, "_read_semantic", refuse)
    again = FitRanking.run(cfg, work)
    assert again == before
    assert (again / RANKING_FILE).read_bytes() == content


def test_shares_come_from_the_tags_alone(finished: Path) -> None:
    cfg = compose(overrides(finished, LEARNT))
    folder, dataset = FitRanking.run(cfg), Workspace(cfg).dataset("train")
    num_foreground = 0
    for image_id in dataset.ids:
        example = load_file(folder / "examples" / f"{image_id}.safetensors")
        shares = example["shares"]
        torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))
        foreign = torch.tensor([i not in (0, *(dataset.labels_of(image_id) or ())) for i in range(shares.shape[1])])
        assert not bool(shares[:, foreign].any())
        assert len(example["queries"]) == len(example["shapes"]) == len(shares)
        num_foreground += int((shares.argmax(1) > 0).sum())
    assert num_foreground > 5


def test_the_ranking_lies_beside_the_bank(finished: Path) -> None:
    cfg = compose(overrides(finished, LEARNT))
    fitted, bank = FitRanking.run(cfg), BuildBank.run(cfg)
    assert (fitted / RANKING_FILE).read_bytes() == (bank / RANKING_FILE).read_bytes()
    assert Ranking.load(bank / RANKING_FILE).classes == Bank.load(bank).classes
    # One that was lost is written again, without another fit.
    (bank / RANKING_FILE).unlink()
    stamp = (fitted / RANKING_FILE).stat().st_mtime_ns
    FitRanking.run(compose(overrides(finished, LEARNT)))
    assert (bank / RANKING_FILE).is_file()
    assert (fitted / RANKING_FILE).stat().st_mtime_ns == stamp


def test_a_bank_has_its_key_with_and_without_a_ranking(finished: Path) -> None:
    plain, learnt = compose(overrides(finished)), compose(overrides(finished, LEARNT))
    assert BuildBank.run(plain) == BuildBank.run(learnt)
    assert Queries.run(plain) == Queries.run(learnt)
    assert Infer.run(plain) != Infer.run(learnt)
    parts = json.loads((Infer.run(plain) / "manifest.json").read_text())["parts"]
    assert "ranking" not in parts


def test_segmenter_and_infer_agree(finished: Path) -> None:
    cfg = compose(overrides(finished, LEARNT))
    path, values = Infer.run(cfg), cfg.as_dict()
    settings = {name: values[name] for name in ("proposer", "bank", "retrieval")}
    segmenter = Segmenter.from_bank(BuildBank.run(cfg), device="cpu", overrides=settings)
    for image_id in Workspace(cfg).dataset("val").ids:
        prediction = segmenter.predict(finished / "world-10-3" / "JPEGImages" / f"{image_id}.png")
        assert np.array_equal(prediction.label_map, read_label_png(path / "labels" / f"{image_id}.png"))


def test_banks_made_of_a_bank_keep_its_ranking(finished: Path, tmp_path: Path) -> None:
    cfg = compose(overrides(finished, LEARNT))
    source = BuildBank.run(cfg)
    smaller = edit.remove(Bank.load(source), images=[Bank.load(source).image_ids[0]])
    folder = write_derived(smaller, "remove", sources=[source], details={}, folder=tmp_path / "bank", outputs=tmp_path)
    assert (folder / RANKING_FILE).read_bytes() == (source / RANKING_FILE).read_bytes()
    results = json.loads(
        (Infer.run(compose(overrides(finished, LEARNT, f"bank.path={folder}"))) / "results.json").read_text()
    )
    assert results["images"] == 3


def test_a_bank_of_ones_own_without_a_ranking_is_one_line(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(BuildBank.run(compose(overrides(finished, LEARNT))), tmp_path / "bank")
    (tmp_path / "bank" / RANKING_FILE).unlink()
    cfg = compose(overrides(finished, LEARNT, f"bank.path={tmp_path / 'bank'}"))
    with pytest.raises(ArtefactError, match=r"retrieval\.selection: got learnt, and .* has no ranking\.safetensors"):
        Infer.run(cfg)
    values = cfg.as_dict()
    with pytest.raises(ArtefactError, match=r"has no ranking\.safetensors, expected one; run scripts/infer\.py"):
        Segmenter.from_bank(tmp_path / "bank", device="cpu", overrides={"retrieval": values["retrieval"]})


def test_centres_of_many_images_fit_no_ranking(finished: Path) -> None:
    """A centre has vectors of the very image that the others are to label."""
    with pytest.raises(ConfigError, match=r"bank\.prototypes: got 3, expected null with retrieval\.selection=learnt"):
        Infer.run(compose(overrides(finished, LEARNT, "bank.prototypes=3")))
