"""Sweeps from caches: the figures of `infer`, no model, and an honest word on who chose."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moduseg.backbones.timm_backbone import TimmBackbone
from moduseg.bank import edit
from moduseg.bank.derived import write_derived
from moduseg.bank.store import Bank
from moduseg.config import compose
from moduseg.errors import ConfigError
from moduseg.evaluation import measures
from moduseg.evaluation.measures import Measure
from moduseg.files import write_atomic
from moduseg.pipeline.workspace import Workspace
from moduseg.proposers import sa1b
from moduseg.proposers.superpixels import SuperpixelProposer
from moduseg.retrieval.retriever import Retriever
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.infer import Infer
from moduseg.stages.queries import Queries
from moduseg.structures import Proposals, SearchBank
from moduseg.studies import sweep
from moduseg.studies.cached_split import CachedSplit
from moduseg.studies.sweep import parse
from tests.support.runs import overrides
from tests.support.trees import random_tree

SETTINGS = (
    [],
    ["retrieval.top_k=4", "retrieval.nms_iou=0.8"],
    ["retrieval.selection=nms_quality", "retrieval.nms_iou=0.2"],
    ["retrieval.top_k=7", "retrieval.vote_temperature=0.05", "retrieval.nms_iou=0.1"],
    ["retrieval.top_k=5", "retrieval.vote_balance=cap", "retrieval.min_area=60"],
    ["retrieval.top_k=5", "retrieval.vote_balance=distance", "bank.outliers.enabled=false"],
    ["retrieval.top_k=7", "retrieval.cap_top_k=true", "bank.centre=false", "retrieval.selection=similarity"],
    ["retrieval.top_k=3", "retrieval.selection=margin", "retrieval.min_predicted_iou=0.5"],
    ["retrieval.selection=margin", "bank.outliers.drop_ratio=0.5", "bank.shuffle_labels=1"],
    ["retrieval.top_k=3", "retrieval.selection=majority", "retrieval.min_area=40"],
    ["retrieval.top_k=7", "retrieval.selection=shares", "retrieval.vote_temperature=0.05", "bank.shuffle_labels=2"],
    ["retrieval.selection=shares", "retrieval.min_area=40"],
    ["retrieval.selection=learnt"],
    ["retrieval.selection=learnt", "retrieval.min_area=60", "bank.centre=false", "bank.outliers.drop_ratio=0.5"],
    ["bank.prototypes=2", "retrieval.nms_iou=1.0", "retrieval.min_predicted_iou=1.0"],
    ["bank.images_per_class=1", "bank.classes=[red disc,yellow star]", "retrieval.top_k=2"],
)


QUICK = ("evaluation.panels=0", "evaluation.bootstrap=0", "evaluation.boundary_width=0")


def arguments(outputs: Path, *more: str) -> list[str]:
    return overrides(outputs, "proposer=superpixels", *QUICK, *more, train=10, val=3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with overlapping proposals of which some have no vector."""
    outputs = tmp_path_factory.mktemp("sweep")
    cfg = compose(arguments(outputs))
    vectors = Queries.run(cfg)
    Infer.run(cfg)
    assert vectors.is_dir()
    return outputs


def test_every_setting_gives_what_infer_gives(finished: Path) -> None:
    """One split in memory, asked for all settings in turn, against a run of each."""
    settings = [compose(arguments(finished, *more)) for more in SETTINGS]
    split = CachedSplit(settings[0], [s.retrieval for s in settings])
    matrices = [split.confusion(s.bank, s.retrieval) for s in settings]
    for cfg, matrix in zip(settings, matrices, strict=True):
        results = json.loads((Infer.run(cfg) / "results.json").read_text())
        assert matrix.tolist() == results["confusion"]
    assert len({m.tobytes() for m in matrices}) > len(SETTINGS) / 2
    again = [split.confusion(s.bank, s.retrieval) for s in reversed(settings)]
    assert all(np.array_equal(a, b) for a, b in zip(matrices, reversed(again), strict=True))


def test_label_maps_that_are_tidied_cannot_be_swept(finished: Path) -> None:
    cfg = compose(arguments(finished, "retrieval.max_hole_area=9"))
    with pytest.raises(ConfigError, match=r"retrieval\.max_hole_area: got 9, expected 0, as a sweep scores regions"):
        CachedSplit(cfg, [cfg.retrieval])


