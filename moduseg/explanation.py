"""Why a region has its label: the regions of the bank that are nearest to it, as values, a table and a picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from PIL import Image

from moduseg.bank.store import Bank
from moduseg.report.bank_regions import RegionPictures, draw_region
from moduseg.report.panel import draw_panel_picture
from moduseg.report.pictures import encode_data_url

MIN_NEIGHBOURS = 6
"""At least this many regions of the bank explain a proposal; fewer may vote."""
BANK_PICTURE_SIDE = 160
"""Longer side of the picture of a bank region, in pixels."""
_SIDE = 120
"""Longer side of a neighbour's picture in a table, in pixels."""


@dataclass(frozen=True)
class Neighbour:
    """A region of the bank near a proposal.

    Attributes:
        row: in the bank.
        label: its class.
        image: id of its training image.
        similarity: cosine with the proposal.
        has_voted: whether it was among those that decided; the others are shown for comparison.
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
    """Why a proposal has its label; a notebook shows it as a table with pictures.

    Attributes:
        proposal: its number.
        label: the class that won.
        score: mean similarity of the neighbours that voted for it.
        votes: voting neighbours by class, the winner first, then in descending share.
        runner_up: the class with the second largest share of the votes, `None` if all agree.
        neighbours: nearest first.
        region: `[h, w, 3]` uint8, the proposal itself; `None` if it was not asked for.
        shares: share of the votes by class, 0 to 1, where near neighbours count more (`retrieval.vote_temperature`);
            `None` if all count alike.
    """

    proposal: int
    label: str
    score: float
    votes: dict[str, int]
    runner_up: str | None
    neighbours: tuple[Neighbour, ...]
    region: np.ndarray | None = None
    shares: dict[str, float] | None = None

    def describe_votes(self) -> str:
        """Return the votes in words: `cat 6, background 19`, or `cat 6 (91 %), background 19 (9 %)`."""
        texts = [
            f"{name} {count}" if self.shares is None else f"{name} {count} ({100 * self.shares[name]:.0f} %)"
            for name, count in self.votes.items()
        ]
        return ", ".join(texts) or "none"

    @property
    def picture(self) -> Image.Image:
        """The region and its neighbours side by side, under their names and similarities."""
        columns = [] if self.region is None else [(f"region: {self.label}", self.region)]
        for neighbour in self.neighbours:
            if neighbour.picture is not None:
                columns.append((f"{neighbour.label} {neighbour.similarity:.2f}", neighbour.picture))
        if not columns:
            columns = [("no picture at hand", np.full((_SIDE, _SIDE, 3), 255, np.uint8))]
        return Image.fromarray(draw_panel_picture(columns))

    def __str__(self) -> str:
        lines = [f"{self.label}, score {self.score:.3f}, votes: {self.describe_votes()}"]
        if self.neighbours:
            widest = max(len(neighbour.label) for neighbour in self.neighbours)
            lines += [
                f"  {'*' if n.has_voted else ' '} {n.similarity:.3f}  {n.label:<{widest}}  {n.image}"
                for n in self.neighbours
            ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        rows = []
        for n in self.neighbours:
            picture = (
                "" if n.picture is None else f'<img src="{encode_data_url(n.picture, _SIDE)}" alt="{escape(n.image)}">'
            )
            rows.append(
                f"<tr><td>{picture}</td><td>{escape(n.label)}</td><td>{n.similarity:.3f}</td>"
                f"<td>{'yes' if n.has_voted else ''}</td><td>{escape(n.image)}</td></tr>"
            )
        region = ""
        if self.region is not None:
            region = f'<img src="{encode_data_url(self.region, 2 * _SIDE)}" alt="the region"><br>'
        return (
            f"<div>{region}<b>{escape(self.label)}</b>, score {self.score:.3f}; votes: {escape(self.describe_votes())}"
            "<table><thead><tr><th>region of the bank</th><th>class</th><th>similarity</th><th>decided</th>"
            f"<th>image</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        )


@dataclass(frozen=True)
class BankPictures:
    """Pictures of the regions of a bank: of the images that it has learned from in memory, else of its stored ones.

    Attributes:
        classes: of the bank.
        find_learned: image id and class id -> image and mask `[H, W]` bool of a learned image; `None` for another one.
        stored: finds the photographs of a stored bank; `None` for a bank in memory.
    """

    classes: Sequence[str]
    find_learned: Callable[[str, int], tuple[np.ndarray, np.ndarray] | None]
    stored: RegionPictures | None

    def draw(self, image_id: str, class_name: str) -> np.ndarray | None:
        """Return the picture of a class in an image, `[h, w, 3]` uint8; `None` if the image is not at hand."""
        learned = self.find_learned(image_id, self.classes.index(class_name))
        if learned is not None:
            image, mask = learned
            return draw_region(image, mask if mask.any() else None, BANK_PICTURE_SIDE)
        return None if self.stored is None else self.stored.draw(image_id, class_name)


@dataclass(frozen=True)
class NearestRows:
    """The regions of the bank that are nearest to a proposal, and those that decided its label.

    Attributes:
        rows: of the bank, nearest first.
        similarities: cosines.
        voters: rows that decided.
        temperature: weighs their votes as in `moduseg.retrieval.vote`; `None` weighs all alike.
    """

    rows: Sequence[int]
    similarities: Sequence[float]
    voters: Sequence[int]
    temperature: float | None = None

    @classmethod
    def of(
        cls,
        neighbours: torch.Tensor,
        similarities: torch.Tensor,
        nearest: tuple[torch.Tensor, torch.Tensor],
        temperature: float | None = None,
    ) -> NearestRows:
        """Join the neighbours that decided, `[k]` rows and similarities, with the nearest, `[n]` each.

        Those that decided need not be the nearest: the vote may be balanced between classes, and a region that a person
        named decides alone.
        """
        voters = [(int(r), float(s)) for r, s in zip(neighbours, similarities, strict=True) if r >= 0]
        named = {row for row, _ in voters}
        others = [(int(r), float(s)) for r, s in zip(*nearest, strict=True) if int(r) not in named]
        wanted = max(len(voters), MIN_NEIGHBOURS)
        # A stable sort keeps the voters before others of equal similarity.
        chosen = sorted([*voters, *others[: wanted - len(voters)]], key=lambda entry: -entry[1])
        return cls([row for row, _ in chosen], [similarity for _, similarity in chosen], sorted(named), temperature)


def explain(
    bank: Bank,
    nearest: NearestRows,
    *,
    proposal: int,
    label: str,
    score: float,
    draw: Callable[[str, str], np.ndarray | None] | None = None,
    region: np.ndarray | None = None,
) -> Explanation:
    """Return why a proposal has its label.

    Args:
        bank: as stored.
        nearest: rows of the bank.
        proposal: its number.
        label: the class that won.
        score: see `Explanation`.
        region: `[h, w, 3]` uint8, the proposal itself; left out if omitted.
        draw: image id and class name -> picture of the region; no pictures if omitted.
    """
    neighbours = []
    voters = set(nearest.voters)
    for row, similarity in zip(nearest.rows, nearest.similarities, strict=True):
        name, image = bank.classes[int(bank.labels[row])], bank.image_ids[int(bank.image_index[row])]
        picture = None if draw is None else draw(image, name)
        neighbours.append(Neighbour(row, name, image, similarity, row in voters, picture))
    votes: Counter[str] = Counter()
    weights: dict[str, float] = {}
    highest = max((neighbour.similarity for neighbour in neighbours if neighbour.has_voted), default=0.0)
    for neighbour in neighbours:
        if neighbour.has_voted:
            votes[neighbour.label] += 1
            weight = 1.0
            if nearest.temperature is not None:
                weight = math.exp((neighbour.similarity - highest) / nearest.temperature)
            weights[neighbour.label] = weights.get(neighbour.label, 0.0) + weight
    # A stable sort keeps classes of equal weight in the order of their nearest neighbour.
    others = sorted((name for name in weights if name != label), key=lambda name: -weights[name])
    ordered = {name: votes[name] for name in [label, *others] if votes[name]}
    total = sum(weights.values())
    shares = None if nearest.temperature is None else {name: weights[name] / total for name in ordered}
    runner_up = others[0] if others else None
    return Explanation(proposal, label, score, ordered, runner_up, tuple(neighbours), region, shares)
