"""`cls_labels.npy`: a pickled dictionary, read without running anything that it contains.

A pickle is a program that names functions and calls them. Here every name that NumPy writes for an array maps to an
inert stand-in that keeps its arguments, any other name is refused, and the arrays are made afterwards from the plain
bytes that the stand-ins kept. What a file may take is bounded by its size: Python's own unpickler is used, because the
one in C allocates whatever length or memo index nine bytes announce.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moduseg.errors import DataError
from moduseg.structures import IGNORE_INDEX

MAX_BYTES = 1 << 28
"""Larger files are refused; the largest known one, of COCO's 123,287 images, has some 60 MB."""
MAX_OPERATIONS = 10_000_000
"""Pickles of more operations are refused, since one byte can make an empty list; COCO's take some two million."""
_MAX_DIMENSIONS = 2
_MAX_ENTRIES = IGNORE_INDEX - 1
"""Longest vector: classes beside background that an 8-bit label map can hold."""
_MAGIC = b"\x93NUMPY"
_REMEDY = "expected a dictionary from image ids to 0/1 vectors, as numpy.save writes it; save the labels as JSON"
_DAMAGE = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError, OverflowError,
    ImportError, MemoryError, RecursionError, UnicodeError,
)  # fmt: skip


class _Dtype:
    """The arguments of `numpy.dtype(code)`: the code, and the byte order that its state adds."""

    __slots__ = ("code", "order")

    def __init__(self, code: object) -> None:
        if not isinstance(code, str):
            raise pickle.UnpicklingError("a malformed data type")
        self.code = code
        self.order: Any = "="

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError("a malformed data type")
        self.order = state[1]

    def to_numpy(self) -> np.dtype:
        """Return the data type, if it is one of numbers, truth values or text."""
        kind, size = self.code[:1], self.code[1:]
        if kind not in "biufUS" or not size.isdigit() or not (kind in "US" or 1 <= int(size) <= 16):
            raise pickle.UnpicklingError(f"the data type {self.code[:20]!r}")
        return np.dtype(self.code).newbyteorder(self.order)


class _Array:
    """The arguments of an array or a scalar."""

    __slots__ = ("data", "dtype", "fortran", "shape")

    def __init__(self, shape: Any = (), dtype: Any = None, fortran: Any = False, data: Any = b"") -> None:
        self.shape, self.dtype, self.fortran, self.data = shape, dtype, fortran, data

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("a malformed array")
        _, self.shape, self.dtype, self.fortran, self.data = state

    def unwrap(self) -> object:
        """Return the one object that an array of objects holds."""
        if type(self.dtype) is not _Dtype or not self.dtype.code.startswith("O") or not isinstance(self.data, list):
            raise pickle.UnpicklingError("an array that holds no object")
        if len(self.data) != 1:
            raise pickle.UnpicklingError(f"an array of {len(self.data)} objects")
        return self.data[0]

    def to_numpy(self) -> np.ndarray:
        """Make the array from its bytes."""
        shape, data = self.shape, self.data
        if isinstance(data, str):  # what Python 2 called bytes
            data = data.encode("latin-1")
        is_shape = isinstance(shape, tuple) and len(shape) <= _MAX_DIMENSIONS
        is_shape = is_shape and all(type(n) is int and 0 <= n < 1 << 31 for n in shape)
        if type(self.dtype) is not _Dtype or not is_shape or not isinstance(data, bytes | bytearray):
            raise pickle.UnpicklingError("a malformed array")
        dtype = self.dtype.to_numpy()
        if math.prod(shape) * dtype.itemsize != len(data):
            raise pickle.UnpicklingError(f"{len(data)} bytes for an array of {shape}")
        flat = np.frombuffer(bytes(data), dtype=dtype)
        return flat.reshape(shape, order="F" if self.fortran is True else "C")


class _Callable:
    """A function that a pickle may call; an instance, so that the pickle cannot set attributes on it."""

    __slots__ = ("_make",)
    _make: Callable[..., object]

    def __init__(self, make: Callable[..., object]) -> None:
        object.__setattr__(self, "_make", make)

    def __call__(self, *arguments: object) -> object:
        return self._make(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a state for a function")

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError("an attribute for a function")


def _encode(text: object, encoding: object = "latin1") -> bytes:
    # Bytes under the protocols of Python 2 are written as text and encoded again.
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"the encoding {encoding!r}")
    return text.encode("latin-1")


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    return _Array(shape, dtype, order == "F", data)


_CORE = {
    "_reconstruct": _Callable(lambda *arguments: _Array()),
    "scalar": _Callable(lambda dtype, data=b"": _Array((), dtype, False, data)),
}
_NAMES: Mapping[tuple[str, str], _Callable] = {
    ("numpy", "ndarray"): _Callable(lambda *arguments: _Array()),
    ("numpy", "dtype"): _Callable(lambda code, *flags: _Dtype(code)),
    ("_codecs", "encode"): _Callable(_encode),
    **{(f"numpy.{core}.multiarray", name): made for core in ("core", "_core") for name, made in _CORE.items()},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Callable(_from_buffer) for core in ("core", "_core")},
}


class _Operations(dict[int, Callable[[Any], None]]):
    """The unpickler's operations by code; each use is counted, and too many are an error."""

    def __init__(self, operations: Mapping[int, Callable[[Any], None]]) -> None:
        super().__init__(operations)
        self._left = MAX_OPERATIONS

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self._left -= 1
        if self._left < 0:
            raise pickle.UnpicklingError(f"more than {MAX_OPERATIONS} operations")
        return super().__getitem__(code)


