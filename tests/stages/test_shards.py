"""Runs spread over processes: job arrays and torchrun end with the bytes of one process."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import moduseg
from moduseg.config import compose
from moduseg.datasets.labels import check_ids
from moduseg.errors import ConfigError, DataError, IncompleteError, ModusegError
from moduseg.pipeline.manifests import count_failures, safe_name
from moduseg.pipeline.workspace import Workspace
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.infer import Infer
from moduseg.stages.propose import Propose
from tests.support.runs import overrides, result_bytes

RUN = "from moduseg.cli import entry; entry()"


def start(command: str, *arguments: str, torchrun: int = 0) -> subprocess.Popen[str]:
    """A process of its own, or several that torchrun starts."""
    call = [sys.executable, "-c", RUN, command]
    if torchrun:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        script = Path(__file__).parents[2] / "scripts" / f"{command}.py"
        call = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={torchrun}"]
        call += [f"--master-port={port}", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*call, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=240)
    # torchrun has a traceback of its own for a rank that failed; none of ours may stand beside it.
    assert not re.search(f'File "{re.escape(str(Path(moduseg.__file__).parent))}/', err), err
    return process.returncode, out + err


def shard(index: int, count: int) -> tuple[str, ...]:
    return f"runtime.shard.index={index}", f"runtime.shard.count={count}"


def test_a_job_array_names_who_is_missing_and_ends_with_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    """Each submission brings every shard one stage further; the one that finds all records merges."""
    arguments = overrides(tmp_path, world=finished)
    with pytest.raises(IncompleteError, match=r"scores: shard 0 of 3 is done; 4 of 6 .*, of shards 1, 2;"):
        BuildBank.run(compose([*arguments, *shard(0, 3)]))
    with pytest.raises(IncompleteError, match=r"scores: shard 0 of 2 is done; 2 of 6 images are missing, of shard 1;"):
        Infer.run(compose([*arguments, *shard(0, 2)]))
    records = {p.name for p in tmp_path.glob("miniature/scores/*/batches/*.json")}
    assert records == {"000000.json", "000002.json"}

    seen = set()
    for _ in range(8):
        for index in (1, 0):
            try:
                Infer.run(compose([*arguments, *shard(index, 2)]))
            except IncompleteError as error:
                seen.add(str(error).split(":")[0])
    assert seen >= {"pseudo_masks", "build_bank", "propose", "queries", "infer"}
    assert result_bytes(tmp_path) == result_bytes(finished)
    assert (tmp_path / "miniature").is_dir()


def test_what_one_shard_left_a_plain_run_completes(finished: Path, tmp_path: Path) -> None:
    arguments = overrides(tmp_path, world=finished)
    with pytest.raises(IncompleteError):
        Propose.run(compose([*arguments, *shard(1, 2)]))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("miniature/propose/*/batches/*.json")}
    assert len(before) == 1
    Infer.run(compose(arguments))
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert result_bytes(tmp_path) == result_bytes(finished)


def test_a_batch_made_anew_by_one_shard_is_merged_anew_by_whoever_comes_next(finished: Path, tmp_path: Path) -> None:
    """The folder was complete; the shard that changed it was killed before the merge."""
    import shutil

    shutil.copytree(finished, tmp_path / "copy")
    arguments = overrides(tmp_path / "copy")
    image = tmp_path / "copy" / "world-6-4" / "JPEGImages" / "train_00001.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:99])
    assert count_failures(BuildBank.run(compose(arguments))) > 0
    bank = next((tmp_path / "copy" / "miniature" / "build_bank").iterdir())
    broken = (bank / "bank.safetensors").read_bytes()
    image.write_bytes(whole)
    runner = BuildBank(Workspace(compose(arguments))).runner()
    assert runner.run_shard() == 2
    assert (bank / "bank.safetensors").read_bytes() == broken
    BuildBank.run(compose([*arguments, *shard(1, 2)]))
    assert (bank / "bank.safetensors").read_bytes() != broken
    BuildBank.run(compose(arguments))
    expected = {k: v for k, v in result_bytes(finished).items() if "/build_bank/" in k}
    assert {k: v for k, v in result_bytes(tmp_path / "copy").items() if "/build_bank/" in k} == expected


def test_shards_that_wait_need_one_submission(finished: Path, tmp_path: Path) -> None:
    """Two processes at once, each its own shard, the world drawn by both; a third repeats the second's."""
    arguments = overrides(tmp_path, "runtime.shard.wait=200")
    runs = [start("infer", *arguments, *shard(index, 2)) for index in (0, 1, 1)]
    results = [ended(run) for run in runs]
    assert [code for code, _ in results] == [0, 0, 0], results
    assert result_bytes(tmp_path) == result_bytes(finished)
    assert list(tmp_path.rglob("*.tmp")) == []


