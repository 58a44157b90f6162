"""A GPU for tests that there is none of: tensors that claim to be on `cuda:0` and are computed on the CPU.

    with pretend_cuda() as log:
        result = predict(to_pretend(image))  # raises where CUDA would
    log.waits, log.copies  # what the host waited for, and what it copied to the device, by place

Mixing devices raises, and so does `.numpy()` of a tensor on the device. What a GPU has no kernel for, how it rounds and
how fast it is, cannot be seen. Models are to be built in the mode in which they run: both inside or both outside
`torch.inference_mode()`. Only the thread that entered `pretend_cuda` can put tensors on the device.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import moduseg

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PACKAGE = f"{Path(moduseg.__file__).parent}{os.sep}"
WAITING_OPERATORS = frozenset({
    "_linalg_check_errors", "_local_scalar_dense", "_unique2", "bincount", "equal", "histc", "is_nonzero",
    "masked_select", "nms", "nonzero", "repeat_interleave", "unique_consecutive", "unique_dim",
})  # fmt: skip
"""Operators whose result's size or value the host has to know."""
INDEXING_OPERATORS = frozenset({"_index_put_impl_", "_unsafe_index", "index", "index_put", "index_put_"})
"""Operators whose indices may be on the CPU; they are copied."""
DECOMPOSED_OPERATORS = frozenset({
    "aten.item.default", "aten.nonzero_numpy.default", "aten.repeat_interleave.self_Tensor",
    "aten.repeat_interleave.self_int", "aten.where.default",
})  # fmt: skip
"""Operators that arrive undivided in inference mode; whether they wait is seen from what they call."""
COPYING_OPERATORS = frozenset({"_to_copy", "copy_", "to"})
_FACTORIES = frozenset({
    torch.arange, torch.as_tensor, torch.empty, torch.empty_like, torch.empty_strided, torch.eye, torch.full,
    torch.full_like, torch.linspace, torch.ones, torch.ones_like, torch.rand, torch.rand_like, torch.randn,
    torch.randperm, torch.tensor, torch.tril_indices, torch.zeros, torch.zeros_like, torch.Tensor.new_empty,
    torch.Tensor.new_full, torch.Tensor.new_ones, torch.Tensor.new_tensor, torch.Tensor.new_zeros,
})  # fmt: skip
_COPYING_FACTORIES = frozenset({torch.as_tensor, torch.tensor, torch.Tensor.new_tensor})


class Place(NamedTuple):
    """The innermost line of the package when something happened; `file` is relative to the package."""

    file: str
    function: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.function}"


@dataclass
class DeviceLog:
    """What a block of code asked of the device.

    Attributes:
        waits: how often the host waited for the device, by operator and place.
        copies: copies from the host to the device, by place.
        num_operators: operators that ran on the device.
    """

    waits: Counter[tuple[str, Place]] = field(default_factory=Counter)
    copies: Counter[Place] = field(default_factory=Counter)
    num_operators: int = 0

    def waits_by_function(self) -> dict[str, int]:
        """Return the waits of each function, `file:function`."""
        return _sum_by_function((place, count) for (_, place), count in self.waits.items())

    def copies_by_function(self) -> dict[str, int]:
        """Return the copies of each function, `file:function`."""
        return _sum_by_function(self.copies.items())

    def add_wait(self, operator: str) -> None:
        self.waits[operator, _find_place()] += 1

    def add_copy(self) -> None:
        self.copies[_find_place()] += 1


_log = DeviceLog()


def _sum_by_function(counts: Any) -> dict[str, int]:
    total: Counter[str] = Counter()
    for place, count in counts:
        total[str(place)] += count
    return dict(total)


