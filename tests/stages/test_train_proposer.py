"""Proposals of the training images may be others than those of the evaluated ones; regions that vote have a score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moduseg.config import compose
from moduseg.errors import ConfigError
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.infer import Infer
from moduseg.stages.propose import Propose
from moduseg.stages.pseudo_masks import PseudoMasks
from tests.support.runs import overrides

VOTE = ("pseudo_masks.refine=region_vote", "evaluation.panels=0")


def stages(outputs: Path, stage: str) -> set[str]:
    return {path.name for path in (outputs / "miniature" / stage).iterdir()}


def test_the_training_images_have_their_own_proposer(tmp_path: Path) -> None:
    def run(*more: str) -> Path:
        cfg = compose(overrides(tmp_path, *VOTE, *more, train=3, val=2))
        Infer.run(cfg)
        return BuildBank.run(cfg)

    bank = run("proposer=superpixels")
    before = stages(tmp_path, "propose")
    assert {name.rsplit("-", 1)[0] for name in before} == {"superpixels-train", "superpixels-val"}
    # True proposals for the evaluated images alone: the bank stays.
    assert run("proposer=ground_truth", "proposer@train_proposer=superpixels") == bank
    assert {name.rsplit("-", 1)[0] for name in stages(tmp_path, "propose") - before} == {"ground_truth-val"}
    # The same proposer said twice changes nothing.
    known = stages(tmp_path, "infer")
    assert run("proposer=superpixels", "proposer@train_proposer=superpixels") == bank
    assert stages(tmp_path, "infer") == known
    # Without it, the evaluated images' proposer has the training images too.
    assert run("proposer=ground_truth") != bank


def test_a_split_that_is_trained_on_and_evaluated(tmp_path: Path) -> None:
    settings = ("proposer=ground_truth", "proposer@train_proposer=superpixels", "dataset.val_split=train")
    cfg = compose(overrides(tmp_path, *settings, train=2, val=1))
    assert Propose.run(cfg).name.startswith("ground_truth-train")
    assert Propose.run(cfg, split="train").name.startswith("superpixels-train")


def test_mistakes() -> None:
    with pytest.raises(ConfigError, match=r"train_proposer: got 'sam'.*proposer@train_proposer=<file>"):
        compose(["+train_proposer=sam"])
    with pytest.raises(ConfigError, match=r"vote_min_score: got 2\.0, expected 0 to 1"):
        compose(["pseudo_masks.vote_min_score=2"])


def test_regions_that_are_trusted_less_do_not_vote(tmp_path: Path) -> None:
    """Where no region votes the labels are the scores' own; where all do, as without a threshold."""
    made = Propose.run(compose(overrides(tmp_path, "proposer=superpixels", train=3, val=1)), split="train")
    own = tmp_path / "own"
    own.mkdir()
    for file in (made / "masks").iterdir():
        content = json.loads(file.read_text())
        for annotation in content["annotations"]:
            annotation["predicted_iou"] = 0.4
        (own / file.name).write_text(json.dumps(content))

    def labels(refine: str, score: float) -> dict[str, bytes]:
        settings = ["proposer=files", f"proposer.folder={own}", "pseudo_masks=cam", "evaluation.panels=0"]
        settings += [f"pseudo_masks.refine={refine}", f"pseudo_masks.vote_min_score={score}"]
        cfg = compose(overrides(tmp_path, *settings, train=3, val=1))
        return {file.name: file.read_bytes() for file in sorted((PseudoMasks.run(cfg) / "labels").iterdir())}

    everyone, nobody, none = labels("region_vote", 0.4), labels("region_vote", 0.5), labels("none", 0.5)
    assert everyone == labels("region_vote", 0)
    assert nobody == none
    assert everyone != none
    # Only a threshold that matters is part of the key.
    assert len(stages(tmp_path, "pseudo_masks")) == 4
