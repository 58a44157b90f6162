"""Proposals that are kept for a while without the memory of their masks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from moduseg.structures import Proposals

_MAX_LOOSE_PIXELS = 1 << 24
"""Masks of more pixels together, a byte each, are kept as bits."""


@dataclass(frozen=True)
class KeptProposals:
    """Proposals on the CPU that take little memory while nobody looks at them.

    Attributes:
        proposals: as they are, if they are few; else without masks.
        bits: `[N, H, ceil(W / 8)]` uint8 of the masks; `None` if they are few.
        id_map: `[H, W]` int32 of disjoint ones, without which they would count as overlapping; else `None`.
        width: of the image.
    """

    proposals: Proposals
    bits: np.ndarray | None
    id_map: torch.Tensor | None
    width: int

    @classmethod
    def of(cls, proposals: Proposals) -> KeptProposals:
        """Return proposals on the CPU, their masks as bits if they are many."""
        on_host = proposals.to(torch.device("cpu"))
        width = on_host.masks.shape[2]
        if on_host.masks.numel() <= _MAX_LOOSE_PIXELS:
            return cls(on_host, None, None, width)
        without_masks = replace(on_host, masks=on_host.masks[:, :0, :0], id_map=None)
        return cls(without_masks, np.packbits(on_host.masks, 2), on_host.id_map, width)

    def decode(self) -> Proposals:
        """Return the proposals as they were, on the CPU."""
        if self.bits is None:
            return self.proposals
        masks = torch.from_numpy(np.unpackbits(self.bits, 2, self.width).view(bool))
        return replace(self.proposals, masks=masks, id_map=self.id_map)

    def find_covering(self, row: int, column: int) -> torch.Tensor:
        """Return the proposals that cover a pixel inside the image, `[K]` int64 indices, ascending."""
        if self.bits is None:
            return self.proposals.masks[:, row, column].nonzero()[:, 0]
        covers = self.bits[:, row, column // 8] & (0x80 >> column % 8)
        return torch.from_numpy(np.flatnonzero(covers))

    def decode_some(self, rows: torch.Tensor) -> Proposals:
        """Return some proposals, `[K]` int64 indices, without their parents and without the masks of the others."""
        quality = self.proposals.predicted_iou[rows], self.proposals.stability_score[rows]
        if self.bits is None:
            return Proposals(self.proposals.masks[rows], *quality)
        masks = np.unpackbits(self.bits[rows.numpy()], 2, self.width).view(bool)
        return Proposals(torch.from_numpy(masks), *quality)

    def decode_mask(self, proposal: int) -> np.ndarray:
        """Return the mask of one proposal, `[H, W]` bool, without those of the others."""
        if self.bits is None:
            return np.asarray(self.proposals.masks[proposal])
        return np.unpackbits(self.bits[proposal], 1, self.width).view(bool)
