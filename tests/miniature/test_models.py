"""The miniature models: shipped weights, quality on unseen scenes, and their training loops."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moduseg.config import compose
from moduseg.errors import ArtefactError, ConfigError, MissingError
from moduseg.miniature.models.clip import (
    DENSE_MODES,
    build_miniature_clip,
    build_tokenizer,
    dense_features,
    last_block_input,
    learn_vocabulary,
    text_embeddings,
    world_words,
)
from moduseg.miniature.models.sam import SAM_GENERATOR, build_miniature_sam
from moduseg.miniature.models.vit import build_miniature_vit
from moduseg.miniature.models.weights import WEIGHTS, WEIGHTS_DIR, load_weights, save_weights, weights_path
from moduseg.miniature.training.loop import Schedule
from moduseg.miniature.training.pool import ScenePool, draw_side, make_pool, make_pools, mosaic, split_mosaic
from moduseg.miniature.training.quality import (
    dense_text_accuracy,
    object_regions,
    pool_regions,
    quality_scenes,
    region_knn_accuracy,
    sam_recall,
    vit_tokens,
)
from moduseg.miniature.training.train_clip import PHRASES, ClipTraining, held_phrases, train_clip
from moduseg.miniature.training.train_sam import SamTraining, decode, draw_points, train_sam
from moduseg.miniature.training.train_vit import TAG_NAMES, TAGS, TagHead, VitTraining, train_vit
from moduseg.miniature.world.scenes import PRETRAIN_SEED, QUALITY_SEED, render_scene


def shipped(name: str) -> Path:
    """Weights in the package; the ViT's must be there, a test of the others is left out where they are not."""
    if name != "vit" and not (WEIGHTS_DIR / WEIGHTS[name]).exists():
        pytest.skip(f"the package carries no weights of the miniature {name}")
    return weights_path(name)


@pytest.fixture(scope="module")
def pools() -> dict[int, ScenePool]:
    return make_pools(PRETRAIN_SEED, tiles=20, close_ups=12, scenes=12)


@pytest.fixture(scope="module")
def clip() -> tuple:
    from transformers import CLIPModel, CLIPTokenizer

    path = shipped("clip")
    return CLIPModel.from_pretrained(path).eval(), CLIPTokenizer.from_pretrained(path)


# Shipped weights


@pytest.mark.parametrize(("name", "build"), [("vit", build_miniature_vit), ("sam", build_miniature_sam)])
def test_shipped_weights_fit_their_models(name: str, build: Callable[[Path], torch.nn.Module]) -> None:
    stored = load_file(shipped(name))
    model = build(weights_path(name))
    assert set(stored) == set(model.state_dict())
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float16}
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())
    assert not model.training


def test_shipped_clip_loads_with_nothing_missing() -> None:
    from transformers import CLIPModel

    model, report = CLIPModel.from_pretrained(shipped("clip"), output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.float32


def test_shipped_weights_are_small() -> None:
    sizes = {path: path.stat().st_size for path in WEIGHTS_DIR.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 24_000_000
    assert weights_path("vit").stat().st_size <= 5_000_000


def test_weights_errors(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"got 'vgg', expected one of .*'vit'"):
        weights_path("vgg")
    with pytest.raises(MissingError, match="expected safetensors"):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "none.safetensors")
    save_weights(torch.nn.Linear(2, 3).state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ArtefactError, match="do not fit"):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "other.safetensors")


# Quality


def test_vit_tells_regions_apart_where_random_weights_do_not() -> None:
    bank, queries = quality_scenes("train", 40), quality_scenes("val", 40)
    trained = region_knn_accuracy(vit_tokens(build_miniature_vit(weights_path("vit"))), bank, queries)
    torch.manual_seed(0)
    random = region_knn_accuracy(vit_tokens(build_miniature_vit()), bank, queries)
    assert trained >= 83.0
    assert random < 60.0


def test_sam_finds_objects() -> None:
    quality = sam_recall(build_miniature_sam(shipped("sam")), quality_scenes("val", 12))
    assert quality["found"] >= 80.0
    assert quality["best_iou"] >= 0.65


def test_clip_names_regions(clip: tuple) -> None:
    accuracy = dense_text_accuracy(*clip, quality_scenes("val", 40))
    assert max(accuracy.values()) >= 65.0


def test_regions_are_connected_pieces_of_objects() -> None:
    scene = quality_scenes("val", 1)[0]
    masks, labels = object_regions(scene, min_area=10)
    assert masks.dtype == bool
    assert (masks.sum((1, 2)) > 10).all()
    for mask, label in zip(masks, labels, strict=True):
        assert set(scene.semantic[mask]) == {label}


