"""A thousand mutilated files thrown at every reader: each ends in our error or in a good read."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from moduseg.bank.store import Bank, read_vectors
from moduseg.config import compose
from moduseg.datasets.coco_json import read_index
from moduseg.datasets.io import (
    label_png_kind,
    read_image,
    read_index_png,
    read_label_png,
    read_size,
    write_label_png,
)  # fmt: skip
from moduseg.datasets.labels import check_ids, read_classes, read_label_file, read_list, resolve_labels
from moduseg.datasets.voc import read_voc_xml
from moduseg.errors import ModusegError
from moduseg.evaluation.counts import ImageCounts, SplitCounts
from moduseg.files import digest_of
from moduseg.pipeline.artefacts import FORMAT, Artefact
from moduseg.proposers import sa1b
from moduseg.proposers.id_maps import read_id_map
from moduseg.pseudo_masks.files import read_label_map
from moduseg.pseudo_masks.store import pack, unpack
from moduseg.structures import Proposals, ScoreMaps
from moduseg.studies.ablate import load_table
from moduseg.weights.tensors import load_state

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
st = hypothesis.strategies

MEMORY = 1 << 30
"""Bytes that a reader may take beyond what the process has."""
SECONDS = 20
EXAMPLES = int(os.environ.get("MODUSEG_MUTILATED", "40"))
"""Of each of the 29 kinds of file."""


def _picture(kind: str) -> bytes:
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 255, (24, 31, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    if kind == "jpg":
        exif = Image.Exif()
        exif[0x0112] = 6
        pixels.save(buffer, "JPEG", quality=80, exif=exif, progressive=True)
    else:
        pixels.convert("RGBA").save(buffer, "PNG")
    return buffer.getvalue()


def _ids() -> np.ndarray:
    return np.repeat(np.repeat(np.arange(12, dtype=np.uint8).reshape(3, 4), 8, 0), 8, 1)


def _proposals() -> bytes:
    masks = torch.from_numpy(_ids()) == torch.arange(12)[:, None, None]
    return sa1b.dump(sa1b.to_annotations(Proposals(masks, torch.rand(12)), "a"))


def _npz() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, instance_mask=_ids().astype(np.int32), scores=np.ones(11))
    return buffer.getvalue()


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, {"a": np.ones(2, np.float32), "b": np.zeros(2, np.float32)}, allow_pickle=True)  # type: ignore[arg-type]
    return buffer.getvalue()


def _coco() -> bytes:
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
    image = {"id": 7, "file_name": "a.jpg", "height": 24, "width": 32}
    polygon = {"id": 1, "image_id": 7, "category_id": 18, "iscrowd": 0, "segmentation": [[2, 2, 20, 3, 9, 17]]}
    crowd = {"size": [24, 32], "counts": [100, 50, 618]}
    return json.dumps(
        {
            "images": [image],
            "annotations": [polygon, {**polygon, "id": 2, "iscrowd": 1, "segmentation": crowd}],
            "categories": categories,
        }
    ).encode()


def _counts() -> bytes:
    counts = SplitCounts(3)
    counts.append("a", ImageCounts(np.arange(9, dtype=np.int64).reshape(3, 3)))
    return counts.to_bytes()


_BANK = {
    "pooled": torch.rand(4, 3),
    "labels": torch.tensor([0, 1, 2, 1]),
    "image_index": torch.tensor([0, 0, 1, 1]),
    "areas": torch.tensor([5, 6, 7, 8]),
}
_BANK_JSON = {"classes": ["background", "dog", "cat"], "image_ids": ["a", "b"], "backbone_digest": "d", "config": {}}


def _read_bank(path: Path) -> None:
    whole = Bank(**_BANK, image_ids=("a", "b"), classes=("background", "dog", "cat"), info={"backbone_digest": "d"})
    content = path.read_bytes()
    folder = path.parent / "bank"
    folder.mkdir(exist_ok=True)
    whole.save(folder)
    (folder / path.name).write_bytes(content)
    bank = Bank.load(folder)
    bank.check_fits("d", 3, ("background", "dog", "cat"))
    bank.select_vectors(True, compose([]).bank.outliers)


def _read_json_labels(path: Path) -> None:
    for image_id, raw in read_label_file(path).entries.items():
        resolve_labels(raw, ("background", "dog", "cat"), image_id, str(path))


def _read_coco(path: Path, has_own_categories: bool = False) -> None:
    index = read_index(path, has_own_categories=has_own_categories)
    check_ids(index.ids, str(path))
    for row in range(len(index.ids)):
        index.rasterise(row, ignore_crowd=True)


def _manifest() -> bytes:
    key = digest_of({"format": FORMAT})
    return json.dumps({"key": key, "status": "complete", "products": {"a": [3, "x"]}}).encode()


def _read_manifest(path: Path) -> None:
    artefact = Artefact(path.parent, "d", "s", "n", {})
    artefact.manifest_path.write_bytes(path.read_bytes())
    again = Artefact(path.parent, "d", "s", "n", {})
    again.is_intact(verify=True)


@dataclass(frozen=True)
class Kind:
    """One kind of file: its name, a whole one, what reads it."""

    name: str
    whole: Callable[[], bytes]
    read: Callable[[Path], object]


SIZE = (24, 32)
KINDS = [
    Kind("photo.jpg", lambda: _picture("jpg"), read_image),
    Kind("size.jpg", lambda: _picture("jpg"), read_size),
    Kind("photo.png", lambda: _picture("png"), read_image),
    Kind("labels.png", lambda: write_label_png(_ids()), read_label_png),
    Kind("kind.png", lambda: write_label_png(_ids()), label_png_kind),
    Kind("objects.png", lambda: write_label_png(_ids()), read_index_png),
    Kind("given.png", lambda: write_label_png(_ids()), lambda p: read_label_map(p.read_bytes(), p.name, 12)),
    Kind("ids.png", lambda: write_label_png(_ids()), lambda p: read_id_map(p, SIZE)),
    Kind("ids.npz", _npz, lambda p: read_id_map(p, SIZE)),
    Kind("masks.json", _proposals, lambda p: sa1b.read_proposals(p, SIZE)),
    Kind("free.json", _proposals, sa1b.read_proposals),
    Kind("coco.json", _coco, _read_coco),
    Kind("own.json", _coco, lambda p: _read_coco(p, has_own_categories=True)),
    Kind("labels.json", lambda: b'{"images": [{"img_id": "a/b", "labels": [1, "dog"]}]}', _read_json_labels),
    Kind("labels.csv", lambda: b"image,labels\na/b,dog;cat\nc,1 2\n", _read_json_labels),
    Kind("labels.npy", _npy, _read_json_labels),
    Kind("classes.txt", lambda: b"background\ndog\ncat\n", read_classes),
    Kind("list.txt", lambda: b"a/b\nc\nd\n", lambda p: check_ids(read_list(p), str(p))),
    Kind("objects.xml", lambda: b"<annotation><object><name>dog</name></object></annotation>", read_voc_xml),
    Kind("weights.safetensors", lambda: save(_BANK), load_state),
    Kind("vectors.safetensors", lambda: save(_BANK), lambda p: read_vectors(p, ("pooled", "labels", "areas"))),
    Kind("scores.z", lambda: pack(ScoreMaps((1, 2), torch.rand(2, 6, 7))), lambda p: unpack(p.read_bytes())),
    Kind("counts.safetensors", _counts, lambda p: SplitCounts.from_bytes(p.read_bytes(), str(p)).matrix()),
    Kind("bank.safetensors", lambda: save(_BANK), _read_bank),
    Kind("bank.json", lambda: json.dumps(_BANK_JSON).encode(), _read_bank),
    Kind("manifest.json", _manifest, _read_manifest),
]  # fmt: skip


@contextmanager
def _bounded() -> Iterator[None]:
    """A reader that hangs or takes a gigabyte is interrupted, by an error that is none of ours."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"a reader took more than {SECONDS} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _thrown(read: Callable[[], object]) -> None:
    """Read within bounds; an error of ours is one line."""
    text = ""
    with _bounded():
        try:
            read()
        except ModusegError as error:
            text = str(error)
    assert "\n" not in text
    assert len(text) < 2000


