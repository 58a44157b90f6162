"""Search the bank in faiss's flat index of inner products (Johnson et al., 2019)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moduseg.errors import MissingError
from moduseg.retrieval.search import BankIndex, best_candidates

_SLACK = 8
"""Vectors requested beyond k, so that rounding decides only at the end of a longer list."""
_CHUNK = 65536


class FaissIndex(BankIndex):
    """`faiss.IndexFlatIP` on the CPU; on CUDA `GpuIndexFlatIP` on the GPU of the vectors, if faiss has it.

    It compares all vectors, in float32 with its own rounding. The neighbours that it finds are compared again as
    `ExactIndex` does, so that similarities and their order are equal. Only if more than `_SLACK` vectors lie within a
    rounding error of the k-th one may another of them be returned.

    Args:
        vectors: `[B, C]` float of any length.

    Raises:
        ValueError: not `[B, C]` of floats, or not finite.
        MissingError: faiss is not installed.
    """

    name = "faiss"

    def __init__(self, vectors: Tensor) -> None:
        super().__init__(vectors)
        try:
            faiss: Any = importlib.import_module("faiss")
        except ImportError as error:
            raise MissingError(
                "retrieval.engine: got 'faiss', which is not installed; pip install 'moduseg[faiss]', or set "
                "retrieval.engine=exact"
            ) from error
        self._index: Any = faiss.IndexFlatIP(self.dim)
        if vectors.device.type == "cuda" and hasattr(faiss, "GpuIndexFlatIP"):
            # Without a configuration faiss takes GPU 0, whichever the process uses.
            settings = faiss.GpuIndexFlatConfig()
            settings.device = torch.cuda.current_device() if vectors.device.index is None else vectors.device.index
            self._index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), self.dim, settings)
        for part in vectors.split(_CHUNK) if len(vectors) else ():
            self._index.add(_normalize(part))

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        _, candidates = self._index.search(_normalize(queries), min(k + _SLACK, len(self)))
        columns = torch.from_numpy(candidates).to(queries.device).sort(1).values
        rows = torch.arange(len(queries), device=queries.device)[:, None].expand_as(columns)
        return best_candidates(queries, self.vectors, rows=rows.flatten(), columns=columns.flatten(), k=k)


def _normalize(vectors: Tensor) -> Any:
    """Return `[n, C]` float32, L2-normalised, as an array."""
    unit = functional.normalize(vectors.float(), dim=1)
    if not bool(torch.isfinite(unit).all()):
        raise ValueError("search: got NaN or infinity; check the backbone's precision")
    return unit.cpu().contiguous().numpy()