def _load_bytes(unpickler: Any) -> None:
    # Python's own operation allocates the announced length before it reads.
    unpickler.append(unpickler.read(int.from_bytes(unpickler.read(8), "little")))


def _load_items(unpickler: Any) -> None:
    items = unpickler.pop_mark()
    _fill(unpickler.stack[-1], items)


def _load_item(unpickler: Any) -> None:
    value, key = unpickler.stack.pop(), unpickler.stack.pop()
    _fill(unpickler.stack[-1], [key, value])


def _load_dictionary(unpickler: Any) -> None:
    items = unpickler.pop_mark()
    unpickler.append({})
    _fill(unpickler.stack[-1], items)


def _fill(target: Any, items: list[Any]) -> None:
    """Add keys and values, which alternate; a nested tuple as key could take for ever to hash."""
    if type(target) is not dict or not all(type(key) in (str, bytes, int, float, _Array) for key in items[::2]):
        raise pickle.UnpicklingError("a key that is neither text nor a number")
    target.update(zip(items[::2], items[1::2], strict=True))


_ALLOWED = {
    **pickle._Unpickler.dispatch,
    pickle.BYTEARRAY8[0]: _load_bytes,
    pickle.SETITEM[0]: _load_item,
    pickle.SETITEMS[0]: _load_items,
    pickle.DICT[0]: _load_dictionary,
}
for _code in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER):
    del _ALLOWED[_code[0]]


class _Unpickler(pickle._Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="latin1")
        self.dispatch = _Operations(_ALLOWED)  # type: ignore[misc]  # each file is counted by itself

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"the name {f'{module}.{name}'[:80]!r}, which no array needs")
        return _NAMES[module, name]

    def persistent_load(self, pid: object) -> Any:
        raise pickle.UnpicklingError("a reference to something outside")


def read_npy_labels(path: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """Read the image-level labels of a `cls_labels.npy` or a plain pickle, as weakly supervised methods share them.

    Args:
        path: a `.npy` file of one object, or a pickle: a dictionary from image ids, text or whole numbers, to vectors
            of zeros and ones, entry `i` for class `i + 1`.

    Returns:
        Ids as text -> ascending class ids `1..C`, and `C`, the length of every vector.

    Raises:
        DataError: the file cannot be read, names anything but NumPy's arrays, or holds something else; one line.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DataError(f"{path}: got {path.stat().st_size} bytes, expected at most {MAX_BYTES}; {_REMEDY}")
        content = _unpickle(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: unreadable ({error.strerror}); check the file and its permissions") from error
    except _DAMAGE as error:
        raise DataError(f"{path}: refused to read further, it has {_one_line(error)}; {_REMEDY}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: got {type(content).__name__.strip('_').lower()} of something else; {_REMEDY}")
    labels: dict[str, tuple[int, ...]] = {}
    lengths: set[int] = set()
    # Images of equal labels share one tuple, because a file may name one vector a million times.
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}
    for number, (key, value) in enumerate(content.items(), start=1):
        try:
            name, vector = _to_id(key), _to_vector(value)
        except _DAMAGE as error:
            named = f" {key[:60]!r}" if isinstance(key, str | bytes) else ""
            raise DataError(f"{path}: entry {number}{named} has {_one_line(error)}; {_REMEDY}") from error
        lengths.add(len(vector))
        present = tuple(int(i) + 1 for i in np.flatnonzero(vector))
        labels[name] = shared.setdefault(present, present)
    if len(lengths) != 1:
        got = f"vectors of {min(lengths)} to {max(lengths)} entries" if lengths else "no entry"
        raise DataError(f"{path}: got {got}, expected vectors of one length; {_REMEDY}")
    return labels, lengths.pop()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _unpickle(data: bytes) -> object:
    start = 0
    if data.startswith(_MAGIC):
        # Magic, version (2 bytes), length of the header (2 bytes in version 1, else 4), header, pickle.
        wide = data[6:7] != b"\x01"
        first = 12 if wide else 10
        start = first + int.from_bytes(data[8:first], "little")
        header = data[first:start].decode("latin-1")
        if not re.search(r"'descr': '\|O'", header) or not re.search(r"'shape': \((1,)?\)", header):
            raise ValueError(f"an array that is no single object, {' '.join(header.split())[:100]}")
    content = _Unpickler(io.BytesIO(data[start:])).load()
    return content.unwrap() if type(content) is _Array else content


def _to_id(key: object) -> str:
    if type(key) is _Array:
        key = key.to_numpy().item()
    if isinstance(key, bytes):
        key = key.decode("utf-8")
    if type(key) not in (str, int):
        raise ValueError(f"a key of type {type(key).__name__}")
    return str(key)


def _to_vector(value: object) -> np.ndarray:
    if type(value) is _Array:
        vector = value.to_numpy()
    else:
        # Lists inside lists may share their content, and as an array would be far larger than the file.
        is_flat = isinstance(value, list) and all(type(entry) in (bool, int, float) for entry in value)
        vector = np.asarray(value if is_flat else None)
    if vector.ndim != 1 or vector.dtype.kind not in "biuf" or not np.isin(vector, (0, 1)).all():
        raise ValueError("no vector of zeros and ones")
    if len(vector) > _MAX_ENTRIES:
        raise ValueError(f"a vector of {len(vector)} entries, more than {_MAX_ENTRIES} classes")
    return vector
