"""The training loop: killed and resumed, in two processes, with numbers that are none."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moduseg.devices import Device
from moduseg.errors import ArtefactError, ConfigError, TrainingError
from moduseg.training import loop
from moduseg.training.books import CHECKPOINT, CURVE, LOG, MEASURES, TableLog, read_table
from moduseg.training.data import BatchDraw
from moduseg.training.loop import Extras, build_optimiser, fit
from moduseg.training.options import TrainingOptions
from tests.support.processes import context, run_two_ranks
from tests.support.tiny_training import (
    Points,
    compute_loss,
    digest_weights,
    make_network,
    train,
    train_as_rank,
    train_in_process,
    without_batch_statistics,
)

CPU = Device(torch.device("cpu"))


def test_a_training_learns_and_writes_its_books(tmp_path: Path, device: torch.device) -> None:
    model, result = train(tmp_path, device, steps=200)
    rows, measures = read_table(tmp_path / LOG), read_table(tmp_path / MEASURES)
    assert result.measures["accuracy"] == pytest.approx(measures[-1]["accuracy"], abs=1e-5)
    assert result.measures["accuracy"] > 0.9
    assert [row["step"] for row in rows] == [*range(0, 200, 10), 199]
    assert [row["step"] for row in measures] == list(range(20, 201, 20))
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"]
    assert rows[0]["learning_rate"] == pytest.approx(0.01 / 5)
    assert (tmp_path / CURVE).read_bytes().startswith(b"\x89PNG")
    assert not model.training


def test_a_finished_training_is_read(tmp_path: Path) -> None:
    first, result = train(tmp_path)
    written = (tmp_path / CHECKPOINT).stat().st_mtime_ns
    second, again = train(tmp_path)
    assert digest_weights(first) == digest_weights(second)
    assert again == result
    assert (tmp_path / CHECKPOINT).stat().st_mtime_ns == written


def test_killed_at_ten_moments_ends_with_the_same_bits(tmp_path: Path) -> None:
    options = {"steps": 400, "save_minutes": 0, "workers": 2}
    expected = digest_weights(train(tmp_path / "whole", **options)[0])
    folder = tmp_path / "killed"
    draws = torch.rand(10, generator=torch.Generator().manual_seed(5)).tolist()
    folder.mkdir()
    num_killed = 0
    for share in draws:
        process = context().Process(target=train_in_process, args=(str(folder), options))
        process.start()
        # Each life makes some steps of its own, then dies anywhere: in a step, in a file, in between.
        before = _modified(folder / CHECKPOINT)
        deadline = time.monotonic() + 60
        while process.is_alive() and _modified(folder / CHECKPOINT) == before and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.08 * share)
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            num_killed += 1
        process.join()
    assert num_killed == 10
    assert not (folder / "digest.txt").exists()
    model, _ = train(folder, **options)
    assert digest_weights(model) == expected
    assert not list(folder.rglob("*.tmp"))
    for name in (LOG, MEASURES):
        rows, undisturbed = read_table(folder / name), read_table(tmp_path / "whole" / name)
        assert [_without_time(row) for row in rows] == [_without_time(row) for row in undisturbed]


def _modified(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def _without_time(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "seconds"}


@pytest.mark.parametrize(
    ("optimiser", "accumulation"),
    [pytest.param("adamw", 1, id="adamw"), pytest.param("sgd", 2, id="sgd, two passes each")],
)
def test_two_processes_equal_one(tmp_path: Path, optimiser: str, accumulation: int) -> None:
    options: dict[str, Any] = {"steps": 30, "batch": 8, "warmup": 3, "optimiser": optimiser, "learning_rate": 0.01}
    alone = without_batch_statistics()
    fit(alone, compute_loss, Points(), TrainingOptions(**options), tmp_path / "alone", device=CPU)
    options["accumulation"] = accumulation
    shared = tmp_path / "shared"
    shared.mkdir()
    arguments = (2, str(shared), str(tmp_path / "store"), options)
    processes = [context().Process(target=train_as_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    weights = [torch.load(shared / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, tensor in alone.state_dict().items():
        assert torch.equal(weights[0][name], weights[1][name])
        torch.testing.assert_close(weights[0][name], tensor, rtol=0, atol=1e-5)


def test_torchrun_starts_a_training(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom tests.support.tiny_training import digest_weights, train\n"
        "import os\nmodel, _ = train(Path(sys.argv[1]), steps=10)\n"
        "(Path(sys.argv[1]) / f'{os.environ[\"RANK\"]}.txt').write_text(digest_weights(model))\n"
    )
    run_two_ranks(script, [str(tmp_path)], tmp_path / "output.txt")
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text()
    assert [row["step"] for row in read_table(tmp_path / LOG)] == [0, 9]


def test_torchrun_starts_trainings_one_after_the_other(tmp_path: Path) -> None:
    """As a generator that is fitted and a student that learns its masks."""
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom tests.support.tiny_training import train\n"
        "for name in ('first', 'second', 'third'):\n    train(Path(sys.argv[1]) / name, steps=3)\n"
    )
    for name in ("first", "second", "third"):
        (tmp_path / name).mkdir()
    run_two_ranks(script, [str(tmp_path)], tmp_path / "output.txt")
    digests = {digest_weights(train(tmp_path / name, steps=3)[0]) for name in ("first", "second", "third")}
    assert len(digests) == 1


def test_processes_without_torchrun_share_one_address(tmp_path: Path) -> None:
    """Another launcher names address and port alone: stages and training meet there, served by rank 0."""
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom moduseg.pipeline.peers import Peers\n"
        "from tests.support.tiny_training import digest_weights, train\n"
        "peers, folder = Peers(), Path(sys.argv[1])\n"
        "peers.run_then_merge('before', lambda: 1, str)\n"
        "digest = digest_weights(train(folder, steps=3)[0])\n"
        "peers.run_then_merge('after', lambda: 1, str)\n"
        "(folder / f'{peers.rank}.txt').write_text(digest)\n"
        # The store ends with rank 0.
        "while not (folder / '1.txt').exists():\n    time.sleep(0.05)\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}) for rank in range(2)]
    try:
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text()


def test_nothing_holds_the_group_when_it_ends(tmp_path: Path) -> None:
    """A reducer of gradients that outlived it would end its threads under Python's lock, and might wait for ever."""
    script = tmp_path / "run.py"
    script.write_text(
        "import gc, os, sys\nfrom pathlib import Path\nfrom torch import distributed\n"
        "from torch.nn.parallel import DistributedDataParallel\nfrom tests.support.tiny_training import train\n"
        "end = distributed.destroy_process_group\n"
        "def watch():\n"
        "    left = sum(isinstance(value, DistributedDataParallel) for value in gc.get_objects())\n"
        "    (Path(sys.argv[1]) / f'{os.environ[\"RANK\"]}.txt').write_text(str(left))\n"
        "    end()\n"
        "distributed.destroy_process_group = watch\n"
        "train(Path(sys.argv[1]), steps=3)\n"
    )
    run_two_ranks(script, [str(tmp_path)], tmp_path / "output.txt")
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["0", "0"]


