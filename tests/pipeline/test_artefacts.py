"""Artefact folders: keys, atomic writes, leftovers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moduseg.errors import ArtefactError, StorageError
from moduseg.files import _HOST, write_atomic, write_json
from moduseg.pipeline.artefacts import Artefact


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
    orphan = folder / f".a.png.{_HOST}.{dead}.tmp"
    alive = folder / f".b.png.{_HOST}.{os.getppid()}.tmp"
    orphan.touch()
    alive.touch()
    Artefact(tmp_path, "world", "infer", "vit", {})
    assert not orphan.exists()
    assert alive.exists()


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
