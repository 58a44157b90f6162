"""SAM 3's concepts as a generator, on a tiny model with random weights, against the library's own processor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from moduseg.devices import Device
from moduseg.errors import ArtefactError, ConfigError, DataError, MissingError
from moduseg.pseudo_masks import build
from moduseg.pseudo_masks.sam3_concepts import Sam3ConceptsGenerator, Sam3ConceptsOptions
from moduseg.pseudo_masks.sam3_model import Sightings, merge_objects, weigh_semantic
from tests.pseudo_masks.contract import CLASSES, GeneratorContract, sample
from tests.pseudo_masks.test_given_masks import no_backbone
from tests.support import tiny_models
from tests.support.devices import CPU
from tests.test_processors import assert_same_pixels

Make = Callable[..., Sam3ConceptsGenerator]
ALL = (1, 2, 3, 4, 5)
SIDE = 112


@pytest.fixture(scope="module")
def weights(words: tuple[Path, int, int], tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.save_concepts(words, tmp_path_factory.mktemp("sam3"))


@pytest.fixture
def make(weights: str) -> Make:
    def inner(device: torch.device = CPU.torch_device, **options: Any) -> Sam3ConceptsGenerator:
        cfg = {"name": "sam3_concepts", "weights": weights, "min_object_score": 0.35, **options}
        generator = build(cfg, Device(device), no_backbone, CLASSES)
        assert isinstance(generator, Sam3ConceptsGenerator)
        return generator

    return inner


def make_library_processor(folder: str) -> Any:
    import transformers

    image_processor = transformers.Sam3ImageProcessor(size={"height": SIDE, "width": SIDE})
    return transformers.Sam3Processor(image_processor, transformers.CLIPTokenizer.from_pretrained(folder))


def follow_truth(generator: Sam3ConceptsGenerator) -> None:
    """Let the model see each word `class <id>` where the picture of the contract has it."""
    truth = sample(name="24-2").semantic
    assert truth is not None
    classes = torch.from_numpy(truth.astype(np.int64))

    def look(encoded_image: Any, words: Any) -> Sightings:
        labels = [int(row[0, 0]) for row in words.features]
        masks = torch.stack([torch.where(classes == label, 9.0, -9.0) for label in labels])
        masks = masks.to(words.features.device)
        presence = torch.ones(len(labels), device=masks.device)
        return Sightings(presence, presence[:, None], masks[:, None], masks)

    words, label_of_word = generator._words
    for row, label in enumerate(label_of_word):
        words.features[row, 0, 0] = label
    generator._model.look = look  # type: ignore[method-assign]


class TestContract(GeneratorContract):
    @pytest.fixture
    def generator(self, make: Make, device: torch.device, request: pytest.FixtureRequest) -> Sam3ConceptsGenerator:
        generator = make(device)
        if request.node.originalname == "test_labels_come_out_right":
            follow_truth(generator)
        return generator


@pytest.mark.parametrize("size", [(24, 40), (150, 90), (112, 112)])
def test_inputs_are_the_librarys(size: tuple[int, int], make: Make, weights: str) -> None:
    processor, generator = make_library_processor(weights), make()
    image = sample(size).image
    pixels = generator._model._prepare(image, SIDE)
    assert_same_pixels(pixels, {"torchvision": processor.image_processor}, image)
    texts = processor(text=[f"class {label}" for label in ALL], return_tensors="pt")
    theirs = generator._model._model.get_text_features(texts["input_ids"], texts["attention_mask"]).pooler_output
    torch.testing.assert_close(generator._words[0].features, theirs)
    assert torch.equal(generator._words[0].mask, texts["attention_mask"])


def test_scores_are_those_of_the_librarys_processor(make: Make, weights: str) -> None:
    """One word at a time through the whole model, its objects and semantic map made by the library."""
    processor, item, min_score = make_library_processor(weights), sample(), 0.345
    generator = make(min_object_score=min_score)
    pixels, expected, num_objects = generator._model._prepare(item.image, SIDE), [], []
    for label in (2, 4):
        texts = processor(text=[f"class {label}"], return_tensors="pt")
        texts = {name: texts[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            outputs = generator._model._model(pixel_values=pixels, **texts)
        (found,) = processor.post_process_instance_segmentation(outputs, min_score, target_sizes=[item.size])
        (semantic,) = processor.post_process_semantic_segmentation(
            outputs, target_sizes=[item.size], return_segmentation_scores=True
        )
        # The library gives masks as bits: they have to be those of the probabilities that are weighed here.
        keep = (outputs.pred_logits.sigmoid() * outputs.presence_logits.sigmoid())[0] > min_score
        soft = F.interpolate(outputs.pred_masks[:, keep].sigmoid(), item.size, mode="bilinear")[0]
        assert torch.equal((soft > 0.5).long(), found["masks"])
        objects = (soft * found["scores"][:, None, None]).amax(0)
        expected.append(torch.maximum(objects, semantic.segmentation_scores[0] * outputs.presence_logits.sigmoid()))
        num_objects.append(len(soft))
    assert all(0 < number < 8 for number in num_objects)
    torch.testing.assert_close(generator.generate(item, (2, 4)).scores, torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_heads_by_hand() -> None:
    """Two words, three objects of 1 x 2 pixels; at the same size, so that nothing is interpolated."""
    logit = torch.logit
    sightings = Sightings(
        presence=torch.tensor([0.5, 1.0]),
        object_scores=torch.tensor([[0.8, 0.6, 0.2], [0.1, 0.1, 0.1]]),
        masks=logit(torch.tensor([[[[0.5, 0.1]], [[0.9, 0.2]], [[0.9, 0.9]]]] * 2)),
        semantic=logit(torch.tensor([[[0.4, 0.6]], [[0.3, 0.2]]])),
    )
    # Word 1: objects of .4 and .3 count, that of .1 does not; word 2 has none.
    expected = torch.tensor([[[0.27, 0.06]], [[0.0, 0.0]]])
    torch.testing.assert_close(merge_objects(sightings, 0.2, (1, 2)), expected)
    torch.testing.assert_close(merge_objects(sightings, 0.35, (1, 2))[0], torch.tensor([[0.2, 0.04]]))
    torch.testing.assert_close(weigh_semantic(sightings, (1, 2)), torch.tensor([[[0.2, 0.3]], [[0.3, 0.2]]]))


def test_many_objects_are_merged_in_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    sightings = Sightings(
        presence=torch.rand(3, generator=generator),
        object_scores=torch.rand(3, 50, generator=generator),
        masks=torch.randn(3, 50, 4, 5, generator=generator),
        semantic=torch.zeros(3, 4, 5),
    )
    scores = sightings.object_scores * sightings.presence[:, None]
    enlarged = F.interpolate(sightings.masks.sigmoid(), (8, 9), mode="bilinear")
    expected = torch.where(scores > 0.1, scores, 0.0)[:, :, None, None] * enlarged
    torch.testing.assert_close(merge_objects(sightings, 0.1, (8, 9)), expected.amax(1))


@pytest.mark.parametrize("options", [
    pytest.param({"min_object_score": 0.9}, id="no object counts"),
    pytest.param({"heads": "instance"}, id="objects alone"),
    pytest.param({"heads": "semantic"}, id="semantic map alone"),
    pytest.param({"class_words": {"class 2": "red disc"}}, id="words"),
])  # fmt: skip
def test_every_setting_matters(options: dict[str, Any], make: Make) -> None:
    assert not torch.allclose(
        make(**options).generate(sample(), (2, 4)).scores, make().generate(sample(), (2, 4)).scores
    )


def test_a_class_has_the_score_of_its_best_word(make: Make) -> None:
    words = ("red disc", "blue ring")
    single = [make(class_words={"class 2": word}).generate(sample(), (2,)).scores for word in words]
    both = make(class_words={"class 2": list(words)}, batch_size=3).generate(sample(), (2,)).scores
    torch.testing.assert_close(both, torch.maximum(*single), atol=1e-5, rtol=1e-5)


def test_no_batch_changes_the_scores(make: Make) -> None:
    first, second = (make(batch_size=size).generate(sample(), ALL).scores for size in (1, 4))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_a_preview_keeps_the_most_present_classes(make: Make, words: tuple[Path, int, int], weights: str) -> None:
    """The preview's presence is that of a model that is built for the smaller square."""
    side, item = 56, sample()
    small = tiny_models.build_concepts(*words[1:], side=side)
    texts = make_library_processor(weights)(text=[f"class {label}" for label in ALL], return_tensors="pt")
    generator = make(max_classes=3, preview_side=side)
    with torch.no_grad():
        pixels = generator._model._prepare(item.image, side).expand(len(ALL), -1, -1, -1)
        outputs = small(pixel_values=pixels, input_ids=texts["input_ids"], attention_mask=texts["attention_mask"])
    kept = tuple(sorted((outputs.presence_logits[:, 0].argsort(descending=True)[:3] + 1).tolist()))
    maps = generator.generate(item, ALL)
    assert maps.class_ids == kept
    torch.testing.assert_close(maps.scores, make().generate(item, kept).scores, atol=1e-5, rtol=1e-5)
    assert make(max_classes=None).generate(item, ALL).class_ids == ALL
    assert make(max_classes=5, preview_side=1).generate(item, ALL).class_ids == ALL


