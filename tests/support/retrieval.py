"""Retrievers from tensors, for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moduseg.config import RetrievalConfig
from moduseg.retrieval.retriever import Retriever
from moduseg.structures import SearchBank


def make_retriever(vectors: Tensor, labels: Tensor, centre: Tensor | None = None, **settings: Any) -> Retriever:
    """Return a retriever of a bank whose rows are its vectors; proposals of every size are searched."""
    rows = torch.arange(len(vectors), device=vectors.device)
    return Retriever(SearchBank(vectors, labels, rows, centre), RetrievalConfig(**{"min_area": 0, **settings}))
