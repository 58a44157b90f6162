"""The transformer with a class token for each class: masking, gates, losses, maps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moduseg.backbones.timm_model import build_model
from moduseg.devices import Device
from moduseg.errors import ConfigError
from moduseg.pseudo_masks.class_token_model import (
    ClassTokenSettings,
    MultiClassTokenViT,
    compute_contrast,
    compute_diversity,
    draw_kept,
    mask_outputs,
    pool_by_rank,
)
from moduseg.pseudo_masks.class_token_start import find_prototypes
from moduseg.pseudo_masks.class_tokens import ClassTokenGenerator, ClassTokenOptions
from moduseg.pseudo_masks.head_gates import HeadGates
from moduseg.pseudo_masks.labels import rank_labels
from tests.support.tiny_vit import TINY

NUM_CLASSES = 5
MCTFORMER: dict[str, Any] = {
    "logits": "mean",
    "maps": "fused",
    "register": False,
    "gates": False,
    "map_blocks": 2,
    "affinity": True,
    "class_start": "copy",
}


def make_model(**settings: Any) -> MultiClassTokenViT:
    """Return a tiny model in training mode; the same settings give the same weights."""
    vit = build_model("vit_tiny_patch16_224", TINY, None, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = MultiClassTokenViT(vit, NUM_CLASSES, ClassTokenSettings(**settings))
        # Attention of untrained weights hardly differs between tokens.
        for block in model.blocks:
            torch.nn.init.normal_(block.attn.qkv.weight, std=0.3)
    return model.train()


def make_pixels(batch: int = 2, size: tuple[int, int] = (32, 48)) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("settings", [pytest.param({}, id="token masking"), pytest.param(MCTFORMER, id="MCTformer+")])
def test_shapes_on_any_grid(settings: dict[str, Any], device: torch.device) -> None:
    model = make_model(**settings).to(device)
    for size in ((32, 32), (32, 48), (16, 24)):
        output = model(make_pixels(2, size).to(device), keeps_heads=True)
        grid = (size[0] // 8, size[1] // 8)
        assert output.logits.shape == (2, NUM_CLASSES)
        assert output.maps.shape == output.attention.shape == (2, NUM_CLASSES, *grid)
        assert output.tokens.shape == (3, 2, NUM_CLASSES, 16)
        assert output.heads is not None
        assert output.heads.shape == (2, 3, 2, NUM_CLASSES, *grid)
        assert (output.maps >= 0).all()
        assert (output.patch_logits is None) == (model.settings.maps == "attention")


def test_only_outputs_of_absent_classes_are_masked() -> None:
    tags = torch.rand(200, NUM_CLASSES, generator=torch.Generator().manual_seed(0)) < 0.4
    keep = draw_kept(tags, 0.5, torch.Generator().manual_seed(1))
    outputs = mask_outputs(torch.ones(200, NUM_CLASSES, 7), keep)
    assert (outputs[tags] == 1).all()
    masked = (outputs == 0).all(2)
    assert torch.equal(masked, ~keep)
    share = masked[~tags].float()
    assert 0.42 < float(share.mean()) < 0.58
    # Draws are independent: pairs of absent classes are masked together as often as by chance.
    both = masked[:, 0] & masked[:, 1]
    assert 0.1 < float(both[~tags[:, 0] & ~tags[:, 1]].float().mean()) < 0.4


@pytest.mark.parametrize(("rate", "expected"), [(0.0, True), (1.0, False)])
def test_rates_at_the_ends(rate: float, expected: bool) -> None:
    tags = torch.tensor([[True, False, False]])
    assert draw_kept(tags, rate, torch.Generator()).tolist() == [[True, expected, expected]]


def test_masking_touches_nothing_but_the_logits() -> None:
    model = make_model(gates=False)
    pixels = make_pixels()
    keep = torch.ones(2, NUM_CLASSES, dtype=torch.bool)
    keep[0, 2] = False
    masked, plain = model(pixels, keep), model(pixels)
    assert torch.equal(masked.maps, plain.maps)
    assert torch.equal(masked.tokens, plain.tokens)
    assert torch.equal(masked.logits[1], plain.logits[1])
    assert not torch.equal(masked.logits[0], plain.logits[0])


def test_open_gates_are_the_identity() -> None:
    gated, plain = make_model(gate_start=1.0).eval(), make_model(gates=False).eval()
    plain.load_state_dict({name: t for name, t in gated.state_dict().items() if not name.startswith("gates")})
    with torch.no_grad():
        first, second = gated(make_pixels()), plain(make_pixels())
    for name in ("logits", "maps", "tokens"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_closed_heads_leave_no_trace() -> None:
    model = make_model().eval()
    assert model.gates is not None
    with torch.no_grad():
        model.gates.log_alpha[1, 0] = -1.0
        before = model(make_pixels(), keeps_heads=True)
        # The map is the mean over all heads of what the open ones see, summed over the blocks.
        assert before.heads is not None
        is_open = model.gates.is_open.float()[None, :, :, None, None, None]
        expected = (before.heads * is_open).mean(2).sum(1)
        torch.testing.assert_close(before.maps, expected)
        # Whatever the closed head computes, nothing of it arrives anywhere.
        width = model.blocks[1].attn.head_dim
        for part in range(3):
            rows = slice(part * 16, part * 16 + width)
            model.blocks[1].attn.qkv.weight[rows] = torch.randn(width, 16)
        after = model(make_pixels(), keeps_heads=True)
    assert torch.equal(before.maps, after.maps)
    assert torch.equal(before.logits, after.logits)
    assert after.heads is not None
    assert not torch.equal(before.heads[:, 1, 0], after.heads[:, 1, 0])


def test_heads_count_by_their_logarithms() -> None:
    model = make_model(head_mean="log", gate_start=1.0, map_blocks=1).eval()
    assert model.gates is not None
    with torch.no_grad():
        model.gates.log_alpha[-1, 1] = -1.0
        output = model(make_pixels(), keeps_heads=True)
    assert output.heads is not None
    # Of the last block's two heads one is closed, and counts as seeing nothing.
    torch.testing.assert_close(output.maps, (output.heads[:, -1, 0] / 1e-4).log1p() / 2)
    torch.testing.assert_close(output.attention, output.heads[:, -1, 0] / 2)


def test_gates_in_evaluation_are_open_above_zero() -> None:
    gates = HeadGates(1, 3, 0.0).eval()
    gates.log_alpha.data[0] = torch.tensor([-0.1, 0.0, 0.1])
    assert gates().tolist() == [[0.0, 0.0, 1.0]]


def test_gates_in_training_are_drawn() -> None:
    gates = HeadGates(40, 50, 0.5)
    torch.manual_seed(0)
    drawn = gates()
    assert drawn.detach().unique().tolist() == [0.0, 1.0]
    # The stretched variable is above a half where the Concrete one is: with probability sigmoid(log alpha).
    assert float(drawn.detach().mean()) == pytest.approx(1 / (1 + math.exp(-0.5)), abs=0.03)
    drawn.sum().backward()
    assert gates.log_alpha.grad is not None
    assert (gates.log_alpha.grad >= 0).all()
    assert float((gates.log_alpha.grad > 0).float().mean()) > 0.1


def test_penalty_is_the_formula_and_rises() -> None:
    values = torch.linspace(-4, 4, 9)
    penalties = []
    for value in values:
        gates = HeadGates(2, 3, float(value))
        penalties.append(float(gates.compute_penalty().detach()))
        expected = 6 / (1 + math.exp(-(float(value) - 0.33 * math.log(0.1 / 1.1))))
        assert penalties[-1] == pytest.approx(expected, rel=1e-5)
    assert penalties == sorted(penalties)
    assert len(set(penalties)) == 9


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="token masking"),
        pytest.param(MCTFORMER | {"contrast_weight": 0.1}, id="MCTformer+"),
        pytest.param(MCTFORMER | {"gates": True, "register": True, "map_blocks": None}, id="everything"),
        pytest.param(MCTFORMER | {"pool": "logsumexp", "class_block": 1, "frozen_blocks": 1}, id="upper blocks"),
    ],
)
def test_every_parameter_has_a_gradient(settings: dict[str, Any], device: torch.device) -> None:
    options = ClassTokenOptions(model="vit_tiny_patch16_224", model_kwargs=TINY, **settings)
    names = ["background", *"abcde"]
    generator = ClassTokenGenerator(options, Device(device), names)
    model_settings = {name: value for name, value in settings.items() if name != "contrast_weight"}
    model = make_model(**model_settings).to(device)
    tags = torch.tensor([[True, False, True, False, False], [False, False, False, True, True]], device=device)
    batch = {"pixels": make_pixels().to(device), "tags": tags, "keep": tags}
    losses = generator.compute_losses(model, batch)
    losses["loss"].backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    without = [n for n, p in trained if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert without == []
    assert all(value.isfinite() for value in losses.values())


def test_gradient_of_the_maps_reaches_what_makes_them() -> None:
    model = make_model(**MCTFORMER)
    model(make_pixels()).maps.sum().backward()
    for name, parameter in model.named_parameters():
        # The mean of the class tokens has no parameters of its own: all there are make the fused map.
        assert parameter.grad is not None, name


@pytest.mark.parametrize(
    ("maps", "expected"),
    [
        pytest.param([[1.0, 0, 0, 0], [0, 0, 2.0, 0]], 0.0, id="apart"),
        pytest.param([[1.0, 1, 0, 0], [2.0, 2, 0, 0]], math.sqrt(2), id="the same"),
        pytest.param([[1.0, 1, 0, 0], [0, 1, 1, 0]], math.sqrt(2) / 2, id="half"),
    ],
)
def test_diversity(maps: list[list[float]], expected: float) -> None:
    value = compute_diversity(torch.tensor([maps]).unflatten(2, (2, 2)))
    assert float(value) == pytest.approx(expected, abs=1e-5)


def test_contrast() -> None:
    tokens = torch.eye(3)[None, None] * 5
    alike = torch.ones(1, 1, 3, 3)
    tags = torch.tensor([[1.0, 0.0, 1.0]])
    assert float(compute_contrast(alike, tags)) == pytest.approx(math.log(3))
    assert float(compute_contrast(tokens, tags)) == pytest.approx(math.log(1 + 2 / math.e), rel=1e-4)
    assert float(compute_contrast(tokens, torch.zeros(1, 3))) == 0.0


def test_pooling_by_rank() -> None:
    maps = torch.tensor([[[1.0, 3.0, 2.0]]])
    assert float(pool_by_rank(maps, 1.0)) == pytest.approx(2.0)
    assert float(pool_by_rank(maps, 0.5)) == pytest.approx((3 + 2 * 0.5 + 1 * 0.25) / 1.75)


def test_pooling_by_exponentials_is_the_log_of_their_mean() -> None:
    model = make_model(**MCTFORMER, pool="logsumexp")
    evidence = torch.tensor([[[1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 0.0, 0.0]]])
    expected = [1.0, math.log((3 + math.exp(3)) / 4)]
    assert model._pool(evidence)[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_class_tokens_join_late() -> None:
    model = make_model(class_block=2, frozen_blocks=1, gates=True)
    patches, grid = model.embed_patches(make_pixels())
    first, _ = make_model(class_block=1).embed_patches(make_pixels())
    assert grid == (4, 6)
    # The same weights: what joins after two blocks is what joins after one, passed through the second.
    torch.testing.assert_close(patches, model.blocks[1](first))
    output = model(make_pixels(), keeps_heads=True)
    assert output.heads is not None
    assert output.heads.shape[1] == len(output.tokens) == 1
    assert model.gates is not None
    assert model.gates.log_alpha.shape == (1, 2)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(("patch_", "blocks.0."))}


def test_prototypes_are_means_over_the_images_of_a_class() -> None:
    model = make_model(class_block=1).eval()
    pixels = make_pixels(3)
    tags = torch.tensor([[True, True, False, False, False], [True, False, True, False, False], [False] * 5])
    images = [(pixels[index : index + 1], tags[index]) for index in range(3)]
    prototypes = find_prototypes(model, lambda: images, share=1.0)
    means = model.embed_patches(pixels)[0].mean(1)
    torch.testing.assert_close(prototypes[:3], torch.stack([means[:2].mean(0), means[0], means[1]]))
    assert not prototypes[3:].any()
    # A smaller share is of the patches that tell images of the class from others.
    assert not torch.allclose(find_prototypes(model, lambda: images, share=0.1)[0], prototypes[0])


def test_published_labels() -> None:
    maps = torch.tensor(
        [[[9.0, 9.0, 0, 0, 0, 0, 0, 0]], [[0, 4.0, 4.0, 0, 0, 0, 0, 4.0]]],
    )
    # The second class is the more probable one, so that it keeps what both claim; cells of none take the nearest.
    assert rank_labels(maps, torch.tensor([0.2, 0.7])).tolist() == [[0, 1, 1, 1, 1, 1, 1, 1]]
    assert rank_labels(maps, torch.tensor([0.7, 0.2])).tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize("side", range(2, 9))
def test_a_map_of_one_value_covers_every_cell(side: int) -> None:
    """Its mean may be rounded to more than the value."""
    assert not rank_labels(torch.full((1, side, side), 0.1), torch.tensor([0.5])).any()


def test_positions_of_the_patches_are_resampled() -> None:
    model = make_model().eval()
    with torch.no_grad():
        model.patch_positions.copy_(torch.arange(16).view(1, 16, 1) % 4 * torch.ones(1, 1, 16))
        wide = model._resample_positions((4, 8)).unflatten(1, (4, 8))[0, :, :, 0]
    # The columns of the trained grid, stretched to twice as many.
    assert (wide.diff(dim=1)[:, 1:-1] > 0).all()
    assert wide[:, 3:5].mean() == pytest.approx(1.5, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "kwargs", "settings", "message"),
    [
        pytest.param("mobilenetv2_035", {}, {}, "expected timm's plain VisionTransformer", id="a CNN"),
        pytest.param("eva02_tiny_patch14_224", {}, {}, "expected timm's plain VisionTransformer", id="other blocks"),
        pytest.param("vit_tiny_patch16_224", TINY, {"map_blocks": 9}, "got 9, expected at most", id="too many blocks"),
        pytest.param("vit_tiny_patch16_224", TINY, {"class_block": 3}, "class_block: got 3", id="no block is left"),
    ],
)
def test_model_that_does_not_fit(name: str, kwargs: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MultiClassTokenViT(build_model(name, kwargs, None, 0), 3, ClassTokenSettings(**settings))