def test_a_bank_with_named_regions_cannot_be_swept(finished: Path) -> None:
    """`infer` lets a named region decide alone, which a sweep's votes do not."""
    source = BuildBank.run(compose(arguments(finished)))
    bank = Bank.load(source)
    named = edit.correct_region(bank, "shown", "red disc", bank.pooled[0], 9)
    folder = write_derived(named, "correct", sources=[source], details={}, folder=finished / "named", outputs=finished)
    cfg = compose(arguments(finished, f"bank.path={folder}"))
    with pytest.raises(ConfigError, match=r"bank\.path: got a bank with 1 regions that a person named, expected none"):
        CachedSplit(cfg, [cfg.retrieval])


def test_trees_of_proposals_give_what_infer_gives(tmp_path: Path, rng: np.random.Generator) -> None:
    """Nested masks from files, of which the small ones are filtered, so that trees lose their leaves."""
    cfg = compose(arguments(tmp_path))
    for split in ("train", "val"):
        dataset = Workspace(cfg).dataset(split)
        for image_id in dataset.ids:
            masks, parents = random_tree(rng, 12, dataset.image_size(image_id))
            content = sa1b.encode_proposals(Proposals(masks, parents=parents), image_id)
            write_atomic(tmp_path / "trees" / f"{image_id}.json", content)
    files = ("proposer=files", f"proposer.folder={tmp_path / 'trees'}")
    rules = ("margin", "similarity", "majority", "shares")
    settings = [
        compose(arguments(tmp_path, *files, f"retrieval.selection={r}", "retrieval.min_area=500")) for r in rules
    ]
    split_in_memory = CachedSplit(settings[0], [s.retrieval for s in settings])
    for cfg in settings:
        results = json.loads((Infer.run(cfg) / "results.json").read_text())
        assert split_in_memory.confusion(cfg.bank, cfg.retrieval).tolist() == results["confusion"]
    assert all(image.parents is not None for image in split_in_memory.images)


