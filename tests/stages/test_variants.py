"""Options of bank and retrieval inside a run: keys, what is stored, what runs no model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moduseg import Segmenter
from moduseg.backbones.timm_backbone import TimmBackbone
from moduseg.bank.overlaps import count_nearest_classes, worst_lines
from moduseg.bank.parts import find_parts
from moduseg.bank.regions import labelled_regions, region_vectors
from moduseg.bank.store import Bank
from moduseg.config import OutliersConfig, compose
from moduseg.datasets.io import read_label_png
from moduseg.pipeline.manifests import StageFolder
from moduseg.pipeline.workspace import Workspace
from moduseg.proposers.ground_truth import GroundTruthProposer
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.infer import Infer
from moduseg.stages.propose import Propose
from moduseg.stages.pseudo_masks import PseudoMasks
from moduseg.stages.queries import Queries
from tests.support import runs

OPTIONS = (
    "retrieval.vote_balance=cap",
    "retrieval.vote_balance=distance",
    "retrieval.cap_top_k=true",
    "retrieval.selection=nms_quality",
    "retrieval.selection=margin",
    "retrieval.selection=similarity",
    "retrieval.selection=shares",
    "retrieval.smoothing_radius=2",
    "bank.prototypes=2",
    "bank.classes=[red disc]",
)


def overrides(outputs: Path, *more: str, world: Path | None = None) -> list[str]:
    quick = ("evaluation.panels=0", "evaluation.bootstrap=0", "evaluation.boundary_width=0")
    return runs.overrides(outputs, *quick, *more, train=12, val=4, world=world)


def manifest(path: Path) -> dict[str, object]:
    content = json.loads((path / "manifest.json").read_text())
    assert isinstance(content, dict)
    return content


def test_options_that_are_off_are_no_part_of_keys(finished: Path) -> None:
    """Results made before there were these options keep their folders."""
    cfg = compose(overrides(finished))
    parts = manifest(Infer.run(cfg))["parts"]
    assert isinstance(parts, dict)
    assert parts["retrieval"].keys() == {"top_k", "nms_iou", "min_area", "min_predicted_iou", "vote_temperature"}
    assert not {"prototypes", "classes", "images_per_class"} & parts.keys()
    stored = manifest(BuildBank.run(cfg))["parts"]
    assert isinstance(stored, dict)
    assert stored["bank"].keys() == {"purify", "min_area", "aggregation"}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_changes_the_result_and_runs_no_model(
    option: str, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bank vectors are stored before filters and options, proposal vectors are cached: only `infer` runs anew."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model ran")

    default = compose(overrides(finished))
    bank, vectors, result = BuildBank.run(default), Queries.run(default), Infer.run(default)
    monkeypatch.setattr(TimmBackbone, "tokens", refuse)
    monkeypatch.setattr(GroundTruthProposer, "propose", refuse)
    changed = compose(overrides(finished, option, "bank.outliers.drop_ratio=0.5"))
    assert BuildBank.run(changed) == bank
    assert Queries.run(changed) == vectors
    path = Infer.run(changed)
    assert path != result
    assert manifest(path)["failures"] == 0
    assert json.loads((path / "results.json").read_text())["images"] == 4


def test_what_is_stored_is_before_the_filter(finished: Path) -> None:
    """One vector for each image and class of the pseudo masks, however many the filter drops when the bank is read."""
    cfg = compose(overrides(finished, "bank.outliers.drop_ratio=0.9"))
    bank = Bank.load(BuildBank.run(cfg))
    masks = PseudoMasks.run(cfg)
    work = Workspace(cfg)
    expected = 0
    for image_id in work.dataset("train").ids:
        image = work.dataset("train").load(image_id).image
        labels = torch.from_numpy(read_label_png(masks / f"labels/{image_id}.png"))
        entry = region_vectors(*labelled_regions(labels, cfg.bank), work.backbone.tokens([image])[0], cfg.bank)
        rows = bank.image_index == bank.image_ids.index(image_id)
        torch.testing.assert_close(bank.pooled[rows], entry["pooled"])
        expected += len(entry["labels"])
    assert len(bank) == expected
    assert len(bank.configured(cfg.bank).vectors) < expected
    assert len(list((Queries.run(cfg) / "vectors").iterdir())) == 4


def test_flips_add_the_vectors_of_mirror_images(finished: Path) -> None:
    default = compose(overrides(finished))
    cfg = compose(overrides(finished, "bank.flips=true"))
    plain, flipped = (Bank.load(BuildBank.run(c)) for c in (default, cfg))
    work, masks = Workspace(cfg), PseudoMasks.run(cfg)
    assert len(flipped) == 2 * len(plain)
    for index, image_id in enumerate(plain.image_ids):
        image = np.ascontiguousarray(work.dataset("train").load(image_id).image[:, ::-1])
        labels = torch.from_numpy(read_label_png(masks / f"labels/{image_id}.png")[:, ::-1].copy())
        mirrored = region_vectors(*labelled_regions(labels, cfg.bank), work.backbone.tokens([image])[0], cfg.bank)
        own, both = plain.image_index == index, flipped.image_index == index
        torch.testing.assert_close(flipped.pooled[both], torch.cat((plain.pooled[own], mirrored["pooled"])))
        assert flipped.labels[both].tolist() == plain.labels[own].tolist() + mirrored["labels"].tolist()
    assert not torch.allclose(flipped.pooled[: len(plain)], plain.pooled)
    assert Infer.run(cfg) != Infer.run(default)


def test_parts_add_the_vectors_of_proposals(finished: Path) -> None:
    """The regions of the classes stay as they are; of 30 proposals follow those that lie in a class, mirrored too."""
    default = compose(overrides(finished))
    cfg = compose(overrides(finished, "bank.parts=30"))
    mirrored = compose(overrides(finished, "bank.parts=30", "bank.flips=true"))
    plain, banks = Bank.load(BuildBank.run(default)), [Bank.load(BuildBank.run(c)) for c in (cfg, mirrored)]
    work, masks, proposals = Workspace(cfg), PseudoMasks.run(cfg), StageFolder(Propose.run(cfg, split="train"))
    num_parts = 0
    for index, image_id in enumerate(plain.image_ids):
        labels = torch.from_numpy(read_label_png(masks / f"labels/{image_id}.png"))
        candidates = proposals.proposals(image_id, (labels.shape[0], labels.shape[1])).masks[:30]
        part_labels, part_masks = find_parts(labels, candidates)
        (tokens,) = work.backbone.tokens([work.dataset("train").load(image_id).image])
        parts = region_vectors(part_labels, part_masks, tokens, cfg.bank)
        own, both = plain.image_index == index, banks[0].image_index == index
        torch.testing.assert_close(banks[0].pooled[both], torch.cat((plain.pooled[own], parts["pooled"])))
        assert banks[0].labels[both].tolist() == plain.labels[own].tolist() + part_labels.tolist()
        num_parts += len(part_labels)
    assert num_parts > len(plain.image_ids)
    assert len(banks[1]) == 2 * len(banks[0]) == 2 * (len(plain) + num_parts)
    assert Infer.run(cfg) != Infer.run(default)


@pytest.mark.parametrize(
    "option",
    [
        "retrieval.selection=margin",
        "retrieval.selection=shares",
        "retrieval.vote_balance=cap",
        "retrieval.min_object_area=90",
        "bank.prototypes=3",
    ],
)
def test_the_api_follows_the_options(option: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    arguments = overrides(tmp_path / "copy", "proposer=superpixels", option, "retrieval.top_k=4", world=finished)
    cfg = compose(arguments)
    path = Infer.run(cfg)
    values = cfg.as_dict()
    segmenter = Segmenter.from_bank(
        BuildBank.run(cfg), device="cpu", overrides={n: values[n] for n in ("proposer", "bank", "retrieval")}
    )
    prediction = segmenter.predict(finished / "world-12-4" / "JPEGImages" / "val_00002.png")
    assert np.array_equal(prediction.label_map, read_label_png(path / "labels" / "val_00002.png"))
    named = {segmenter.describe(int(row))["label"] for row in prediction.neighbours[0]}
    assert named <= set(segmenter.classes)


def test_confidence_is_written_beside_the_label_maps(finished: Path) -> None:
    plain = Infer.run(compose(overrides(finished)))
    path = Infer.run(compose(overrides(finished, "retrieval.confidence=true")))
    assert not (plain / "scores").exists()
    for file in sorted((plain / "labels").iterdir()):
        label_map = read_label_png(path / "labels" / file.name)
        assert np.array_equal(label_map, read_label_png(file))
        with Image.open(path / "scores" / file.name) as picture:
            assert picture.mode == "L"
            confidence = np.asarray(picture)
        assert confidence.shape == label_map.shape
        # One neighbour votes here, so that whatever has a label is sure.
        assert (confidence[label_map > 0] == 255).all()
        assert set(np.unique(confidence)) <= {0, 255}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param((), "none (no CRF", id="none"),
        pytest.param(
            ("retrieval.max_hole_area=9", "retrieval.smoothing_radius=1"),
            "max_hole_area=9, smoothing_radius=1 (no CRF",
            id="label maps are tidied",
        ),
    ],
)
def test_results_say_what_changed_label_maps_last(options: tuple[str, ...], expected: str, finished: Path) -> None:
    path = Infer.run(compose(overrides(finished, *options)))
    assert json.loads((path / "results.json").read_text())["refinement"].startswith(expected)


@pytest.mark.parametrize("refine", ["none", "region_vote"])
def test_results_of_pseudo_masks_name_their_refinement(refine: str, finished: Path) -> None:
    path = PseudoMasks.run(compose(overrides(finished, f"pseudo_masks.refine={refine}")))
    assert json.loads((path / "results.json").read_text())["refinement"].startswith(f"{refine} (no CRF")


def test_infer_ends_with_the_classes_that_cannot_be_told_apart(
    finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A backbone without training tells few classes apart; the control experiment with shuffled labels is silent."""
    cfg = compose(overrides(finished, "backbone=miniature_random"))
    bank = Bank.load(BuildBank.run(cfg))
    vectors = bank.select_vectors(cfg.bank.centre, OutliersConfig(enabled=False)).vectors
    expected = [f"bank: {line}" for line in worst_lines(count_nearest_classes(bank, vectors), "")]
    assert len(expected) == 3
    for option, lines in (([], expected), (["bank.shuffle_labels=1"], [])):
        caplog.clear()
        Infer.run(compose(overrides(finished, "backbone=miniature_random", *option)))
        said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("bank: ")]
        assert said[:2] == lines[:2]
        assert len(said) == len(lines)
