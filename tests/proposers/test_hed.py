"""HED beside a plain reimplementation, the package's own edges, and what its weight file may not be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from moduseg.devices import Device
from moduseg.errors import ArtefactError, MissingError
from moduseg.proposers.hed import BLOCKS, MEAN_BGR, ContourDetector, Hed, convert_keras, name_keras_tensors
from tests import reference
from tests.support.devices import CPU
from tests.support.key_names import read
from tests.support.pretend_cuda import CUDA, pretend_cuda
from tests.support.real_weights import HED, use_real_weights


def detector(weights: str = "random", seed: int = 0, device: Device = CPU) -> ContourDetector:
    return ContourDetector(weights, seed, device)


def resize_plainly(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize `[h, w]` bilinearly, pixel centres on half numbers, the border repeated."""
    for axis, length in enumerate(size):
        centre = (np.arange(length) + 0.5) * values.shape[axis] / length - 0.5
        low = np.floor(centre).astype(int)
        first, second = (np.take(values, np.clip(low + step, 0, values.shape[axis] - 1), axis=axis) for step in (0, 1))
        share = (centre - low).reshape((-1, 1) if axis == 0 else (1, -1))
        values = first * (1 - share) + second * share
    return values


def pool_plainly(features: Tensor) -> Tensor:
    """Return the largest of every 2 x 2 pixels of `[C, h, w]`; a last odd row or column has no second."""
    channels, height, width = features.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    padded = torch.full((channels, 2 * rows, 2 * columns), -torch.inf)
    padded[:, :height, :width] = features
    return padded.view(channels, rows, 2, columns, 2).amax((2, 4))


def detect_plainly(state: dict[str, Tensor], image: np.ndarray) -> np.ndarray:
    """Return the logits `[6, H, W]` for `image` `[H, W, 3]` from tensors under Keras' names."""
    features = torch.from_numpy((image[..., ::-1] - np.array(MEAN_BGR)).transpose(2, 0, 1)).float()
    sides = []
    for i, widths in enumerate(BLOCKS):
        if i:
            features = pool_plainly(features)
        for j in range(len(widths)):
            name = f"block{i + 1}/layers/conv2d{'' if j == 0 else f'_{j}'}/vars"
            kernel = state[f"{name}/0"].permute(3, 2, 0, 1)
            features = F.conv2d(features[None], kernel, state[f"{name}/1"], padding=1)[0].clamp(min=0)
        kernel, bias = state[f"dsn{i + 1}/vars/0"][0, 0, :, 0], state[f"dsn{i + 1}/vars/1"]
        side = torch.einsum("chw,c->hw", features, kernel) + bias
        sides.append(resize_plainly(side.numpy(), image.shape[:2]))
    weights, bias = state["fuse/vars/0"][0, 0, :, 0].numpy(), state["fuse/vars/1"].numpy()
    return np.stack([*sides, np.tensordot(weights, np.stack(sides), 1) + bias])


