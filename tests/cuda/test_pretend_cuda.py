"""The pretended GPU refuses what a GPU refuses, counts what makes the host wait, and computes what the CPU does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moduseg.devices import resolve_device
from tests.support.pretend_cuda import CUDA, PretendTensor, pretend_cuda, to_pretend

Call = Callable[[Tensor, Tensor], object]


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda host, device: host + device, id="sum"),
        pytest.param(lambda host, device: device @ host, id="product"),
        pytest.param(lambda host, device: torch.cat([host, device]), id="concatenation"),
        pytest.param(lambda host, device: torch.where(device > 0, host, 0), id="choice"),
        pytest.param(lambda host, device: host[device.long()], id="host's tensor indexed by the device's"),
        pytest.param(lambda host, device: device.index_put_((device[0].long(),), host), id="values of the host"),
        pytest.param(lambda host, device: nn.Linear(2, 2)(device), id="model left on the host"),
    ],
)
def test_mixed_devices_raise(call: Call) -> None:
    with pretend_cuda(), pytest.raises(RuntimeError, match=r"same device"):
        call(torch.ones(2, 2), to_pretend(torch.ones(2, 2)))


def test_numpy_of_the_device_raises() -> None:
    with pretend_cuda():
        tensor = torch.ones(2, device="cuda")
        with pytest.raises(TypeError, match=r"can't convert cuda:0"):
            tensor.numpy()
        assert tensor.cpu().numpy().tolist() == [1, 1]


@pytest.mark.parametrize(
    ("call", "num_waits"),
    [
        pytest.param(lambda tensor: tensor * 2 + tensor.sum(), 0, id="arithmetic"),
        pytest.param(lambda tensor: tensor.sum().item(), 1, id="item"),
        pytest.param(lambda tensor: bool(tensor.any()), 1, id="truth"),
        pytest.param(lambda tensor: tensor.tolist(), 1, id="list"),
        pytest.param(lambda tensor: tensor.nonzero(), 1, id="nonzero"),
        pytest.param(lambda tensor: tensor[tensor > 1], 1, id="boolean index"),
        pytest.param(lambda tensor: tensor.unique(), 1, id="unique"),
        pytest.param(lambda tensor: tensor.cpu(), 1, id="copy to the host"),
        pytest.param(lambda tensor: torch.empty(3).copy_(tensor), 1, id="copy into a tensor of the host"),
        pytest.param(lambda tensor: tensor[torch.tensor([0])], 0, id="indices of the host"),
        pytest.param(lambda tensor: torch.where(tensor > 1), 1, id="indices of what is true"),
        pytest.param(lambda tensor: tensor.repeat_interleave(2), 0, id="each value twice"),
        pytest.param(lambda tensor: tensor.repeat_interleave(tensor.long()), 1, id="values by counts"),
    ],
)
@pytest.mark.parametrize("is_inference", [False, True])
def test_waits_are_counted(call: Callable[[Tensor], object], num_waits: int, is_inference: bool) -> None:
    with torch.inference_mode(is_inference), pretend_cuda() as log:
        call(to_pretend(torch.arange(3.0)))
    assert log.waits.total() == num_waits


@pytest.mark.parametrize(
    ("call", "num_copies"),
    [
        pytest.param(lambda host, device: device + 1, 0, id="number"),
        pytest.param(lambda host, device: host.to(CUDA), 1, id="to"),
        pytest.param(lambda host, device: host.to(device), 1, id="to the device of another"),
        pytest.param(lambda host, device: torch.tensor([1.0], device="cuda"), 1, id="tensor of a list"),
        pytest.param(lambda host, device: device.new_tensor([1.0]), 1, id="new tensor of a list"),
        pytest.param(lambda host, device: torch.zeros(3, device="cuda"), 0, id="zeros"),
        pytest.param(lambda host, device: device[host.long()], 1, id="indices of the host"),
        pytest.param(lambda host, device: device[[0, 1]], 1, id="indices in a list"),
        pytest.param(lambda host, device: device.copy_(host), 1, id="copy into a tensor of the device"),
        pytest.param(lambda host, device: device.to(CUDA), 0, id="to where it is"),
    ],
)
def test_copies_to_the_device_are_counted(call: Call, num_copies: int) -> None:
    with pretend_cuda() as log:
        call(torch.arange(3.0), to_pretend(torch.arange(3.0)))
    assert log.copies.total() == num_copies
    assert log.waits.total() == 0


def test_values_are_those_of_the_cpu() -> None:
    """A model, its gradient-free pass under autocast, and results in the precision of the device."""
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.LayerNorm(4)), torch.randn(2, 3)
    with torch.no_grad():
        expected = model(inputs)
        with pretend_cuda() as log:
            device = resolve_device("cuda", "float16")
            model.to(device.torch_device)
            moved = inputs.to(device.torch_device)
            exact = model(moved)
            with device.autocast():
                rough = model[0](moved)
    assert isinstance(exact, PretendTensor)
    assert exact.device == CUDA
    assert torch.equal(exact.hosted, expected)
    assert rough.dtype == torch.float16
    assert log.num_operators >= 4


def test_nothing_is_left_of_the_pretended_device() -> None:
    with pretend_cuda():
        assert torch.cuda.is_available()
    assert torch.zeros(1).device.type == "cpu"
    assert torch.cuda.is_available() == (torch.cuda.device_count() > 0)
