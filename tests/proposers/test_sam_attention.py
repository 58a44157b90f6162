"""SAM's attention without the bias of all pairs, held against the published one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from segment_anything.modeling.image_encoder import Attention
from torch import Tensor
from torch.overrides import TorchFunctionMode

from moduseg.proposers import sam_attention
from moduseg.proposers.sam_attention import RelativeAttention, attend_in_parts, attend_with_wide_keys

Attend = Callable[..., Tensor]


class LargestTensor(TorchFunctionMode):
    """Notes the numbers of the largest tensor that any function returns."""

    numel = 0

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def make_attention(dim: int, heads: int, side: int) -> Attention:
    torch.manual_seed(0)
    attention = Attention(dim, heads, use_rel_pos=True, input_size=(side, side)).requires_grad_(False)
    torch.nn.init.normal_(attention.rel_pos_h, std=0.2)
    torch.nn.init.normal_(attention.rel_pos_w, std=0.2)
    return attention


@pytest.fixture(params=[attend_in_parts, attend_with_wide_keys], ids=["in parts", "wide keys"])
def attend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Attend:
    """Either way, on the CPU."""
    monkeypatch.setattr(sam_attention, "attend_in_parts", request.param)
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize(("dim", "heads", "side", "batch"), [(160, 2, 14, 3), (1280, 16, 14, 1), (64, 1, 33, 2)])
def test_results_are_those_of_the_published_attention(
    dim: int, heads: int, side: int, batch: int, attend: Attend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sam_attention, "MAX_BIAS", side**4)  # one head at a time
    attention, cells = make_attention(dim, heads, side), torch.randn(batch, side, side, dim)
    expected = attention(cells)
    torch.testing.assert_close(RelativeAttention(attention, heads)(cells), expected, atol=1e-5, rtol=0)


def test_parts_have_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, cells = RelativeAttention(make_attention(96, 3, 14), 3), torch.randn(2, 14, 14, 96)
    expected = attention(cells)
    for heads in (1, 2, 4):
        monkeypatch.setattr(sam_attention, "MAX_BIAS", heads * 14**4)
        assert torch.equal(attention(cells), expected)


def test_wide_keys_are_no_worse_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bias is rounded once, and not again after rows and columns are added."""
    attention, cells = RelativeAttention(make_attention(160, 2, 14), 2), torch.randn(4, 14, 14, 160)
    expected, errors = attention(cells), []
    for way in (attend_with_wide_keys, attend_in_parts):
        monkeypatch.setattr(sam_attention, "attend_in_parts", way)
        with torch.autocast("cpu", torch.bfloat16):
            errors.append((attention(cells).float() - expected).abs().mean())
    assert errors[0] < errors[1]


def test_no_tensor_holds_all_pairs(attend: Attend, monkeypatch: pytest.MonkeyPatch) -> None:
    """ViT-H's shape in small: 16 heads, where the bias of all pairs is the largest tensor by far."""
    side, heads = 24, 16
    monkeypatch.setattr(sam_attention, "MAX_BIAS", side**4)
    attention = RelativeAttention(make_attention(256, heads, side), heads)
    with LargestTensor() as largest:
        attention(torch.randn(1, side, side, 256))
    assert largest.numel < heads * side**4 / 8
