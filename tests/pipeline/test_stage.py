"""The base class of stages, and each stage's `process` on items made by hand, without a run or a file."""

from __future__ import annotations

import json
import pickle
import shutil
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors

from moduseg.config import compose
from moduseg.devices import Device
from moduseg.errors import ArtefactError
from moduseg.files import write_atomic
from moduseg.masks import encoded
from moduseg.pipeline.batches import Files, Outcome
from moduseg.pipeline.manifests import StageFolder
from moduseg.pipeline.records import encode_files
from moduseg.pipeline.stage import Stage, rebuild_runner, skipped_images
from moduseg.pipeline.workspace import Workspace
from moduseg.proposers import sa1b
from moduseg.pseudo_masks.labelling import ScoredImage
from moduseg.pseudo_masks.store import unpack
from moduseg.retrieval.retriever import Retriever
from moduseg.stages.build_bank import BuildBank, RegionSource
from moduseg.stages.class_scores import ClassScores
from moduseg.stages.infer import Infer
from moduseg.stages.propose import Propose
from moduseg.stages.pseudo_masks import PseudoMasks
from moduseg.stages.queries import Queries
from moduseg.structures import Proposals, Sample, ScoreMaps, SearchBank
from tests.support.runs import overrides

SIZE = (32, 40)
LABELS = np.zeros(SIZE, np.uint8)
LABELS[:, 20:] = 3
"""The left half is background, the right half class 3."""
IMAGE = np.where(LABELS[..., None] == 3, np.uint8(200), np.uint8(30)).repeat(3, 2)
SAMPLE = Sample("trip/a", IMAGE, labels=(3,), semantic=LABELS)
HALVES = Proposals(torch.from_numpy(np.stack([LABELS == 0, LABELS == 3])))


@pytest.fixture
def work(tmp_path: Path) -> Workspace:
    """A workspace of oracles and a random backbone, with nothing on disk."""
    return Workspace(compose(overrides(tmp_path / "outputs", "bank.min_area=1", "bank.purify.enabled=false")))


def only_file(files: list[Files], name: str) -> bytes:
    """Return the content of the one file of the one image."""
    assert [list(of_image) for of_image in files] == [[name]]
    return encode_files(files[0])[name]


def decode(png: bytes) -> np.ndarray:
    """Return the ids of a label PNG."""
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)))


@torch.inference_mode()
def test_propose_writes_masks(work: Workspace) -> None:
    content = json.loads(only_file(Propose(work).process([SAMPLE]), "masks/trip/a.json"))
    assert {annotation["area"] for annotation in content["annotations"]} == {32 * 20}


@torch.inference_mode()
def test_class_scores_writes_a_map_for_each_tag(work: Workspace) -> None:
    maps = unpack(only_file(ClassScores(work).process([(SAMPLE, None)]), "maps/trip/a.safetensors.z"))
    assert maps.class_ids == (3,)
    assert np.array_equal(maps.scores[0].numpy() > 0.5, LABELS == 3)


@torch.inference_mode()
def test_pseudo_masks_writes_a_label_map(work: Workspace) -> None:
    is_class = torch.from_numpy(LABELS == 3).float()
    item = ScoredImage("trip/a", ScoreMaps((3,), is_class[None], 1 - is_class))
    assert np.array_equal(decode(only_file(PseudoMasks(work).process([item]), "labels/trip/a.png")), LABELS)


@torch.inference_mode()
def test_build_bank_writes_a_vector_for_each_class(work: Workspace) -> None:
    item = ("trip/a", IMAGE, RegionSource(LABELS))
    entry = load_tensors(only_file(BuildBank(work).process([item]), "vectors/trip/a.safetensors"))
    assert entry["labels"].tolist() == [0, 3]
    assert entry["areas"].tolist() == [32 * 20, 32 * 20]
    assert entry["pooled"].shape == (2, work.backbone.dim)


@torch.inference_mode()
def test_queries_and_bank_pool_a_region_alike(work: Workspace) -> None:
    pooled = load_tensors(only_file(Queries(work).process([(SAMPLE, HALVES)]), "vectors/trip/a.safetensors"))["pooled"]
    item = ("trip/a", IMAGE, RegionSource(LABELS))
    entry = load_tensors(only_file(BuildBank(work).process([item]), "vectors/trip/a.safetensors"))
    torch.testing.assert_close(pooled, entry["pooled"])


