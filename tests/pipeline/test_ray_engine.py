"""Batches on the workers of a local Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from moduseg.config import compose
from moduseg.devices import Device
from moduseg.errors import ConfigError, MissingError
from moduseg.pipeline.workspace import Workspace
from moduseg.stages.propose import Propose
from tests.support.runs import overrides, result_bytes

RAY = ("runtime.engine=ray", "runtime.ray.actors=2", "runtime.ray.cpus=1", "runtime.ray.batches=1")
RUN = "from moduseg.cli import entry; entry()"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}


def records(outputs: Path) -> list[Path]:
    return sorted(outputs.glob("miniature/propose/*/batches/*.json"))


def test_one_stage_on_ray_gives_the_same_bytes_and_passes_a_poisoned_image_by(tmp_path: Path) -> None:
    """What is done is left out: the first batch is there before Ray starts, and stays as it is."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    plain, spread = overrides(tmp_path / "plain", world=tmp_path), overrides(tmp_path / "ray", world=tmp_path)
    image = tmp_path / "world-6-4" / "JPEGImages" / "val_00003.png"
    runner = Propose(Workspace(compose(spread))).runner()
    assert list(runner.process_batches([0])) == [(0, 2)]
    image.write_bytes(image.read_bytes()[:50])
    before = records(tmp_path / "ray")[0].stat().st_mtime_ns
    Propose.run(compose(plain))

    run = subprocess.run(
        [sys.executable, "-c", RUN, "propose", *spread, *RAY],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "4 images (1 now, 2 done before), 1 failed" in run.stdout
    assert "Traceback" not in run.stderr
    assert records(tmp_path / "ray")[0].stat().st_mtime_ns == before
    assert result_bytes(tmp_path / "ray") == result_bytes(tmp_path / "plain")
    failures = next((tmp_path / "ray").glob("miniature/propose/*/failures.jsonl")).read_text()
    assert json.loads(failures)["id"] == "val_00003"


@pytest.mark.parametrize(("command", "more"), [
    pytest.param("segment", ("pseudo_masks=clip_dense", "pseudo_masks.refine=none"), id="words"),
    pytest.param("discover", ("discoverer=kmeans", "discoverer.num_clusters=4"), id="no words"),
])  # fmt: skip
def test_images_without_a_bank_are_labelled_on_ray(command: str, more: tuple[str, ...], tmp_path: Path) -> None:
    """Every stage of a command, on two workers: the clusters of the set are found in each of them alike."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    plain, spread = (
        overrides(tmp_path / name, *more, "runtime.record_size=1", train=1, val=3, world=tmp_path)
        for name in ("plain", "ray")
    )
    for arguments in (plain, [*spread, *RAY]):
        run = subprocess.run(
            [sys.executable, "-c", RUN, command, *arguments],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert run.returncode == 0, run.stdout + run.stderr
    expected = result_bytes(tmp_path / "plain")
    assert sum(f"/{command}/" in name and "/labels/" in name for name in expected) == 3
    assert result_bytes(tmp_path / "ray") == expected


@pytest.mark.slow
def test_a_worker_is_killed_and_its_images_are_done_by_another(tmp_path: Path) -> None:
    """The whole job, every stage on two workers; one of those that label the images is killed in the middle."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    plain = overrides(tmp_path / "plain", train=12, val=40, world=tmp_path)
    spread = overrides(tmp_path / "ray", train=12, val=40, world=tmp_path)
    run_plain = [sys.executable, "-c", RUN, "infer", *plain]
    assert subprocess.run(run_plain, env=ENVIRONMENT, capture_output=True, check=False).returncode == 0

    command = [sys.executable, "-c", RUN, "infer", *spread, *RAY]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        killed = 0
        while run.poll() is None and not killed:
            if len(records(tmp_path / "ray")) >= 2:
                workers = [pid for pid in _descendants(run.pid) if "MapWorker" in _title(pid)]
                if len(workers) > 1:
                    os.kill(workers[0], signal.SIGKILL)
                    killed = workers[0]
            time.sleep(0.005)
        out, err = run.communicate(timeout=500)
    assert killed, "no worker was caught alive"
    assert run.returncode == 0, out + err
    assert result_bytes(tmp_path / "ray") == result_bytes(tmp_path / "plain")


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _descendants(pid: int) -> list[int]:
    found, waiting = [], [pid]
    while waiting:
        parent = waiting.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                children = [int(child) for child in task.read_text().split()]
            except OSError:
                continue
            found += children
            waiting += children
    return found


def test_ray_that_is_not_there_and_gpus_that_are_not_given_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moduseg.pipeline.ray_engine import worker_config

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingError, match=r"runtime\.engine: got ray, which is not installed .*moduseg\[ray\]"):
        Propose.run(compose([*overrides(tmp_path), *RAY]))
    cfg = compose(["runtime.device=cpu", "runtime.ray.gpus=0"])
    assert worker_config(cfg, Device(torch.device("cpu"), "float32")).runtime.device == "cpu"
    with pytest.raises(ConfigError, match=r"ray\.gpus: got 0 with runtime\.device=cuda"):
        worker_config(cfg, Device(torch.device("cuda", 1), "bfloat16"))
