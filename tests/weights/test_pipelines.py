"""Text-to-image models of the hub: the files of all parts are fetched, and no other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moduseg.errors import MissingError, MissingWeightsError
from moduseg.weights.download import forbid_downloads
from moduseg.weights.hub import get_cached_folder
from moduseg.weights.pipelines import PARTS, choose_files, find_pipeline_folder
from tests.support.serving import HubHandler, Site, go_online, serve

ID = "owner/painter"
KEY = "pseudo_masks.generator.weights"
SMALL = (
    "scheduler/scheduler_config.json", "text_encoder/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt",
    "unet/config.json", "vae/config.json",
)  # fmt: skip
WEIGHTS = (
    "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)  # fmt: skip
OTHERS = (
    "README.md", "model_index.json", "v1.safetensors", "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors", "safety_checker/config.json", "safety_checker/model.safetensors",
    "text_encoder/pytorch_model.bin",
)  # fmt: skip


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A hub with one repository, published with more files than are read."""
    monkeypatch.setenv("MODUSEG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    with serve(HubHandler) as served:
        go_online(monkeypatch, served.address)
        for name in (*SMALL, *WEIGHTS, *OTHERS):
            served.files[f"/{ID}/{name}"] = name.encode()
        yield served


def list_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_parts_are_fetched_once(site: Site) -> None:
    folder = find_pipeline_folder(ID, KEY, "v2")
    assert folder == get_cached_folder(ID, "v2")
    fetched = {name for name in list_files(folder) if not name.startswith(".cache")}
    assert fetched == {*SMALL, *WEIGHTS}
    assert (folder / "unet" / "config.json").read_bytes() == b"unet/config.json"
    num_requests = len(site.asked)
    assert find_pipeline_folder(ID, KEY, "v2") == folder
    assert len(site.asked) == num_requests


def test_size_of_the_parts_is_known_before_they_are_fetched(site: Site) -> None:
    with forbid_downloads(), pytest.raises(MissingWeightsError) as raised:
        find_pipeline_folder(ID, KEY)
    assert raised.value.find_size is not None
    assert raised.value.find_size() == sum(len(name) for name in (*SMALL, *WEIGHTS))


@pytest.mark.parametrize("part", [name for name, part in PARTS.items() if part.weights])
def test_a_repository_without_a_parts_weights_is_refused(part: str, site: Site) -> None:
    for name in [name for name in site.files if name.startswith(f"/{ID}/{part}/") and "config" not in name]:
        del site.files[name]
    with pytest.raises(MissingError, match=rf"the repository has no {part}/\S+ or {part}/\S+") as raised:
        find_pipeline_folder(ID, KEY)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("present", "chosen"), [
    pytest.param(["unet/diffusion_pytorch_model.bin"], ["unet/diffusion_pytorch_model.bin"], id="an older file"),
    pytest.param(["unet/diffusion_pytorch_model.safetensors.index.json",
                  "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
                  "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
                  "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors"],
                 ["unet/diffusion_pytorch_model.safetensors.index.json",
                  "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
                  "unet/diffusion_pytorch_model-00002-of-00002.safetensors"], id="several files"),
    pytest.param(["unet/diffusion_pytorch_model.fp16.safetensors"], [], id="another precision alone"),
    pytest.param(["tokenizer/tokenizer.json", "tokenizer/README.md"], ["tokenizer/tokenizer.json"], id="a tokenizer"),
])  # fmt: skip
def test_files_of_a_repository_are_chosen(present: list[str], chosen: list[str]) -> None:
    assert choose_files(present) == chosen