@pytest.mark.parametrize("workers", [0, 2])
def test_not_a_number_names_the_batch(tmp_path: Path, workers: int, device: torch.device) -> None:
    options = TrainingOptions(steps=60, batch=5, warmup=5, workers=workers)
    with pytest.raises(TrainingError, match=r"step \d: got loss nan .*point-7\b.*expected finite numbers") as caught:
        fit(make_network(), compute_loss, Points(broken=7), options, tmp_path, device=Device(device))
    assert str(caught.value).count("point-") == 5
    assert not (tmp_path / CHECKPOINT).exists()


def test_the_loss_is_waited_for_on_the_device_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is `runtime.device=cuda:1` perhaps, while the process's current device is the first one."""
    waited: list[Any] = []

    class Event:
        def record(self, stream: Any = None) -> None:
            waited.append(stream)

        def synchronize(self) -> None:
            waited.append("done")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    watch = loop._Watch(Points(), torch.device("cuda", 1))
    watch.add([], torch.tensor(1.0), torch.tensor(2.0))
    watch.check()
    assert waited == ["stream of cuda:1", "done"]


def test_a_gradient_of_another_process_is_not_laid_to_these_items() -> None:
    watch = loop._Watch(Points(), CPU.torch_device, num_ranks=3)
    draw = BatchDraw(4, 0.5, (7, 8), (0, 1))
    with pytest.raises(TrainingError, match=r"step 4: .* on point-7, point-8, or on those of 2 other processes"):
        watch.add([draw], torch.tensor(1.0), torch.tensor(float("nan")))