def _find_place() -> Place:
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # A comprehension belongs to the function around it.
        if code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<"):
            return Place(code.co_filename.removeprefix(PACKAGE), code.co_name, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return Place("?", "?", 0)


class PretendTensor(Tensor):
    """A tensor on the CPU under the device's name.

    Attributes:
        hosted: the tensor that is computed with.
    """

    hosted: Tensor

    @staticmethod
    def __new__(cls, hosted: Tensor) -> PretendTensor:
        wrapper: PretendTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            hosted.size(),
            strides=hosted.stride(),
            storage_offset=hosted.storage_offset(),
            dtype=hosted.dtype,
            layout=hosted.layout,
            device=CUDA,
        )
        wrapper.hosted = hosted
        return wrapper

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"PretendTensor({self.hosted!r})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name, options = func.overloadpacket.__name__, dict(kwargs or {})
        if name == "_has_compatible_shallow_copy_type":
            return False
        if str(func) in DECOMPOSED_OPERATORS:
            return func.decompose(*args, **options)
        tensors = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
        _log.num_operators += 1
        is_to_host = options.get("device") is not None and torch.device(options["device"]).type == "cpu"
        if name in INDEXING_OPERATORS:
            _check_indexing(func, args)
        elif name == "copy_":
            _count_copy(args[0], args[1])
        elif name in COPYING_OPERATORS:
            if is_to_host:
                _log.add_wait("copy to the host")
        else:
            _check_devices(func, tensors)
        if name in WAITING_OPERATORS:
            _log.add_wait(name)
        if "device" in options:
            options["device"] = CPU
        result = func(*_unwrap(args), **_unwrap(options))
        return (
            result.clone()
            if is_to_host and _is_one_of(result, _unwrap(tensors))
            else _wrap(result, tensors, is_to_host)
        )


def _unwrap(values: Any) -> Any:
    return tree_map(lambda value: value.hosted if isinstance(value, PretendTensor) else value, values)


def _wrap(result: Any, tensors: list[Tensor], is_to_host: bool) -> Any:
    """Return an operator's results as tensors of the device; those that are among its arguments stay what they were."""
    arguments = {id(_unwrap(tensor)): tensor for tensor in tensors}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor) or is_to_host:
            return value
        return arguments[id(value)] if id(value) in arguments else PretendTensor(value)

    return tree_map(wrap, result)


def _is_one_of(value: Any, tensors: list[Tensor]) -> bool:
    return any(value is tensor for tensor in tensors)


def _check_devices(func: Any, tensors: list[Tensor]) -> None:
    """Raise as CUDA does if a tensor of the host that is no single number is among the arguments."""
    if any(tensor.device.type == "cpu" and tensor.dim() for tensor in tensors):
        raise RuntimeError(
            f"{func}: Expected all tensors to be on the same device, got "
            + ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        )


def _check_indexing(func: Any, args: tuple[Any, ...]) -> None:
    """Raise as CUDA does if indexed tensor or values are on another device, and count waits and copies of indices."""
    indexed, indices = args[0], [index for index in args[1] if index is not None]
    if not isinstance(indexed, PretendTensor):
        raise RuntimeError(f"{func}: indices should be on the same device as the indexed tensor (cpu), got cuda:0")
    _check_devices(func, [value for value in args[2:3] if isinstance(value, Tensor)])
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        _log.add_wait("boolean index")
    if not all(isinstance(index, PretendTensor) for index in indices):
        _log.add_copy()


def _count_copy(target: Tensor, source: Tensor) -> None:
    if not isinstance(target, PretendTensor):
        _log.add_wait("copy to the host")
    elif not isinstance(source, PretendTensor):
        _log.add_copy()


class _Functions(TorchFunctionMode):
    """Answers what would start CUDA before an operator is called: `torch.zeros(..., device="cuda")`, `.to("cuda")`."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        answer = _find_answer(func, args)
        return func(*args, **options) if answer is None else answer(func, args, options)


Answer = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


def _find_answer(func: Any, args: tuple[Any, ...]) -> Answer | None:
    """Return the function that stands for `func`; `None` if PyTorch's own will do."""
    if func in _FACTORIES:
        return _make
    if func in (Tensor.to, Tensor.cuda) and isinstance(args[0], Tensor):
        return _move
    if func is torch.where and len(args) == 3 and any(isinstance(arg, PretendTensor) for arg in args):
        return _choose
    if not (args and isinstance(args[0], PretendTensor)):
        return None
    return {
        Tensor.numpy: _refuse_numpy,
        Tensor.tolist: _list,
        Tensor.__getitem__: _index,
        Tensor.__setitem__: _index,
    }.get(func)


