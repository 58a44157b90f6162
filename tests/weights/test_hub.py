"""Repositories of the hub: what is on the disk is found, what is not is fetched or ends in one line."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import moduseg
from moduseg.backbones.clip import ClipBackbone, ClipOptions
from moduseg.backbones.timm_backbone import TimmBackbone, TimmOptions
from moduseg.errors import ArtefactError, MissingError, MissingWeightsError, StorageError
from moduseg.files import file_digest
from moduseg.pipeline.plan import Plan, PlannedStage, describe_plan
from moduseg.weights import hub
from moduseg.weights.download import forbid_downloads, get_cache_home
from moduseg.weights.hub import fetch_hub_file, fetch_hub_folder, get_cached_folder, list_weight_files, model_digest
from moduseg.weights.sources import find_model_folder, find_weights
from tests.support.agree_vit import DEPTH, HEADS, WIDTH, radio_state
from tests.support.agreement import picture
from tests.support.bomb import Bomb
from tests.support.devices import CPU
from tests.support.serving import HubHandler, Site, go_online, serve

KEY = "backbone.weights"
ID = "owner/model-b"
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def _nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty caches, no network."""
    monkeypatch.setenv("MODUSEG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


Cache = Callable[..., Path]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Put files into the hub's own cache, in its layout, and return the snapshot's folder."""

    def put(files: dict[str, bytes], hub_id: str = ID, branch: str | None = "main", commit: str = COMMIT) -> Path:
        repository = tmp_path / "hf" / f"models--{hub_id.replace('/', '--')}"
        snapshot = repository / "snapshots" / commit
        for number, (name, content) in enumerate(files.items()):
            blob, link = repository / "blobs" / f"{commit[:8]}{number}", snapshot / name
            for path in (blob, link):
                path.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(content)
            link.symlink_to(blob)
        if branch:
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / branch).write_text(commit)
        return snapshot

    return put


def whole(**more: bytes) -> dict[str, bytes]:
    return {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        **{n.replace("_dot_", "."): c for n, c in more.items()},
    }


# Places


def test_the_hubs_own_cache_is_found(cache: Cache) -> None:
    folder = cache(whole())
    assert fetch_hub_folder(ID, None, KEY) == folder
    assert fetch_hub_folder(ID, "main", KEY) == folder
    assert fetch_hub_folder(ID, COMMIT, KEY) == folder
    assert fetch_hub_file(ID, ["model.safetensors", "pytorch_model.bin"], None, KEY) == folder / "model.safetensors"
    assert find_weights(f"hf://{ID}@{COMMIT}/model.safetensors", KEY) == folder / "model.safetensors"
    with pytest.raises(MissingError, match=r"got hub id 'owner/model-b' at revision v2"):
        fetch_hub_folder(ID, "v2", KEY)


def test_a_revision_is_its_own_weights(cache: Cache) -> None:
    cache(whole())
    other = cache(whole() | {"model.safetensors": b"other"}, branch="v2", commit=COMMIT[::-1])
    assert fetch_hub_folder(ID, "v2", KEY) == other
    assert (fetch_hub_file(ID, ["model.safetensors"], None, KEY)).read_bytes() == b"weights"
    assert (fetch_hub_file(ID, ["model.safetensors"], "v2", KEY)).read_bytes() == b"other"


def test_files_put_into_the_cache_folder_come_first(cache: Cache) -> None:
    cache(whole())
    for revision in (None, "refs/pr/3"):
        place = get_cached_folder(ID, revision)
        place.mkdir(parents=True)
        for name, content in whole().items():
            (place / name).write_bytes(content)
        assert fetch_hub_folder(ID, revision, KEY) == place
        assert fetch_hub_file(ID, ["model.safetensors"], revision, KEY) == place / "model.safetensors"
    assert get_cached_folder(ID, None) == get_cache_home() / "huggingface.co" / "owner" / "model-b" / "main"


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": b"{}"},
        {"model.safetensors": b"weights"},
        {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}'},
    ],
    ids=["no weights", "no configuration", "a part is missing"],
)
def test_half_a_model_is_none(cache: Cache, files: dict[str, bytes]) -> None:
    cache(files)
    with pytest.raises(MissingError, match="HF_HUB_OFFLINE forbids"):
        fetch_hub_folder(ID, None, KEY)


def test_texts_need_a_copy_with_a_tokenizer(cache: Cache) -> None:
    folder = cache(whole())
    with pytest.raises(MissingError):
        fetch_hub_folder(ID, None, KEY, companions=("tokenizer.json", "vocab.json"))
    cache({"vocab.json": b"{}"})
    assert fetch_hub_folder(ID, None, KEY, companions=("tokenizer.json", "vocab.json")) == folder


def test_directories_hub_ids_and_variables(cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cache(whole())
    local = shutil.copytree(folder, tmp_path / "owner" / "model-b")
    assert find_model_folder(ID, KEY) == folder
    assert find_model_folder(str(local), KEY) == local
    monkeypatch.setenv("HERE", str(local))
    assert find_model_folder("$HERE", KEY) == local
    monkeypatch.chdir(tmp_path)
    assert find_model_folder(ID, KEY) == Path(ID)
    for text, message in (
        ("$MODUSEG_NOT_SET", "variable MODUSEG_NOT_SET is not set; set it to the directory of a SAM"),
        ("./nowhere", r"backbone\.weights: got './nowhere', no such file"),
        (str(tmp_path), r"holds no config\.json with model\.safetensors or pytorch_model\.bin"),
    ):
        with pytest.raises(MissingError, match=message):
            find_model_folder(text, KEY, what="SAM")


def says_what_to_do(error: BaseException, *words: str) -> bool:
    return "\n" not in str(error) and all(word in str(error) for word in (f"{KEY}: got ", f"{KEY}=<", *words))


def test_offline_and_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", touched)
    for revision in (None, "v2"):
        place = str(get_cached_folder(ID, revision))
        address = f"https://huggingface.co/{ID}" + ("/tree/v2" if revision else "")
        with pytest.raises(MissingError, match="HF_HUB_OFFLINE forbids") as caught:
            fetch_hub_folder(ID, revision, KEY)
        assert says_what_to_do(caught.value, address, place, "config.json", "model.safetensors", f"hf download {ID}")
        with pytest.raises(MissingError, match="HF_HUB_OFFLINE forbids") as caught:
            fetch_hub_file(ID, ["model.safetensors"], revision, KEY, value="hub")
        assert says_what_to_do(caught.value, address, place, "model.safetensors", "got 'hub'")


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    go_online(monkeypatch)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    for get in (lambda: fetch_hub_folder(ID, None, KEY), lambda: fetch_hub_file(ID, ["model.safetensors"], None, KEY)):
        with pytest.raises(MissingError, match="could not be fetched") as caught:
            get()
        assert says_what_to_do(caught.value, f"https://huggingface.co/{ID}", str(get_cached_folder(ID, None)))


# Fetching from a stand-in for the hub


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with serve(HubHandler) as site:
        go_online(monkeypatch, site.address)
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        for name, content in whole(tokenizer_dot_json=b"{}", README_dot_md=b"...", tf_model_dot_h5=b"...").items():
            site.files[f"/{ID}/{name}"] = content
        yield site


def test_a_model_is_fetched_once(site: Site) -> None:
    folder = fetch_hub_folder(ID, None, KEY)
    assert folder == get_cached_folder(ID, None)
    assert {p.name for p in folder.iterdir() if p.is_file()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    count = len(site.asked)
    assert fetch_hub_folder(ID, None, KEY) == folder
    assert fetch_hub_file(ID, ["model.safetensors"], None, KEY) == folder / "model.safetensors"
    assert len(site.asked) == count


MODEL = partial(fetch_hub_folder, ID, None, KEY)


@pytest.mark.parametrize(("fetch", "expected"), [
    pytest.param(MODEL, 10**6 + 4, id="a model: configuration, tokenizer, weights"),
    pytest.param(partial(fetch_hub_file, ID, ["absent.bin", "README.md"], None, KEY), 3, id="the first file there is"),
    pytest.param(partial(fetch_hub_file, ID, ["absent.bin"], None, KEY), None, id="no such file"),
    pytest.param(partial(fetch_hub_folder, "owner/absent", None, KEY), None, id="no such repository"),
])  # fmt: skip
def test_a_dry_run_names_the_size_of_what_it_would_fetch(
    site: Site, fetch: Callable[[], Path], expected: int | None
) -> None:
    site.files[f"/{ID}/model.safetensors"] = b"w" * 10**6
    with forbid_downloads(), pytest.raises(MissingWeightsError) as raised:
        fetch()
    assert raised.value.find_size is not None
    assert raised.value.find_size() == expected
    assert not get_cached_folder(ID, None).exists()
    lines = list(describe_plan(Plan([PlannedStage("t")], downloads={"backbone": raised.value}), Path("outputs")))
    assert f", {'1 MB' if expected == 10**6 + 4 else '0 MB' if expected else 'size unknown'}, http" in lines[1]


def test_sizes_are_unknown_offline(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with forbid_downloads(), pytest.raises(MissingWeightsError) as raised:
        MODEL()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert raised.value.find_size is not None
    assert raised.value.find_size() is None
    assert site.asked == []


def test_parts_of_weights_are_added_up(site: Site) -> None:
    del site.files[f"/{ID}/model.safetensors"]
    for name in ("model.safetensors.index.json", "model-00001.safetensors", "model-00002.safetensors"):
        site.files[f"/{ID}/{name}"] = b"1234567"
    with forbid_downloads(), pytest.raises(MissingWeightsError) as raised:
        MODEL()
    assert raised.value.find_size is not None
    assert raised.value.find_size() == 4 + 3 * 7


def test_a_data_sets_file_is_fetched_once(site: Site) -> None:
    site.files["/datasets/owner/masks/VOC2012/pseudo.zip"] = b"archive"
    address = "hf://datasets/owner/masks/VOC2012/pseudo.zip"
    found = find_weights(address, KEY)
    folder = get_cached_folder("datasets/owner/masks", None)
    assert folder == get_cache_home() / "huggingface.co" / "datasets" / "owner" / "masks" / "main"
    assert found == folder / "VOC2012" / "pseudo.zip"
    assert found.read_bytes() == b"archive"
    count = len(site.asked)
    assert find_weights(address, KEY) == found
    assert len(site.asked) == count
    with pytest.raises(MissingError, match=r"could not be fetched .*the repository has no other\.zip") as caught:
        find_weights("hf://datasets/owner/masks/other.zip", KEY)
    assert f"other.zip from {site.address}/datasets/owner/masks into" in str(caught.value)
    # A model of the same name is another repository.
    with pytest.raises(MissingError, match="could not be fetched"):
        find_weights("hf://owner/masks/VOC2012/pseudo.zip", KEY)


def test_older_models_have_a_pytorch_file(site: Site) -> None:
    site.files[f"/{ID}/pytorch_model.bin"] = site.files.pop(f"/{ID}/model.safetensors")
    assert list_weight_files(fetch_hub_folder(ID, "v1", KEY)) == [get_cached_folder(ID, "v1") / "pytorch_model.bin"]
    found = fetch_hub_file(ID, ["model.safetensors", "pytorch_model.bin"], None, KEY)
    assert found == get_cached_folder(ID, None) / "pytorch_model.bin"


def test_what_the_hub_answers(site: Site, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"could not be fetched \(the repository has no other\.safetensors\)"):
        fetch_hub_file(ID, ["other.safetensors"], None, KEY)
    with pytest.raises(
        MissingError, match=r"got hub id 'owner/none', but its model is not here and could not"
    ) as caught:
        fetch_hub_folder("owner/none", None, KEY)
    assert says_what_to_do(caught.value)
    del site.files[f"/{ID}/config.json"]
    with pytest.raises(MissingError, match="could not be fetched in full"):
        fetch_hub_folder(ID, None, KEY)
    site.answers = [403]
    for get in (lambda: fetch_hub_folder(ID, "v3", KEY), lambda: fetch_hub_file(ID, ["model.safetensors"], "v3", KEY)):
        with pytest.raises(MissingError, match=r"licence to be accepted: do so at .*/owner/model-b, then run `hf auth"):
            get()


def test_another_digest_than_the_hub_announced(site: Site) -> None:
    site.files["/announced/model.safetensors"] = b"WEIGHTS"
    for get in (lambda: fetch_hub_folder(ID, None, KEY), lambda: fetch_hub_file(ID, ["model.safetensors"], None, KEY)):
        with pytest.raises(ArtefactError, match=r"model\.safetensors came with sha256 .*, and was removed"):
            get()
        assert not (get_cached_folder(ID, None) / "model.safetensors").exists()
    del site.files["/announced/model.safetensors"]
    assert list_weight_files(fetch_hub_folder(ID, None, KEY))


def test_a_cache_folder_that_cannot_be_written(site: Site, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot be written.*MODUSEG_HOME="):
        fetch_hub_folder(ID, None, KEY)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("xet: No space left on device")]
)
def test_a_full_disk(site: Site, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(StorageError, match=r"No space left on device\); free some space"):
        fetch_hub_file(ID, ["model.safetensors"], None, KEY)


# Digests


def test_the_digest_covers_the_loaded_files_only(cache: Cache, tmp_path: Path) -> None:
    folder = cache(whole())
    first = model_digest(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in ("pytorch_model.bin", "model.fp16.safetensors", "README.md"):
        (copy / name).write_bytes(b"not read")
    assert model_digest(copy) == first
    (copy / "config.json").write_bytes(b"{ }")
    assert len({first, model_digest(copy), model_digest(folder, copy)}) == 3


def test_a_model_in_parts(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    width = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**width, "vocab_size": 32, "max_position_embeddings": 8},
        vision_config={**width, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    model = CLIPModel(config)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    parts = list_weight_files(tmp_path)
    assert len(parts) > 2
    assert parts[0].name == "model.safetensors.index.json"
    loaded = ClipBackbone(ClipOptions(weights=str(tmp_path)), CPU)._source.model
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    digest = ClipBackbone(ClipOptions(weights=str(tmp_path)), CPU).digest
    parts[-1].write_bytes(parts[-1].read_bytes() + b" ")
    assert ClipBackbone(ClipOptions(weights=str(tmp_path)), CPU).digest != digest
    parts[-1].unlink()
    with pytest.raises(MissingError, match=r"all parts of it"):
        _ = ClipBackbone(ClipOptions(weights=str(tmp_path)), CPU).digest
    parts[0].write_text(json.dumps(["no map"]))
    with pytest.raises(ArtefactError, match=r"index\.json: lists no weight files"):
        list_weight_files(tmp_path)


# Timm's published weights


@pytest.mark.parametrize(
    ("name", "hub_id"), [("test_vit", "timm/test_vit.r160_in1k"), ("resnet10t", "timm/resnet10t.c3_in1k")]
)
def test_published_weights_are_what_timm_loads(
    cache: Cache, tmp_path: Path, name: str, hub_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published architecture with its classifier, random weights, in the hub's own cache."""
    import numpy as np
    import timm

    torch.manual_seed(5)
    published = timm.create_model(name, pretrained=False)
    for buffer in (b for n, b in published.named_buffers() if "running" in n):
        buffer.uniform_(0.5, 1.5)
    save_file(published.state_dict(), tmp_path / "w.safetensors")
    folder = cache({"config.json": b"{}", "model.safetensors": (tmp_path / "w.safetensors").read_bytes()}, hub_id)
    backbone = TimmBackbone(TimmOptions(name, weights="hub"), CPU)
    assert backbone.digest == file_digest(folder / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expected = timm.create_model(name, pretrained=True, num_classes=0, cache_dir=tmp_path / "hf").state_dict()
    for key, tensor in backbone._model.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    assert backbone.tokens([image])[0].tokens.isfinite().all()


RADIO = "naflexvit_so400m_patch16_radio_v4"


def make_radio(**options: Any) -> TimmBackbone:
    """A tiny C-RADIOv4 with published weights."""
    kwargs = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 4.0}
    return TimmBackbone(TimmOptions(f"{RADIO}.c_radio", weights="hub", model_kwargs=kwargs, **options), CPU)


def test_nvidias_file_is_taken_where_timms_is_not_to_be_had(
    cache: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same weights under NVIDIA's names and under timm's: the same tokens."""
    save_file(radio_state(), tmp_path / "nvidia.safetensors")
    theirs = cache({"model.safetensors": (tmp_path / "nvidia.safetensors").read_bytes()}, "nvidia/C-RADIOv4-SO400M")
    backbone = make_radio()
    assert backbone.digest == file_digest(theirs / "model.safetensors")
    tokens = backbone.tokens([picture(48, 64)])[0].tokens
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"backbone.weights: timm's file of {RADIO}.c_radio could not be had; the maker's own, "
        f"{theirs / 'model.safetensors'}, has its place"
    ]
    save_file(backbone._model.state_dict(), tmp_path / "timm.safetensors")
    timms = cache(
        {"model.safetensors": (tmp_path / "timm.safetensors").read_bytes()}, f"timm/{RADIO}.c_radio", commit=COMMIT
    )
    caplog.clear()
    preferred = make_radio()
    assert preferred.digest == file_digest(timms / "model.safetensors") != backbone.digest
    assert torch.equal(preferred.tokens([picture(48, 64)])[0].tokens, tokens)
    assert not caplog.records


def test_neither_of_two_publishers_has_the_file(cache: Cache) -> None:
    with pytest.raises(
        MissingError, match=r"timm/naflexvit.*hf://nvidia/C-RADIOv4-SO400M/model\.safetensors"
    ) as caught:
        _ = make_radio().digest
    assert "\n" not in str(caught.value)
    cache({"model.safetensors": b"x"}, "nvidia/C-RADIOv4-SO400M")
    # A revision is one of timm's repository.
    with pytest.raises(MissingError, match=r"timm/naflexvit.*at revision v2"):
        _ = make_radio(revision="v2").digest


def test_the_revision_of_published_weights(cache: Cache) -> None:
    main = cache({"model.safetensors": b"main"}, "timm/test_vit.r160_in1k")
    other = cache({"pytorch_model.bin": b"other"}, "timm/test_vit.r160_in1k", "v2", COMMIT[::-1])
    digests = [
        TimmBackbone(TimmOptions("test_vit", weights="hub", revision=r), CPU).digest for r in (None, "v2", COMMIT)
    ]
    assert digests == [
        file_digest(path)
        for path in (main / "model.safetensors", other / "pytorch_model.bin", main / "model.safetensors")
    ]


# Pickles


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_pickles_of_a_hub_directory_are_not_run(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPConfig

    monkeypatch.chdir(tmp_path)
    CLIPConfig().save_pretrained(tmp_path / "clip")
    file = tmp_path / "clip" / "pytorch_model.bin"
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"logit_scale": Bomb()}))
    else:
        torch.save({"logit_scale": Bomb()}, file)
    with pytest.raises(ArtefactError, match="not readable as a CLIP"):
        _ = ClipBackbone(ClipOptions(weights="clip"), CPU).dim
    assert not (tmp_path / "exploded").exists()


def test_nothing_in_the_package_loads_a_pickle() -> None:
    loads = 0
    for path in sorted(Path(moduseg.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            options = {k.arg: ast.unparse(k.value) for k in node.keywords}
            where = f"{path.name}:{node.lineno}: {called}"
            if called == "torch.load":
                loads += 1
                assert options.get("weights_only") == "True", where
            assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load"), where
            assert options.get("allow_pickle", "False") == "False", where
            assert options.get("trust_remote_code", "False") == "False", where
            assert options.get("weights_only", "True") == "True", where
    assert loads
    assert hub.SMALL_FILES
