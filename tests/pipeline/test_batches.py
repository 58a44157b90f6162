"""The loop over images: resume, failures, damaged files."""

from __future__ import annotations

import json
import mmap
import os
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from moduseg.errors import DataError, DeviceError, IncompleteError, StorageError
from moduseg.pipeline.artefacts import Artefact
from moduseg.pipeline.batches import BatchJob, BatchRunner, Files, Outcome, Shard
from moduseg.pipeline.forward import is_out_of_memory
from moduseg.pipeline.records import Record, Records

IDS = tuple(f"im{i}" for i in range(7))


class World:
    """Records what is asked of it; images in `broken` cannot be loaded, those in `poisoned` cannot be processed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.broken, self.poisoned = folder, set[str](), set[str]()
        self.inputs = folder / "inputs"
        self.inputs.mkdir()
        for image_id in IDS:
            self.write_input(image_id, b"1")
        self.max_items = len(IDS)
        self.error: Exception | None = None
        self.worked: list[str] = []
        self.batches: list[list[str]] = []

    def load(self, image_id: str) -> str:
        if image_id in self.broken:
            raise DataError(f"{image_id}: truncated")
        return image_id

    def process(self, items: list[str]) -> list[dict[str, bytes]]:
        if self.poisoned & set(items):
            raise RuntimeError("bad\nvalues")
        if len(items) > self.max_items:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if self.error is not None:
            raise self.error
        self.batches.append(list(items))
        self.worked += items
        return [{f"out/{item}.txt": item.encode() * 3} for item in items]

    def reads(self, image_id: str) -> list[Path]:
        return [self.inputs / image_id]

    def write_input(self, image_id: str, content: bytes, mtime: int = 1_000_000_000) -> None:
        """Write the file that an image is made from, as if at that time."""
        (self.inputs / image_id).write_bytes(content)
        os.utime(self.inputs / image_id, (mtime, mtime))

    def record(self, index: int) -> Path:
        return Artefact(self.folder, "d", "s", "n", {}).path / "batches" / f"{index:06d}.json"

    def runner(
        self,
        batch_size: int = 3,
        skipped: dict[str, str] | None = None,
        shard: Shard | None = None,
        max_forward: int | None = None,
    ) -> BatchRunner[str]:
        job = BatchJob(
            IDS,
            self.load,
            self.process,
            batch_size,
            title="test",
            skipped=skipped or {},
            reads=self.reads,
            max_forward=max_forward,
        )
        return BatchRunner(Artefact(self.folder, "d", "s", "n", {}), job, shard)

    def run(self, skipped: dict[str, str] | None = None) -> Outcome:
        self.worked.clear()
        self.batches.clear()
        runner = self.runner(skipped=skipped)
        outcome = runner.run()
        runner.artefact.write_manifest(status="complete", content=outcome.content_digest)
        return outcome

    def files(self) -> dict[str, bytes]:
        folder = Artefact(self.folder, "d", "s", "n", {}).path
        return {p.name: p.read_bytes() for p in (folder / "out").iterdir()}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_everything_is_done_once(world: World) -> None:
    first = world.run()
    assert world.batches == [["im0", "im1", "im2"], ["im3", "im4", "im5"], ["im6"]]
    assert (first.processed_now, first.changed, first.failed) == (7, True, {})
    second = world.run()
    assert (second.processed_now, second.changed, world.worked) == (0, False, [])
    assert second.seconds.keys() == {"load", "work", "model", "write", "wall", "cpu"}


@pytest.mark.parametrize("damage", ["missing", "truncated", "record"])
def test_only_the_batch_with_a_damaged_file_is_done_again(world: World, damage: str) -> None:
    world.run()
    before = world.files()
    folder = Artefact(world.folder, "d", "s", "n", {}).path
    if damage == "missing":
        (folder / "out/im4.txt").unlink()
    elif damage == "truncated":
        (folder / "out/im4.txt").write_bytes(b"i")
    else:
        (folder / "batches/000001.json").write_text('{"ids": ["im3"')
    assert world.run().processed_now == 3
    assert world.worked == ["im3", "im4", "im5"]
    assert world.files() == before


def test_a_broken_image_is_recorded_and_tried_again_without_redoing_the_rest(world: World) -> None:
    world.broken = {"im1"}
    outcome = world.run()
    assert outcome.failed == {"im1": "im1: truncated"}
    assert len(world.files()) == 6
    lines = (Artefact(world.folder, "d", "s", "n", {}).path / "failures.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"id": "im1", "error": "im1: truncated"}]

    assert world.run().failed == outcome.failed
    assert world.worked == []

    world.broken = set()
    mended = world.run()
    assert (mended.failed, mended.processed_now, mended.changed) == ({}, 3, True)
    assert len(world.files()) == 7
    assert (Artefact(world.folder, "d", "s", "n", {}).path / "failures.jsonl").read_text() == ""


def test_an_image_that_breaks_later_loses_its_files(world: World) -> None:
    world.run()
    world.broken = {"im4"}
    world.write_input("im4", b"")
    assert world.run().failed == {"im4": "im4: truncated"}
    assert sorted(world.files()) == [f"im{i}.txt" for i in (0, 1, 2, 3, 5, 6)]


@pytest.mark.parametrize("size", [1, 2, 4, 7, 100])
@pytest.mark.parametrize("done", [
    pytest.param([0, 1, 2], id="all is done"),
    pytest.param([0], id="the first batch is done"),
    pytest.param([2], id="the last batch is done"),
])  # fmt: skip
def test_another_batch_size_throws_nothing_away(world: World, size: int, done: list[int]) -> None:
    """A folder keeps the size that it was begun with."""
    finished = [image_id for batch in done for image_id in world.runner(3).batches[batch]]
    assert len(dict(world.runner(3).process_batches(done))) == len(done)
    world.worked.clear()
    world.runner(size).run()
    assert sorted(world.worked) == sorted(set(IDS) - set(finished))
    assert len(world.files()) == len(IDS)


def test_a_damaged_record_does_not_tell_the_batch_size(world: World) -> None:
    world.run()
    world.record(0).write_text('{"ids": ["im0"')
    world.record(1).write_text('{"ids": ["im1", "im0"]}')
    assert world.runner(2).batches == [["im0", "im1", "im2"], ["im3", "im4", "im5"], ["im6"]]


@pytest.mark.parametrize(("content", "mtime", "verify", "num_again"), [
    pytest.param(b"22", 1_000_000_000, False, 1, id="another size"),
    pytest.param(b"2", 1_000_000_001, False, 1, id="the same size, later"),
    pytest.param(b"1", 1_000_000_001, False, 0, id="a copy, later"),
    pytest.param(b"2", 1_000_000_000, False, 0, id="the same size and time"),
    pytest.param(b"2", 1_000_000_000, True, 1, id="the same size and time, verified"),
    pytest.param(None, 0, False, 1, id="gone"),
])  # fmt: skip
def test_a_changed_input_redoes_its_batch_alone(
    world: World, content: bytes | None, mtime: int, verify: bool, num_again: int
) -> None:
    world.run()
    world.worked.clear()
    if content is None:
        (world.inputs / "im6").unlink()
    else:
        world.write_input("im6", content, mtime)
    assert world.runner(shard=Shard(verify=verify)).run_shard() == num_again
    assert world.worked == ["im6"] * num_again
    assert world.runner(shard=Shard(verify=verify)).run_shard() == 0


@pytest.mark.parametrize(("content", "num_again"), [
    pytest.param(b"2", 0, id="the same size"),
    pytest.param(b"22", 1, id="another size"),
])  # fmt: skip
def test_a_record_of_sizes_alone_is_believed(world: World, content: bytes, num_again: int) -> None:
    """Earlier versions recorded nothing else."""
    world.run()
    record = json.loads(world.record(2).read_text())
    record["stamps"] = [[size for size, _, _ in stamps] for stamps in record["stamps"]]
    assert record["stamps"] == [[1]]
    world.record(2).write_text(json.dumps(record))
    world.write_input("im6", content, 1_000_000_001)
    assert world.runner().run_shard() == num_again


def test_a_poisoned_image_costs_only_itself(world: World) -> None:
    world.poisoned = {"im4"}
    outcome = world.run()
    assert outcome.failed == {"im4": "RuntimeError: bad values"}
    assert sorted(world.files()) == [f"im{i}.txt" for i in (0, 1, 2, 3, 5, 6)]


def test_a_forward_batch_is_part_of_a_batch(world: World) -> None:
    assert world.runner(max_forward=2).run().processed_now == 7
    assert world.batches == [["im0", "im1"], ["im2"], ["im3", "im4"], ["im5"], ["im6"]]
    assert len(list(world.record(0).parent.iterdir())) == 3


@pytest.mark.parametrize(("max_items", "batches"), [
    pytest.param(2, [["im0", "im1"], ["im2", "im3"], ["im4", "im5"], ["im6"]], id="half of it fits"),
    pytest.param(1, [[image_id] for image_id in IDS], id="one image fits"),
])  # fmt: skip
def test_out_of_memory_halves_the_forward_batch(
    world: World, caplog: pytest.LogCaptureFixture, max_items: int, batches: list[list[str]]
) -> None:
    world.max_items = max_items
    outcome = world.runner(4).run()
    assert (outcome.failed, outcome.processed_now) == ({}, 7)
    assert world.batches == batches
    assert "test: no memory for 4 images at once; going on with 2" in caplog.text


ALLOCATIONS = [
    pytest.param(lambda: bytearray(1 << 60), id="Python"),
    pytest.param(lambda: np.empty(1 << 50), id="numpy"),
    pytest.param(lambda: torch.empty(1 << 50), id="torch"),
    pytest.param(lambda: cv2.resize(np.zeros((1, 1), np.uint8), (32_000, 1 << 30)), id="OpenCV"),
    pytest.param(lambda: mmap.mmap(-1, 1 << 60), id="system"),
]
"""Allocations that no machine can make."""


@pytest.mark.parametrize("step", ["load", "process", "encode"])
@pytest.mark.parametrize("allocate", ALLOCATIONS)
def test_an_image_without_memory_costs_only_itself(world: World, allocate: Callable[[], object], step: str) -> None:
    load, process = world.load, world.process

    def fail_to_load(image_id: str) -> str:
        if step == "load" and image_id == "im4":
            allocate()
        return load(image_id)

    def fail_to_process(items: list[str]) -> list[dict[str, Any]]:
        if step == "process" and "im4" in items:
            allocate()
        files: list[dict[str, Any]] = [*process(items)]
        for item, content in zip(items, files, strict=True):
            if step == "encode" and item == "im4":
                content["out/im4.txt"] = allocate
        return files

    world.load, world.process = fail_to_load, fail_to_process  # type: ignore[method-assign]
    assert list(world.run().failed) == ["im4"]
    assert len(world.files()) == 6
    if step == "process":
        # The batches after it are as large as before.
        assert world.batches == [["im0", "im1", "im2"], ["im3"], ["im5"], ["im6"]]


def test_other_errors_are_no_lack_of_memory() -> None:
    with pytest.raises(cv2.error) as raised:
        cv2.resize(np.zeros((0, 1), np.uint8), (1, 1))
    assert not is_out_of_memory(raised.value)
    assert not is_out_of_memory(OSError(2, "No such file"))


LOST = "CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize(("error", "message"), [
    pytest.param(RuntimeError(LOST), "test: the device is lost (RuntimeError: CUDA error: an illegal", id="lost"),
    pytest.param(RuntimeError("odd"), "test: 3 images in a row failed, the last one im5: RuntimeError: odd;", id="odd"),
    pytest.param(MemoryError(), "test: 3 images in a row failed, the last one im5: MemoryError: no mess", id="memory"),
])  # fmt: skip
def test_a_lost_device_ends_the_run_and_keeps_what_is_done(world: World, error: Exception, message: str) -> None:
    """Recorded as failures of all other images, it would leave a bank of the few before."""
    process = world.process

    def lose_device(items: list[str]) -> list[dict[str, bytes]]:
        if "im3" in items:
            world.error = error
        return process(items)

    world.process = lose_device  # type: ignore[method-assign]
    with pytest.raises(DeviceError, match=re.escape(message)) as raised:
        world.run()
    assert "\n" not in str(raised.value)
    assert sorted(world.files()) == ["im0.txt", "im1.txt", "im2.txt"]
    world.process, world.error = process, None  # type: ignore[method-assign]
    outcome = world.run()
    assert (outcome.processed_now, outcome.failed) == (4, {})


def test_errors_of_images_may_follow_each_other(world: World) -> None:
    world.error = DataError("too thin")
    with pytest.raises(DataError, match="none of 7 images could be processed; first im0: too thin"):
        world.run()


def test_images_an_earlier_stage_lost_are_left_out_until_it_has_them(world: World) -> None:
    assert world.run({"im6": "propose failed: truncated"}).failed == {"im6": "left out: propose failed: truncated"}
    assert world.run().failed == {}


def test_a_full_disk_ends_the_run_and_keeps_what_is_done(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "im4" in self.name:
            raise OSError(28, "No space left on device")
        return original(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match="No space left"):
        world.run()
    monkeypatch.undo()
    assert world.run().processed_now == 4
    assert world.batches == [["im3", "im4", "im5"], ["im6"]]


def test_digests_find_what_sizes_do_not(world: World) -> None:
    world.run()
    before = world.files()
    artefact = Artefact(world.folder, "d", "s", "n", {})
    artefact.file("out/im4.txt").write_bytes(b"x" * len(before["im4.txt"]))
    assert world.run().processed_now == 0
    assert world.runner(shard=Shard(verify=True)).run().processed_now == 3
    assert world.files() == before


def test_files_are_encoded_while_the_next_images_are_processed(tmp_path: Path) -> None:
    """The first batch's file is encoded only once the second batch has been processed, in another thread."""
    is_second_processed, threads = threading.Event(), set[str]()

    def encode(image_id: str) -> bytes:
        threads.add(threading.current_thread().name)
        assert is_second_processed.wait(10)
        return image_id.encode()

    def process(items: list[str]) -> list[Files]:
        if items == ["b"]:
            is_second_processed.set()
        return [{f"out/{item}.txt": partial(encode, item)} for item in items]

    artefact = Artefact(tmp_path, "d", "s", "n", {})
    assert BatchRunner(artefact, BatchJob("ab", str, process, 1)).run().failed == {}
    assert [(artefact.path / f"out/{name}.txt").read_bytes() for name in "ab"] == [b"a", b"b"]
    assert threading.current_thread().name not in threads