def test_a_grid_runs_no_model_and_leaves_table_csv_and_plot(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model ran")

    usual = json.loads((Infer.run(compose(arguments(finished))) / "results.json").read_text())
    monkeypatch.setattr(TimmBackbone, "tokens", refuse)
    monkeypatch.setattr(TimmBackbone, "_model", property(refuse))
    monkeypatch.setattr(SuperpixelProposer, "propose", refuse)
    grid = ["retrieval.top_k=1,3", "bank.outliers.drop_ratio=0,0.25", "retrieval.vote_balance=none,cap"]
    path = sweep.run([*arguments(finished), *grid])
    record = json.loads((path / "results.json").read_text())
    with (path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["retrieval.top_k"] for row in rows] == ["1"] * 4 + ["3"] * 4
    assert [float(row["mIoU"]) for row in rows] == [row["mIoU"] for row in record["rows"]]
    assert record["best"]["mIoU"] == max(row["mIoU"] for row in record["rows"])
    default = next(r for r in record["rows"] if r["setting"] == record["default"])
    assert default["mIoU"] == usual["miou"]
    text = (path / "sweep.md").read_text()
    assert "**8 settings** on miniature val, 3 images" in text
    assert "Chosen on val, which is what is reported: not a fair result." in text
    assert record["fair"] is False
    assert "| retrieval.vote_balance | others as they are |" in text
    with Image.open(path / "sweep.png") as picture:
        assert picture.width > 600
    assert sweep.run([*arguments(finished), *grid]) == path


def test_the_winner_is_chosen_elsewhere(finished: Path) -> None:
    """On the training split, an image's own vectors left out; what is reported is the winner's figure on val."""
    grid = ["retrieval.top_k=1,3,9", "retrieval.selection=nms,margin"]
    record = json.loads((sweep.run([*arguments(finished), *grid, "select=train"]) / "results.json").read_text())
    assert record["fair"] is True
    assert record["chosen_on"] == "train, 10 images, no image being a neighbour of its own proposals"
    assert record["best"]["chosen by"] == max(row["chosen by"] for row in record["rows"])
    alone = json.loads((sweep.run([*arguments(finished), *grid]) / "results.json").read_text())
    assert [row["mIoU"] for row in record["rows"]] == [row["mIoU"] for row in alone["rows"]]
    of_other_run = json.loads(
        (sweep.run([*arguments(finished), *grid, "select=retrieval.min_area=60"]) / "results.json").read_text()
    )
    assert of_other_run["chosen_on"] == "val with retrieval.min_area=60, 3 images"
    with pytest.raises(ConfigError, match=r"select: got val, which is what is reported"):
        sweep.run([*arguments(finished), *grid, "select=val"])
    with pytest.raises(ConfigError, match=r"retrieval\.selection=learnt, whose ranking is fitted on the very images"):
        sweep.run([*arguments(finished), "retrieval.selection=nms,learnt", "select=train"])
    with pytest.raises(ConfigError, match=r"bank\.prototypes.*choose on another split"):
        sweep.run([*arguments(finished), "bank.prototypes=2,3", "select=train"])


@pytest.mark.parametrize("more", [[], ["retrieval.vote_balance=cap"], ["retrieval.selection=margin"]])
def test_held_out_is_a_bank_without_the_image(more: list[str], finished: Path) -> None:
    cfg = compose(arguments(finished, "dataset.val_split=train", "retrieval.top_k=4", *more))
    split = CachedSplit(cfg, [cfg.retrieval], is_held_out=True)
    split.confusion(cfg.bank, cfg.retrieval)
    answers = split.answer(cfg.bank, cfg.retrieval)
    bank = split.bank.configured(cfg.bank)
    from moduseg.retrieval.selection import compute_worths

    for image in split.images:
        keep = split.bank.image_index[bank.rows] != split.bank.image_ids.index(image.id)
        kept = SearchBank(bank.vectors[keep], bank.labels[keep], bank.rows[keep], bank.centre)
        retriever = Retriever(kept, cfg.retrieval)
        pooled = split.queries.pooled[image.queries]
        votes = retriever.vote(pooled)
        assert answers.labels[image.queries].tolist() == votes.labels.tolist()
        assert answers.scores[image.queries].tolist() == votes.scores.tolist()
        if cfg.retrieval.selection == "margin":
            certain = compute_worths(retriever._margins(pooled, votes.labels), split.queries.quality[image.queries])
            assert answers.worths[image.queries].tolist() == certain.tolist()
    assert BuildBank.run(cfg) == split.inputs["build_bank"]
    assert torch.is_tensor(split.queries.pooled)


def test_what_a_command_line_means() -> None:
    grid = parse(
        ["dataset.seed=3", "retrieval.top_k=1,5", "retrieval.vote_temperature=null,0.05", "select=dataset.seed=4"]
    )
    assert grid.axes == {"retrieval.top_k": [1, 5], "retrieval.vote_temperature": [None, 0.05]}
    assert (grid.overrides, grid.select) == (["dataset.seed=3"], ["dataset.seed=4"])
    assert grid.points[1] == {"retrieval.top_k": 1, "retrieval.vote_temperature": 0.05}
    listed = parse(["bank.classes=[a,b],[red disc],null", "retrieval.cap_top_k=true,false"])
    assert listed.axes == {"bank.classes": [["a", "b"], ["red disc"], None], "retrieval.cap_top_k": [True, False]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"sweep: got no key with several values"),
        (["retrieval.top_k=5"], r"sweep: got no key with several values.*try retrieval\.top_k=1,5"),
        (["backbone.layer=1,2"], r"sweep: got backbone\.layer, which is not applied to caches"),
        (["bank.flips=true,false"], r"sweep: got bank\.flips"),
        (["retrieval.topk=1,2"], r"sweep: got retrieval\.topk.*expected some of retrieval\.top_k"),
        (["retrieval.top_k=1,2", "oops"], r"oops: got no '=', expected key=value"),
        (["retrieval.top_k=1,2", "select="], r"select: got ''"),
        (["retrieval.top_k=1,2", "select=train", "select=dataset.seed=3"], r"expected one split, or key=value"),
        (["retrieval.top_k=1,many"], r"retrieval\.top_k: got 'many'"),
        (["retrieval.nms_iou=0.4,1.5"], r"nms_iou: got 1\.5, expected 0 to 1"),
    ],
)
def test_mistakes_are_one_line(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep.run(given)


def test_a_column_has_the_decimals_and_the_unit_of_its_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    distance = Measure(name="distance", title="distance", compute=measures.mean_iou, unit="px", decimals=3)
    monkeypatch.setattr(measures, "MEASURES", (*measures.MEASURES, distance))
    row = {"setting": {"retrieval.top_k": 1}, "mIoU": 50.0, "distance": 1.23456}
    record = {
        "where": "miniature val, 1 images",
        "chosen_on": "train",
        "axes": {"retrieval.top_k": [1]},
        "default": {"retrieval.top_k": 1},
        "best": row,
        "rows": [row],
        "seconds": {"read": 0.0, "sweep": 0.0},
    }
    lines = [line for line in sweep._make_report(record, [0]).splitlines() if line.startswith("| ")][:2]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells == [["retrieval.top_k", "mIoU", "distance (px)"], ["1", "50.0", "1.235"]]
