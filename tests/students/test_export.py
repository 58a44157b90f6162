"""Exported students: an ONNX file that gives PyTorch's logits, and the example that runs it alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from moduseg.errors import ConfigError, ModusegError
from moduseg.students import export
from moduseg.students.base import Outputs
from moduseg.students.export import check_export, export_network
from moduseg.students.network import LiteHead, SegmentationNetwork

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra `onnx`)")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra `onnx`)")
OUTPUTS = Outputs(("background", "red", "green", "blue"))
EXAMPLE = Path(__file__).parents[2] / "examples" / "student_onnx.py"


class Body(nn.Module):
    """Two convolutions and a light head."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 8, 3, 2, 1)
        self.head = LiteHead(8, 4, OUTPUTS.count, 8)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        fine = self.fine(images).relu()
        return self.head(self.coarse(fine).relu(), fine)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return SegmentationNetwork(Body(), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).eval()


@pytest.fixture(scope="module")
def exported(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "student.onnx"
    check = export_network(network, OUTPUTS, path, (64, 96), is_flexible=True)
    assert check.max_difference < 1e-5
    assert check.num_bytes == path.stat().st_size
    return path


def test_the_file_takes_any_size(network: nn.Module, exported: Path) -> None:
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    for shape in ((1, 3, 33, 47), (2, 3, 100, 40)):
        pictures = torch.rand(*shape)
        with torch.no_grad():
            expected = network(pictures).numpy()
        logits = session.run(["logits"], {"image": pictures.numpy()})[0]
        assert logits.shape == (shape[0], 4, *shape[2:])
        assert np.abs(logits - expected).max() < 1e-4


def test_the_file_names_its_classes(exported: Path) -> None:
    metadata = onnxruntime.InferenceSession(str(exported)).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == list(OUTPUTS.classes)
    assert metadata["first_id"] == "0"


def test_the_example_labels_a_picture(network: nn.Module, exported: Path, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "photo.png")
    command = [sys.executable, str(EXAMPLE), str(exported), str(tmp_path / "photo.png"), str(tmp_path / "labels.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    labels = np.asarray(Image.open(tmp_path / "labels.png"))
    with torch.no_grad():
        logits = network(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255)
    assert (labels == logits[0].argmax(0).numpy()).mean() > 0.999
    shares = {line.split(":")[0] for line in done.stdout.splitlines()}
    assert shares == {OUTPUTS.classes[label] for label in np.unique(labels)}


def test_a_file_of_another_network_is_refused(exported: Path) -> None:
    torch.manual_seed(1)
    other = SegmentationNetwork(Body(), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).eval()
    with pytest.raises(ModusegError, match=r"differ from PyTorch's by .*expected at most 0\.0001"):
        check_export(other, exported, (64, 96), is_flexible=True)


def test_a_file_that_answers_otherwise_does_not_stay(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MAX_DIFFERENCE", -1.0)
    with pytest.raises(ModusegError, match="differ from PyTorch's"):
        export_network(network, OUTPUTS, tmp_path / "student.onnx", (64, 96), is_flexible=True)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name.startswith("onnx") else object())
    with pytest.raises(
        ConfigError, match=r"onnx, onnxscript, onnxruntime not installed; pip install 'moduseg\[onnx\]'"
    ):
        export_network(network, OUTPUTS, tmp_path / "a.onnx", (64, 64), is_flexible=True)