@st.composite
def mutilated(draw: Callable[..., int], whole: bytes) -> bytes:
    """A file with one to four of the wounds that disks, networks and editors inflict."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, max(len(data) - 1, 0)))
        stop = min(len(data), start + draw(st.sampled_from([1, 2, 4, 8, 64])))
        wound = draw(st.sampled_from(["cut", "flip", "noise", "insert", "drop", "repeat", "number", "word", "zeros"]))
        if wound == "cut":
            del data[start:]
        elif wound == "flip" and data:
            data[start] ^= 1 << draw(st.integers(0, 7))
        elif wound == "noise":
            data[start:stop] = draw(st.binary(min_size=stop - start, max_size=stop - start))  # type: ignore[assignment]
        elif wound == "insert":
            data[start:start] = draw(st.binary(max_size=20))  # type: ignore[assignment]
        elif wound == "drop":
            del data[start:stop]
        elif wound == "repeat":
            data[start:start] = data[start:stop] * 50
        elif wound == "number":
            digits = [i for i, byte in enumerate(data) if 48 <= byte < 58]
            if digits:
                at = digits[draw(st.integers(0, len(digits) - 1))]
                data[at : at + 1] = draw(
                    st.sampled_from([b"-1", b"99999999999", b"4294967295", b"1e400", b"0.5", b"NaN"])
                )  # type: ignore[assignment]
        elif wound == "word":
            data[start:stop] = draw(
                st.sampled_from([b"null", b"[]", b"{}", b'""', b"../", b"\xff\xfe", b"[" * 3000, b"\0"])
            )  # type: ignore[assignment]
        elif wound == "zeros":
            data[start:stop] = bytes(stop - start)
    return bytes(data)


def _settings(examples: int) -> Callable[..., object]:
    return hypothesis.settings(  # type: ignore[no-any-return]
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_a_mutilated_file_is_our_error_or_a_good_read(kind: Kind, tmp_path: Path) -> None:
    path, whole = tmp_path / kind.name, kind.whole()
    path.write_bytes(whole)
    kind.read(path)

    @_settings(EXAMPLES)
    @hypothesis.given(mutilated(whole))
    def throw(content: bytes) -> None:
        path.write_bytes(content)
        _thrown(lambda: kind.read(path))

    throw()


@pytest.mark.parametrize("name", ["runtime/default.yaml", "config.yaml", "table/top_k.yaml"])
def test_a_mutilated_yaml_is_our_error_or_a_good_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from moduseg.config import files as config_files
    from moduseg.studies import ablate

    shutil.copytree(config_files.config_dir(), tmp_path / "configs")
    for module in (config_files, ablate):
        monkeypatch.setattr(module, "config_dir", lambda: tmp_path / "configs")
    path = tmp_path / "configs" / name
    whole = path.read_bytes()

    @_settings(EXAMPLES)
    @hypothesis.given(mutilated(whole))
    def throw(content: bytes) -> None:
        path.write_bytes(content)
        _thrown(lambda: load_table("top_k") if name.startswith("table") else compose([]))

    throw()
