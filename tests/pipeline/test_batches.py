"""The loop over images: resume, failures, damaged files."""

from __future__ import annotations

import json
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from moduseg.errors import DataError, IncompleteError, StorageError
from moduseg.pipeline.artefacts import Artefact
from moduseg.pipeline.batches import BatchJob, BatchRunner, Files, Outcome, Shard

IDS = tuple(f"im{i}" for i in range(7))


class World:
    """Records what is asked of it; images in `broken` cannot be loaded, those in `poisoned` cannot be processed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.broken, self.poisoned = folder, set[str](), set[str]()
        self.sizes: dict[str, int] = {}
        self.worked: list[str] = []
        self.batches: list[list[str]] = []

    def load(self, image_id: str) -> str:
        if image_id in self.broken:
            raise DataError(f"{image_id}: truncated")
        return image_id

    def process(self, items: list[str]) -> list[dict[str, bytes]]:
        if self.poisoned & set(items):
            raise RuntimeError("bad\nvalues")
        self.batches.append(list(items))
        self.worked += items
        return [{f"out/{item}.txt": item.encode() * 3} for item in items]

    def input_sizes(self, image_id: str) -> list[int]:
        return [self.sizes.get(image_id, 1)]

    def runner(
        self, batch_size: int = 3, skipped: dict[str, str] | None = None, shard: Shard | None = None
    ) -> BatchRunner[str]:
        job = BatchJob(
            IDS,
            self.load,
            self.process,
            batch_size,
            title="test",
            skipped=skipped or {},
            input_sizes=self.input_sizes,
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
    assert second.seconds.keys() == {"load", "work", "model", "write", "wall"}


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
    world.broken, world.sizes = {"im4"}, {"im4": 0}
    assert world.run().failed == {"im4": "im4: truncated"}
    assert sorted(world.files()) == [f"im{i}.txt" for i in (0, 1, 2, 3, 5, 6)]


def test_another_batch_size_loses_nothing(world: World) -> None:
    world.run()
    before = world.files()
    for size in (4, 2, 3):
        world.runner(size).run()
        assert world.files() == before


def test_a_changed_input_redoes_its_batch_alone(world: World) -> None:
    world.run()
    world.sizes["im6"] = 2
    assert world.run().processed_now == 1
    assert world.worked == ["im6"]
    assert world.run().processed_now == 0


def test_a_poisoned_image_costs_only_itself(world: World) -> None:
    world.poisoned = {"im4"}
    outcome = world.run()
    assert outcome.failed == {"im4": "RuntimeError: bad values"}
    assert sorted(world.files()) == [f"im{i}.txt" for i in (0, 1, 2, 3, 5, 6)]


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


def test_nothing_but_failures_is_an_error(world: World) -> None:
    world.broken = set(IDS)
    with pytest.raises(DataError, match="none of 7 images could be processed; first im0: im0: truncated"):
        world.run()
