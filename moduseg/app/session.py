"""The demo without a page: label an image, say why, add corrections to the bank.

session = Session.open_bank("outputs/miniature/build_bank/timm-train-1a2b3c4d")
session.show(image)                     # [H, W, 3] uint8
proposal = session.at(x, y)
session.why(proposal)                   # label, votes, the nearest regions of the bank with their pictures
session.correct(proposal, "red star")   # what changes in the picture
session.save("my/bank")                 # a new bank; the one that was opened is not changed
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moduseg.api import Observation, Segmenter
from moduseg.bank import edit
from moduseg.bank.derived import open_bank, write_derived
from moduseg.bank.store import Bank
from moduseg.datasets.io import write_label_png, write_rgb_png
from moduseg.errors import ConfigError
from moduseg.files import write_atomic
from moduseg.report.annotations import split_objects
from moduseg.report.bank_regions import RegionPictures
from moduseg.report.overlay import find_outlines, overlay_labels
from moduseg.structures import IGNORE_INDEX, Prediction

SHOWN = "shown"
"""Pictures that were shown are called `shown/<number>` in the bank."""
MIN_NEIGHBOURS = 6
"""At least this many regions of the bank explain a proposal; fewer may vote."""


@dataclass(frozen=True)
class Neighbour:
    """A region of the bank near a proposal.

    Attributes:
        row: in the bank.
        label: its class.
        image: id of its training image.
        similarity: cosine with the proposal.
        has_voted: whether it was among the nearest that vote; the others are shown for comparison.
        picture: `[h, w, 3]` uint8; `None` if the training image is not at hand.
    """

    row: int
    label: str
    image: str
    similarity: float
    has_voted: bool
    picture: np.ndarray | None


@dataclass(frozen=True)
class Explanation:
    """Why a proposal has its label.

    Attributes:
        proposal: its number.
        label: the class that won.
        score: mean similarity of the neighbours that voted for it.
        votes: voting neighbours by class, most first.
        runner_up: the class with the second most votes, `None` if all agree.
        neighbours: nearest first.
    """

    proposal: int
    label: str
    score: float
    votes: dict[str, int]
    runner_up: str | None
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class Change:
    """A proposal whose label changed."""

    proposal: int
    before: str
    after: str


@dataclass(frozen=True)
class Correction:
    """A region that a person named.

    Attributes:
        image: id of its picture in the bank.
        proposal: its number in that picture.
        label: the class it was given.
        vector: `[C]` float32, what the bank stores of it.
        area: pixels, as the bank counts them.
        mask: `[H, W]` bool.
    """

    image: str
    proposal: int
    label: str
    vector: torch.Tensor
    area: int
    mask: np.ndarray


class Session:
    """The pictures that one person looks at with one bank, and their corrections. Nothing is written before `save`.

    Args:
        segmenter: the bank and its models; other sessions may share it.
        folder: of the bank.
        picture_folders, is_public: which training images may be shown; see `RegionPictures`.
    """

    def __init__(
        self, segmenter: Segmenter, folder: Path, *, picture_folders: Sequence[Path] = (), is_public: bool = False
    ) -> None:
        self._original, self._folder = segmenter, folder
        self._top_k: int | None = None
        self._pictures = RegionPictures(folder, segmenter.bank, picture_folders=picture_folders, is_public=is_public)
        self.corrections: list[Correction] = []
        self._images: dict[str, np.ndarray] = {}
        self._image_id = ""
        self._observation: Observation | None = None
        self._prediction: Prediction | None = None
        self._segmenter = segmenter
        self._label_again()

    @classmethod
    def open_bank(cls, path: str | Path, device: str = "auto") -> Session:
        """Return a session with the bank in a folder.

        Raises:
            ArtefactError: no bank is there, or it is damaged.
        """
        folder = Path(path).expanduser()
        open_bank(folder)
        return cls(Segmenter.from_bank(folder, device), folder)

    @property
    def bank(self) -> Bank:
        """The bank with the corrections in it."""
        return self._segmenter.bank

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, background first; new ones of corrections are appended."""
        return self.bank.classes

    @property
    def top_k(self) -> int:
        """Neighbours that vote: as set, or as the bank was configured, but at most the regions of the rarest class.

        Among more neighbours, a class of a few regions could never win a vote.
        """
        return self._count_votes(self.bank)

    def _count_votes(self, bank: Bank) -> int:
        if self._top_k is not None:
            return self._top_k
        rarest = min((count for count in bank.counts.values() if count), default=1)
        return min(self._original.cfg.retrieval.top_k, rarest)

    def set_top_k(self, top_k: int | None) -> None:
        """Let so many neighbours vote; `None` for the number that `top_k` describes.

        Raises:
            ConfigError: less than 1.
        """
        if top_k is not None and top_k < 1:
            raise ConfigError(f"top_k: got {top_k}, expected 1 or more; try 5")
        self._top_k = top_k
        self._label_again()

    def read_image(self, path: Path) -> np.ndarray:
        """Read a picture as the images of the bank were read, `[H, W, 3]` uint8.

        Raises:
            DataError: the file cannot be used.
        """
        return self._original.read_image(path)

    def show(self, image: np.ndarray) -> None:
        """Label a picture, `[H, W, 3]` uint8.

        Raises:
            ConfigError: not such an array.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ConfigError(
                f"picture: got {image.shape} {image.dtype}, expected [H, W, 3] uint8 RGB; try another file"
            )
        corrected = {correction.image for correction in self.corrections}
        self._images = {image_id: shown for image_id, shown in self._images.items() if image_id in corrected}
        taken = set(self.bank.image_ids) | corrected
        self._image_id = next(name for i in range(1, len(taken) + 2) if (name := f"{SHOWN}/{i}") not in taken)
        self._images[self._image_id] = image
        self._observation = self._segmenter.observe(image)
        self._prediction = self._segmenter.label(self._observation)

    @property
    def image(self) -> np.ndarray:
        """The picture that is shown, `[H, W, 3]` uint8."""
        self._shown_prediction()
        return self._images[self._image_id]

    @property
    def prediction(self) -> Prediction:
        """Its labels, and what retrieval says of its proposals."""
        return self._shown_prediction()

    def labels(self) -> list[tuple[str, int]]:
        """Return the classes in the picture and their pixels, most first."""
        counts = np.bincount(self.prediction.label_map.ravel(), minlength=len(self.classes))
        present = [(self.classes[i], int(counts[i])) for i in np.flatnonzero(counts)]
        return sorted(present, key=lambda entry: -entry[1])

    def overlay(self, proposal: int | None = None) -> np.ndarray:
        """Return `[H, W, 3]` uint8: the picture in the colours of its labels, a chosen proposal outlined."""
        painted = overlay_labels(self.image, self.prediction.label_map)
        if proposal is not None:
            mask = self.prediction.proposals.masks[proposal].cpu().numpy()
            painted[mask] = (0.5 * painted[mask] + 0.5 * self.image[mask]).astype(np.uint8)
            painted[find_outlines(mask.astype(np.uint8), 3)] = (255, 255, 0)
        return painted

    def at(self, x: float, y: float) -> int | None:
        """Return the proposal at a pixel: the visible one, or else the smallest that covers it; `None` for none."""
        prediction = self.prediction
        height, width = prediction.label_map.shape
        column, row = int(x), int(y)
        if not (0 <= column < width and 0 <= row < height):
            return None
        covering = [int(i) for i in prediction.kept.tolist() if bool(prediction.proposals.masks[i, row, column])]
        foreground = [i for i in covering if int(prediction.labels[i]) > 0]
        # Proposals are kept, and painted, in descending score: the first one is visible.
        if foreground:
            return foreground[0]
        areas = prediction.proposals.areas
        return min(covering, key=lambda i: (int(areas[i]), i), default=None)

    def why(self, proposal: int, pictures: bool = True) -> Explanation:
        """Explain the label of a proposal by its votes and neighbours.

        Args:
            proposal: as `at` gives it.
            pictures: whether the neighbours' pictures are correction.

        Raises:
            ConfigError: no such proposal.
        """
        prediction = self._shown_prediction()
        self._check_proposal(proposal)
        bank = self.bank
        neighbours = []
        rows, similarities = self._nearest(proposal)
        for rank, (row, similarity) in enumerate(zip(rows, similarities, strict=True)):
            label, image = bank.classes[int(bank.labels[row])], bank.image_ids[int(bank.image_index[row])]
            picture = self._pictures.draw(image, label) if pictures else None
            neighbours.append(
                Neighbour(
                    row=row,
                    label=label,
                    image=image,
                    similarity=float(similarity),
                    has_voted=rank < self.top_k,
                    picture=picture,
                )
            )
        votes = Counter(neighbour.label for neighbour in neighbours if neighbour.has_voted)
        label = self.classes[int(prediction.labels[proposal])]
        others = [name for name, _ in votes.most_common() if name != label]
        ordered = {name: votes[name] for name in [label, *others] if votes[name]}
        score = float(prediction.scores[proposal])
        return Explanation(
            proposal=proposal,
            label=label,
            score=score,
            votes=ordered,
            runner_up=others[0] if others else None,
            neighbours=tuple(neighbours),
        )

    def correct(self, proposal: int, label: str) -> list[Change]:
        """Name a proposal: its vector is added to the bank, and the picture is labelled again.

        A proposal that is corrected twice counts once.

        Args:
            proposal: as `at` gives it.
            label: a class of the bank, `background`, or a new name.

        Returns:
            The proposals whose label changed.

        Raises:
            ConfigError: no such proposal, or an empty name.
        """
        before = self._shown_prediction()
        self._check_proposal(proposal)
        name = label.strip()
        edit.append_classes(self.classes, [name])
        observation, image_id = self._observation, self._image_id
        if observation is None:
            raise ConfigError("picture: got none, expected one to be shown; drop a picture first")
        mask = observation.proposals.masks[proposal]
        vector, area = edit.pool_region(mask, observation.tokens, self._original.cfg.bank)
        correction = Correction(
            image=image_id, proposal=proposal, label=name, vector=vector.cpu(), area=area, mask=mask.cpu().numpy()
        )
        others = [c for c in self.corrections if (c.image, c.proposal) != (image_id, proposal)]
        self.corrections = [*others, correction]
        names = [self.classes[int(i)] for i in before.labels]
        self._label_again()
        return [
            Change(i, names[i], self.classes[int(label_id)])
            for i, label_id in enumerate(self.prediction.labels)
            if self.classes[int(label_id)] != names[i]
        ]

    def undo(self) -> Correction | None:
        """Take the last correction back and return it; `None` if there is none."""
        if not self.corrections:
            return None
        correction = self.corrections.pop()
        self._label_again()
        return correction

    def dropped_corrections(self) -> list[Correction]:
        """Return the corrections that the outlier filter keeps out of the search."""
        searched = set(self._segmenter.searched_rows)
        start = len(self._original.bank)
        return [c for i, c in enumerate(self.corrections) if start + i not in searched]

    def save(self, out: str | Path) -> Path:
        """Write the bank with the corrections into a new folder, with their pictures, and return the folder.

        Raises:
            ConfigError: nothing was corrected.
            ArtefactError: the folder holds something else, or is that of the bank.
        """
        if not self.corrections:
            raise ConfigError("save: got no correction, expected one at least; name a proposal first")
        target = Path(out).expanduser()
        files: dict[str, str] = {}
        maps: dict[str, np.ndarray] = {}
        for correction in self.corrections:
            files[correction.image] = str((target / "images" / f"{correction.image}.png").resolve())
            labels = maps.setdefault(correction.image, np.full(correction.mask.shape, IGNORE_INDEX, np.uint8))
            labels[correction.mask] = self.classes.index(correction.label)
        details = {"corrections": [[c.image, c.label, c.area] for c in self.corrections]}
        bank = edit.append_files(self.bank, files)
        path = write_derived(
            bank,
            "correct",
            sources=[self._folder],
            details=details,
            folder=target,
            outputs=target,
            config=bank.info["config"],
        )
        for image_id, labels in maps.items():
            write_atomic(path / "images" / f"{image_id}.png", write_rgb_png(self._images[image_id]))
            write_atomic(path / "labels" / f"{image_id}.png", write_label_png(labels))
        return path

    def count_objects(self) -> int:
        """Return how many objects are visible in the picture."""
        return len(split_objects(self.prediction)[1])

    def _label_again(self) -> None:
        """Make the segmenter and the prediction for the present corrections and number of votes."""
        bank = self._original.bank
        for correction in self.corrections:
            bank = edit.add_region(bank, correction.image, correction.label, correction.vector, correction.area)
            self._pictures.add(correction.image, correction.label, self._images[correction.image], correction.mask)
        retrieval = dataclasses.replace(self._original.cfg.retrieval, top_k=self._count_votes(bank))
        self._segmenter = self._original.with_bank(bank, dataclasses.replace(self._original.cfg, retrieval=retrieval))
        if self._observation is not None:
            self._prediction = self._segmenter.label(self._observation)

    def _nearest(self, proposal: int) -> tuple[list[int], list[float]]:
        """Return rows and similarities of the neighbours that explain a proposal; none if it has no vector."""
        if self._observation is None or not bool(self._observation.pooled[proposal].any()):
            return [], []
        rows, similarities = self._segmenter.nearest(
            self._observation.pooled[proposal : proposal + 1], max(self.top_k, MIN_NEIGHBOURS)
        )
        return rows[0].tolist(), similarities[0].tolist()

    def _shown_prediction(self) -> Prediction:
        if self._prediction is None:
            raise ConfigError("picture: got none, expected one to be shown; drop a picture first")
        return self._prediction

    def _check_proposal(self, proposal: int) -> None:
        count = len(self._shown_prediction().labels)
        if not 0 <= proposal < count:
            raise ConfigError(f"proposal: got {proposal}, expected 0..{count - 1}; click inside the picture")