def test_no_more_than_three_batches_wait_for_their_files(tmp_path: Path) -> None:
    """What is not encoded yet is bounded: two batches and the one that was just processed."""
    lock, waiting, largest = threading.Lock(), [0], [0]

    def encode() -> bytes:
        time.sleep(0.01)
        with lock:
            waiting[0] -= 1
        return b"x"

    def process(items: list[str]) -> list[Files]:
        with lock:
            waiting[0] += 1
            largest[0] = max(largest[0], waiting[0])
        return [{f"out/{items[0]}.txt": encode}]

    BatchRunner(Artefact(tmp_path, "d", "s", "n", {}), BatchJob("abcdefgh", str, process, 1)).run()
    assert 1 < largest[0] <= 3


def test_an_image_whose_files_cannot_be_encoded_costs_only_itself(world: World) -> None:
    def refuse() -> bytes:
        raise ValueError("not finite")

    def process(items: list[str]) -> list[Files]:
        return [{f"out/{i}.txt": refuse if i == "im4" else b"x", f"out/{i}.json": b"y"} for i in items]

    artefact = Artefact(world.folder, "d", "s", "n", {})
    outcome = BatchRunner(artefact, BatchJob(IDS, str, process, 3)).run()
    assert (outcome.failed, outcome.processed_now) == ({"im4": "ValueError: not finite"}, 6)
    assert sorted(p.name for p in artefact.path.glob("out/*4*")) == []