@pytest.fixture(scope="module")
def keras_state() -> dict[str, Tensor]:
    """Random weights by the names of the manifest, of a size that keeps the values of all blocks alike."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in read("hed").items():
        fan_in = int(np.prod(shape[:3])) if len(shape) == 4 else 100
        state[name] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
    return state


def test_names_and_shapes_are_those_of_the_manifest() -> None:
    manifest = read("hed")
    names = name_keras_tensors()
    assert sorted(names.values()) == sorted(manifest)
    state = {name: torch.empty(shape, device="meta") for name, shape in manifest.items()}
    with torch.device("meta"):
        Hed().load_state_dict(convert_keras(state, Path("hed.safetensors")), strict=True)


@pytest.mark.parametrize("size", [(16, 32), (17, 31), (33, 18), (5, 3), (1, 1), (1, 40)])
def test_logits_are_those_of_a_plain_network(size: tuple[int, int], keras_state: dict[str, Tensor]) -> None:
    image = np.random.default_rng(size).integers(0, 256, (*size, 3), dtype=np.uint8)
    model = Hed().eval()
    model.load_state_dict(convert_keras(keras_state, Path("hed.safetensors")))
    pixels = torch.from_numpy((image[..., ::-1] - np.array(MEAN_BGR)).transpose(2, 0, 1)).float()
    with torch.no_grad():
        logits = model(pixels[None])[0].numpy()
    expected = detect_plainly(keras_state, image)
    assert logits.shape == (6, *size)
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("crop", range(3))
def test_edges_are_those_of_the_package(crop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_real_weights(monkeypatch)
    golden = np.load(reference.GOLDEN / "hed.npz")
    image = golden[f"image_{crop}"]
    edges = detector(HED).detect(image, image.shape[:2]).numpy()
    np.testing.assert_allclose(edges[5], golden[f"edges_{crop}"], atol=1e-5)
    for i in range(5):
        logits = np.log(edges[i].astype(np.float64) / (1 - edges[i].astype(np.float64)))
        np.testing.assert_allclose(logits, golden[f"side{i + 1}_{crop}"], atol=1e-2, rtol=1e-3)


def test_a_file_with_keras_names_is_read(tmp_path: Path, keras_state: dict[str, Tensor]) -> None:
    path = tmp_path / "hed.safetensors"
    save_file(keras_state, path)
    image = np.random.default_rng(1).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    before = image.copy()
    edges = detector(str(path)).detect(image, (20, 24)).double()
    expected = 1 / (1 + np.exp(-detect_plainly(keras_state, image)))
    np.testing.assert_allclose(edges, expected, atol=1e-3)
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param({"dsn3/vars/1": None}, r"1 missing \(dsn3/vars/1\)", id="a tensor is missing"),
        pytest.param({"dsn6/vars/1": (1,)}, r"1 unexpected \(dsn6/vars/1\)", id="a tensor is left over"),
        pytest.param({"fuse/vars/0": (1, 1, 6, 1)}, r"1 of another shape \(fuse/vars/0\)", id="another shape"),
    ],
)
def test_other_weights_are_refused(
    damage: dict[str, tuple[int, ...] | None], message: str, tmp_path: Path, keras_state: dict[str, Tensor]
) -> None:
    state = dict(keras_state)
    for name, shape in damage.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(shape)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ArtefactError, match=message):
        _ = detector(str(tmp_path / "other.safetensors")).model


def test_a_missing_file_is_named() -> None:
    with pytest.raises(MissingError, match=r"proposer\.weights: got 'nowhere\.safetensors', no such file"):
        _ = detector("nowhere.safetensors").digest


@pytest.mark.parametrize("size", [(15, 20), (30, 40), (1, 1)])
def test_image_is_resized_first(size: tuple[int, int]) -> None:
    image = np.random.default_rng(2).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    edges = detector().detect(image, size)
    assert edges.shape == (6, *size)
    assert edges.dtype == torch.float32
    assert 0 <= edges.min() < edges.max() <= 1 or size == (1, 1)


def test_random_weights_follow_the_seed() -> None:
    image = np.random.default_rng(3).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    first, again, other = (detector(seed=seed).detect(image, (16, 16)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (detector().digest, detector(seed=1).digest) == ("random-0", "random-1")


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02), ("float16", 0.02)])
def test_gpu_gives_the_same_edges(precision: str, tolerance: float) -> None:
    image = np.random.default_rng(4).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    expected = detector().detect(image, (24, 32))
    with torch.inference_mode(), pretend_cuda():
        on_device = detector(device=Device(CUDA, precision))
        _ = on_device.model
        with pretend_cuda() as log:
            edges = on_device.detect(image, (24, 32))
        assert edges.device == CUDA
        assert (log.waits.total(), log.copies.total()) == (0, 1)
        assert edges.dtype == torch.float32
        assert (edges.cpu() - expected).abs().max() < tolerance
