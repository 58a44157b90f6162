"""What `Segmenter.predict` returns: a label map that can be shown, saved, asked why, and turned into other formats."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from moduseg.bank.store import Bank
from moduseg.datasets.io import write_label_png
from moduseg.datasets.photographs import NamedPicture
from moduseg.errors import ConfigError, MissingError
from moduseg.explanation import MIN_NEIGHBOURS, Explanation, NearestRows, explain
from moduseg.files import write_atomic
from moduseg.kept_proposals import KeptProposals
from moduseg.masks.polygons import find_polygons
from moduseg.report.annotations import PredictedObject, split_objects, to_coco, to_labelme, to_record
from moduseg.report.bank_regions import draw_region
from moduseg.report.overlay import overlay_labels
from moduseg.report.panel import draw_legend, make_class_legend
from moduseg.result_pictures import append_legend, encode_small_png, to_html, write_names
from moduseg.retrieval.pointing import find_region_at
from moduseg.retrieval.retriever import Retriever
from moduseg.structures import Prediction, Proposals

Kind = Literal["labels", "overlay", "coco", "labelme"]
_SUFFIX_KINDS: dict[str, Kind] = {
    ".labelme.json": "labelme", ".overlay.png": "overlay", ".json": "coco", ".png": "labels", ".jpg": "overlay",
    ".jpeg": "overlay", ".webp": "overlay",
}  # fmt: skip
"""What a file name says that is to be saved; the first ending that fits counts."""
_REGION_SIDE = 160
"""Longer side of the picture of an explained region, in pixels."""
_TOLERANCE = 1.0
"""Of polygons, in pixels, as `scripts/predict.py` has it."""


@dataclass(frozen=True)
class Change:
    """A proposal whose label changed."""

    proposal: int
    before: str
    after: str


@dataclass(frozen=True)
class BankView:
    """The bank that predictions were made with, for what they say later.

    Attributes:
        retriever: searches it.
        bank: as stored.
        draw: image id and class name -> picture of that region of the bank, `None` where there is none.
        colours: `[256, 3]` uint8, row = label id.
    """

    retriever: Retriever
    bank: Bank
    draw: Callable[[str, str], np.ndarray | None]
    colours: np.ndarray

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by id, background first."""
        return self.bank.classes


