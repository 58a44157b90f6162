"""Operators counted on tensors without data, held against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from benchmarks.roofline import ACHIEVED, GPUS, LAUNCH, count_operators


def test_a_product_is_bounded_by_its_operations() -> None:
    a, b = torch.empty(2, 4096, 4096, dtype=torch.bfloat16, device="meta")
    counter = count_operators(lambda: F.linear(a, b).view(-1))
    assert (counter.operators, counter.flops, counter.bytes) == (1, 2 * 4096**3, 3 * 2 * 4096**2)
    assert counter.seconds["H200"] == pytest.approx(2 * 4096**3 / GPUS["H200"].half / ACHIEVED)


def test_a_sum_is_bounded_by_its_bytes_or_its_launch() -> None:
    large, small = torch.empty(1 << 28, device="meta"), torch.empty(8, device="meta")
    assert count_operators(lambda: large + 1).seconds["RTX 4090"] == pytest.approx((1 << 31) / 1e12 / ACHIEVED)
    assert count_operators(lambda: small + 1).seconds["RTX 4090"] == LAUNCH


def test_attention_moves_nothing_of_the_size_of_all_pairs() -> None:
    q, k, v = (torch.empty(1, 2, 1000, channels, device="meta") for channels in (24, 24, 16))
    counter = count_operators(lambda: F.scaled_dot_product_attention(q, k, v))
    assert counter.operators == 1
    assert counter.flops == 2 * 2 * 1000**2 * (24 + 16)
    assert counter.bytes == 4 * 2 * 1000 * (24 + 24 + 16 + 16)
