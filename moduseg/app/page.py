"""What the events of the page do: values of components in, what to show out. `moduseg.app.session` does the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moduseg.app import markup
from moduseg.app.picture import draw_picture
from moduseg.app.session import Session
from moduseg.config.command_keys import MAX_DEMO_PIXELS
from moduseg.datasets.io import read_size
from moduseg.errors import ConfigError, DataError

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class PageView:
    """What the page shows after an event.

    Attributes:
        proposal: the region that was chosen, `None` for none.
        label: what it is to be called, for the field of the name; `None` for none.
        picture, legend, change, explanation: as HTML, see `moduseg.app.markup`.
        classes: names on offer.
        refusals: why an action is not possible, by its name; empty where it is.
    """

    proposal: int | None = None
    label: str | None = None
    picture: str = markup.NO_PICTURE
    legend: str = ""
    change: str = markup.NO_CHANGE
    explanation: str = markup.NO_REGION
    classes: tuple[str, ...] = ()
    refusals: dict[str, str] = field(default_factory=dict)


class Page:
    """What the events of the page do. Each visitor has a session, which the page's state holds.

    Args:
        new_session: makes a session; models may be shared.
        save_folder: banks are saved below it, and opened from there; `None` if the page does neither.
        max_pixels: larger pictures are refused.
        open_bank: makes a session with the bank in a folder.
    """

    def __init__(
        self,
        new_session: Callable[[], Session],
        save_folder: Path | None = None,
        max_pixels: int = MAX_DEMO_PIXELS,
        open_bank: Callable[[Path], Session] = Session.open_bank,
    ) -> None:
        self._new_session, self._open_bank = new_session, open_bank
        self.save_folder, self._max_pixels = save_folder, max_pixels

    def drop(self, session: Session | None, file: str | None, label: str | None = None) -> tuple[Session, PageView]:
        """Label a picture that was dropped, by its file; `None` if it was cleared.

        Raises:
            DataError: no picture, or one of too many pixels.
        """
        session = session or self._new_session()
        if file is None:
            session.clear()
            return session, self._view(session, None, label)
        height, width = read_size(Path(file))
        if height * width > self._max_pixels:
            raise DataError(
                f"picture: got {width} x {height} pixels, expected at most {self._max_pixels}; make it smaller"
            )
        session.show(Path(file))
        return session, self._view(session, None, label)

    def point(self, session: Session, box: Box, label: str | None, *, names_at_once: bool = False) -> PageView:
        """Choose the region at a pixel, or the one that a box means; draw one where there is none.

        Args:
            session: with a picture.
            box: `(x0, y0, x1, y1)` as shares of the picture's width and height; a click has no size.
            label: what the field of the name holds.
            names_at_once: whether the region gets that name without another click.
        """
        height, width = session.prediction.label_map.shape
        x0, y0, x1, y1 = box[0] * width, box[1] * height, box[2] * width, box[3] * height
        proposal, count = session.at(x0, y0) if (x0, y0) == (x1, y1) else None, len(session.prediction.labels)
        is_sought = proposal is None
        if proposal is None:
            proposal = session.draw((x0, y0, x1, y1))
        if names_at_once and (label or "").strip():
            return self.correct(session, proposal, label)
        name = session.classes[int(session.prediction.labels[proposal])]
        # A box may mean a region that was there.
        origin = "A region was drawn" if proposal >= count else "That region was there already"
        message = f"{origin}; it looks like {name}." if is_sought else ""
        return self._view(session, proposal, label if names_at_once else name, message)

    def correct(self, session: Session, proposal: int | None, label: str | None) -> PageView:
        """Say what a region is; the picture is labelled again at once."""
        refusal = session.refusals(proposal, label)["correct"]
        if proposal is None or refusal:
            return self._view(session, proposal, label, refusal.capitalize() + ".")
        session.correct(proposal, label or "")
        return self._view(session, proposal, label, shows_change=True)

    def undo(self, session: Session, label: str | None) -> PageView:
        """Take the last step back."""
        step = session.undo()
        message = "Nothing to undo." if step is None else f"Undone: {step.describe()}."
        return self._view(session, None, label, message, shows_change=step is not None)

    def redo(self, session: Session, label: str | None) -> PageView:
        """Take a step again that was undone."""
        step = session.redo()
        message = "Nothing was undone." if step is None else f"Done again: {step.describe()}."
        return self._view(session, None, label, message, shows_change=step is not None)

    def save(
        self, session: Session, name: str | None, proposal: int | None = None, label: str | None = None
    ) -> PageView:
        """Write the bank into a folder of this name below `save_folder`; `None` where nothing was typed.

        Raises:
            ConfigError: the page saves nothing, nothing was named, or the name leads out of that folder.
        """
        path = session.save(self._find_saved(name or "", "save"))
        message = f"Saved: a bank of {len(session.bank)} regions in {path}."
        return self._view(session, proposal, label, message)

    def open(self, session: Session | None, name: str, label: str | None = None) -> tuple[Session, PageView]:
        """Go on with a bank that was saved, and with the picture that is shown.

        Raises:
            ConfigError: the page opens nothing, or the name leads out of that folder.
            ArtefactError: no bank is there, or it does not fit the models.
        """
        opened = self._open_bank(self._find_saved(name, "open"))
        if session is not None and session.has_picture:
            opened.show(session.picture)
        count = len(opened.bank)
        return opened, self._view(opened, None, label, f"Opened: {name}, a bank of {count} regions.")

    def list_saved(self) -> list[str]:
        """Return the names of the banks below `save_folder`, the latest first."""
        if self.save_folder is None or not self.save_folder.is_dir():
            return []
        banks = [path.parent for path in self.save_folder.glob("*/bank.json")]
        return [path.name for path in sorted(banks, key=lambda path: (-path.stat().st_mtime_ns, path.name))]

    def refresh(self, session: Session | None, proposal: int | None, label: str | None) -> dict[str, str]:
        """Return why actions are not possible, see `Session.refusals`."""
        return REFUSALS_AT_START if session is None else session.refusals(proposal, label)

    def _find_saved(self, name: str, verb: str) -> Path:
        if self.save_folder is None:
            raise ConfigError(f"{verb}: the page is open to others, expected host=127.0.0.1; start it on this machine")
        target = (self.save_folder / name.strip()).resolve() if name.isprintable() else self.save_folder.resolve()
        if target == self.save_folder.resolve() or not target.is_relative_to(self.save_folder.resolve()):
            raise ConfigError(
                f"{verb}: got {name.strip()!r}, expected the name of a folder below {self.save_folder}; try my_bank, "
                "or start the page with save_folder=<folder>"
            )
        return target

    def _view(
        self, session: Session, proposal: int | None, label: str | None, message: str = "", shows_change: bool = False
    ) -> PageView:
        refusals = session.refusals(proposal, label)
        change = session.last_change if shows_change else None
        if not session.has_picture:
            said = markup.show_change(change, message)
            return PageView(None, label, change=said, classes=session.classes, refusals=refusals)
        prediction = session.prediction
        shown = draw_picture(prediction, session.colours, proposal, change)
        return PageView(
            proposal=proposal,
            label=label,
            picture=markup.show_picture(shown, prediction),
            legend=markup.show_legend(prediction, session.colours),
            change=markup.show_change(change, message),
            explanation=markup.show_explanation(None if proposal is None else prediction.explain(proposal)),
            classes=session.classes,
            refusals=refusals,
        )


REFUSALS_AT_START = {
    "correct": "drop a picture first",
    "undo": "nothing to undo yet",
    "redo": "nothing was undone",
    "save": "nothing was named yet",
}
"""Of a page without a session."""


def read_pointer(data: Any) -> Box | None:
    """Return the box that static/app.js sent, as shares of the picture in [0, 1]; `None` for anything else."""
    try:
        values = [float(value) for value in data["box"]]
    except (ValueError, TypeError, KeyError):
        return None
    if len(values) != 4 or not all(0 <= value <= 1 for value in values):
        return None
    # The last pixel's far edge is outside.
    return tuple(min(value, 1 - 1e-9) for value in values)  # type: ignore[return-value]
