"""The training of an ARM: it learns, goes on where it was killed, and its results carry their mark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moduseg.backbones.arm import read_record
from moduseg.bank.store import Bank
from moduseg.config import compose, compose_hydra
from moduseg.errors import ConfigError, MissingError
from moduseg.stages import evaluate
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.segment import Segment
from moduseg.studies import new_class, sweep
from moduseg.tools import compare, train_arm
from moduseg.tools.arm_training import HostWindows, compute_arm_loss
from moduseg.training import loop
from moduseg.training.data import BatchDraw
from tests.support.runs import overrides

TINY = (
    "pseudo_masks=clip_dense", "proposer@train_proposer=ground_truth", "arm.width=16", "arm.heads=2",
    "arm.mlp_width=16", "arm.check_images=1",
    "training.batch=2", "training.steps=6", "training.warmup=2",
)  # fmt: skip
"""On four drawn scenes, beside the miniature CLIP."""
MARK = "pixel:miniature"


def train(outputs: Path, *more: str) -> Path:
    return train_arm.run(compose_hydra(overrides(outputs, *TINY, *more), "train_arm"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an ARM that learnt for a few steps."""
    return train(tmp_path_factory.mktemp("arm"), "training.steps=24", "training.learning_rate=3e-3")


def test_the_loss_falls_and_the_file_says_on_what(weights: Path) -> None:
    rows = [line.split(",") for line in (weights.parent / "training.csv").read_text().splitlines()]
    losses = [float(row[rows[0].index("loss")]) for row in rows[1:]]
    assert sum(losses[-2:]) / 2 < 0.8 * losses[0]
    record = read_record(weights, "arm")
    assert (record.supervision, len(record.hosts)) == (MARK, 7)
    measured = (weights.parent / "measures.csv").read_text().splitlines()[0].split(",")
    assert measured == ["step", *record.hosts, "words", "smallest_gain"]


def test_a_killed_training_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = train(tmp_path / "whole", "arm.hosts=[plain,naclip]", "training.save_minutes=0").read_bytes()
    make_step, steps = loop._Trainer._make_step, []

    def die(*arguments: object) -> object:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return make_step(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(loop._Trainer, "_make_step", die)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", "arm.hosts=[plain,naclip]", "training.save_minutes=0")
    resumed = train(tmp_path / "cut", "arm.hosts=[plain,naclip]", "training.save_minutes=0")
    assert resumed.read_bytes() == expected


def test_a_step_has_one_host_and_ignores_what_has_no_label(tmp_path: Path) -> None:
    cfg = compose(overrides(tmp_path, "pseudo_masks=clip_dense"))
    work = train_arm.Workspace(cfg)
    hosts = train_arm.build_hosts(work, ("plain", "maskclip", "naclip"), {})
    data = HostWindows(work.dataset("train"), hosts, lambda sample: pytest.fail("no host needs proposals"), seed=1)
    batches = [data.load(BatchDraw(step, 0.0, (0, 1), (2, 3))) for step in range(20)]
    assert {batch["host"] for batch in batches} == set(hosts)
    first, second = batches[0], data.load(BatchDraw(0, 0.0, (0, 1), (3, 2)))
    assert torch.equal(first["labels"][0].flip(1), second["labels"][0])
    assert (first["windows"][1] == second["windows"][1][:, ::-1]).all()
    arm = train_arm.Arm(
        train_arm.ArmShape(deep_width=128, shallow_width=128, blocks=(2, 3), width=16, heads=2, mlp_width=16)
    )
    loss = compute_arm_loss(arm, first, hosts, 2)["loss"]
    ignored = {**first, "labels": [torch.full_like(labels, 255) for labels in first["labels"]]}
    assert loss > 0
    assert compute_arm_loss(arm, ignored, hosts, 2)["loss"] == 0


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        pytest.param(["pseudo_masks=cam"], ConfigError, "expected clip_dense", id="no words"),
        pytest.param(["arm.hosts=[plain,plain]"], ConfigError, "each once", id="a host twice"),
        pytest.param(["arm.hosts=[other]"], ConfigError, "variant", id="an unknown host"),
        pytest.param(["arm.blocks=[3,6]"], ConfigError, "blocks 3..6", id="blocks"),
        pytest.param(["corrclip.generator.weights=x"], ConfigError, "as of the other hosts", id="two CLIPs"),
        pytest.param(["dataset=folder", "dataset.root={root}"], MissingError, "no masks", id="no masks"),
    ],
)
def test_what_cannot_be_trained(tmp_path: Path, more: list[str], error: type[Exception], message: str) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        (tmp_path / "images" / f"{name}.png").write_bytes(PNG)
    (tmp_path / "labels.csv").write_text("image,labels\na,dog\nb,dog\n")
    arguments = [text.format(root=tmp_path) for text in more]
    if "dataset=folder" in arguments:
        composed = compose_hydra([*arguments, *TINY, f"runtime.outputs={tmp_path}"], "train_arm")
    else:
        composed = compose_hydra(overrides(tmp_path / "outputs", *TINY, *arguments), "train_arm")
    with pytest.raises(error, match=message):
        train_arm.run(composed)


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108020000009077"
    "53de0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)
"""A picture of one pixel."""


def test_every_result_carries_the_mark(weights: Path, tmp_path: Path) -> None:
    """Segment, bank, retrieval and comparison say on which masks a part was trained; a run without says nothing."""
    quick = ("pseudo_masks=clip_dense", "evaluation.panels=0", "evaluation.bootstrap=10", "pseudo_masks.refine=none")
    arm = f"pseudo_masks.generator.arm={weights}"
    plain, marked = (evaluate.run(compose(overrides(tmp_path, *quick, *more))) for more in ((), (arm,)))
    results = [json.loads((folder / "results.json").read_text()) for folder in (plain, marked)]
    for part in ("prediction", "pseudo_masks"):
        assert "supervision" not in results[0][part]
        assert results[1][part]["supervision"] == MARK
    assert f"[supervision={MARK}]" in (marked / "results.md").read_text()
    assert "supervision" not in (plain / "results.md").read_text()
    for stage in ("scores", "pseudo_masks", "build_bank", "infer"):
        texts = [json.loads(path.read_text()) for path in (tmp_path / "miniature" / stage).glob("*/manifest.json")]
        assert sorted(str(text.get("supervision")) for text in texts) == ["None", MARK]
    segmented = Segment.run(compose(overrides(tmp_path, *quick, "evaluation.report=true", arm)))
    assert json.loads((segmented / "manifest.json").read_text())["supervision"] == MARK
    assert json.loads((segmented / "results.json").read_text())["supervision"] == MARK
    assert f"[supervision={MARK}]" in (segmented / "report" / "data" / "summary.js").read_text()
    compared = compare.run(str(plain), str(marked), compose(overrides(tmp_path, *quick)), names_dataset=True)
    head = (compared / "results.md").read_text().splitlines()
    assert sum(line.count(MARK) for line in head[:3]) >= 2
    run = overrides(tmp_path, *quick, arm)
    swept = sweep.run([*run, "retrieval.top_k=1,2"])
    assert json.loads((swept / "results.json").read_text())["supervision"] == MARK
    assert f"[supervision={MARK}]" in (swept / "sweep.md").read_text()
    cfg = compose(run)
    bank = Bank.load(BuildBank.run(cfg))
    known = next(name for name in bank.classes[1:] if bank.counts[name] > 1)
    added = new_class.run(new_class.NewClassOptions((known,), images=1), cfg)
    assert json.loads(added.with_suffix(".json").read_text())["supervision"] == MARK
    assert f"[supervision={MARK}]" in added.read_text()
