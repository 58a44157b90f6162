"""The demo without a page: label a picture, say why, correct it, take it back, save what the bank learned.

session = Session.open_bank("outputs/miniature/build_bank/timm-train-1a2b3c4d")
session.show("photo.jpg")
proposal = session.at(x, y)             # or session.draw((x0, y0, x1, y1)) where no proposal fits
session.prediction.explain(proposal)    # label, votes, the nearest regions of the bank with their pictures
session.correct(proposal, "red star")   # what changed in the picture
session.undo(), session.redo()
session.save("my/bank")                 # a new bank; the one that was opened is not changed
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moduseg.api import Segmenter
from moduseg.app.changes import WhatChanged, compare_predictions
from moduseg.bank import edit
from moduseg.bank.store import Bank
from moduseg.datasets.photographs import NamedPicture, Picture, read_picture
from moduseg.errors import ConfigError
from moduseg.learning import NamedRegion
from moduseg.masks.polygons import compute_iou
from moduseg.observation import Observation
from moduseg.result import ImagePrediction

SAME_REGION = 0.9
"""A region that was drawn is the proposal that overlaps it by at least this IoU."""


@dataclass(frozen=True)
class Step:
    """What a person did, which can be taken back.

    Attributes:
        picture: in which.
        mask: `[H, W]` bool, the region.
        proposal: its number in that picture.
        named: the region with its name; `None` if it was drawn only.
    """

    picture: NamedPicture
    mask: np.ndarray = field(repr=False)
    proposal: int
    named: NamedRegion | None = None

    def describe(self) -> str:
        """Return it in a word or two."""
        return "a region that was drawn" if self.named is None else f"“{self.named.label}”"


class Session:
    """The pictures that one person looks at with one bank, and their corrections. Nothing is written before `save`.

    Args:
        segmenter: the bank and its models; other sessions may share it, and none changes it.
    """

    def __init__(self, segmenter: Segmenter) -> None:
        self._original, self._segmenter = segmenter, segmenter.with_bank(segmenter.bank)
        self._done: list[Step] = []
        self._undone: list[Step] = []
        self._picture: NamedPicture | None = None
        self._observation: Observation | None = None
        self._prediction: ImagePrediction | None = None
        self.last_change: WhatChanged | None = None

    @classmethod
    def open_bank(cls, path: str | Path, device: str = "auto") -> Session:
        """Return a session with the bank in a folder.

        Raises:
            ArtefactError: no bank is there, or it is damaged.
        """
        return cls(Segmenter.from_bank(path, device))

    @property
    def bank(self) -> Bank:
        """The bank with the corrections in it."""
        return self._segmenter.bank

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, background first; new ones of corrections are appended."""
        return self.bank.classes

    @property
    def colours(self) -> np.ndarray:
        """`[256, 3]` uint8, row = label id."""
        return self._segmenter.colours

    @property
    def named(self) -> tuple[NamedRegion, ...]:
        """The regions that were named and not taken back, in order."""
        return tuple(step.named for step in self._done if step.named is not None)

    # Look ------------------------------------------------------------------------------------------------------------

    def show(self, image: Picture | NamedPicture) -> ImagePrediction:
        """Label a picture, and return its labels.

        Args:
            image: a path, an array or the like (`moduseg.datasets.photographs.read_picture`); a file is read as the
                images of the bank were.

        Raises:
            DataError, TypeError, ValueError: it cannot be used.
        """
        path = Path(image) if isinstance(image, str | Path) else None
        if path is not None:
            picture = NamedPicture(self._segmenter.read_image(path), path.stem, path)
        else:
            picture = image if isinstance(image, NamedPicture) else read_picture(image)
        observation = self._segmenter.observe(picture.pixels)
        self._picture, self._observation = picture, observation
        # What was drawn and not named is of the last picture alone.
        self._done = [step for step in self._done if step.named is not None]
        self._undone = []
        self.last_change = None
        self._label()
        return self.prediction

    def clear(self) -> None:
        """Show no picture; what was named stays."""
        self._picture = self._observation = self._prediction = self.last_change = None
        self._done = [step for step in self._done if step.named is not None]
        self._undone = []

    @property
    def picture(self) -> NamedPicture:
        """The picture that is shown.

        Raises:
            ConfigError: none is.
        """
        if self._picture is None:
            raise ConfigError("picture: got none, expected one to be shown; drop a picture first")
        return self._picture

    @property
    def has_picture(self) -> bool:
        """Whether a picture is shown."""
        return self._picture is not None

    @property
    def prediction(self) -> ImagePrediction:
        """The labels of the picture that is shown.

        Raises:
            ConfigError: none is.
        """
        if self._prediction is None:
            raise ConfigError("picture: got none, expected one to be shown; drop a picture first")
        return self._prediction

    def at(self, x: float, y: float) -> int | None:
        """Return the proposal that a person means at a pixel; `None` for none."""
        return self.prediction.at(x, y)

    def refusals(self, proposal: int | None, label: str | None = None) -> dict[str, str]:
        """Return why an action is not possible now, by its name; the empty text where it is."""
        if not self.has_picture:
            region = "drop a picture first"
        elif proposal is None:
            region = "click a region first"
        else:
            region = "" if (label or "").strip() else "type what it is first"
        return {
            "correct": region,
            "undo": "" if self._done else "nothing to undo yet",
            "redo": "" if self._undone else "nothing was undone",
            "save": "" if self.named else "nothing was named yet",
        }

    # Say -------------------------------------------------------------------------------------------------------------

    def draw(self, box: tuple[float, float, float, float]) -> int:
        """Return the region that a box or a point means, which becomes a proposal of the picture if it is none.

        Args:
            box: `(x0, y0, x1, y1)` in pixels; a point has no size.

        Raises:
            ConfigError: outside the picture, or smaller than `retrieval.min_area`.
        """
        before = self.prediction
        mask, count = self._segmenter.observer.find_region(self.picture.sample, box), len(before.labels)
        # One mask at a time: all of them, of a large photograph, take gigabytes.
        overlaps = [compute_iou(before.get_mask(proposal), mask) for proposal in range(count)]
        if max(overlaps, default=0.0) >= SAME_REGION:
            return int(np.argmax(overlaps))
        self._done.append(Step(self.picture, mask, count))
        try:
            self._label()
        except ConfigError:
            self._done.pop()
            raise
        self._undone = []
        self.last_change = compare_predictions(before, self.prediction)
        return count

    def correct(self, proposal: int, label: str) -> WhatChanged:
        """Say what a region is, and label the picture again at once (`Segmenter.correct`).

        Args:
            proposal: as `at` and `draw` give it.
            label: a class of the bank, `background`, or a new name.

        Raises:
            ConfigError: no such proposal, one without a vector, or an empty name.
        """
        before = self.prediction
        self.check_proposal(proposal)
        name = label.strip()
        edit.append_classes(self.classes, [name])
        after = self._segmenter.correct(before, proposal, name)
        mask = before.get_mask(proposal)
        region = NamedRegion(self.picture, mask, before.pooled[proposal], name)
        self._done.append(Step(self.picture, mask, proposal, region))
        self._undone = []
        self._prediction = after
        self.last_change = compare_predictions(before, after, proposal)
        return self.last_change

    def undo(self) -> Step | None:
        """Take the last step back and return it; `None` if there is none."""
        if not self._done:
            return None
        step = self._done.pop()
        self._undone.append(step)
        self._repeat(step)
        return step

    def redo(self) -> Step | None:
        """Take the last step that was undone again and return it; `None` if there is none."""
        if not self._undone:
            return None
        step = self._undone.pop()
        self._done.append(step)
        self._repeat(step)
        return step

    def save(self, out: str | Path) -> Path:
        """Write the bank with the corrections into a new folder, with their pictures, and return the folder.

        Raises:
            ConfigError: nothing was named.
            ArtefactError: the folder holds something else, or is that of the bank.
        """
        if not self.named:
            raise ConfigError("save: got no correction, expected one at least; name a region first")
        return self._segmenter.save(out)

    def check_proposal(self, proposal: int) -> None:
        """Raise ConfigError unless the picture has this proposal."""
        count = len(self.prediction.labels)
        if not 0 <= proposal < count:
            raise ConfigError(f"proposal: got {proposal}, expected 0..{count - 1}; click inside the picture")

    def _repeat(self, changed: Step) -> None:
        """Make the bank and the prediction from the steps that are done, after one of them came or went."""
        before = self._prediction
        if changed.named is not None:
            self._segmenter = self._original.with_bank(self._original.bank)
            self._segmenter.name_regions(self.named)
        if before is not None:
            self._label()
            is_here = changed.named is not None and changed.picture is self._picture
            self.last_change = compare_predictions(before, self.prediction, changed.proposal if is_here else None)

    def _label(self) -> None:
        """Label the picture with the present bank, and with the regions that were drawn in it."""
        if self._observation is None or self._picture is None:
            return
        drawn = [step.mask for step in self._done if step.named is None]
        observation = self._segmenter.append_regions(self._picture.pixels, self._observation, drawn)
        self._prediction = self._segmenter.present(self._picture, observation)
