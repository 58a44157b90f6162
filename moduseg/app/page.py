"""The demo as a Gradio page: events in, values of components out; what they mean is in `moduseg.app`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from moduseg.app.session import Session
from moduseg.errors import MissingError, ModusegError

TITLE = "moduseg"
LEAST_SIDE = 512
"""Pictures are shown at least about that many pixels large."""
INTRODUCTION = (
    "# moduseg\nDrop a picture. Click a region to see which regions of the bank gave it its label; name it otherwise, "
    "and the bank has learned it. Nothing is written before you save."
)


def import_gradio() -> Any:
    """The package, of a version that this page is written for.

    Raises:
        MissingError: it is not there, or cannot be used.
    """
    try:
        gradio = importlib.import_module("gradio")
    except ImportError as error:
        raise MissingError(f"gradio: cannot be imported ({error}); pip install 'moduseg[app]'") from error
    version = str(gradio.__version__)
    if int(version.split(".")[0]) < 5:
        raise MissingError(f"gradio: got version {version}, expected 5 or newer; pip install 'moduseg[app]'")
    return gradio


class Page:
    """What the events of the page do. Each visitor has a session of their own, held by the page's state.

    Args:
        new_session: makes a session; models may be shared.
    """

    def __init__(self, new_session: Callable[[], Session]) -> None:
        self._new_session = new_session

    def dropped(self, session: Session | None, image: np.ndarray | None) -> tuple[Any, ...]:
        """A picture was dropped (or cleared): session, proposal, overlay, labels, explanation, thumbnails, message."""
        session = session or self._new_session()
        if image is None:
            return session, None, None, "", "", [], ""
        session.show(np.ascontiguousarray(image[:, :, :3]))
        return session, None, picture(session), labels_text(session), "Click a region of the result.", [], ""

    def clicked(self, session: Session, x: float, y: float) -> tuple[Any, ...]:
        """A place of the result was clicked: proposal, overlay, explanation, thumbnails, label."""
        factor = enlargement(session)
        proposal = session.at(x / factor, y / factor)
        if proposal is None:
            return None, picture(session), "No proposal covers this place; it counts as background.", [], None
        return proposal, picture(session, proposal), *self._explained(session, proposal)

    def corrected(self, session: Session, proposal: int | None, label: str | None) -> tuple[Any, ...]:
        """A label was given: overlay, labels, explanation, thumbnails, label, message, class names."""
        if proposal is None or not (label or "").strip():
            message = "Click a region first, then say what it is."
            text, thumbnails, shown = self._explained(session, proposal)
            return picture(session, proposal), labels_text(session), text, thumbnails, shown, message, session.classes
        changes = session.correct(proposal, label or "")
        lines = [f"Regions in the bank: {len(session.bank)}, corrections among them: {len(session.corrections)}."]
        if changes:
            lines += [f"- {change.before} → **{change.after}**" for change in changes]
        else:
            lines.append(
                f"No label changed: {session.top_k} neighbours vote, and the others still agree. Lower their number, "
                "or name more regions."
            )
        if session.left_out():
            lines.append("The outlier filter keeps some corrections out of the search.")
        text, thumbnails, shown = self._explained(session, proposal)
        message = "\n".join(lines)
        return picture(session, proposal), labels_text(session), text, thumbnails, shown, message, session.classes

    def undone(self, session: Session, proposal: int | None) -> tuple[Any, ...]:
        """The last correction is taken back; values as of `corrected`."""
        taken = session.undo()
        message = "Nothing to take back." if taken is None else f"Taken back: {taken.label}."
        text, thumbnails, shown = self._explained(session, proposal)
        return picture(session, proposal), labels_text(session), text, thumbnails, shown, message, session.classes

    def votes_set(self, session: Session | None, proposal: int | None, top_k: int) -> tuple[Any, ...]:
        """Another number of neighbours votes (0: as configured): overlay, labels, explanation, thumbnails, label."""
        if session is None:
            return None, "", "", [], None
        session.set_top_k(int(top_k) or None)
        return picture(session, proposal), labels_text(session), *self._explained(session, proposal)

    def saved(self, session: Session, out: str) -> str:
        """The bank is written: message."""
        if not out.strip():
            return "Name a folder first."
        return f"Bank of {len(session.bank)} regions -> {session.save(out.strip())}"

    def _explained(
        self, session: Session, proposal: int | None
    ) -> tuple[str, list[tuple[np.ndarray, str]], str | None]:
        if proposal is None:
            return "", [], None
        found = session.why(proposal)
        votes = ", ".join(f"{name} {count}" for name, count in found.votes.items()) or "none"
        text = f"**{found.label}**, score {found.score:.2f}; votes: {votes}"
        pictures = [
            (n.picture, f"{n.label} {n.similarity:.2f}{'' if n.voted else ', no vote'} ({n.image})")
            for n in found.neighbours
            if n.picture is not None
        ]
        missing = len(found.neighbours) - len(pictures)
        if missing:
            text += f"; {missing} training images are not at hand"
        return text, pictures, found.label


def enlargement(session: Session) -> int:
    """By how much a small picture is enlarged, a whole number."""
    return max(1, LEAST_SIDE // max(session.image.shape[:2]))


def picture(session: Session, proposal: int | None = None) -> np.ndarray:
    """What the page shows of `Session.overlay`, `[h, w, 3]` uint8."""
    factor = enlargement(session)
    return session.overlay(proposal).repeat(factor, 0).repeat(factor, 1)


def labels_text(session: Session) -> str:
    """The classes in the picture with their share of it."""
    pixels = session.prediction.label_map.size
    return ", ".join(f"{name} {100 * count / pixels:.0f} %" for name, count in session.labels())


def build_page(new_session: Callable[[], Session], classes: tuple[str, ...]) -> Any:
    """The page, a `gradio.Blocks`.

    Args:
        new_session: makes a session for a visitor.
        classes: of the bank, offered as labels.

    Raises:
        MissingError: gradio is not there.
    """
    gr = import_gradio()
    page = Page(new_session)

    def guarded(act: Callable[..., Any]) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            try:
                return act(*values)
            except ModusegError as error:
                raise gr.Error(str(error)) from error

        return run

    def clicked(session: Session, event: Any) -> Any:
        x, y = event.index
        return page.clicked(session, x, y)

    def with_choices(values: tuple[Any, ...]) -> tuple[Any, ...]:
        *rest, names = values
        rest[4] = gr.update(choices=list(names), value=rest[4])
        return tuple(rest)

    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        session, proposal = gr.State(None), gr.State(None)
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            dropped = gr.Image(type="numpy", label="picture", sources=["upload", "clipboard"], height=420)
            result = gr.Image(type="numpy", format="png", label="result: click a region", interactive=False, height=420)
        labels = gr.Markdown()
        explanation = gr.Markdown()
        # Thumbnails keep their size where there are few of them; older versions do so without being told.
        few = {"fit_columns": False} if "fit_columns" in inspect.signature(gr.Gallery).parameters else {}
        gallery = gr.Gallery(
            label="why: the nearest regions of the bank", columns=6, height=220, object_fit="contain", **few
        )
        with gr.Row():
            name = gr.Dropdown(list(classes), label="it is", allow_custom_value=True, value=None)
            add = gr.Button("Add to the bank", variant="primary")
            undo = gr.Button("Take back")
            votes = gr.Slider(0, 50, value=0, step=1, label="neighbours that vote (0: as configured)")
        message = gr.Markdown()
        with gr.Row():
            out = gr.Textbox(label="save the bank as", placeholder="my/bank")
            save = gr.Button("Save")

        views = [result, labels, explanation, gallery, name]
        dropped.change(
            guarded(page.dropped),
            [session, dropped],
            [session, proposal, result, labels, explanation, gallery, message],
        )

        # Gradio finds the event by the type of the parameter, which is known only here.
        def on_click(session_value: Session, event: Any) -> Any:
            return guarded(clicked)(session_value, event)

        on_click.__annotations__["event"] = gr.SelectData
        result.select(on_click, [session], [proposal, result, explanation, gallery, name])
        add.click(
            guarded(lambda s, p, n: with_choices(page.corrected(s, p, n))), [session, proposal, name], [*views, message]
        )
        undo.click(guarded(lambda s, p: with_choices(page.undone(s, p))), [session, proposal], [*views, message])
        votes.release(guarded(page.votes_set), [session, proposal, votes], views)
        save.click(guarded(page.saved), [session, out], [message])
    return blocks
