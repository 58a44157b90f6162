"""Scores once, labels as often as one likes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from moduseg.config import Config, compose
from moduseg.datasets.io import read_label_png
from moduseg.errors import ConfigError, DataError
from moduseg.pipeline.manifests import StageFolder, count_failures
from moduseg.pipeline.workspace import Workspace
from moduseg.pseudo_masks.store import SUFFIX, unpack
from moduseg.stages.class_scores import ClassScores
from moduseg.stages.propose import Propose
from moduseg.stages.pseudo_masks import PseudoMasks, label_stored_scores
from tests.support.runs import overrides

CAM = "pseudo_masks=cam"
QUIET = ("evaluation.panels=0", "evaluation.bootstrap=0")
RULES = [("constant", 0.3, None), ("power", 2.0, None), ("threshold", 0.6, 0.2), ("probability", 0.75, None)]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scores")


def changed(cfg: Config, rule: str, value: float, low: float | None, refine: str) -> Config:
    background = dataclasses.replace(cfg.pseudo_masks.background, rule=rule, value=value, low=low)
    settings = dataclasses.replace(cfg.pseudo_masks, background=background, refine=refine, dilations=(1, 2))
    return dataclasses.replace(cfg, pseudo_masks=settings)


@pytest.mark.parametrize("refine", ["none", "region_vote", "pamr", "par"])
def test_rules_and_refiners_run_no_model(refine: str, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rule and refiner from one artefact of scores; what `apply` gives is what the stage writes."""
    cfg = compose(overrides(outputs, CAM, *QUIET))
    stored, proposals = StageFolder(ClassScores.run(cfg)), StageFolder(Propose.run(cfg, split="train"))
    work = Workspace(cfg)
    dataset = work.dataset("train")

    def refuse(*_: object) -> None:
        raise LookupError("a model was asked for")

    monkeypatch.setattr("moduseg.pseudo_masks.cam.CamGenerator.generate", refuse)
    seen = set()
    for rule, value, low in RULES:
        this = changed(cfg, rule, value, low, refine)
        found = dict(label_stored_scores(dataset, this.pseudo_masks, stored, proposals))
        assert list(found) == list(dataset.ids)
        folder = PseudoMasks.run(this)
        for image_id, labels in found.items():
            assert torch.equal(labels, torch.from_numpy(read_label_png(folder / "labels" / f"{image_id}.png")))
        seen.add(b"".join(labels.numpy().tobytes() for labels in found.values()))
        assert folder.name.startswith("cam-train-")
    assert len(seen) == len(RULES)
    assert len(list((outputs / "miniature" / "scores").iterdir())) == 1


def test_what_is_stored(outputs: Path) -> None:
    cfg = compose(overrides(outputs, CAM, *QUIET))
    folder = ClassScores.run(cfg)
    files = sorted((folder / "maps").iterdir())
    assert [f.name for f in files] == [f"train_{i:05d}{SUFFIX}" for i in range(6)]
    work = Workspace(cfg)
    sample = work.dataset("train").load("train_00002")
    maps = unpack(files[2].read_bytes())
    assert maps.class_ids == sample.labels
    assert maps.scores.shape[1:] == sample.size
    assert files[2].stat().st_size < 2 * maps.scores.numel()


def test_a_damaged_score_file_costs_its_image_only(tmp_path: Path, outputs: Path) -> None:
    import shutil

    shutil.copytree(outputs, tmp_path / "copy")
    cfg = compose(overrides(tmp_path / "copy", CAM, *QUIET, world=outputs))
    folder = ClassScores.run(cfg)
    file = folder / "maps" / f"train_00001{SUFFIX}"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)
    labelled = PseudoMasks.run(changed(cfg, "constant", 0.7, None, "none"))
    failed = [json.loads(line) for line in (labelled / "failures.jsonl").read_text().splitlines()]
    assert [f["id"] for f in failed] == ["train_00001"]
    assert "not readable as class scores" in failed[0]["error"]
    assert count_failures(labelled) == 1
    file.unlink()
    labelled = PseudoMasks.run(changed(cfg, "constant", 0.7, None, "none"))
    assert count_failures(labelled) == 0
    assert (labelled / "labels" / "train_00001.png").is_file()


def test_mistakes(outputs: Path) -> None:
    cfg = compose(overrides(outputs, CAM, *QUIET))
    stored, dataset = StageFolder(ClassScores.run(cfg)), Workspace(cfg).dataset("train")
    with pytest.raises(DataError, match="no proposals, which refine=region_vote needs"):
        next(label_stored_scores(dataset, changed(cfg, "constant", 0.5, None, "region_vote").pseudo_masks, stored))
    with pytest.raises(ConfigError, match="got 'words', but this generator scores no background"):
        next(label_stored_scores(dataset, changed(cfg, "words", 0.5, None, "none").pseudo_masks, stored))
    with pytest.raises(ConfigError, match=r"pseudo_masks: dilations: got \[0\]"):
        compose(overrides(outputs, CAM, "pseudo_masks.dilations=[0]"))


@pytest.mark.parametrize(("masks", "count"), [("cam", 1), ("cam_photo", 2)])
def test_a_fit_is_made_anew_where_it_saw_the_proposals(masks: str, count: int, outputs: Path) -> None:
    """And not where it did not."""
    for most in (20, 30):
        cfg = compose(
            overrides(
                outputs,
                f"pseudo_masks={masks}",
                "pseudo_masks.refine=none",
                "proposer=superpixels",
                f"proposer.max_proposals={most}",
                *QUIET,
            )
        )
        folder = ClassScores.run(cfg)
        assert len(list((folder / "maps").iterdir())) == 6
    fits = {"cam": "cam", "cam_photo": "cam_neighbours"}[masks]
    assert len(list((outputs / "miniature" / "fit").glob(f"{fits}-train-*"))) == count


@pytest.mark.parametrize("masks", ["cam_photo", "cam"])
def test_a_fit_serves_both_splits(masks: str, tmp_path: Path, outputs: Path) -> None:
    """Whichever split is scored first, what is fitted on proposals is fitted on those of the training images."""
    cfg = compose(overrides(tmp_path, f"pseudo_masks={masks}", "proposer=superpixels", *QUIET, world=outputs))
    for split in ("val", "train", "val"):
        folder = StageFolder(ClassScores.run(cfg, split=split))
        assert (folder.manifest["images"], count_failures(folder.path)) == ({"val": 4, "train": 6}[split], 0)
    assert len(list((tmp_path / "miniature" / "fit").iterdir())) == 1
