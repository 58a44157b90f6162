"""Seconds of forward passes."""

from __future__ import annotations

import time

import pytest
import torch

from moduseg.clock import count_passes, measure, model_cpu_seconds, model_pass, model_seconds
from moduseg.devices import Device


def test_passes_are_counted_once_and_what_is_between_is_not(device: torch.device) -> None:
    before, begun = model_seconds(), time.perf_counter()
    with measure(), Device(device).autocast():
        with model_pass(device):
            time.sleep(0.03)
        inside = time.perf_counter() - begun
    counted = model_seconds() - before
    assert 0.03 <= counted < inside + 0.02
    time.sleep(0.03)
    assert model_seconds() - before == counted


def test_a_pass_is_cast_as_the_precision_says(device: torch.device) -> None:
    matrix = torch.ones(4, 4, device=device)
    with Device(device, "bfloat16").autocast():
        assert (matrix @ matrix).dtype == torch.bfloat16
    with Device(device, "float32").autocast():
        assert (matrix @ matrix).dtype == torch.float32


def test_modules_that_others_call_are_counted_also_where_they_fail(device: torch.device) -> None:
    class Slow(torch.nn.Module):
        def forward(self, fail: bool) -> None:
            end = time.thread_time() + 0.02
            while time.thread_time() < end:
                pass
            if fail:
                raise ValueError("broken")

    module = Slow()
    count_passes(module, device)
    before, cpu_before = model_seconds(), model_cpu_seconds()
    module(False)
    with pytest.raises(ValueError, match="broken"):
        module(True)
    counted = model_seconds() - before
    assert counted >= model_cpu_seconds() - cpu_before >= 0.04
    time.sleep(0.02)
    module(False)
    assert model_cpu_seconds() - cpu_before < 0.08
