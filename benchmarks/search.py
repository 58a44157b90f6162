"""The search beside the minimum of an exact search: a matrix product, chunk by chunk, and the k largest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.common import Row, Setting, interleave, peak_memory, require_within
from moduseg.retrieval import search as module
from moduseg.retrieval.search import ExactIndex

TOP_K = 25
MAX_RATIO = 1.3
GIGABYTE = 1 << 30


def search_minimal(queries: Tensor, bank: Tensor, top_k: int, chunk: int = module.BANK_CHUNK) -> tuple[Tensor, Tensor]:
    """Return the k largest products with a bank whose vectors have length 1."""
    unit = normalize(queries, dim=1)
    values = unit.new_empty((len(unit), 0))
    indices = torch.empty((len(unit), 0), dtype=torch.int64, device=unit.device)
    for start in range(0, len(bank), chunk):
        scores = unit @ bank[start : start + chunk].T
        best = scores.topk(min(top_k, scores.shape[1]))
        values, indices = torch.cat((values, best.values), 1), torch.cat((indices, best.indices + start), 1)
        values, order = values.topk(min(top_k, values.shape[1]))
        indices = indices.gather(1, order)
    return values, indices


def search(setting: Setting) -> list[Row]:
    """Measure one image's queries in a bank like VOC's, and a thousand queries in a bank of a million."""
    sizes = [(6, 200, 16), (10, 3000, 8)] if setting.is_small else [(60, 20_000, 768), (1000, 1_000_000, 384)]
    return [_measure_size(*size, setting) for size in sizes]


def _measure_size(count: int, bank_size: int, dim: int, setting: Setting) -> Row:
    generator = torch.Generator().manual_seed(0)
    # The bank is filled in place: a copy of it would be most of the memory that is measured.
    bank = torch.empty((bank_size, dim), device=setting.device)
    for part in bank.split(65536):
        part.copy_(normalize(torch.randn(part.shape, generator=generator), dim=1))
    queries = torch.randn((count, dim), generator=generator).to(setting.device)
    index = ExactIndex(bank)
    with peak_memory(setting.device) as memory:
        similarities, indices = module.search(queries, index, TOP_K)
    num_extra_bytes = memory[0]
    expected, expected_indices = search_minimal(queries, bank, TOP_K)
    torch.testing.assert_close(similarities, expected, atol=1e-4, rtol=0)
    share_equal = float((indices == expected_indices).float().mean())
    ways: dict[str, Callable[[], object]] = {
        "bare": lambda: search_minimal(queries, bank, TOP_K),
        "ours": lambda: module.search(queries, index, TOP_K),
    }
    repeats = setting.repeats if bank_size < 10**6 else max(1, min(3, setting.repeats // 2))
    times = interleave(ways, repeats, setting.device, warm_up=bank_size < 10**6)
    title = f"search: {count} queries, bank {bank_size:,} x {dim}, top {TOP_K}"
    sizes = {"bank_bytes": bank.nbytes, "bytes_beside_the_bank": num_extra_bytes, "same_places": share_equal}
    row = require_within(title, MAX_RATIO, times, "bare", "ours", **sizes)
    text = f"{row.result}; {num_extra_bytes / 1e6:.0f} MB beside the bank"
    return Row(
        title,
        f"{row.target}, under bank + 1 GB",
        text,
        bool(row.is_reached) and num_extra_bytes < GIGABYTE,
        row.details,
    )
