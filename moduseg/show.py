"""Look at what a proposer finds in one photograph."""

from __future__ import annotations

import io
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from moduseg import proposers
from moduseg.config import compose
from moduseg.datasets.photographs import Picture, read_picture
from moduseg.devices import resolve_device
from moduseg.report.overlay import overlay_proposals
from moduseg.report.pictures import encode_data_url, fit_size
from moduseg.structures import Proposals

DEFAULT = "superpixels_photo"
"""The preset that needs no weights."""
_NOTEBOOK_SIDE = 560


@dataclass(frozen=True)
class ShownProposals:
    """The proposals of a photograph; a notebook shows their outlines.

    Attributes:
        image: `[H, W, 3]` uint8, the photograph.
        proposals: on the CPU, as the proposer gives them.
        preset: the proposer's name.
    """

    image: np.ndarray
    proposals: Proposals
    preset: str

    @property
    def picture(self) -> Image.Image:
        """The photograph at its own size with every outline."""
        return Image.fromarray(overlay_proposals(self.image, self.proposals.masks))

    def show(self) -> None:
        """Open the picture in the system's viewer."""
        self.picture.show()

    def __len__(self) -> int:
        return len(self.proposals)

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        return f"<{len(self)} proposals of {self.preset}, {width} x {height} pixels>"

    def _repr_html_(self) -> str:
        url = encode_data_url(np.asarray(self.picture), _NOTEBOOK_SIDE)
        return f'<div><img src="{url}" alt="outlines"><div>{escape(repr(self)[1:-1])}</div></div>'

    def _repr_png_(self) -> bytes:
        picture, file = self.picture, io.BytesIO()
        height, width = fit_size((picture.height, picture.width), _NOTEBOOK_SIDE)
        picture.resize((width, height), Image.Resampling.BOX).quantize(128).save(file, "PNG", optimize=True)
        return file.getvalue()


def show_proposals(image: Picture, proposer: str = DEFAULT, device: str = "auto") -> ShownProposals:
    """Return the masks that a proposer finds in a photograph, with a picture of their outlines.

    Args:
        image: as for `Segmenter.predict`.
        proposer: a file of `configs/proposer/`, such as `contours` or `sam2_tiny`, whose weights are fetched on first
            use.
        device: `auto`, `cpu`, `cuda`, ...

    Raises:
        ConfigError: no such preset, or one that needs more than an image.
        DataError, ValueError, TypeError: as for `read_picture`.
    """
    picture = read_picture(image)
    cfg = compose([f"proposer={proposer}"])
    built = proposers.build(cfg.proposer, resolve_device(device, cfg.runtime.precision))
    return ShownProposals(picture.pixels, built.propose(picture.sample), proposer)