@pytest.mark.parametrize("workers", [1, 4])
def test_images_are_loaded_ahead_and_files_written_behind_in_order(world: World, workers: int) -> None:
    """Batches of one image: several are loaded at once, and still each is worked on in its turn."""
    artefact = Artefact(world.folder, "d", "s", "n", {})
    barrier, inside, most = threading.Lock(), [0], [0]

    def load(image_id: str) -> str:
        with barrier:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        with barrier:
            inside[0] -= 1
        return image_id

    runner = BatchRunner(artefact, BatchJob(IDS, load, world.process, 1), Shard(workers=workers))
    assert [index for index, _ in runner.process_batches(range(7))] == list(range(7))
    assert world.worked == list(IDS)
    assert most[0] == workers if workers == 1 else most[0] > 1
    outcome = runner.collect()
    assert outcome.seconds["load"] >= 7 * 0.02
    assert outcome.seconds["wall"] >= outcome.seconds["work"] >= outcome.seconds["model"] == 0


def test_shards_do_their_own_batches_and_say_who_is_missing(world: World) -> None:
    def shard(index: int) -> BatchRunner[str]:
        return world.runner(2, shard=Shard(index, 3))

    assert shard(1).run_shard() == 2
    assert world.worked == ["im2", "im3"]
    with pytest.raises(IncompleteError, match=r"s: shard 1 of 3 is done; 5 of 7 images are missing, of shards 0, 2;"):
        shard(1).collect()
    assert [shard(index).run_shard() for index in (0, 1, 2)] == [3, 0, 2]
    assert shard(2).collect(2).processed_now == 2
    assert len(world.files()) == 7


def test_a_waiting_shard_reads_no_record_twice(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.runner(1, shard=Shard(1, 2)).run_shard()
    waiting = world.runner(1, shard=Shard(1, 2, wait=0.6))
    reads = list[int]()
    read = Records.read

    def count(self: Records, index: int) -> Record | None:
        reads.append(index)
        return read(self, index)

    monkeypatch.setattr(Records, "read", count)
    assert waiting.run_shard() == 0
    with pytest.raises(IncompleteError, match=r"4 of 7 images are missing, of shard 0"):
        waiting.collect()
    # The shard's own three, batch 0 at each look, and every batch that is missing once for the message.
    assert sorted(index for index in reads if index) == [1, 2, 3, 4, 5, 6]
    assert 3 <= reads.count(0) <= 7


def test_nothing_but_failures_is_an_error(world: World) -> None:
    world.broken = set(IDS)
    with pytest.raises(DataError, match="none of 7 images could be processed; first im0: im0: truncated"):
        world.run()