def _make(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Make a tensor on the device that `device=` names, or else on that of the first argument."""
    is_like_pretend = any(isinstance(arg, PretendTensor) for arg in args)
    name = options.pop("device", None)
    options.pop("pin_memory", None)  # memory is pinned for a driver
    device = (CUDA if is_like_pretend else CPU) if name is None else torch.device(name)
    if device.type != "cuda":
        made = func(*_unwrap(args), **_unwrap(options), **({} if name is None else {"device": device}))
        if is_like_pretend and func is torch.as_tensor:
            _log.add_wait("copy to the host")
        return made
    is_given = func is torch.as_tensor and is_like_pretend
    if func in _COPYING_FACTORIES and not is_given:
        _log.add_copy()
    return PretendTensor(func(*_unwrap(args), **_unwrap(options), **({} if is_given else {"device": CPU})))


def _move(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Move a tensor to the device that an argument names, or convert it where it is."""
    tensor = args[0]
    device = CUDA if func is Tensor.cuda else tensor.device
    rest = [] if func is Tensor.cuda else list(args[1:])
    for index, value in enumerate(rest):
        if isinstance(value, Tensor):
            device, rest[index] = value.device, _unwrap(value)
        elif isinstance(value, str | torch.device):
            device, rest[index] = torch.device(value), CPU
    if options.get("device") is not None:
        device, options["device"] = torch.device(options["device"]), CPU
    hosted = _unwrap(tensor)
    moved = hosted.to(*rest, **options) if rest or options else hosted
    is_pretend = isinstance(tensor, PretendTensor)
    if device.type == "cuda" and is_pretend:
        return tensor if moved is hosted else PretendTensor(moved)
    if device.type != "cuda" and not is_pretend:
        return moved
    if is_pretend:
        _log.add_wait("copy to the host")
    else:
        _log.add_copy()
    moved = moved.clone() if moved is hosted else moved
    return PretendTensor(moved.detach()) if device.type == "cuda" else moved


def _choose(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Run `torch.where`, whose numbers PyTorch makes tensors of the device."""
    _check_devices(func, [arg for arg in args if isinstance(arg, Tensor)])
    _log.num_operators += 1
    return PretendTensor(func(*_unwrap(args), **options))


def _index(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Index a tensor; a list among the indices is copied to the device, a number is written without a copy."""
    indices = args[1] if isinstance(args[1], tuple) else (args[1],)
    has_rows = any(isinstance(index, Tensor) and index.dtype == torch.int64 for index in indices)
    if has_rows and not all(isinstance(value, Tensor) for value in args[2:]):
        args = (*args[:2], PretendTensor(torch.tensor(args[2], dtype=args[0].dtype)))
    if any(isinstance(index, list) for index in indices):
        _log.add_copy()
        indices = tuple(PretendTensor(torch.tensor(i)) if isinstance(i, list) else i for i in indices)
        args = (args[0], indices if len(indices) > 1 else indices[0], *args[2:])
    return func(*args, **options)


def _refuse_numpy(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to the host first.")


def _list(func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    _log.add_wait("tolist")
    return args[0].hosted.tolist()


def to_pretend(value: Any) -> Any:
    """Return a tensor, or the tensors of a collection or module, on the device; nothing is counted."""
    if isinstance(value, nn.Module):
        return value.to(CUDA)
    return tree_map(lambda v: PretendTensor(v.clone()) if isinstance(v, Tensor) and v.device == CPU else v, value)


@contextmanager
def pretend_cuda() -> Iterator[DeviceLog]:
    """Let there be one GPU, `cuda:0`; yield what is asked of it."""
    global _log
    outer_log, _log = _log, DeviceLog()
    if not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        pytest.skip(f"torch {torch.__version__} has no device guards that do nothing without a driver; a newer one has")
    torch._C._ensureCUDADeviceGuardSet()
    is_overwriting = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with ExitStack() as stack:
        for target, answer in {
            "torch.cuda.is_available": True,
            "torch.cuda.device_count": 1,
            "torch.cuda.current_device": 0,
            "torch.cuda.get_device_capability": (9, 0),
            "torch.cuda.get_device_name": "a pretended GPU",
            "torch.cuda.is_bf16_supported": True,
            "torch.cuda.synchronize": None,
            "torch.cuda.amp.common.amp_definitely_not_available": False,
        }.items():
            stack.enter_context(mock.patch(target, return_value=answer))
        stack.enter_context(_Functions())
        try:
            yield _log
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(is_overwriting)
            _log = outer_log
