"""A pickle is a program; these are programs that must not run."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moduseg.datasets import npy_labels
from moduseg.datasets.labels import read_label_file
from moduseg.datasets.npy_labels import read_npy_labels
from moduseg.errors import DataError


def _one_hot(*ids: int, size: int = 20, dtype: Any = np.float32) -> np.ndarray:
    vector = np.zeros(size, dtype=dtype)
    vector[[i - 1 for i in ids]] = 1
    return vector


LABELS = {"2007_000032": (1, 15), "2007_000039": (), "2008_000001": (20,)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8, np.bool_, ">f4"])
def test_numpy_saved_dictionary(tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "cls_labels.npy"
    np.save(path, {id: _one_hot(*ids, dtype=dtype) for id, ids in LABELS.items()}, allow_pickle=True)  # type: ignore[arg-type]
    assert read_npy_labels(path) == (LABELS, 20)
    file = read_label_file(path)
    assert (file.source, file.classes, file.entries["2007_000032"]) == ("npy", 20, (1, 15))


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_every_protocol(tmp_path: Path, protocol: int) -> None:
    content = {
        "a": _one_hot(3),
        np.str_("b"): np.asfortranarray(_one_hot(4)),
        7: [0.0] * 19 + [1.0],
        np.int64(8): _one_hot(5, 6),
    }
    (tmp_path / "l.npy").write_bytes(pickle.dumps(content, protocol=protocol))
    assert read_npy_labels(tmp_path / "l.npy")[0] == {"a": (3,), "b": (4,), "7": (20,), "8": (5, 6)}


def test_arrays_written_by_numpy_1_and_by_python_2(tmp_path: Path) -> None:
    """NumPy 1 named another module, and Python 2 wrote bytes as its `str`."""
    data = pickle.dumps({"a": _one_hot(3)}, protocol=2)
    old = data.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")
    assert b"cnumpy.core.multiarray" in old
    (tmp_path / "a.npy").write_bytes(old)
    assert read_npy_labels(tmp_path / "a.npy")[0] == {"a": (3,)}
    array = _one_hot(3).tobytes()
    text = (
        b"\x80\x02}U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x14\x85"
        b"cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + struct.pack("<I", len(array)) + array + b"tbs."
    )
    (tmp_path / "b.npy").write_bytes(text)
    assert read_npy_labels(tmp_path / "b.npy")[0] == {"a": (3,)}


class _Runs:
    """Unpickling it calls `function(*arguments)`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, Any]:
        return self.call


def _attacks(trace: Path) -> dict[str, bytes]:
    touch = f"open({str(trace)!r}, 'w')"
    in_array = io.BytesIO()
    np.save(in_array, np.array({"a": _Runs(exec, touch)}, dtype=object), allow_pickle=True)
    return {
        "system": pickle.dumps(_Runs(os.system, f"touch {trace}")),
        "eval": pickle.dumps({"a": _Runs(eval, touch)}),
        "inside an array": in_array.getvalue(),
        "protocol 0": f"cos\nsystem\n(S'touch {trace}'\ntR.".encode(),
        "INST": f"(S'touch {trace}'\nios\nsystem\n.".encode(),
        "OBJ": f"(cos\nsystem\nS'touch {trace}'\no.".encode(),
        "getattr": pickle.dumps(_Runs(getattr, "text", "upper")),
        "numpy's own loader": pickle.dumps(_Runs(np.load, str(trace))),
        "numpy's exec": b"cnumpy.testing._private.utils\nrunstring\n(S'1'\n}tR.",
        "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.tofile\x93.",
        "a persistent reference": b"Pother\n.",
        "an extension": b"\x80\x02\x82\x01.",
        "attributes of what may be called": b"\x80\x02cnumpy\nndarray\n}U\x05_makeK\x01sb.",
        "slots of what may be called": b"\x80\x02cnumpy\nndarray\nN}U\x05_makeK\x01s\x86b.",
        "another encoding": b"c_codecs\nencode\n(Vabc\nVrot13\ntR.",
    }


@pytest.mark.parametrize("name", sorted(_attacks(Path("x"))))
def test_nothing_runs(tmp_path: Path, name: str) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "cls_labels.npy"
    path.write_bytes(_attacks(trace)[name])
    with pytest.raises(DataError, match=r"cls_labels\.npy") as caught:
        read_npy_labels(path)
    assert not trace.exists()
    assert "\n" not in str(caught.value)
    # It does what it says where nobody minds: reading the harmless file still works afterwards.
    np.save(path, {"a": _one_hot(1)}, allow_pickle=True)  # type: ignore[arg-type]
    assert read_npy_labels(path)[0] == {"a": (1,)}


def test_the_attacks_would_work_on_an_ordinary_reader(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    pickle.loads(_attacks(trace)["system"])
    assert trace.exists()


class _Crafted:
    """Pickled as an array with a state made by hand: what a damaged or crafted file may hold."""

    def __init__(self, *state: Any) -> None:
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), self.state


def _array(*state: Any) -> bytes:
    return pickle.dumps({"a": _Crafted(*state)})


