"""Artefact folders: keys, atomic writes, leftovers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moduseg.errors import ArtefactError, StorageError
from moduseg.files import _MACHINE, _identify_machine, write_atomic, write_json
from moduseg.pipeline.artefacts import Artefact
from moduseg.pipeline.environment import describe_environment


def test_equal_parts_share_a_folder_and_others_do_not(tmp_path: Path) -> None:
    first = Artefact(tmp_path, "world", "infer", "vit", {"top_k": 25, "nms": 0.4})
    same = Artefact(tmp_path, "world", "infer", "vit", {"nms": 0.4, "top_k": 25})
    other = Artefact(tmp_path, "world", "infer", "vit", {"top_k": 9, "nms": 0.4})
    assert first.path == same.path
    assert first.path != other.path
    assert first.path.parent == tmp_path / "world" / "infer"
    assert first.manifest["parts"]["top_k"] == 25
    assert not first.is_complete


def test_a_folder_made_from_other_parts_is_refused(tmp_path: Path) -> None:
    artefact = Artefact(tmp_path, "world", "infer", "vit", {"top_k": 25})
    write_json(artefact.manifest_path, {"key": "somebody else's"})
    with pytest.raises(ArtefactError, match=r"somebody else's.*remove the folder"):
        Artefact(tmp_path, "world", "infer", "vit", {"top_k": 25})


@pytest.mark.parametrize("relative", ["../out.png", "a/../../out.png", "/etc/passwd"])
def test_files_cannot_leave_the_folder(tmp_path: Path, relative: str) -> None:
    with pytest.raises(ArtefactError, match="leaves the folder"):
        Artefact(tmp_path, "world", "infer", "vit", {}).file(relative)


def test_a_failed_write_keeps_the_old_content_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "labels.png"
    write_atomic(target, b"old")

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match=r"labels\.png.*No space left.*free some space"):
        write_atomic(target, b"new and longer")
    monkeypatch.undo()
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["labels.png"]


def test_a_folder_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match=r"runtime\.outputs"):
        Artefact(tmp_path / "file", "world", "infer", "vit", {})


def test_leftovers_of_a_dead_process_are_swept_and_those_of_a_living_one_kept(tmp_path: Path) -> None:
    dead = int(subprocess.check_output([sys.executable, "-c", "import os; print(os.getpid())"]))
    folder = Artefact(tmp_path, "world", "infer", "vit", {}).path / "labels"
    folder.mkdir()
    orphan = folder / f".a.png.{_MACHINE}.0123abcd.{dead}.tmp"
    alive = folder / f".b.png.{_MACHINE}.0123abcd.{os.getppid()}.tmp"
    orphan.touch()
    alive.touch()
    Artefact(tmp_path, "world", "infer", "vit", {})
    assert not orphan.exists()
    assert alive.exists()


@pytest.mark.parametrize(("age", "is_kept"), [
    pytest.param(60, True, id="a minute old"),
    pytest.param(2 * 24 * 3600, False, id="two days old"),
])  # fmt: skip
def test_a_file_of_another_container_is_a_leftover_when_it_is_old(tmp_path: Path, age: float, is_kept: bool) -> None:
    """Containers may share host name and folder; a process id means nothing outside of its own."""
    dead = int(subprocess.check_output([sys.executable, "-c", "import os; print(os.getpid())"]))
    folder = Artefact(tmp_path, "world", "infer", "vit", {}).path
    other = folder / f".a.png.{'0' * 12}.0123abcd.{dead}.tmp"
    other.touch()
    os.utime(other, (time.time() - age,) * 2)
    Artefact(tmp_path, "world", "infer", "vit", {})
    assert other.exists() == is_kept


def test_the_namespace_of_process_ids_tells_containers_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    here = _identify_machine()
    monkeypatch.setattr(Path, "readlink", lambda path: Path("pid:[4026532000]"))
    other = _identify_machine()
    monkeypatch.setattr(Path, "readlink", lambda path: Path("pid:[4026532001]"))
    assert len({here, other, _identify_machine()}) == 3


def test_a_folder_that_another_process_removes_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, original, num_writes = tmp_path / "panels" / "a.png", Path.write_bytes, 0

    def remove_folder(self: Path, data: bytes) -> int:
        nonlocal num_writes
        num_writes += 1
        if num_writes == 1:
            self.parent.rmdir()
        return original(self, data)

    monkeypatch.setattr(Path, "write_bytes", remove_folder)
    write_atomic(target, b"picture")
    assert (target.read_bytes(), num_writes) == (b"picture", 2)


def test_a_durable_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, synced, fsync = tmp_path / "record.json", list[bool](), os.fsync

    def note(descriptor: int) -> None:
        synced.append(target.exists())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_atomic(target, b"{}", is_durable=True)
    assert synced == [False]
    assert target.read_bytes() == b"{}"


@pytest.mark.parametrize(("before", "message"), [
    pytest.param({"torch": "1.0", "threads": 99}, r"infer: .*\(torch 1\.0 -> \S+, threads 99 -> \d+\) -> ", id="old"),
    pytest.param(None, "", id="none recorded"),
    pytest.param({}, "", id="equal"),
])  # fmt: skip
def test_another_environment_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, before: dict[str, Any] | None, message: str
) -> None:
    artefact = Artefact(tmp_path, "world", "infer", "vit", {})
    manifest = artefact.manifest
    assert manifest["environment"] == describe_environment()
    assert {"moduseg", "torch", "timm", "transformers", "opencv", "threads"} == set(manifest["environment"])
    manifest["environment"] = None if before is None else {**manifest["environment"], **before}
    write_json(artefact.manifest_path, manifest)
    caplog.set_level("INFO", logger="moduseg")
    for _ in range(2):
        Artefact(tmp_path, "world", "infer", "vit", {})
    assert len(caplog.messages) == bool(message)
    assert all(re.match(message, text) for text in caplog.messages)


def test_a_damaged_manifest_is_written_anew_and_what_was_merged_is_compared_with_it(tmp_path: Path) -> None:
    artefact = Artefact(tmp_path, "world", "infer", "vit", {})
    (artefact.path / "panels" / "trip").mkdir(parents=True)
    (artefact.path / "panels" / "trip" / "a.png").write_bytes(b"picture")
    (artefact.path / "results.json").write_bytes(b"figures")
    artefact.write_manifest(status="complete")
    assert set(artefact.manifest["products"]) == {"panels/trip/a.png", "results.json"}
    assert artefact.is_intact(verify=True)
    (artefact.path / "results.json").write_bytes(b"figurez")
    assert artefact.is_intact()
    assert not artefact.is_intact(verify=True)
    (artefact.path / "results.json").write_bytes(b"fig")
    assert not artefact.is_intact()

    artefact.manifest_path.write_bytes(artefact.manifest_path.read_bytes()[:30])
    again = Artefact(tmp_path, "world", "infer", "vit", {})
    assert again.manifest["status"] == "running"
    assert not again.is_intact()