class ImagePrediction:
    """The labels of one photograph.

    It holds the photograph and what retrieval said of each proposal; masks that are many are kept as bits, an eighth of
    their memory. In a notebook it shows itself.

    Args:
        picture: the photograph.
        prediction: what retrieval says of it.
        pooled: `[N, C]` float32, the vectors of the proposals.
        view: the bank that it was made with.
        changes: proposals whose label a correction changed.

    Attributes:
        picture, pooled, view, changes: as above.
        label_map: `[H, W]` uint8, ids of `classes`.
        labels, scores, kept, neighbours, neighbour_labels, similarities: of the proposals, see
            `moduseg.structures.Prediction`.
    """

    def __init__(
        self,
        picture: NamedPicture,
        prediction: Prediction,
        pooled: torch.Tensor,
        view: BankView,
        changes: Sequence[Change] = (),
    ) -> None:
        self.picture, self.pooled, self.view, self.changes = picture, pooled, view, tuple(changes)
        self.label_map = prediction.label_map
        self.labels, self.scores, self.kept = prediction.labels, prediction.scores, prediction.kept
        self.neighbours, self.neighbour_labels = prediction.neighbours, prediction.neighbour_labels
        self.similarities = prediction.similarities
        self._confidence, self._is_named = prediction.confidence, prediction.is_named
        self._proposals = KeptProposals.of(prediction.proposals)

    @property
    def image(self) -> np.ndarray:
        """The photograph, `[H, W, 3]` uint8."""
        return self.picture.pixels

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, background first; ids of the label map index it."""
        return self.view.classes

    @property
    def proposals(self) -> Proposals:
        """The `N` proposals that were searched, on the CPU, in the proposer's order; smaller ones are dropped."""
        return self._proposals.decode()

    def get_mask(self, proposal: int) -> np.ndarray:
        """Return the mask of one of the proposals, `[H, W]` bool; much faster than `proposals`, if they are many."""
        return self._proposals.decode_mask(proposal)

    @property
    def retrieved(self) -> Prediction:
        """The same as the plain structure that the pipeline uses."""
        return Prediction(
            self.label_map,
            self.proposals,
            self.labels,
            self.scores,
            self.kept,
            self.neighbours,
            self.neighbour_labels,
            self.similarities,
            self._confidence,
            self._is_named,
        )

    @property
    def confidence(self) -> np.ndarray:
        """How sure each label is, `[H, W]` uint8, 255 if all neighbours agree (`moduseg.retrieval.confidence`).

        Raises:
            ConfigError: words are asked, which count no votes of neighbours.
        """
        if self._confidence is None:
            if self.view.retriever.settings.answer == "words":
                raise ConfigError(
                    "confidence: got retrieval.answer=words, expected labels, since it is the share of the neighbours' "
                    "votes; look at the scores of the proposals"
                )
            self._confidence = self.view.retriever.measure_confidence(self.retrieved)
        return self._confidence

    @cached_property
    def shares(self) -> dict[str, float]:
        """Share of the picture that each class has, by name, largest first; the background among them."""
        counts = np.bincount(self.label_map.ravel(), minlength=len(self.classes))
        order = sorted(np.flatnonzero(counts[: len(self.classes)]).tolist(), key=lambda label: -counts[label])
        return {self.classes[label]: float(counts[label]) / self.label_map.size for label in order}

    # Look ------------------------------------------------------------------------------------------------------------

    def overlay(self, alpha: float = 0.55, outline: int | bool = True, names: bool = False) -> Image.Image:
        """Return the photograph at its own size with its classes in colour.

        Args:
            alpha: share of the colour, in [0, 1].
            outline: width of outlines in pixels; `True` for one that suits the size, `False` for none.
            names: whether class names are written on the regions.

        Raises:
            ValueError: a share outside [0, 1], or a negative width.
        """
        painted = overlay_labels(self.image, self.label_map, self.view.colours, alpha=alpha, outline=outline)
        picture = Image.fromarray(painted)
        if names:
            write_names(picture, self.objects("components"), self.classes)
        return picture

    def legend(self) -> Image.Image:
        """Return which colour is which class, for the classes in this picture."""
        return Image.fromarray(draw_legend(self._legend()))

    def show(self) -> None:
        """Show the overlay with its legend: in the notebook, or in the system's viewer of pictures."""
        try:
            from IPython import get_ipython
            from IPython.display import display
        except ImportError:
            get_ipython = None
        if get_ipython is not None and get_ipython() is not None:
            display(self)
        else:
            append_legend(self.overlay(), self._legend()).show()

    def _legend(self) -> list[tuple[str, tuple[int, int, int]]]:
        return make_class_legend(self.classes, self.label_map, colours=self.view.colours)

    def __repr__(self) -> str:
        height, width = self.label_map.shape
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in list(self.shares.items())[:4])
        more = f", {len(self.shares) - 4} more" if len(self.shares) > 4 else ""
        changed = f", {len(self.changes)} regions changed" if self.changes else ""
        return f"<Prediction of {self.picture.name!r}, {width} x {height} pixels: {shares}{more}{changed}>"

    def _repr_html_(self) -> str:
        return to_html(self.overlay(), self._legend(), self.shares, repr(self))

    def _repr_png_(self) -> bytes:
        return encode_small_png(self.overlay(), self._legend())

    # Ask -------------------------------------------------------------------------------------------------------------

    def at(self, x: float, y: float) -> int | None:
        """Return the proposal that a person means at a pixel (`moduseg.retrieval.pointing`); `None` for none."""
        column, row = math.floor(x), math.floor(y)
        height, width = self.label_map.shape
        if not (0 <= column < width and 0 <= row < height):
            return None
        # Those that do not cover the pixel are not meant, and hundreds of masks take long to decode.
        covering = self._proposals.find_covering(row, column)
        are_all_voting = self.view.retriever.settings.selection in ("majority", "shares")
        chosen = find_region_at(self._select(covering), x, y, is_majority=are_all_voting)
        return None if chosen is None else int(covering[chosen])

    def _select(self, rows: torch.Tensor) -> Prediction:
        """Return what retrieval says of some of the proposals, `[K]` int64 indices."""
        new_rows = torch.full_like(self.labels, -1)
        new_rows[rows] = torch.arange(len(rows))
        kept = new_rows[self.kept]
        return Prediction(
            self.label_map,
            self._proposals.decode_some(rows),
            self.labels[rows],
            self.scores[rows],
            kept[kept >= 0],
            self.neighbours[rows],
            self.neighbour_labels[rows],
            self.similarities[rows],
        )

    def why(self, x: float, y: float) -> Explanation:
        """Explain the label at a pixel by the regions of the bank that decided it, as a small table with pictures.

        Raises:
            ConfigError: no proposal is there.
        """
        return self.explain(self.find_proposal(x, y))

    def explain(self, proposal: int) -> Explanation:
        """Explain the label of a proposal, as `why` does at a pixel."""
        nearest: tuple[torch.Tensor, torch.Tensor] = (torch.empty(0), torch.empty(0))
        if bool(self.pooled[proposal].any()):
            retriever = self.view.retriever
            query = self.pooled[proposal : proposal + 1].to(retriever.bank.vectors.device)
            count = MIN_NEIGHBOURS + self.neighbours.shape[1]
            rows, similarities = retriever.nearest(query, count)
            nearest = rows[0].cpu(), similarities[0].cpu()
        temperature = self.view.retriever.settings.vote_temperature
        neighbours, similarities = self.neighbours[proposal], self.similarities[proposal]
        nearest_rows = NearestRows.of(neighbours, similarities, nearest, temperature)
        label, score = self.classes[int(self.labels[proposal])], float(self.scores[proposal])
        region = draw_region(self.image, self.get_mask(proposal), _REGION_SIDE)
        bank, draw = self.view.bank, self.view.draw
        return explain(bank, nearest_rows, proposal=proposal, label=label, score=score, draw=draw, region=region)

    def find_proposal(self, x: float, y: float) -> int:
        """Return the proposal at a pixel, as `at` does.

        Raises:
            ConfigError: no proposal is there.
        """
        proposal = self.at(x, y)
        if proposal is None:
            height, width = self.label_map.shape
            raise ConfigError(
                f"point: got ({x:g}, {y:g}), where no proposal is, expected one inside a proposal of the {width} x "
                f"{height} picture; moduseg.show_proposals shows them"
            )
        return proposal

    # Convert ---------------------------------------------------------------------------------------------------------

    def objects(
        self, kind: Literal["proposals", "components"] = "proposals", min_score: float | None = None
    ) -> list[PredictedObject]:
        """Return the objects: label id, score and visible mask `[H, W]` bool of each, as `split_objects` finds them.

        Args:
            kind: what is visible of each proposal, or connected regions of a class.
            min_score: objects of a lower score are left out.
        """
        settings = self.view.retriever.settings
        return split_objects(self.retrieved, min_score, kind == "components", settings=settings)[1]

    def masks(self) -> dict[str, np.ndarray]:
        """Return the mask of each class that is in the picture, name -> `[H, W]` bool; the background is none."""
        present = [label for label in np.unique(self.label_map).tolist() if 0 < label < len(self.classes)]
        return {self.classes[label]: self.label_map == label for label in present}

    def polygons(self, tolerance: float = _TOLERANCE) -> dict[str, list[np.ndarray]]:
        """Return the outlines of each class, name -> rings `[P, 2]` float of `(x, y)` along the edges of pixels.

        Args:
            tolerance: largest distance in pixels by which an outline may be simplified; 0 keeps every step.
        """
        return {
            name: [np.asarray(ring) for ring in find_polygons(mask, tolerance, "edges")]
            for name, mask in self.masks().items()
        }

    def to_detections(self, kind: Literal["proposals", "components"] = "proposals") -> Any:
        """Return the objects as `supervision.Detections`, with `class_name` in their data.

        Raises:
            MissingError: supervision is not installed.
        """
        try:
            import supervision  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise MissingError("to_detections: got no supervision, expected it; pip install supervision") from error
        objects = self.objects(kind)
        masks = np.stack([o.mask for o in objects]) if objects else np.zeros((0, *self.label_map.shape), bool)
        return supervision.Detections(
            xyxy=supervision.mask_to_xyxy(masks).astype(np.float32) if objects else np.zeros((0, 4), np.float32),
            mask=masks,
            confidence=np.array([o.score for o in objects], dtype=np.float32),
            class_id=np.array([o.label for o in objects], dtype=int),
            data={"class_name": np.array([self.classes[o.label] for o in objects], dtype=str)},
        )

    def save(self, path: str | Path, kind: Kind | None = None) -> Path:
        """Write the prediction into a file, as its name says, and return the file.

        Args:
            path: `x.png` is the label map (ids, VOC's palette), `x.overlay.png`, `x.jpg` and `x.webp` are overlays,
                `x.json` is COCO's instances, `x.labelme.json` LabelMe's file.
            kind: `labels`, `overlay`, `coco` or `labelme`, whatever the name.

        Raises:
            ConfigError: neither the name nor `kind` says what to write.
        """
        file = Path(path)
        kind_by_name = next((k for suffix, k in _SUFFIX_KINDS.items() if file.name.lower().endswith(suffix)), None)
        chosen = kind or kind_by_name
        writers: dict[str, Callable[[Path], bytes]] = {
            "labels": lambda _: write_label_png(self.label_map),
            "overlay": self._encode_overlay,
            "coco": lambda target: _to_json(to_coco([(self._source_name(), *self._records())], self.classes)),
            "labelme": lambda target: _to_json(
                to_labelme(self._source_path(target), *self._records(), classes=self.classes)
            ),
        }
        if chosen not in writers:
            raise ConfigError(
                f"save: got {file.name!r}, expected a name that ends in {', '.join(_SUFFIX_KINDS)}, or kind=labels, "
                "overlay, coco or labelme"
            )
        write_atomic(file, writers[chosen](file))
        return file

    def _records(self) -> tuple[tuple[int, int], list[dict[str, Any]]]:
        """Return the size and the objects' records, of which COCO's and LabelMe's files are made."""
        height, width = self.label_map.shape
        return (height, width), [to_record(predicted, _TOLERANCE) for predicted in self.objects()]

    def _source_name(self) -> str:
        return self.picture.path.name if self.picture.path is not None else self.picture.name

    def _source_path(self, target: Path) -> str:
        """Return the photograph as seen from the folder of a file."""
        if self.picture.path is None:
            return self.picture.name
        return os.path.relpath(self.picture.path.resolve(), target.parent.resolve()).replace(os.sep, "/")

    def _encode_overlay(self, target: Path) -> bytes:
        file = io.BytesIO()
        suffix = target.suffix.lower()
        kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}.get(suffix, "PNG")
        self.overlay().save(file, kind, **({} if kind == "PNG" else {"quality": 92}))
        return file.getvalue()


def _to_json(content: Any) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=1).encode()


def list_changes(prediction: ImagePrediction, labels: Sequence[str]) -> list[Change]:
    """Return the proposals of a prediction that have another label now.

    Args:
        prediction: what it was.
        labels: the names that its `N` proposals have now.
    """
    before = [prediction.classes[int(label)] for label in prediction.labels]
    pairs = enumerate(zip(before, labels, strict=True))
    return [Change(proposal, old, new) for proposal, (old, new) in pairs if old != new]