@torch.inference_mode()
def test_infer_paints_each_proposal_with_its_neighbours_label(work: Workspace) -> None:
    stage = Infer(work)
    bank = SearchBank(torch.eye(2), torch.tensor([0, 3]), torch.arange(2))
    stage.retriever = Retriever(bank, work.cfg.retrieval)
    vectors = {"pooled": torch.tensor([[0.9, 0.1], [0.2, 0.8]])}
    assert np.array_equal(decode(only_file(stage.process([("trip/a", HALVES, vectors)]), "labels/trip/a.png")), LABELS)


@torch.inference_mode()
def test_propose_holds_the_masks_of_one_image(work: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a proposer that takes images one by one; with a thousand masks a batch of them would take gigabytes."""
    alive: weakref.WeakSet[Proposals] = weakref.WeakSet()
    most_alive = 0

    def propose(sample: Sample) -> Proposals:
        nonlocal most_alive
        proposals = Proposals(HALVES.masks.clone())
        alive.add(proposals)
        most_alive = max(most_alive, len(alive))
        return proposals

    monkeypatch.setattr(encoded, "MAX_WAITING_PIXELS", 2 * 32 * 40 - 1)
    monkeypatch.setattr(work.proposer, "propose", propose)
    files = Propose(work).process([SAMPLE, SAMPLE, SAMPLE, SAMPLE])
    assert most_alive <= 2  # the one before goes when the next one is there
    assert len(alive) <= 1
    assert [encode_files(of_image)["masks/trip/a.json"] for of_image in files] == [
        sa1b.encode_proposals(HALVES, "trip/a")
    ] * 4


@torch.inference_mode()
@pytest.mark.parametrize("max_pixels", [pytest.param(0, id="run lengths"), pytest.param(1 << 24, id="masks")])
def test_proposals_that_wait_give_the_same_files(
    work: Workspace, max_pixels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoded, "MAX_WAITING_PIXELS", max_pixels)
    (tmp_path / "a.json").write_bytes(sa1b.encode_proposals(HALVES, "a"))
    waiting = sa1b.read_waiting(tmp_path / "a.json", SIZE)
    assert isinstance(waiting, encoded.EncodedProposals) is (max_pixels == 0)
    is_class = torch.from_numpy(LABELS == 3).float()
    work.cfg = replace(work.cfg, pseudo_masks=replace(work.cfg.pseudo_masks, refine="region_vote"))
    maps = ScoreMaps((3,), is_class[None], 1 - is_class)
    stages: list[tuple[Stage[Any], Any, Any]] = [
        (ClassScores(work), (SAMPLE, HALVES), (SAMPLE, waiting)),
        (PseudoMasks(work), ScoredImage("a", maps, None, HALVES), ScoredImage("a", maps, None, waiting)),
        (Queries(work), (SAMPLE, HALVES), (SAMPLE, waiting)),
    ]
    for stage, item, waiting_item in stages:
        assert encode_files(stage.process([waiting_item])[0]) == encode_files(stage.process([item])[0])


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("stage", [Propose, ClassScores])
def test_a_key_names_the_device_unless_it_is_the_cpu(work: Workspace, stage: type[Stage[Any]], kind: str) -> None:
    """Float32 of a GPU is not float32 of the CPU, bit for bit; the keys of the CPU are older than the name."""
    work.device = Device(torch.device(kind))
    named = {key: value for key, value in stage(work).key().items() if key in ("device", "precision")}
    expected = {"precision": "float32"} if kind == "cpu" else {"precision": "float32", "device": "cuda"}
    assert named == expected
    assert {key: value for key, value in work.backbone_parts().items() if key in expected} == expected


def test_how_scores_are_stored_is_in_the_key_unless_it_is_the_default(work: Workspace, tmp_path: Path) -> None:
    small = compose(overrides(tmp_path / "outputs", "pseudo_masks.score_bits=8", "pseudo_masks.score_scale=2"))
    key = ClassScores(Workspace(small)).key()
    assert (key.pop("score_bits"), key.pop("score_scale")) == (8, 2)
    assert ClassScores(work).key() == key


def test_process_leaves_no_file(work: Workspace, tmp_path: Path) -> None:
    with torch.inference_mode():
        Propose(work).process([SAMPLE])
        Queries(work).process([(SAMPLE, HALVES)])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


class Shout(Stage[str]):
    """Writes each id in capitals, with the number of images beside it."""

    name = "shout"
    uses = "eval"

    def key(self) -> dict[str, Any]:
        return {"stage": "shout"}

    def folder_name(self) -> str:
        return f"loud-{self.split}"

    def load(self, image_id: str) -> str:
        return image_id.upper()

    def process(self, items: list[str]) -> list[Files]:
        return [{f"out/{item}.txt": item.encode()} for item in items]

    def reads(self, image_id: str) -> list[Path]:
        return [self.image_file(image_id)]

    def merge(self, outcome: Outcome) -> dict[str, Any]:
        file = self.artefact.path / "count.txt"
        if outcome.changed or not file.is_file():
            write_atomic(file, str(len(self.image_ids())).encode())
        return {"loudest": max(self.image_ids())}


def test_a_stage_says_what_it_does_and_nothing_else(tmp_path: Path) -> None:
    """Loop, resume, manifest and merge come from the base class."""
    cfg = compose(overrides(tmp_path))
    folder = StageFolder(Shout.run(cfg))
    assert folder.path.parent == tmp_path / "miniature" / "shout"
    assert folder.name.startswith("loud-val-")
    assert (folder.path / "out" / "VAL_00002.txt").read_text() == "VAL_00002"
    assert (folder.path / "count.txt").read_text() == "4"
    assert (folder.manifest["images"], folder.manifest["loudest"]) == (4, "val_00003")
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.is_file()}
    assert Shout.run(cfg) == folder.path
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (folder.path / "count.txt").unlink()
    Shout.run(cfg)
    assert (folder.path / "count.txt").read_text() == "4"


@pytest.mark.parametrize("field", ["seconds", "images", "key"])
def test_merge_may_not_return_a_field_of_the_base_class(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shout, "merge", lambda self, outcome: {field: 1})
    with pytest.raises(ArtefactError, match=rf"Shout\.merge: got the fields {field}, expected none of those"):
        Shout.run(compose(overrides(tmp_path)))


def test_infer_starts_the_stages_of_the_bank_first(work: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked of it first."""
    started: list[str] = []

    def record(stage: type[Stage[Any]]) -> classmethod:
        return classmethod(lambda cls, *_: started.append(cls.name) or Path("nowhere"))

    for stage in (BuildBank, Queries, Propose):
        monkeypatch.setattr(stage, "run", record(stage))
    with pytest.raises(KeyError, match="propose"):
        _ = Infer(work).proposals
    assert started == ["build_bank", "queries"]


class Rebuild(Shout):
    """Merges into a folder that it makes anew, as pictures of an earlier result are removed."""

    name = "rebuild"

    def merge(self, outcome: Outcome) -> dict[str, Any]:
        folder = self.artefact.path / "pictures"
        if outcome.changed:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            time.sleep(0.2)
            (folder / "a.txt").touch(exist_ok=False)
        return {}


def test_two_mergers_take_turns(tmp_path: Path) -> None:
    """Shards that find all batches done at the same moment; the second one finds the merge done too."""
    cfg = compose(overrides(tmp_path))
    Shout.run(cfg)  # draws the data set
    stages = [Rebuild(Workspace(cfg)) for _ in range(2)]
    runners = [stage.runner() for stage in stages]
    num_processed = [runner.run_shard() for runner in runners]
    outcomes = [runner.collect() for runner in runners]
    assert [outcome.changed for outcome in outcomes] == [True, True]
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(Rebuild._complete, stages, runners, num_processed))
    assert folders == [str(stages[0].artefact.path)] * 2
    assert [path.name for path in (stages[0].artefact.path / "pictures").iterdir()] == ["a.txt"]
    assert stages[0].artefact.is_complete


def test_a_stage_runs_once_in_a_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = compose(overrides(tmp_path))
    work = Workspace(cfg)
    folder = Shout.run(cfg, work)
    monkeypatch.setattr(Shout, "runner", None)
    assert Shout.run(cfg, work) == folder


def test_another_process_gets_the_class(tmp_path: Path) -> None:
    """What a worker of Ray receives: picklable, and with the stages that are complete already."""
    cfg = compose(overrides(tmp_path))
    rebuild = pickle.loads(pickle.dumps(partial(rebuild_runner, Shout, cfg, {("propose", "val"): tmp_path}, None)))
    runner = rebuild()
    assert dict(runner.process_batches([1])) == {1: 2}
    assert runner.unfinished([0, 1]) == [0]


def test_images_that_an_earlier_stage_lost_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "failures.jsonl").write_text('{"id": "a", "error": "truncated"}\n')
    assert skipped_images({"propose": StageFolder(tmp_path)}) == {"a": "propose failed: truncated"}
