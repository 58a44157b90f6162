"""Proposals as run lengths, for images that wait for their turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from moduseg.masks.rle import decode_masks, merge_disjoint_runs
from moduseg.structures import Proposals

MAX_WAITING_PIXELS = 1 << 24
"""Most pixels in the masks of one image that waits for its turn, a byte each; more of them wait as run lengths. Several
batches of images wait at a time."""
_large_masks = threading.RLock()
"""Held by the thread that has the many masks of an image in memory."""


@dataclass(frozen=True)
class EncodedProposals:
    """The proposals of one image as run lengths: a thousandth of the memory that their masks take.

    Attributes:
        runs: of each mask, run lengths `[R]` int64 column by column, first of zeros.
        size: `(H, W)` of the image.
        predicted_iou, stability_score, parents: as in `Proposals`.
    """

    runs: list[np.ndarray]
    size: tuple[int, int]
    predicted_iou: torch.Tensor
    stability_score: torch.Tensor
    parents: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.runs)

    @property
    def num_pixels(self) -> int:
        """Pixels of all masks together, a byte each once they are decoded."""
        return len(self) * self.size[0] * self.size[1]

    def decode(self) -> Proposals:
        """Return the proposals on the CPU, `H * W` bytes each; disjoint ones come with an id map."""
        quality = self.predicted_iou, self.stability_score
        ids = merge_disjoint_runs(self.runs, self.size)
        if ids is not None:
            return Proposals.of_id_map(torch.from_numpy(ids), len(self), *quality, parents=self.parents)
        return Proposals(torch.from_numpy(decode_masks(self.runs, self.size)), *quality, parents=self.parents)


WaitingProposals: TypeAlias = Proposals | EncodedProposals
"""Proposals of an image that waits for its turn: as run lengths if their masks are many (`MAX_WAITING_PIXELS`)."""


def decode(proposals: WaitingProposals) -> Proposals:
    """Return proposals with their masks, decoded if they are not."""
    return proposals.decode() if isinstance(proposals, EncodedProposals) else proposals


@contextmanager
def decoded(proposals: WaitingProposals) -> Iterator[Proposals]:
    """Lend proposals with their masks: of several threads, one at a time has those of an image with many.

    Else the memory would grow with the number of threads. Keep nothing of the masks after the block.
    """
    if not isinstance(proposals, EncodedProposals):
        yield proposals
        return
    with _large_masks:
        yield proposals.decode()
