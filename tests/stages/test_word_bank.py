"""A bank whose regions have CLIP features beside their vectors, so that proposals are labelled by words."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from moduseg import Segmenter
from moduseg.bank import edit
from moduseg.bank.aggregation import patch_coverage
from moduseg.bank.store import Bank
from moduseg.cli.options import parse
from moduseg.config import compose
from moduseg.config.command_keys import AddOptions, PredictOptions
from moduseg.datasets.io import read_label_png
from moduseg.errors import ArtefactError, ConfigError
from moduseg.pipeline.workspace import Workspace
from moduseg.pseudo_masks.base import PseudoMaskGenerator
from moduseg.stages import extend_bank
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.infer import Infer
from moduseg.stages.queries import Queries
from moduseg.tools import predict
from tests.stages.test_segment import CLIP
from tests.support.runs import overrides

WORDS = (*CLIP, "pseudo_masks.refine=none", "retrieval.answer=words")
UNLABELLED = (*WORDS, "bank.regions=proposals", "bank.min_area=30")


def settings_of(outputs: Path, *more: str) -> list[str]:
    return overrides(outputs, *more, train=3, val=2)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("word_bank")


@pytest.fixture(scope="module")
def inferred(outputs: Path) -> Path:
    """The folder of a run with a bank without labels."""
    return Infer.run(compose(settings_of(outputs, *UNLABELLED)))


@pytest.fixture(scope="module")
def bank_folder(outputs: Path, inferred: Path) -> Path:
    return BuildBank.run(compose(settings_of(outputs, *UNLABELLED)))


def test_bank_without_labels_holds_all_proposals(outputs: Path, bank_folder: Path) -> None:
    work, bank = Workspace(compose(settings_of(outputs, *UNLABELLED))), Bank.load(bank_folder)
    samples = [work.dataset("train").load(image_id, truth=True) for image_id in work.dataset("train").ids]
    areas = [work.proposer.propose(sample).areas for sample in samples]
    assert bank.areas.tolist() == [area for image in areas for area in image.tolist() if area >= 30]
    assert not bank.labels.any()
    assert bank.word_values is not None
    torch.testing.assert_close(bank.word_values.norm(dim=1), torch.ones(len(bank)))


def test_no_tag_is_read(bank_folder: Path) -> None:
    manifest = json.loads((bank_folder / "manifest.json").read_text())
    assert not any("scores" in str(folder) or "pseudo_masks" in str(folder) for folder in manifest["inputs"].values())


def test_region_features_are_means_of_patches(outputs: Path) -> None:
    work = Workspace(compose(settings_of(outputs, *WORDS)))
    sample = work.dataset("val").load(work.dataset("val").ids[0], truth=True)
    masks = torch.cat([work.proposer.propose(sample).masks, torch.zeros(1, *sample.size, dtype=torch.bool)])
    encoder = work.region_encoder
    (token_map,) = encoder._encode([sample.image], None)
    unit = functional.normalize(token_map.tokens, dim=-1)
    expected = torch.stack(
        [(unit * weights[..., None]).sum((0, 1)) for weights in patch_coverage(masks, token_map.stride)]
    )
    torch.testing.assert_close(encoder.pool_regions(sample.image, masks), functional.normalize(expected, dim=1))
    assert not encoder.pool_regions(sample.image, masks)[-1].any()


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param(("window=64", "stride=48"), id="windows"),
        pytest.param(("short_side=96",), id="resized"),
        pytest.param(("padding=56",), id="padded"),
        pytest.param(("short_side=100", "padding=0"), id="cut to whole patches"),
    ],
)
def test_regions_keep_their_features_however_the_image_is_seen(outputs: Path, setting: tuple[str, ...]) -> None:
    """A wrong offset or size would give a region the features of another one."""
    more = [f"{'+' if 'stride' in s or 'padding' in s else ''}pseudo_masks.generator.{s}" for s in setting]
    plain = Workspace(compose(settings_of(outputs, *WORDS))).region_encoder
    work = Workspace(compose(settings_of(outputs, *WORDS, *more)))
    sample = work.dataset("val").load(work.dataset("val").ids[1], truth=True)
    masks = work.proposer.propose(sample).masks
    similarity = work.region_encoder.pool_regions(sample.image, masks) @ plain.pool_regions(sample.image, masks).T
    assert similarity.argmax(1).tolist() == list(range(len(masks)))


def test_label_maps_are_those_of_the_plain_steps(outputs: Path, inferred: Path, bank_folder: Path) -> None:
    """True proposals do not overlap: each has the label of the best word of a half-and-half mix."""
    work, bank = Workspace(compose(settings_of(outputs, *UNLABELLED))), Bank.load(bank_folder)
    assert bank.word_values is not None
    words, keys = work.region_encoder.words, functional.normalize(bank.pooled - bank.pooled.mean(0), dim=1)
    for image_id in work.dataset("val").ids:
        sample = work.dataset("val").load(image_id, truth=True)
        expected, proposals = np.zeros(sample.size, np.uint8), work.proposer.propose(sample)
        proposals = proposals.select(proposals.areas >= 30)
        tokens = work.backbone.tokens([sample.image])[0]
        own = work.region_encoder.pool_regions(sample.image, proposals.masks)
        for mask, value in zip(proposals.masks, own, strict=True):
            weights = patch_coverage(mask[None], tokens.stride)[0]
            pooled = (tokens.tokens * weights[..., None]).sum((0, 1)) / weights.sum() - bank.pooled.mean(0)
            neighbour = bank.word_values[(keys @ pooled).argmax()]
            best = int(((value @ words.features.T + neighbour @ words.features.T) / 2).argmax())
            expected[mask.numpy()] = words.labels[best]
        assert np.array_equal(read_label_png(inferred / "labels" / f"{image_id}.png"), expected)


def test_a_bank_with_labels_may_be_asked_by_words_too(outputs: Path) -> None:
    labelled = Bank.load(BuildBank.run(compose(settings_of(outputs, *CLIP, "pseudo_masks.refine=none"))))
    worded = Bank.load(BuildBank.run(compose(settings_of(outputs, *WORDS))))
    assert labelled.word_values is None
    assert torch.equal(labelled.pooled, worded.pooled)
    assert torch.equal(labelled.labels, worded.labels)
    assert worded.word_values is not None
    assert len(worded.word_values) == len(worded)


def test_a_class_is_added_by_its_name(outputs: Path, bank_folder: Path, tmp_path: Path) -> None:
    """Without a name no pixel can get the class; with it, the bank answers as if it had always known it."""
    bank, val = Bank.load(bank_folder), Workspace(compose(settings_of(outputs, *UNLABELLED))).dataset("val")
    sample = next(s for s in map(val.load, val.ids) if s.labels)
    # True masks cannot be proposed for an image alone.
    sam = {"proposer": compose(["proposer=superpixels"]).proposer}
    full = Segmenter.from_bank(bank_folder, "cpu", sam)
    expected = full.predict(sample.image).label_map
    last = int(expected.max())
    name = bank.classes[last]
    assert last > 0

    smaller = edit.remove(bank, [name])
    smaller.save(tmp_path / "smaller")
    (tmp_path / "smaller" / "manifest.json").write_text((bank_folder / "manifest.json").read_text())
    without = Segmenter.from_bank(tmp_path / "smaller", "cpu", sam).predict(sample.image)
    assert name not in smaller.classes
    grown = extend_bank.run(AddOptions(str(tmp_path / "smaller"), words=(name,), out=str(tmp_path / "grown")))
    segmenter = Segmenter.from_bank(grown, "cpu", sam)
    label_map = segmenter.predict(sample.image).label_map

    new = segmenter.classes.index(name)
    assert new == len(segmenter.classes) - 1
    assert np.array_equal(label_map == new, expected == last)
    assert (without.label_map[expected == last] != new).all()
    assert len(Bank.load(grown)) == len(bank)


def test_other_words_are_another_prediction(outputs: Path, bank_folder: Path, tmp_path: Path) -> None:
    val = Workspace(compose(settings_of(outputs, *UNLABELLED))).dataset("val")
    asked = [f"bank={bank_folder}", f"images={val.image_path(val.ids[0])}", f"out={tmp_path}", "formats=png"]
    asked += ["proposer=superpixels", "runtime.device=cpu", "retrieval.min_area=10"]
    predict.run(*parse(asked, PredictOptions, "predict"))
    words = "pseudo_masks.generator.background_words=[a red star]"
    with pytest.raises(ArtefactError, match="result of another bank or other settings"):
        predict.run(*parse([*asked, words], PredictOptions, "predict"))


def test_words_have_no_share_of_votes(outputs: Path, bank_folder: Path) -> None:
    """Neighbours without labels would be sure of whatever is called background."""
    val = Workspace(compose(settings_of(outputs, *UNLABELLED))).dataset("val")
    segmenter = Segmenter.from_bank(bank_folder, "cpu", {"proposer": compose(["proposer=superpixels"]).proposer})
    prediction = segmenter.predict(val.load(val.ids[0]).image)
    with pytest.raises(ConfigError, match=r"confidence: got retrieval.answer=words, expected labels"):
        _ = prediction.confidence


def test_others_predict_while_a_new_name_is_learned(
    outputs: Path, bank_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the words of the longer class list are encoded, another thread has all it needs of the shorter one."""
    work = Workspace(compose(settings_of(outputs, *UNLABELLED)))
    sample = work.dataset("val").load(work.dataset("val").ids[0])
    # The oracle that made the bank looks at truth, which pictures of one's own do not have.
    segmenter = Segmenter.from_bank(bank_folder, "cpu", {"proposer": compose(["proposer=superpixels"]).proposer})
    prediction = segmenter.predict(sample.image)
    build, meanwhile = segmenter._build_generator, []

    def build_slowly(classes: Sequence[str]) -> PseudoMaskGenerator:
        meanwhile.append(segmenter.predict(sample.image))
        return build(classes)

    monkeypatch.setattr(segmenter, "_build_generator", build_slowly)
    segmenter.correct(prediction, 0, "a new name")
    assert [each.classes for each in meanwhile] == [prediction.classes]
    assert np.array_equal(meanwhile[0].label_map, prediction.label_map)
    assert segmenter.classes == (*prediction.classes, "a new name")


