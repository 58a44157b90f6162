"""Captions from a file and from a tiny BLIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moduseg.devices import Device
from moduseg.diffusion.captions import Captioner, CaptionerOptions, build_captioner
from moduseg.errors import ArtefactError, DataError, MissingError
from moduseg.structures import Sample
from tests.support.devices import CPU
from tests.support.pretend_cuda import CUDA, pretend_cuda
from tests.support.tiny_models import randomise

KEY = "pseudo_masks.generator.captioner"
PREFIX = "a photograph of dog"


def sample(name: str = "a") -> Sample:
    return Sample(name, np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def from_file(path: Path, content: Any) -> Captioner:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return build_captioner(CaptionerOptions(name="file", path=str(path)), CPU, KEY)


@pytest.mark.parametrize(("content", "expected"), [
    pytest.param({"a": "on a bench"}, " on a bench", id="of an image"),
    pytest.param({"a": {"dog": "that sleeps", "cat": "no"}}, " that sleeps", id="of a class"),
    pytest.param({"a": "A photograph of dog, asleep "}, ", asleep", id="with the prompt"),
    pytest.param({"a": " "}, "", id="an empty one"),
])  # fmt: skip
def test_captions_of_a_file(content: Any, expected: str, tmp_path: Path) -> None:
    assert from_file(tmp_path / "captions.json", content).caption(sample(), "dog", PREFIX) == expected


@pytest.mark.parametrize("content", [{"b": "x"}, {"a": {"cat": "x"}}, {"a": 3}])
def test_a_missing_caption_is_named(content: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"^caption: got none for 'dog', expected a text in .*set {KEY}\.name=none$"):
        from_file(tmp_path / "captions.json", content).caption(sample(), "dog", PREFIX)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_file_of_something_else_ends_in_one_line(content: str, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"captions\.json: .*write it again$"):
        from_file(tmp_path / "captions.json", content).caption(sample(), "dog", PREFIX)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    captioner = build_captioner(CaptionerOptions(name="file", path=str(tmp_path / "none.json")), CPU, KEY)
    for use in (lambda: captioner.digest, lambda: captioner.caption(sample(), "dog", PREFIX)):
        with pytest.raises(MissingError, match=rf"^{KEY}\.path: got '.*none\.json', no such file"):
            use()


def test_digest_follows_the_file(tmp_path: Path) -> None:
    first = from_file(tmp_path / "a.json", {"a": "x"}).digest
    assert first == from_file(tmp_path / "b.json", {"a": "x"}).digest != from_file(tmp_path / "c.json", {}).digest


def test_no_captioner_adds_nothing() -> None:
    captioner = build_captioner(CaptionerOptions(), CPU, KEY)
    assert captioner.digest == ""
    assert captioner.caption(sample(), "dog", PREFIX) == ""


@pytest.mark.parametrize(("options", "message"), [
    pytest.param({"name": "blipp"}, "name: got 'blipp', expected one of none, blip, file", id="a name"),
    pytest.param({"name": "file"}, "path: got none", id="no path"),
    pytest.param({"max_tokens": 0}, "max_tokens: got 0", id="no token"),
])  # fmt: skip
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CaptionerOptions(**options)


WORDS = ("a", "photograph", "of", "dog", "red", "bench", "on", "grass", "sleeping", "##s")


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BLIP with random weights and a vocabulary of ten words, as the hub stores it."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    folder = tmp_path_factory.mktemp("blip")
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
    (folder / "vocab.txt").write_text("\n".join((*special, *WORDS)))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), bos_token="[DEC]")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(tokenizer), "encoder_hidden_size": 16, "bos_token_id": 5, "eos_token_id": 3,
            "sep_token_id": 3, "pad_token_id": 0, "projection_dim": 16}  # fmt: skip
    vision = {**size, "image_size": 16, "patch_size": 8, "projection_dim": 16}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=16))
    randomise(model.eval())
    # Words only, so that a caption does not end before it begins.
    model.text_decoder.cls.predictions.bias.data[: len(special)] = -100
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer).save_pretrained(folder)
    return folder


def test_blip_continues_the_prompt(blip: Path) -> None:
    captioner = build_captioner(CaptionerOptions(name="blip", weights=str(blip), max_tokens=12), CPU, KEY)
    caption = captioner.caption(sample(), "dog", PREFIX)
    assert caption.startswith(" ")
    assert len(caption.split()) > 1
    assert PREFIX not in caption
    assert caption == captioner.caption(sample(), "dog", PREFIX)
    # What transformers writes for the same prompt, without the prompt.
    processor = captioner._processor  # type: ignore[attr-defined]
    inputs = processor(images=sample().image, text=PREFIX, return_tensors="pt")
    with torch.inference_mode():
        output = captioner._model.generate(**inputs, max_length=12, do_sample=False)  # type: ignore[attr-defined]
    assert processor.decode(output[0], skip_special_tokens=True) == PREFIX + caption


def test_blip_runs_on_a_pretended_gpu(blip: Path) -> None:
    options = CaptionerOptions(name="blip", weights=str(blip), max_tokens=12)
    expected = build_captioner(options, CPU, KEY).caption(sample(), "dog", PREFIX)
    with torch.inference_mode(), pretend_cuda():
        assert build_captioner(options, Device(CUDA), KEY).caption(sample(), "dog", PREFIX) == expected


def test_blip_is_looked_for(tmp_path: Path, blip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODUSEG_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    captioner = build_captioner(CaptionerOptions(name="blip"), CPU, KEY)
    with pytest.raises(MissingError, match=rf"^{KEY}\.weights: got hub id 'Salesforce/blip-image-captioning-large'"):
        _ = captioner.digest
    assert len(build_captioner(CaptionerOptions(name="blip", weights=str(blip)), CPU, KEY).digest) == 64
