"""Every student: what it learns from, what it answers, and that it learns."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moduseg import students
from moduseg.backbones.base import Backbone
from moduseg.config import compose, config_dir
from moduseg.devices import Device
from moduseg.errors import ArtefactError, ConfigError
from moduseg.structures import TokenMap
from moduseg.students.base import Batch, LabelledImage, Outputs, Student, to_label_map, to_targets
from moduseg.students.image_student import weighted_cross_entropy
from moduseg.students.network import SegmentationNetwork
from moduseg.students.store import StudentDescription, load_student, save_student
from moduseg.students.token_student import TokenStudent, measure_shares
from moduseg.students.trunks import fix_padding

CPU = Device(torch.device("cpu"))
OUTPUTS = Outputs(("background", "dog", "cat"))
SMALL = {"augmentation": {"crop": 64, "min_scale": 1.0, "max_scale": 1.0}}
MODELS: dict[str, dict[str, Any]] = {
    "torchvision": {"name": "torchvision", "model": "lraspp_mobilenet_v3_large", **SMALL},
    "segformer": {"name": "segformer", "size": "b0", **SMALL, "weights": "random"},
    "timm": {"name": "timm", "model": "mobilenetv2_035", **SMALL},
    "tokens": {"name": "tokens", "hidden": [16]},
}


class ColourBackbone(Backbone):
    """Tokens that are the mean colour of each 8 x 8 patch."""

    digest = "colours"
    dim = 3

    def tokens(self, images: Sequence[np.ndarray]) -> list[TokenMap]:
        maps = []
        for image in images:
            height, width = image.shape[:2]
            padded = np.pad(image, ((0, -height % 8), (0, -width % 8), (0, 0)), mode="edge").astype(np.float32) / 255
            blocks = padded.reshape(padded.shape[0] // 8, 8, padded.shape[1] // 8, 8, 3).mean((1, 3))
            maps.append(TokenMap(torch.from_numpy(blocks), 8, (height, width), (height, width)))
        return maps


def build(name: str, outputs: Outputs = OUTPUTS, **more: Any) -> Student:
    return students.build({**MODELS[name], **more}, CPU, outputs, ColourBackbone)


def make_batch(student: Student, item: LabelledImage, seeds: Sequence[int]) -> Batch:
    """A batch of one image, once for each seed."""
    return student.collate([student.make_example(student.study(item), np.random.default_rng(seed)) for seed in seeds])


def make_item(size: tuple[int, int] = (64, 64)) -> LabelledImage:
    """A picture whose left half is dark and background, and whose right half is bright and a cat."""
    labels = np.zeros(size, np.uint8)
    labels[:, size[1] // 2 :] = 2
    image = np.where(labels[..., None] == 2, np.uint8(220), np.uint8(20)).repeat(3, 2)
    return LabelledImage(image, labels)


@pytest.mark.parametrize("name", MODELS)
def test_students_learn(name: str) -> None:
    """A few steps on one picture lower the loss, and the loss has a gradient for every trained parameter."""
    student, item = build(name), make_item()
    student.prepare([item])
    batch = student.collate(
        [student.make_example(student.study(item), np.random.default_rng(seed)) for seed in range(2)]
    )
    network = student.network.train()
    optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
    losses = []
    for _ in range(6):
        loss = student.compute_loss(network, batch)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_probabilities_of_every_pixel(name: str) -> None:
    student, images = build(name), [make_item((70, 45)).image, make_item((33, 64)).image]
    answers = student.compute_probabilities(images)
    for image, answer in zip(images, answers, strict=True):
        assert answer.shape == (3, *image.shape[:2])
        assert torch.allclose(answer.sum(0), torch.ones(image.shape[:2]), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_views_are_averaged(name: str) -> None:
    """Mirror images of an image and of its mirror image give mirrored answers, whatever the weights."""
    student, image = build(name), np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    mirrored = np.ascontiguousarray(image[:, ::-1])
    first, second = student.compute_probabilities([image, mirrored], (1.0, 0.5), mirror=True)
    assert torch.allclose(first, second.flip(-1), atol=1e-5)
    alone = student.compute_probabilities([image])[0]
    one, half = (student.compute_probabilities([image], (scale,))[0] for scale in (1.0, 0.5))
    assert torch.allclose(alone, one)
    assert torch.allclose(student.compute_probabilities([image], (1.0, 0.5))[0], (one + half) / 2, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_ignored_changes_nothing(name: str) -> None:
    """The loss is the same whatever lies where the label map is 255 or a weight is 0."""
    student, item = build(name), make_item()
    ignored = item.label_map.copy()
    ignored[:32] = 255
    weights = np.where(ignored == 255, 0, 255).astype(np.uint8)
    other = item.label_map.copy()
    other[:32] = 1
    network = student.network.eval()
    by_label = make_batch(student, LabelledImage(item.image, ignored), [5])
    by_weight = make_batch(student, LabelledImage(item.image, other, weights), [5])
    losses = [student.compute_loss(network, batch).item() for batch in (by_label, by_weight)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_batch_without_a_label_gives_no_step() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = weighted_cross_entropy(logits, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_targets_of_a_set_without_background() -> None:
    outputs = Outputs(("unlabelled", "road", "sky"), has_background=False)
    assert outputs.count == 2
    assert to_targets(np.array([[0, 1, 2, 255]], np.uint8), outputs).tolist() == [[255, 0, 1, 255]]
    labels, confidence = to_label_map(torch.tensor([[[0.2, 1.0]], [[0.8, 0.0]]]), outputs)
    assert labels.tolist() == [[2, 1]]
    assert confidence.tolist() == [[204, 255]]
    with pytest.raises(ValueError, match=r"class id 3, expected 0\.\.2 or 255"):
        to_targets(np.array([[3]], np.uint8), outputs)


def test_shares_of_patches_are_counted_by_hand() -> None:
    """A patch of 4 x 4 pixels in an image that the backbone sees at half its size."""
    labels = np.zeros((8, 8), np.uint8)
    labels[:, 4:] = 1  # the right patches are all dog
    labels[:4, :2] = 2  # half of the upper left one is cat
    labels[6:, :4] = 255  # half of the lower left one is not learnt from
    item = LabelledImage(np.zeros((8, 8, 3), np.uint8), labels)
    shares, counts = measure_shares(item, TokenMap(torch.zeros(2, 2, 3), 2, (8, 8), (4, 4)), OUTPUTS)
    assert shares.tolist() == [[0.5, 0, 0.5], [0, 1, 0], [1, 0, 0], [0, 1, 0]]
    assert counts.tolist() == [1, 1, 0.5, 1]


def test_tokens_are_brought_to_mean_0_and_deviation_1() -> None:
    student = build("tokens")
    assert isinstance(student, TokenStudent)
    student.prepare([make_item((64, 64)), make_item((32, 64))])
    seen: list[torch.Tensor] = []
    student.network.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))  # type: ignore[operator,union-attr]
    tokens = torch.cat([m.tokens.flatten(0, 1) for m in ColourBackbone().tokens([make_item().image])])
    student.network(tokens)
    assert seen[0].mean(0).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert seen[0].std(0, unbiased=False).tolist() == pytest.approx([1, 1, 1], abs=1e-5)


def test_padding_does_not_shift_what_is_seen() -> None:
    """A network that passes its input through gives back a picture of any size."""
    network = SegmentationNetwork(nn.AvgPool2d(1), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    picture = torch.rand(2, 3, 37, 70)
    assert torch.allclose(network(picture), picture, atol=1e-6)


def test_frozen_norms_stay_frozen_in_training() -> None:
    student = build("timm", freeze_norms=True)
    network = student.network.train()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert network.training


def test_a_frozen_trunk_gets_no_gradient() -> None:
    student = build("timm", freeze_trunk=True)
    trained = [name for name, p in student.network.named_parameters() if p.requires_grad]
    assert trained
    assert all(name.startswith("body.head.") for name in trained)


def test_a_frozen_trunk_stays_as_it_is_in_training() -> None:
    """Its batch norms do not take in the statistics of the training images either."""
    network = build("timm", freeze_trunk=True).network.train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network(torch.rand(2, 3, 64, 64))
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.startswith("body.head.") for name in changed)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "tokens"])
def test_the_trunk_may_learn_slowly(name: str) -> None:
    student = build(name, trunk_rate=0.1)
    ((start, factor),) = student.rate_factors.items()
    names = [name for name, _ in student.network.named_parameters()]
    assert factor == 0.1
    assert 0 < sum(name.startswith(start) for name in names) < len(names)


def test_fixed_padding_is_that_of_timm() -> None:
    import timm

    model = timm.create_model("tf_efficientnet_lite0", num_classes=0, output_stride=16).eval()
    picture = torch.rand(1, 3, 96, 160)
    with torch.no_grad():
        expected = model.forward_features(picture)
        fix_padding(model)
        assert torch.equal(model.forward_features(picture), expected)
    assert "Conv2dSame" not in {type(module).__name__ for module in model.modules()}


def test_weights_of_a_classifier_start_the_trunk(tmp_path: Path) -> None:
    """Tensors of the classifier's own head are dropped; those of another network are refused."""
    from torchvision.models import mobilenet_v3_large

    classifier = mobilenet_v3_large(weights=None)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    student = build("torchvision", weights=str(tmp_path / "classifier.pth"))
    stored = student.network.state_dict()["body.backbone.4.block.0.0.weight"]
    assert torch.equal(stored.contiguous(), classifier.state_dict()["features.4.block.0.0.weight"])
    torch.save({"features.0.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ArtefactError, match=r"tensors of the trunk are missing or have another shape.*student\.model"):
        _ = build("torchvision", weights=str(tmp_path / "other.pth")).network


@pytest.mark.parametrize("name", MODELS)
def test_a_stored_student_answers_as_before(name: str, tmp_path: Path) -> None:
    student, image = build(name), make_item((40, 64)).image
    with torch.no_grad():
        for parameter in student.network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    description = StudentDescription(
        {**MODELS[name]}, {"name": "colours"} if name == "tokens" else None, student.digest, OUTPUTS.classes
    )
    save_student(tmp_path, student, description)
    loaded, stored = load_student(tmp_path, CPU, ColourBackbone)
    assert stored == description
    assert torch.equal(loaded.compute_probabilities([image])[0], student.compute_probabilities([image])[0])


@pytest.mark.parametrize("content", ['{"model": {}}', "[]", '{"classes": ["a"], "widths": 3}'])
def test_a_description_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "student.safetensors").write_bytes(b"")
    (tmp_path / "student.json").write_text(content)
    with pytest.raises(ArtefactError, match=r"student\.json: got no description of a student .*train again"):
        load_student(tmp_path, CPU)


def test_a_damaged_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"got no student\.safetensors"):
        load_student(tmp_path, CPU)
    student = build("tokens")
    description = StudentDescription(MODELS["tokens"], {}, student.digest, OUTPUTS.classes)
    save_student(tmp_path, student, description)
    (tmp_path / "student.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtefactError, match="not the weights of this student"):
        load_student(tmp_path, CPU, ColourBackbone)
    save_student(tmp_path, student, StudentDescription(MODELS["tokens"], {}, "other", OUTPUTS.classes))
    with pytest.raises(ArtefactError, match="was trained from weights other"):
        load_student(tmp_path, CPU, ColourBackbone)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"name": "unet"}, r"student\.model\.name: got 'unet'", id="unknown student"),
        pytest.param({**MODELS["segformer"], "size": "b9"}, r"size: got 'b9'.*b0, b1", id="unknown size"),
        pytest.param({**MODELS["timm"], "fine": 4}, r"fine, coarse: got 4, 4", id="stages"),
        pytest.param({**MODELS["tokens"], "hidden": [0]}, r"hidden: got \[0\]", id="hidden"),
        pytest.param({**MODELS["torchvision"], "trunk_rate": 0.0}, r"trunk_rate: got 0\.0", id="trunk rate"),
    ],
)
def test_mistakes_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        students.build(settings, CPU, OUTPUTS, ColourBackbone)