def test_the_detector_of_the_video_model_is_read(
    words: tuple[Path, int, int], weights: str, tmp_path: Path, make: Make
) -> None:
    """The published files hold the video model: a prefix before the detector's tensors, and a tracker beside them."""
    import transformers

    shutil.copytree(weights, tmp_path, dirs_exist_ok=True)
    config = transformers.Sam3VideoConfig(detector_config=tiny_models.concept_config(*words[1:]).to_dict())
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    tensors = load_file(tmp_path / "model.safetensors")
    tracker = {
        "tracker_model.no_memory_embedding": torch.zeros(1, 1, 4),
        "tracker_neck.fpn_layers.0.bias": torch.zeros(4),
    }
    video = {**{f"detector_model.{name}": tensor for name, tensor in tensors.items()}, **tracker}
    save_file(video, tmp_path / "model.safetensors", {"format": "pt"})
    scores = make(weights=str(tmp_path)).generate(sample(), (2, 4)).scores
    torch.testing.assert_close(scores, make().generate(sample(), (2, 4)).scores)


@pytest.mark.parametrize(("options", "message"), [
    pytest.param({"min_object_score": 1.5}, "min_object_score: got 1.5, expected 0 to 1", id="score"),
    pytest.param({"heads": "all"}, "heads: got 'all', expected one of both, instance, semantic", id="heads"),
    pytest.param({"max_classes": 0}, "max_classes: got 0, expected 1 or more, or null", id="classes"),
    pytest.param({"preview_side": 0}, "preview_side: got 0, expected 1 or more", id="preview"),
    pytest.param({"batch_size": 0}, "batch_size: got 0, expected 1 or more", id="batch"),
])  # fmt: skip
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sam3ConceptsOptions(**options)


