"""The demo as a Gradio page: events in, values of components out; `moduseg.app.session` does the work."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moduseg.app.session import Session
from moduseg.config.command_keys import MAX_DEMO_PIXELS
from moduseg.datasets.io import read_size
from moduseg.errors import ConfigError, DataError, MissingError, ModusegError

TITLE = "moduseg"
MIN_SIDE = 512
"""Smaller pictures are enlarged until their longer side has about this many pixels."""
INTRODUCTION = (
    "# moduseg\nDrop a picture. Click a region to see which regions of the bank gave it its label; name it otherwise, "
    "and the bank has learned it. Nothing is written before you save."
)


def import_gradio() -> Any:
    """Return the package, if its version is one that this page is written for.

    Raises:
        MissingError: it is not installed, or too old.
    """
    try:
        gradio = importlib.import_module("gradio")
    except ImportError as error:
        raise MissingError(f"gradio: cannot be imported ({error}); pip install 'moduseg[app]'") from error
    version = str(gradio.__version__)
    if int(version.split(".")[0]) < 5:
        raise MissingError(f"gradio: got version {version}, expected 5 or newer; pip install 'moduseg[app]'")
    return gradio


@dataclass(frozen=True)
class PageView:
    """What the page shows after an event.

    Attributes:
        proposal: the region that was clicked, `None` for none.
        overlay: `[h, w, 3]` uint8, the picture in the colours of its labels; `None` without a picture.
        labels: the classes in the picture, as text.
        explanation: why the proposal has its label, as Markdown.
        thumbnails: pictures of the neighbours with their captions.
        label: the proposal's class.
        message: what the event did.
    """

    proposal: int | None = None
    overlay: np.ndarray | None = None
    labels: str = ""
    explanation: str = ""
    thumbnails: tuple[tuple[np.ndarray, str], ...] = ()
    label: str | None = None
    message: str = ""


class Page:
    """What the events of the page do. Each visitor has a session, which the page's state holds.

    Args:
        new_session: makes a session; models may be shared.
        save_folder: banks are saved below it; `None` if the page saves none.
        max_pixels: larger pictures are refused.
    """

    def __init__(
        self, new_session: Callable[[], Session], save_folder: Path | None = None, max_pixels: int = MAX_DEMO_PIXELS
    ) -> None:
        self._new_session = new_session
        self.save_folder, self._max_pixels = save_folder, max_pixels

    def drop(self, session: Session | None, file: str | None) -> tuple[Session, PageView]:
        """Label a picture that was dropped, by its file; `None` if it was cleared.

        Raises:
            DataError: no picture, or one of too many pixels.
        """
        session = session or self._new_session()
        if file is None:
            return session, PageView()
        height, width = read_size(Path(file))
        if height * width > self._max_pixels:
            raise DataError(
                f"picture: got {width} x {height} pixels, expected at most {self._max_pixels}; make it smaller"
            )
        session.show(session.read_image(Path(file)))
        overlay, labels = draw_picture(session), describe_labels(session)
        return session, PageView(overlay=overlay, labels=labels, explanation="Click a region of the result.")

    def click(self, session: Session, x: float, y: float) -> PageView:
        """Explain the region at a pixel of the result."""
        scale = picture_scale(session)
        proposal = session.at(x / scale, y / scale)
        if proposal is None:
            text = "No proposal covers this place; it counts as background."
            return PageView(overlay=draw_picture(session), explanation=text)
        return self._view(session, proposal)

    def correct(self, session: Session, proposal: int | None, label: str | None) -> PageView:
        """Add a region to the bank with the label that was given, and label the picture again."""
        if proposal is None or not (label or "").strip():
            return self._view(session, proposal, "Click a region first, then say what it is.")
        changes = session.correct(proposal, label or "")
        lines = [f"Regions in the bank: {len(session.bank)}, corrections among them: {len(session.corrections)}."]
        if changes:
            lines += [f"- {change.before} → **{change.after}**" for change in changes]
        else:
            lines.append(
                f"No label changed: {session.top_k} neighbours vote, and the others still agree. Lower their number, "
                "or name more regions."
            )
        if session.dropped_corrections():
            lines.append("The outlier filter keeps some corrections out of the search.")
        return self._view(session, proposal, "\n".join(lines))

    def undo(self, session: Session, proposal: int | None) -> PageView:
        """Take the last correction back."""
        correction = session.undo()
        message = "Nothing to take back." if correction is None else f"Taken back: {correction.label}."
        return self._view(session, proposal, message)

    def set_votes(self, session: Session | None, proposal: int | None, top_k: int) -> PageView:
        """Let another number of neighbours vote; 0 for the number that is configured."""
        if session is None:
            return PageView()
        session.set_top_k(int(top_k) or None)
        return self._view(session, proposal)

    def save(self, session: Session, name: str) -> str:
        """Write the bank into a folder of this name below `save_folder`, and return the message.

        Raises:
            ConfigError: the page saves nothing, or the name leads out of that folder.
        """
        if self.save_folder is None:
            raise ConfigError("save: the page is open to others, expected host=127.0.0.1; start it on this machine")
        if not name.strip():
            return "Name a folder first."
        target = (self.save_folder / name.strip()).resolve() if name.isprintable() else self.save_folder
        if target == self.save_folder.resolve() or not target.is_relative_to(self.save_folder.resolve()):
            raise ConfigError(
                f"save: got {name.strip()!r}, expected the name of a folder below {self.save_folder}; try my_bank, or "
                "start the page with save_folder=<folder>"
            )
        return f"Bank of {len(session.bank)} regions -> {session.save(target)}"

    def _view(self, session: Session, proposal: int | None, message: str = "") -> PageView:
        overlay, labels = draw_picture(session, proposal), describe_labels(session)
        if proposal is None:
            return PageView(overlay=overlay, labels=labels, message=message)
        why = session.why(proposal)
        votes = ", ".join(f"{name} {count}" for name, count in why.votes.items()) or "none"
        text = f"**{why.label}**, score {why.score:.2f}; votes: {votes}"
        thumbnails = tuple(
            (n.picture, f"{n.label} {n.similarity:.2f}{'' if n.has_voted else ', no vote'} ({n.image})")
            for n in why.neighbours
            if n.picture is not None
        )
        num_missing = len(why.neighbours) - len(thumbnails)
        if num_missing:
            text += f"; {num_missing} training images are not at hand"
        return PageView(
            proposal=proposal,
            overlay=overlay,
            labels=labels,
            explanation=text,
            thumbnails=thumbnails,
            label=why.label,
            message=message,
        )


def picture_scale(session: Session) -> int:
    """Return the whole number by which a small picture is enlarged."""
    return max(1, MIN_SIDE // max(session.image.shape[:2]))


def draw_picture(session: Session, proposal: int | None = None) -> np.ndarray:
    """Return `Session.overlay` at the size that the page shows, `[h, w, 3]` uint8."""
    scale = picture_scale(session)
    return session.overlay(proposal).repeat(scale, 0).repeat(scale, 1)


def describe_labels(session: Session) -> str:
    """Return the classes in the picture with their share of it, as text."""
    pixels = session.prediction.label_map.size
    return ", ".join(f"{name} {100 * count / pixels:.0f} %" for name, count in session.labels())


def build_page(page: Page, classes: tuple[str, ...]) -> Any:
    """Return the page, a `gradio.Blocks`.

    Args:
        page: what its events do.
        classes: of the bank, offered as labels.

    Raises:
        MissingError: gradio is not installed, or too old.
    """
    gradio = import_gradio()
    with gradio.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        _connect_events(gradio, page, _add_components(gradio, classes, can_save=page.save_folder is not None))
    return blocks


def _add_components(gr: Any, classes: tuple[str, ...], can_save: bool) -> dict[str, Any]:
    """Lay the page out, and return its components; those that show a field of `PageView` have its name."""
    parts = {"session": gr.State(None), "proposal": gr.State(None)}
    gr.Markdown(INTRODUCTION)
    with gr.Row():
        # Gradio would decode a picture of any size; without a mode it hands the file over, whose header is read first.
        parts["image"] = gr.Image(
            type="filepath", image_mode=None, label="picture", sources=["upload", "clipboard"], height=420
        )
        parts["overlay"] = gr.Image(
            type="numpy", format="png", label="result: click a region", interactive=False, height=420
        )
    parts["labels"] = gr.Markdown()
    parts["explanation"] = gr.Markdown()
    # Without this option, few thumbnails would be stretched; older versions do not know it and do not stretch.
    options = {"fit_columns": False} if "fit_columns" in inspect.signature(gr.Gallery).parameters else {}
    parts["thumbnails"] = gr.Gallery(
        label="why: the nearest regions of the bank", columns=6, height=220, object_fit="contain", **options
    )
    with gr.Row():
        parts["label"] = gr.Dropdown(list(classes), label="it is", allow_custom_value=True, value=None)
        parts["add"] = gr.Button("Add to the bank", variant="primary")
        parts["undo"] = gr.Button("Take back")
        parts["votes"] = gr.Slider(0, 50, value=0, step=1, label="neighbours that vote (0: as configured)")
    parts["message"] = gr.Markdown()
    if can_save:
        with gr.Row():
            parts["name"] = gr.Textbox(label="save the bank as", placeholder="my_bank")
            parts["save"] = gr.Button("Save")
    return parts


def _connect_events(gr: Any, page: Page, parts: dict[str, Any]) -> None:
    """Connect the components' events with the page's methods."""
    region = ("overlay", "explanation", "thumbnails", "label")
    everything = ("overlay", "labels", "explanation", "thumbnails", "label", "message")
    dropped = ("proposal", "overlay", "labels", "explanation", "thumbnails", "message")

    def on_drop(session: Session | None, file: str | None) -> tuple[Any, ...]:
        session, view = _raise_as(gr.Error, page.drop, session, file)
        return session, *_values(view, dropped)

    def on_click(session: Session, event: Any) -> tuple[Any, ...]:
        return _values(_raise_as(gr.Error, page.click, session, *event.index), ("proposal", *region))

    def on_correct(session: Session, proposal: int | None, label: str | None) -> tuple[Any, ...]:
        view = _raise_as(gr.Error, page.correct, session, proposal, label)
        return _values(view, everything, gr.update(choices=list(session.classes), value=view.label))

    def on_undo(session: Session, proposal: int | None) -> tuple[Any, ...]:
        view = _raise_as(gr.Error, page.undo, session, proposal)
        return _values(view, everything, gr.update(choices=list(session.classes), value=view.label))

    def on_votes(session: Session | None, proposal: int | None, top_k: int) -> tuple[Any, ...]:
        view = _raise_as(gr.Error, page.set_votes, session, proposal, top_k)
        return _values(view, ("overlay", "labels", "explanation", "thumbnails", "label"))

    def on_save(session: Session, name: str) -> str:
        return str(_raise_as(gr.Error, page.save, session, name))

    # Gradio finds the event by the type of the parameter, which is known only here.
    on_click.__annotations__["event"] = gr.SelectData
    session, chosen = parts["session"], [parts["session"], parts["proposal"]]
    parts["image"].change(on_drop, [session, parts["image"]], [session, *(parts[name] for name in dropped)])
    parts["overlay"].select(on_click, [session], [parts[name] for name in ("proposal", *region)])
    parts["add"].click(on_correct, [*chosen, parts["label"]], [parts[name] for name in everything])
    parts["undo"].click(on_undo, chosen, [parts[name] for name in everything])
    parts["votes"].release(on_votes, [*chosen, parts["votes"]], [parts[name] for name in everything[:-1]])
    if "save" in parts:
        parts["save"].click(on_save, [session, parts["name"]], [parts["message"]])


def _values(view: PageView, names: tuple[str, ...], label: Any = None) -> tuple[Any, ...]:
    """Return fields of a view for the components of these names; `label` replaces that field."""
    fields = {**vars(view), "thumbnails": list(view.thumbnails)}
    return tuple(label if name == "label" and label is not None else fields[name] for name in names)


def _raise_as(error_class: type[Exception], act: Callable[..., Any], *values: Any) -> Any:
    """Return what `act` returns, with the package's errors raised as one that Gradio shows."""
    try:
        return act(*values)
    except ModusegError as error:
        raise error_class(str(error)) from error