PRESETS = sorted(path.stem for path in (config_dir() / "student").glob("*.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_compose(name: str) -> None:
    from moduseg.config.construct import construct
    from moduseg.training.options import TrainingOptions

    settings = compose([f"student={name}"]).student
    assert settings is not None
    assert students.build(settings.model, CPU, OUTPUTS, ColourBackbone).outputs is OUTPUTS
    assert construct(TrainingOptions, settings.training, "student.training").steps > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deeplabv3_resnet101", "segformer_b5"])
def test_full_sizes_make_a_step(name: str) -> None:
    """Prints seconds, and the peak memory of the process, of a step on two crops with random weights on a CPU."""
    settings = compose([f"student={name}", "student.model.weights=random"]).student
    assert settings is not None
    student = students.build(settings.model, CPU, Outputs(tuple(map(str, range(21)))), ColourBackbone)
    batch = student.collate(
        [student.make_example(student.study(make_item((375, 500))), np.random.default_rng(i)) for i in range(2)]
    )
    batch["targets"] = batch["targets"] % 3
    network = student.network.train()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.001)
    start, cpu_start = time.perf_counter(), time.process_time()
    student.compute_loss(network, batch).backward()
    optimiser.step()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    size = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    print(
        f"\n{name}, {size:.1f} M parameters, 2 crops of {batch['targets'].shape[-1]}: {seconds:.1f} s, "
        f"{cpu_seconds:.1f} s of CPU, {peak:.1f} GB"
    )
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert all(p.isfinite().all() for p in network.parameters())
