"""Names of finished runs: `latest` and names of one's own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moduseg.errors import ConfigError, MissingError
from moduseg.pipeline.run_names import BANKS, RUNS, STUDENTS, check_name, name_run, resolve_run


def make_run(outputs: Path, dataset: str, stage: str, name: str, **inputs: Path) -> Path:
    """Write the folder of a finished run."""
    folder = outputs / dataset / stage / name
    folder.mkdir(parents=True)
    manifest = {"stage": stage, "status": "complete", "inputs": {key: str(path) for key, path in inputs.items()}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(params=[True, False], ids=["links", "text files"])
def outputs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root of artefacts, on a file system with links and on one without."""
    if not request.param:

        def refuse(*args: object, **kwargs: object) -> None:
            raise OSError("no links")

        monkeypatch.setattr(Path, "symlink_to", refuse)
    return tmp_path / "outputs"


def test_run_and_its_inputs_get_the_names(outputs: Path) -> None:
    bank = make_run(outputs, "pets", "build_bank", "timm-train-00000000")
    run = make_run(outputs, "pets", "infer", "timm-val-11111111", build_bank=bank)
    name_run(run, "first")
    for text in ("latest", "first"):
        assert resolve_run(text, RUNS, outputs) == str(run)
        assert resolve_run(text, BANKS, outputs) == str(bank)
        assert resolve_run(str(outputs / "pets" / "infer" / text), RUNS, outputs) == str(run)


def test_latest_is_the_newest_of_all_data_sets(outputs: Path) -> None:
    runs = [make_run(outputs, dataset, "infer", f"timm-val-{i:08d}") for i, dataset in enumerate(["b", "a", "a"])]
    for i, run in enumerate(runs):
        name_run(run)
        os.utime(run.parent / "latest", ns=(10**18 + i, 10**18 + i), follow_symlinks=False)
        assert resolve_run("latest", RUNS, outputs) == str(run)
    assert resolve_run(str(outputs / "b" / "infer" / "latest"), RUNS, outputs) == str(runs[0])


def test_outputs_copied_without_links_end_no_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(tmp_path, "pets", "infer", "timm-val-11111111")
    copied = make_run(tmp_path, "pets", "infer", "latest")
    name_run(run)
    assert copied.is_dir()
    assert not copied.is_symlink()
    assert "latest: is a folder, not a link" in caplog.text
    make_run(tmp_path, "pets", "infer", "first")
    with pytest.raises(ConfigError, match="name: got 'first', which is a folder"):
        name_run(run, "first")


def test_bank_elsewhere_gets_no_name(outputs: Path, tmp_path: Path) -> None:
    bank = make_run(tmp_path / "other", "pets", "build_bank", "timm-train-00000000")
    name_run(make_run(outputs, "pets", "infer", "timm-val-11111111", build_bank=bank))
    assert list(bank.parent.iterdir()) == [bank]


def test_other_texts_stay_as_they_are(outputs: Path) -> None:
    assert [resolve_run(text, RUNS, outputs) for text in ("nowhere", "a/b", ".")] == ["nowhere", "a/b", "."]
    for stages, command in ((RUNS, "infer"), (BANKS, "build_bank"), (STUDENTS, "train_student")):
        with pytest.raises(MissingError, match=rf"^latest: no finished run in .*; run moduseg {command} first"):
            resolve_run("latest", stages, outputs)


@pytest.mark.parametrize("name", ["", "latest", "a/b", "..", ".a", "timm-val-1234abcd", "a\\b"])
def test_names_that_would_be_mistaken_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="try name=first"):
        check_name(name)


def test_folder_keeps_its_name(outputs: Path) -> None:
    run = make_run(outputs, "pets", "infer", "timm-val-11111111")
    (run.parent / "first").mkdir()
    with pytest.raises(ConfigError, match="choose another name"):
        name_run(run, check_name("first"))
    assert check_name("Größe (2)") == "Größe (2)"