def test_gradient_that_is_not_a_number_ends_the_training(tmp_path: Path) -> None:
    def loss_with_a_pole(model: Any, batch: Any) -> dict[str, torch.Tensor]:
        return {"loss": (model(batch["points"]) * 0).sum().sqrt()}

    with pytest.raises(TrainingError, match="got loss 0 and a gradient of length nan"):
        fit(make_network(), loss_with_a_pole, Points(), TrainingOptions(steps=5), tmp_path, device=CPU)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param({"steps": 10}, {"steps": 20}, id="length"),
        pytest.param({"steps": 10}, {"steps": 10, "learning_rate": 0.1}, id="learning rate"),
    ],
)
def test_checkpoint_of_other_settings_is_refused(tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> None:
    train(tmp_path, **first)
    with pytest.raises(ArtefactError, match="got the checkpoint of a training with other settings"):
        train(tmp_path, **second)


def test_resumed_optimiser_counts_its_steps_on_the_host(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the host would wait for the count of each parameter at each step; a CPU cannot show it."""
    optimisers: list[torch.optim.Optimizer] = []

    def build(*arguments: Any) -> torch.optim.Optimizer:
        optimisers.append(build_optimiser(*arguments))
        return optimisers[-1]

    def die(_: Any) -> dict[str, float]:
        raise LookupError("killed")

    monkeypatch.setattr(loop, "build_optimiser", build)
    options = TrainingOptions(steps=10, batch=8, save_minutes=0, measure_every=5)
    with pytest.raises(LookupError):
        fit(
            make_network(), compute_loss, Points(), options, tmp_path, device=Device(device), extras=Extras(measure=die)
        )
    fit(make_network(), compute_loss, Points(), options, tmp_path, device=Device(device))
    counts = [entry["step"] for entry in optimisers[-1].state.values()]
    assert {int(count) for count in counts} == {10}
    assert {count.device.type for count in counts} == {"cpu"}


def test_a_resumed_log_keeps_its_text(tmp_path: Path) -> None:
    first = TableLog(tmp_path / LOG, 0, True)
    for step in range(0, 40, 10):
        first.write({"step": step, "loss": 100.0, "learning_rate": 1e-5})
    written = (tmp_path / LOG).read_text().splitlines(keepends=True)
    (tmp_path / LOG).write_text("".join(written) + "40,1")
    again = TableLog(tmp_path / LOG, 30, True)
    assert (tmp_path / LOG).read_text() == "".join(written[:-1])
    again.write({"step": 30, "loss": 100.0, "learning_rate": 1e-5})
    assert (tmp_path / LOG).read_text() == "".join(written)


def test_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    train(tmp_path, steps=10)
    (tmp_path / CHECKPOINT).write_bytes((tmp_path / CHECKPOINT).read_bytes()[:500])
    with pytest.raises(ArtefactError, match=r"not readable .*remove the folder"):
        train(tmp_path, steps=10)


def test_passes_of_a_batch_add_up(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 20, "batch": 12, "warmup": 2}
    models = []
    for accumulation in (1, 3):
        model = without_batch_statistics()
        settings = TrainingOptions(**options, accumulation=accumulation)
        fit(model, compute_loss, Points(), settings, tmp_path / str(accumulation), device=CPU)
        models.append(model.state_dict())
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, rtol=0, atol=1e-5)


def test_caller_keeps_the_random_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    train(tmp_path, steps=3)
    assert torch.equal(torch.rand(3), expected)


def test_frozen_weights_stay(tmp_path: Path) -> None:
    model = make_network()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    first = model[0]
    assert isinstance(first, nn.Linear)
    first.requires_grad_(False)
    fit(model, compute_loss, Points(), TrainingOptions(steps=5, batch=8), tmp_path, device=CPU)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, before[name]) == name.startswith("0.")


def test_groups_of_the_optimiser() -> None:
    extras = Extras(rate_factors={"4": 10.0}, undecayed=("0",))
    groups = build_optimiser(make_network(), TrainingOptions(weight_decay=0.1), extras).param_groups
    found = {(each["weight_decay"], each["factor"]): [tuple(p.shape) for p in each["params"]] for each in groups}
    assert found == {(0.0, 1.0): [(32, 2), (32,), (32,), (32,)], (0.1, 10.0): [(2, 32)], (0.0, 10.0): [(2,)]}


def test_averaged_weights_are_the_result(tmp_path: Path) -> None:
    models = {ema: train(tmp_path / str(ema), steps=30, ema=ema)[0].state_dict() for ema in (None, 0.9)}
    state = torch.load(tmp_path / "0.9" / CHECKPOINT, weights_only=True)
    for name, tensor in state["average"].items():
        assert torch.equal(models[0.9][name], tensor)
        # The average follows the training, and changes nothing about it.
        assert torch.equal(models[None][name], state["model"][name])
    assert not torch.equal(models[0.9]["0.weight"], models[None]["0.weight"])


def test_lower_precision_of_the_processor(tmp_path: Path) -> None:
    model, result = train(tmp_path, precision="bfloat16")
    assert next(model.parameters()).dtype == torch.float32
    assert result.measures["accuracy"] > 0.5


def test_switches_for_tf32_hold_in_both_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    depth, seen = [0], list[int]()

    @contextmanager
    def hold(_: Device) -> Iterator[None]:
        depth[0] += 1
        yield
        depth[0] -= 1

    def watched_loss(model: Any, batch: Any) -> dict[str, torch.Tensor]:
        logits = model(batch["points"])
        seen.append(depth[0])
        logits.register_hook(lambda _: seen.append(depth[0]))
        return {"loss": logits.square().mean()}

    monkeypatch.setattr(Device, "hold_tf32", hold)
    fit(make_network(), watched_loss, Points(), TrainingOptions(steps=2, batch=8), tmp_path, device=CPU)
    assert seen == [1, 1, 1, 1]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_of_a_graphics_card(tmp_path: Path, precision: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device present")
    _, result = train(tmp_path, torch.device("cuda"), precision=precision, steps=200)
    assert result.measures["accuracy"] > 0.9


def test_float16_is_refused_on_the_processor(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.precision: got float16 on cpu, .*try bfloat16"):
        train(tmp_path, precision="float16")


def test_model_without_trainable_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all frozen"):
        fit(make_network().requires_grad_(False), compute_loss, Points(), TrainingOptions(), tmp_path, device=CPU)


def test_tensorboard_is_an_extra(tmp_path: Path) -> None:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        with pytest.raises(ConfigError, match=r"training\.tensorboard: .*pip install"):
            train(tmp_path, tensorboard=True)
        return
    train(tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert math.isfinite(events.Scalars("loss")[-1].value)
