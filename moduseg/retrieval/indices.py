"""Engines that search the bank, by name."""

from __future__ import annotations

import torch
from torch import Tensor

from moduseg.retrieval.faiss_index import FaissIndex
from moduseg.retrieval.search import BankIndex, ExactIndex

ENGINES: dict[str, type[BankIndex]] = {"exact": ExactIndex, "faiss": FaissIndex}
STORAGE = {"float32": torch.float32, "float16": torch.float16}


def build(vectors: Tensor, engine: str = "exact", storage: str = "float32") -> BankIndex:
    """Return bank vectors prepared for many searches.

    Args:
        vectors: `[B, C]` float.
        engine: `exact`, or `faiss` for its flat index, on the CPU.
        storage: `float32`, or `float16`, which halves the memory and rounds similarities to about three digits.

    Raises:
        ValueError: another name, or vectors that cannot be searched.
        MissingError: faiss is not installed.
    """
    if engine not in ENGINES:
        raise ValueError(f"retrieval.engine: got {engine!r}, expected one of {', '.join(ENGINES)}")
    if storage not in STORAGE:
        raise ValueError(f"retrieval.storage: got {storage!r}, expected one of {', '.join(STORAGE)}")
    return ENGINES[engine](vectors.to(STORAGE[storage]))