F4 = np.dtype("f4")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "EOFError|Ran out of input"),
        (b"\x93NUMPY\x01\x00", "refused"),
        (b"\x93NUMPY\x09\x00v\x00{}", "refused"),
        (pickle.dumps([1, 2]), "got list"),
        (pickle.dumps({}), "no entry"),
        (pickle.dumps({"a": [0, 1], "b": [0]}), "vectors of 1 to 2 entries"),
        (pickle.dumps({"a": [0, 2]}), "no vector of zeros and ones"),
        (pickle.dumps({"a": "dog"}), "no vector of zeros and ones"),
        (pickle.dumps({"a": [[0, 1]]}), "no vector of zeros and ones"),
        (pickle.dumps({"a": np.array([np.nan, 1])}), "no vector of zeros and ones"),
        (pickle.dumps({1.5: [0, 1]}), "a key of type float"),
        (pickle.dumps({"a": np.array(["x"], dtype=object)}), "the data type 'O8'|malformed array"),
        (pickle.dumps({"a": np.zeros(2, dtype=[("x", "f4")])}), "the data type 'V4'"),
        (_array(1, (10**9, 10**9), F4, False, b"1234"), "4 bytes for an array"),
        (_array(1, (-1,), F4, False, b""), "malformed array"),
        (_array(1, (1,), F4, False, b"12345678"), "8 bytes for an array"),
        (_array(1, (1,), F4, False, [1]), "malformed array"),
        (_array(1, (1,), "f4", False, b"1234"), "malformed array"),
        (_array(1, (1,), _Runs(np.dtype, "f99999"), False, b"1234"), "the data type 'f99999'"),
        (_array(1, (1,), np.dtype("O"), False, b"12345678"), "the data type 'O8'"),
        (_array(1, (1,), F4), "malformed array"),
        (pickle.dumps({"a": [0, 1]})[:-3], "refused"),
    ],
)
def test_other_content_is_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "l.npy"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_npy_labels(path)
    assert "\n" not in str(caught.value)
    assert "save the labels as JSON" in str(caught.value)


ANNOUNCED = (1 << 31).to_bytes(8, "little")
KEYED = b"}X\x01\x00\x00\x00a"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"\x80\x02Nr" + (3 << 26).to_bytes(4, "little") + b".", id="an index of the memo"),
        pytest.param(b"N" + b"p199999999\n" + b".", id="an index of the memo as text"),
        pytest.param(b"\x80\x05\x96" + ANNOUNCED + b".", id="announced bytes that may change"),
        pytest.param(b"\x80\x04\x8e" + ANNOUNCED + b".", id="announced bytes"),
        pytest.param(b"\x80\x04\x8d" + ANNOUNCED + b".", id="announced text"),
        pytest.param(b"\x80\x04\x95" + ANNOUNCED + b"N.", id="an announced frame"),
        pytest.param(b"]" + b"0]" * 60_000 + b".", id="more operations than any file needs"),
        pytest.param(b"}N" + b"2\x86" * 60 + b"Ns.", id="a nested key that takes for ever to hash"),
        pytest.param(KEYED + b"]" + b"(" + b"K\x01" * 300 + b"es.", id="a vector longer than any class list"),
        pytest.param(
            KEYED + b"]q\x00(K\x01K\x00e0" + b"".join(
                b"]q%c(" % (level + 1) + b"h%c" % level * 40 + b"e0" for level in range(6)
            ) + b"h\x06s.",
            id="lists that share their content",
        ),
        pytest.param(b"}\x8a\x88" + b"\x13" + b"\x01" * 5000 + b"]s.", id="a number of too many digits"),
    ],
)  # fmt: skip
def test_a_small_file_takes_little_memory(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npy_labels, "MAX_OPERATIONS", 100_000)
    path = tmp_path / "l.npy"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="expected a dictionary") as caught:
            read_npy_labels(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20
    assert "\n" not in str(caught.value)


def test_one_vector_for_many_images(tmp_path: Path) -> None:
    path = tmp_path / "l.npy"
    vector = [1] * 200
    path.write_bytes(pickle.dumps(dict.fromkeys(range(3000), vector)))
    tracemalloc.start()
    try:
        labels, _ = read_npy_labels(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert labels["2999"] == tuple(range(1, 201))
    assert peak < 3 << 20


def test_arrays_that_are_no_dictionary(tmp_path: Path) -> None:
    np.save(tmp_path / "l.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"no single object, .*'<f8'.*\(3,\)"):
        read_npy_labels(tmp_path / "l.npy")
    with pytest.raises(DataError, match="unreadable"):
        read_npy_labels(tmp_path / "absent.npy")


def test_random_damage_never_escapes(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "l.npy"
    np.save(path, {f"2007_{i:06d}": _one_hot(1 + i % 20) for i in range(4)}, allow_pickle=True)  # type: ignore[arg-type]
    whole = path.read_bytes()
    refused = 0
    for _ in range(300):
        content = bytearray(whole)
        content[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(bytes(content))
        try:
            read_npy_labels(path)
        except DataError:
            refused += 1
    assert refused > 100