def test_bad_inputs(make: Make, weights: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a: got labels \[6\], expected 1\.\.5"):
        make().generate(sample(), (6,))
    with pytest.raises(ConfigError, match=r"preview_side: got 60, expected a multiple of .* 14 pixels; try 56"):
        make(max_classes=2, preview_side=60).generate(sample(), ALL)
    shutil.copytree(weights, tmp_path / "wordless", ignore=shutil.ignore_patterns("tokenizer*", "vocab*", "merges*"))
    with pytest.raises(MissingError, match=r"wordless: no tokenizer\.json or vocab\.json, which words need"):
        make(weights=str(tmp_path / "wordless")).generate(sample(), (2,))
    tracker = tiny_models.save(tiny_models.build_sam("sam3_tracker"), tmp_path / "tracker")
    with pytest.raises(ArtefactError, match=r"model_type 'sam3_tracker', expected one of sam3, sam3_video"):
        make(weights=tracker).generate(sample(), (2,))


@pytest.mark.slow
def test_the_encoder_at_full_size_without_weights(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """On the `meta` device: an image goes through at the model's own side and at that of the preview."""
    import transformers

    device = torch.device("meta")
    with device:
        model = transformers.Sam3Model(transformers.Sam3Config()).eval()
    generator = make(device)
    generator._model.__dict__["_model"] = model
    assert (generator._model.side, generator._model.stride) == (1008, 14)
    for side, cells in ((1008, 72), (Sam3ConceptsOptions().preview_side, 48)):
        levels = generator._model.encode_image(sample((375, 500)).image, side).fpn_hidden_states
        assert [level.shape[-1] for level in levels] == [4 * cells, 2 * cells, cells, cells // 2]
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert count == pytest.approx(840.4, abs=0.1)
    with capsys.disabled():
        print(f"\nSAM 3 with detector and text encoder: {count:.1f} M parameters")