def test_a_bank_without_word_values_takes_no_words(outputs: Path) -> None:
    bank = Bank.load(BuildBank.run(compose(settings_of(outputs, *CLIP, "pseudo_masks.refine=none"))))
    with pytest.raises(ArtefactError, match="words: the bank has no word values"):
        edit.append_words(bank, ["red hexagon"])
    with pytest.raises(ArtefactError, match="has no word values, expected them"):
        bank.check_words_fit("")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        pytest.param(["red star"], "words: got 'red star', which is a class", id="a class of the bank"),
        pytest.param([" "], "new: got the class name ' '", id="an empty name"),
    ],
)
def test_names_are_checked(bank_folder: Path, names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        edit.append_words(Bank.load(bank_folder), names)


def test_edited_banks_keep_word_values(bank_folder: Path, tmp_path: Path) -> None:
    bank = Bank.load(bank_folder)
    assert bank.word_values is not None
    smaller = edit.remove(bank, images=[bank.image_ids[0]])
    assert torch.equal(smaller.word_values, bank.word_values[bank.image_index != 0])  # type: ignore[arg-type]
    merged = edit.merge([smaller, edit.prefix_images(bank, "more")])
    assert torch.equal(merged.word_values, torch.cat([smaller.word_values, bank.word_values]))  # type: ignore[arg-type, list-item]
    larger = edit.add_region(bank, "hand", "red star", bank.pooled[0], 50)
    larger.save(tmp_path)
    assert torch.equal(
        Bank.load(tmp_path).word_values, torch.cat([bank.word_values, torch.zeros_like(bank.word_values[:1])])
    )  # type: ignore[arg-type]
    with pytest.raises(ArtefactError, match="merge: the banks have word values of the CLIPs"):
        edit.merge(
            [bank, edit.prefix_images(dataclasses.replace(bank, info={**bank.info, "word_values_digest": "x"}), "x")]
        )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        pytest.param(["bank.regions=proposals"], "retrieval.answer: got labels, expected words", id="nothing to vote"),
        pytest.param(["retrieval.answer=words", "bank.prototypes=3"], "bank.prototypes: got 3", id="prototypes"),
        pytest.param(["retrieval.answer=words", "retrieval.neighbour_share=2"], "neighbour_share: got 2", id="share"),
    ],
)
def test_settings_that_do_not_fit_are_refused(outputs: Path, more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(settings_of(outputs, *CLIP, *more))


def test_a_generator_without_words_is_refused(outputs: Path) -> None:
    with pytest.raises(ConfigError, match="got GroundTruthPseudoMasks, expected clip_dense"):
        Queries.run(compose(settings_of(outputs, "retrieval.answer=words")))


def test_defaults_are_in_no_key(outputs: Path) -> None:
    settings = compose(settings_of(outputs)).as_dict()
    assert "regions" not in settings["bank"]
    assert not {"answer", "neighbour_share"} & set(settings["retrieval"])