def test_pool_regions_weighs_by_coverage() -> None:
    tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    mask = np.zeros((1, 2, 4), bool)
    mask[0, :, 1:4] = True
    pooled = pool_regions(tokens, mask)
    expected = torch.nn.functional.normalize(torch.tensor([[0.5, 1.0]]), dim=1)
    torch.testing.assert_close(pooled, expected)
    assert pool_regions(tokens, mask[:0]).shape == (0, 2)


# Models


@pytest.mark.parametrize("side", [32, 64])
def test_splitting_undoes_the_mosaic(side: int) -> None:
    pictures = torch.randn(2 * (128 // side) ** 2, 3, side, side)
    patches = mosaic(pictures).unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    expected = pictures.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    torch.testing.assert_close(split_mosaic(patches, side), expected)


def test_sides_are_drawn_by_their_shares() -> None:
    rng = np.random.default_rng(0)
    assert {draw_side(rng, (1, 0, 0), (0, 0, 1), 0.0) for _ in range(20)} == {32}
    assert {draw_side(rng, (1, 0, 0), (0, 0, 1), 1.0) for _ in range(20)} == {128}
    assert {draw_side(rng, (1, 0, 1), (0, 1, 0), 0.5) for _ in range(40)} == {32, 64, 128}


def test_tags_of_a_class_are_its_name_and_its_words() -> None:
    assert TAGS.shape == (13, 24)
    assert TAGS[0].sum() == 0
    assert (TAGS[1:].sum(1) == 3).all()
    held = {TAG_NAMES[i] for i in torch.nonzero(TAGS[2]).flatten().tolist()}
    assert held == {"red star", "red", "star"}


def test_phrases_of_a_picture() -> None:
    held = held_phrases([((1, 3), ("grass",)), ((), ("sand", "sky"))])
    names = [{PHRASES[i] for i in torch.nonzero(row).flatten().tolist()} for row in held]
    assert names == [{"red disc", "red", "disc", "yellow star", "yellow", "star", "grass"}, {"sand", "sky"}]


def test_tag_head_is_the_log_sum_exp_of_patch_logits() -> None:
    head = TagHead(4)
    tokens = torch.randn(2, 5, 4)
    patches = tokens @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(tokens), (torch.log(torch.exp(patches).sum(1)), patches.mean(1)))


def test_mean_weight_reaches_the_training_of_pictures_of_one_object(
    pools: dict[int, ScenePool], tmp_path: Path
) -> None:
    def train(weight: float, shares: tuple[float, float, float], name: str) -> bytes:
        settings = VitTraining(
            steps=2, batch=1, check_scenes=2, mean_weight=weight, first_shares=shares, last_shares=shares
        )
        return train_vit(settings, tmp_path / name, pools).read_bytes()

    tiles, scenes = (1.0, 0.0, 0.0), (0.0, 0.0, 1.0)
    assert train(0.5, tiles, "a.safetensors") != train(0.0, tiles, "b.safetensors")
    assert train(0.5, scenes, "c.safetensors") == train(0.0, scenes, "d.safetensors")


def test_batched_decoder_equals_segment_anything() -> None:
    torch.manual_seed(0)
    sam = build_miniature_sam()
    embeddings = torch.randn(2, 64, 16, 16)
    points = torch.rand(2, 3, 2) * 128
    with torch.inference_mode():
        logits, quality = decode(sam, embeddings, points)
        for row in range(2):
            prompt = (points[row][:, None], torch.ones(3, 1))
            sparse, dense = sam.prompt_encoder(points=prompt, boxes=None, masks=None)
            expected, iou = sam.mask_decoder.predict_masks(
                embeddings[row : row + 1], sam.prompt_encoder.get_dense_pe(), sparse, dense
            )
            torch.testing.assert_close(logits[3 * row : 3 * row + 3], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(quality[3 * row : 3 * row + 3], iou, rtol=1e-4, atol=1e-5)


def test_points_lie_on_what_they_ask_for() -> None:
    scene = render_scene(0, "train", 3)
    rng = np.random.default_rng(0)
    instances = scene.instances[None].astype(np.uint8)
    points, targets = draw_points(instances, scene.stuff_map[None], 30, 0.4, rng)
    kinds = set()
    for (x, y), target in zip(points[0].round().long().tolist(), targets[0].numpy(), strict=True):
        asked = scene.instances[y, x]
        kinds.add(bool(asked))
        expected = scene.instances == asked
        if asked == 0:
            expected &= scene.stuff_map == scene.stuff_map[y, x]
        assert (target == expected).all()
    assert kinds == {True, False}


def test_sam_works_with_the_predictor() -> None:
    from segment_anything import SamPredictor

    scene = quality_scenes("val", 1)[0]
    predictor = SamPredictor(build_miniature_sam())
    predictor.set_image(scene.image)
    masks, scores, low = predictor.predict(np.array([[40, 40]]), np.array([1]))
    assert masks.shape == (3, *scene.semantic.shape)
    assert scores.shape == (3,)
    assert low.shape == (3, 64, 64)


def test_every_word_of_the_world_is_one_token(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    for word in set(world_words()):
        assert len(tokenizer(word)["input_ids"]) == 3, word
    rng = np.random.default_rng(0)
    for index in range(20):
        caption = render_scene(0, "train", index).caption(rng)
        ids = tokenizer(caption)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert len(ids) == 2 + len(caption.replace(",", " ,").split())
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",") == caption
    # Other words fall back to pieces, none of them the end of the text.
    assert tokenizer.eos_token_id not in tokenizer("zebra Ünïcode")["input_ids"][1:-1]


def test_vocabulary_is_learnt_most_frequent_pair_first() -> None:
    vocabulary, merges = learn_vocabulary(["ab", "ab", "cb"])
    assert merges == ["a b</w>", "c b</w>"]
    assert list(vocabulary)[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


def test_dense_features_of_the_miniature_clip(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(tmp_path)
    model = build_miniature_clip(tokenizer).eval()
    pixels = torch.randn(1, 3, 96, 128)
    with torch.inference_mode():
        hidden = last_block_input(model, pixels)
        whole = model.vision_model(pixels, interpolate_pos_encoding=True)
        plain = model.vision_model.post_layernorm(whole.last_hidden_state[:, 1:])
        expected = torch.nn.functional.normalize(model.visual_projection(plain), dim=-1).unflatten(1, (12, 16))
        torch.testing.assert_close(dense_features(model, hidden, (12, 16)), expected, rtol=1e-4, atol=1e-5)
        for mode in DENSE_MODES:
            features = dense_features(model, hidden, (12, 16), mode)
            torch.testing.assert_close(features.norm(dim=-1), torch.ones(1, 12, 16))
        with pytest.raises(ConfigError, match=r"got 'dense', expected one of .*maskclip"):
            dense_features(model, hidden, (12, 16), "dense")
        texts = text_embeddings(model, tokenizer, ["a red disc", "grass"])
    assert texts.shape == (2, 128)


# Trainings


@pytest.mark.parametrize("seed", [0, PRETRAIN_SEED - 1, QUALITY_SEED])
def test_training_refuses_other_seeds(seed: int) -> None:
    with pytest.raises(ConfigError, match=r"seed.*expected"):
        make_pool(seed, 1)


def test_pool_errors_and_schedule() -> None:
    with pytest.raises(ConfigError, match="scenes"):
        make_pool(PRETRAIN_SEED, 0)
    with pytest.raises(ConfigError, match="steps"):
        Schedule(0)
    factors = [factor for _, _, factor in Schedule(100, warmup=10)]
    assert len(factors) == 100
    assert int(np.argmax(factors)) == 9
    assert 0.9 < max(factors) <= 1.01
    assert factors[0] < 0.11
    assert factors[-1] < 0.02


@pytest.mark.parametrize("name", ["vit", "sam"])
def test_trainings_are_reproducible(name: str, pools: dict[int, ScenePool], tmp_path: Path) -> None:
    kind, train, scenes = {"vit": (VitTraining, train_vit, pools), "sam": (SamTraining, train_sam, pools[128])}[name]
    settings = kind(steps=3, batch=2, check_every=2, check_scenes=2)
    first = train(settings, tmp_path / "a.safetensors", scenes)
    second = train(settings, tmp_path / "b.safetensors", scenes)
    assert first.read_bytes() == second.read_bytes()
    lines = [json.loads(line) for line in first.with_suffix(".jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3
    {"vit": build_miniature_vit, "sam": build_miniature_sam}[name](first)


def test_teacher_reaches_the_training_of_sam(pools: dict[int, ScenePool], tmp_path: Path) -> None:
    def train(teacher: str | None, weight: float, name: str) -> bytes:
        settings = SamTraining(
            steps=3, batch=2, check_every=2, check_scenes=2, teacher=teacher, teacher_weight=weight, seed=PRETRAIN_SEED
        )
        return train_sam(settings, tmp_path / name, pools[128]).read_bytes()

    alone = train(None, 1.0, "alone.safetensors")
    assert train("vit", 1.0, "taught.safetensors") != alone
    assert train("vit", 0.0, "unheard.safetensors") == alone


def test_generator_options_are_those_of_the_configuration() -> None:
    proposer = compose(["proposer=sam_miniature"]).proposer
    assert {name: proposer[name] for name in SAM_GENERATOR} == SAM_GENERATOR


def test_clip_training(pools: dict[int, ScenePool], tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    out = train_clip(
        ClipTraining(steps=3, batch=2, check_every=2, check_scenes=2, teacher=None),
        tmp_path / "clip",
        pools,
    )
    model, report = CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not report["missing_keys"]
    assert model.dtype == torch.float32
    assert CLIPTokenizer.from_pretrained(out)("a red disc")["input_ids"]