def test_torchrun_ends_with_the_same_bytes_and_says_it_once(finished: Path, tmp_path: Path) -> None:
    code, text = ended(start("evaluate", *overrides(tmp_path), torchrun=2))
    assert code == 0, text
    assert len(re.findall(r"^infer: 4 images \(4 now, 0 done before\)", text, re.MULTILINE)) == 1
    got = {k: v for k, v in result_bytes(tmp_path).items() if "/evaluate/" not in k}
    assert got == result_bytes(finished)
    record = json.loads(next((tmp_path / "miniature" / "infer").glob("*/results.json")).read_text())
    assert "shard" not in record["config"]["runtime"]


def test_what_one_rank_meets_ends_all_in_one_line(tmp_path: Path) -> None:
    """Every image is broken: rank 0 finds it when it merges, rank 1 is told."""
    arguments = overrides(tmp_path)
    Propose.run(compose(arguments))
    for image in (tmp_path / "world-6-4" / "JPEGImages").iterdir():
        image.write_bytes(b"no image")
    code, text = ended(start("propose", *arguments, torchrun=2))
    assert code != 0
    assert text.count("moduseg: error: propose val: none of 4 images could be processed") >= 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("runtime.shard.index=2", "runtime.shard.count=2"), r"shard\.index: got 2, expected 0 to 1"),
        (("runtime.shard.count=0",), r"shard\.count: got 0, expected 1 to"),
        (("runtime.engine=dask",), r"runtime\.engine: got 'dask'.*one of local, ray"),
        (("runtime.engine=ray", "runtime.shard.count=2"), r"engine: got ray with shard\.count=2"),
        (("runtime.ray.actors=0",), r"ray\.actors: got 0"),
        (("runtime.workers=-1",), r"workers: got -1"),
    ],
)
def test_mistakes_are_one_line(more: tuple[str, ...], message: str) -> None:
    with pytest.raises(ModusegError, match=message):
        compose(more)


@pytest.mark.parametrize(("rank", "world"), [("x", "2"), ("2", "2"), ("-1", "2")])
def test_an_environment_that_is_not_torchruns_is_one_line(
    rank: str, world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(ConfigError, match=r"RANK, WORLD_SIZE: got .*runtime\.shard"):
        Workspace(compose([]))


def test_keys_do_not_know_how_the_work_was_spread() -> None:
    plain, spread = compose([]), compose([*shard(1, 4), "runtime.workers=3", "runtime.verify=true"])
    assert plain.as_dict() == spread.as_dict()
    assert spread.runtime.shard.index == 1


@pytest.mark.parametrize("image_id", ["../a", "a/../../b", "/etc/passwd", "a//b", "C:/a", "a\\..\\b", "a\nb", ".."])
def test_no_image_id_leaves_the_output_folder(image_id: str) -> None:
    with pytest.raises(DataError, match="expected a relative path inside the folder"):
        safe_name(image_id, ".json")
    with pytest.raises(DataError, match="expected a relative path inside the folder"):
        check_ids([image_id], "list")
