"""All stages, `Segmenter` and the demo's session on a pretended GPU, in each precision; faults put in are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moduseg import Segmenter
from moduseg.app.session import Session
from moduseg.bank.store import Bank
from moduseg.config import compose
from moduseg.datasets.io import read_label_png
from moduseg.errors import ModusegError
from moduseg.pseudo_masks.clip_dense import ClipDenseGenerator
from moduseg.retrieval import retriever
from moduseg.retrieval.vote import vote
from moduseg.stages import evaluate, extend_bank
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.infer import Infer
from tests.support.pretend_cuda import pretend_cuda
from tests.support.runs import overrides
from tests.support.tagged_world import scene, write_folder

PRECISIONS = ("float32", "bfloat16", "float16")
SAM = ("proposer=sam_miniature", "proposer.points_per_side=5")
MODELS = (
    "pseudo_masks=clip_dense",
    "backbone=miniature",
    "evaluation.bootstrap=0",
    "evaluation.panels=0",
)


def configure(outputs: Path, *more: str) -> Any:
    proposer = () if any(override.startswith("proposer=") for override in more) else SAM
    return compose(overrides(outputs, *MODELS, *proposer, *more, train=4, val=2, world=outputs.parent))


def on_gpu(precision: str) -> tuple[str, str]:
    return ("runtime.device=cuda", f"runtime.precision={precision}")


def read_failures(outputs: Path) -> list[str]:
    return [line for path in outputs.rglob("failures.jsonl") for line in path.read_text().splitlines()]


def read_label_maps(result: Path) -> list[np.ndarray]:
    return [read_label_png(path) for path in sorted(result.rglob("*.png"))]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """The label maps of a run on the CPU."""
    return read_label_maps(Infer.run(configure(tmp_path_factory.mktemp("runs") / "cpu")))


@pytest.fixture(scope="module", params=PRECISIONS)
def gpu_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Configuration and outputs of a run on the pretended GPU."""
    outputs = tmp_path_factory.mktemp(request.param) / "outputs"
    cfg = configure(outputs, *on_gpu(request.param))
    with pretend_cuda():
        evaluate.run(cfg)
    return cfg, outputs


def test_every_stage(gpu_run: tuple[Any, Path], on_cpu: list[np.ndarray]) -> None:
    cfg, outputs = gpu_run
    assert read_failures(outputs) == []
    with pretend_cuda():
        label_maps = read_label_maps(Infer.run(cfg))
    stages = {path.parent.parent.name for path in outputs.rglob("manifest.json")}
    assert {"propose", "scores", "pseudo_masks", "build_bank", "queries", "infer", "evaluate"} <= stages
    differing = np.mean([np.mean(ours != theirs) for ours, theirs in zip(label_maps, on_cpu, strict=True)])
    assert differing < (0.01 if cfg.runtime.precision == "float32" else 0.1)


def test_images_are_added(gpu_run: tuple[Any, Path], tmp_path: Path) -> None:
    cfg, _ = gpu_run
    folder = write_folder(tmp_path / "more", range(30, 32))
    with pretend_cuda():
        bank = BuildBank.run(cfg)
        options = extend_bank.AddOptions(str(bank), (str(folder / "images"),), str(folder / "labels.csv"))
        new = extend_bank.run(options, [f"runtime.outputs={tmp_path / 'outputs'}", "runtime.device=cuda"])
    assert len(Bank.load(new)) > len(Bank.load(bank))
    assert read_failures(tmp_path / "outputs") == []


def test_segmenter_and_session(gpu_run: tuple[Any, Path]) -> None:
    """The session shows what the segmenter predicts, explains it, and learns a correction."""
    image = scene(20).image
    with torch.inference_mode(), pretend_cuda():
        bank = BuildBank.run(gpu_run[0])
        segmenter = Segmenter.from_bank(bank, device="cuda")
        prediction = segmenter.predict(image)
        session = Session(segmenter)
        session.show(image)
        assert np.array_equal(session.prediction.label_map, prediction.label_map)
        proposal = int(prediction.kept[0])
        explanation = session.prediction.explain(proposal)
        top_k = session.prediction.neighbours.shape[1]
        change = session.correct(proposal, "purple blob")
        assert len(session.bank) == len(segmenter.bank) + 1
    assert explanation.label == segmenter.classes[int(prediction.labels[proposal])]
    assert sum(explanation.votes.values()) == top_k
    assert change.region is not None
    assert change.region.after == "purple blob"


@pytest.fixture
def bank(on_cpu: list[np.ndarray], tmp_path: Path) -> Path:
    """A bank made on the CPU."""
    return BuildBank.run(configure(tmp_path / "outputs", "pseudo_masks=ground_truth", "proposer=ground_truth"))


def test_a_tensor_left_on_the_host_in_the_vote_is_found(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def vote_on_the_host(labels: Tensor, similarities: Tensor, temperature: float | None) -> tuple[Tensor, Tensor]:
        return vote(labels, similarities.cpu(), temperature)

    overrides = {"proposer": {"name": "superpixels"}}
    with torch.inference_mode(), pretend_cuda():
        segmenter = Segmenter.from_bank(bank, device="cuda", overrides=overrides)
        assert segmenter.predict(scene(20).image).label_map.any()
        monkeypatch.setattr(retriever, "vote", vote_on_the_host)
        with pytest.raises(RuntimeError, match="same device"):
            segmenter.predict(scene(20).image)


def test_numpy_in_a_generator_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = ClipDenseGenerator._compare

    def compare_in_numpy(generator: ClipDenseGenerator, *arguments: Any) -> Tensor:
        return torch.from_numpy(compare(generator, *arguments).numpy())

    monkeypatch.setattr(ClipDenseGenerator, "_compare", compare_in_numpy)
    cfg = configure(tmp_path / "outputs", *on_gpu("float32"), "proposer=superpixels")
    with pretend_cuda(), pytest.raises(ModusegError, match="can't convert cuda:0"):
        BuildBank.run(cfg)
