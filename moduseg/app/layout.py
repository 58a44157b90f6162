"""The demo as a Gradio page: components, and which event calls what of `moduseg.app.page`."""

from __future__ import annotations

import atexit
import importlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moduseg.app import markup
from moduseg.app.examples import write_examples
from moduseg.app.page import REFUSALS_AT_START, Page, PageView, read_pointer
from moduseg.app.session import Session
from moduseg.errors import MissingError, ModusegError

TITLE = "moduseg"
INTRODUCTION = (
    "# moduseg\nClick a region to see why it has its name; type another name, and everything alike changes with it."
)
MIN_GRADIO = (6, 28)
"""As in pyproject.toml: older ones fetch a script from the network."""
STATIC = Path(__file__).parent / "static"
_WORDS = {"correct": "Name it", "undo": "Undo", "redo": "Redo", "save": "Save"}
"""What the buttons say, by the action."""
_FORWARD = 'element.addEventListener("ms-event", (event) => trigger("select", event.detail));'
"""Of components whose events static/app.js tells: they become events of Gradio."""


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
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_GRADIO:
        lowest = ".".join(map(str, MIN_GRADIO))
        raise MissingError(f"gradio: got version {version}, expected {lowest} or newer; pip install 'moduseg[app]'")
    return gradio


def style_page(gradio: Any) -> dict[str, Any]:
    """Return what `launch` takes: theme, style sheet and script."""
    script = (STATIC / "app.js").read_text("utf-8")
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    # White on Gradio's own orange is hard to read.
    readable = {"button_primary_background_fill": "*primary_700", "button_primary_background_fill_dark": "*primary_700"}
    hovered = {f"button_primary_background_fill_hover{mode}": "*primary_800" for mode in ("", "_dark")}
    return {
        "theme": gradio.themes.Default(primary_hue="blue", **fonts).set(**readable, **hovered),
        "css": (STATIC / "app.css").read_text("utf-8"),
        "head": f"<script>{script}</script>",
        "footer_links": [],
    }


def build_page(page: Page, classes: tuple[str, ...]) -> Any:
    """Return the page, a `gradio.Blocks`.

    Args:
        page: what its events do.
        classes: of the bank, offered as names.

    Raises:
        MissingError: gradio is not installed, or too old.
    """
    gradio = import_gradio()
    folder = Path(tempfile.mkdtemp(prefix="moduseg_examples_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    examples = write_examples(classes, folder)
    with gradio.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        parts = _add_components(gradio, page, classes, examples)
        _connect_events(gradio, page, parts)
    return blocks


def _add_components(gr: Any, page: Page, classes: Sequence[str], examples: Sequence[Path]) -> dict[str, Any]:
    """Lay the page out, and return its components."""
    parts: dict[str, Any] = {"session": gr.State(None), "proposal": gr.State(None), "files": examples}
    gr.Markdown(INTRODUCTION)
    with gr.Row(elem_classes="ms-top"):
        # Gradio would decode a picture of any size; without a mode it hands the file over, whose header is read first.
        parts["image"] = gr.Image(
            type="filepath", image_mode=None, label="Your picture", sources=["upload", "clipboard"], height=170
        )
        parts["examples"] = gr.HTML(markup.show_examples(examples), min_width=300, js_on_load=_FORWARD)
    with gr.Row():
        with gr.Column(scale=3, min_width=460):
            parts["picture"] = gr.HTML(markup.NO_PICTURE, js_on_load=_FORWARD)
            parts["legend"] = gr.HTML("")
        with gr.Column(scale=2, min_width=320):
            parts |= _add_controls(gr, page, classes)
            parts["explanation"] = gr.HTML(markup.NO_REGION)
    return parts


def _add_controls(gr: Any, page: Page, classes: Sequence[str]) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    with gr.Group():
        parts["label"] = gr.Dropdown(
            list(classes), label="Name of the region, old or new", allow_custom_value=True, value=None
        )
        parts["at_once"] = gr.Checkbox(label="Each region that I click gets this name")
        parts["draws"] = gr.Checkbox(label="Draw boxes by touch", elem_id="ms-draws", elem_classes="ms-touch")
    with gr.Row(elem_classes="ms-buttons"):
        for action, variant in (("correct", "primary"), ("undo", "secondary"), ("redo", "secondary")):
            parts[action] = gr.Button(_WORDS[action], variant=variant, interactive=False, min_width=80, size="md")
    parts["reasons"] = gr.HTML(_show_reasons(REFUSALS_AT_START))
    parts["change"] = gr.HTML(markup.NO_CHANGE)
    if page.save_folder is not None:
        with gr.Accordion("Save or open a bank", open=False):
            with gr.Row(elem_classes="ms-save"):
                parts["name"] = gr.Textbox(label="Save as", placeholder="my_bank", min_width=120)
                parts["save"] = gr.Button("Save", interactive=False, min_width=80)
            parts["save_reason"] = gr.HTML(_show_reasons(REFUSALS_AT_START, ("save",)))
            with gr.Row(elem_classes="ms-save"):
                parts["saved"] = gr.Dropdown(page.list_saved(), label="Saved banks", value=None, min_width=120)
                parts["open"] = gr.Button("Open", interactive=False, min_width=80)
    return parts


def _show_reasons(refusals: dict[str, str], actions: Sequence[str] = ("correct", "undo", "redo")) -> str:
    return markup.show_reasons({action: refusals[action] for action in actions}, _WORDS)


def _connect_events(gr: Any, page: Page, parts: dict[str, Any]) -> None:
    """Connect the components' events with the page's methods."""
    buttons = [name for name in _WORDS if name in parts]
    reasons = [name for name in ("reasons", "save_reason") if name in parts]
    shown = ["session", "proposal", "label", "picture", "legend", "change", "explanation", *buttons, *reasons]
    outputs = [parts[name] for name in shown]

    def allow(refusals: dict[str, str]) -> list[Any]:
        """Return the updates of `buttons` and `reasons`."""
        texts = {"reasons": _show_reasons(refusals), "save_reason": _show_reasons(refusals, ("save",))}
        return [*(gr.update(interactive=not refusals[name]) for name in buttons), *(texts[name] for name in reasons)]

    def put(session: Session, view: PageView) -> tuple[Any, ...]:
        label = gr.update(choices=list(view.classes), value=view.label)
        pages = (view.picture, view.legend, view.change, view.explanation)
        return session, view.proposal, label, *pages, *allow(view.refusals)

    def act(run: Callable[..., Any], *values: Any) -> Any:
        """Return what `run` returns, with the package's errors raised as one that Gradio shows."""
        try:
            return run(*values)
        except ModusegError as error:
            raise gr.Error(str(error), duration=None) from error

    def on_drop(session: Session | None, label: str | None, file: str | None) -> tuple[Any, ...]:
        return put(*act(page.drop, session, file, label))

    def on_point(session: Session | None, label: str | None, at_once: bool, event: Any) -> tuple[Any, ...]:
        box = read_pointer(event._data)
        if session is None or box is None:
            return tuple(gr.skip() for _ in outputs)
        return put(session, act(lambda: page.point(session, box, label, names_at_once=at_once)))

    def on_correct(session: Session, label: str | None, proposal: int | None) -> tuple[Any, ...]:
        return put(session, act(page.correct, session, proposal, label))

    def on_undo(session: Session, label: str | None) -> tuple[Any, ...]:
        return put(session, act(page.undo, session, label))

    def on_redo(session: Session, label: str | None) -> tuple[Any, ...]:
        return put(session, act(page.redo, session, label))

    def on_label(session: Session | None, label: str | None, proposal: int | None) -> list[Any]:
        return allow(page.refresh(session, proposal, label))

    def on_save(session: Session, label: str | None, proposal: int | None, name: str) -> tuple[Any, ...]:
        view = act(page.save, session, name, proposal, label)
        return *put(session, view), gr.update(choices=page.list_saved(), value=None)

    def on_open(session: Session | None, label: str | None, name: str | None) -> tuple[Any, ...]:
        return put(*act(page.open, session, name or "", label))

    def on_example(event: Any) -> Any:
        chosen = [path for path in parts["files"] if path.stem == event._data.get("name")]
        return str(chosen[0]) if chosen else gr.skip()

    # Gradio finds the event by the type of the parameter, which is known only here.
    on_point.__annotations__["event"] = on_example.__annotations__["event"] = gr.EventData
    state = [parts["session"], parts["label"]]
    # One after the other, so that no two events change a session at once; the models pass one picture at a time anyway.
    alone = {"concurrency_id": "session", "concurrency_limit": 1}
    parts["image"].change(on_drop, [*state, parts["image"]], outputs, **alone)
    parts["examples"].select(on_example, None, [parts["image"]], show_progress="hidden")
    parts["picture"].select(on_point, [*state, parts["at_once"]], outputs, show_progress="hidden", **alone)
    parts["correct"].click(on_correct, [*state, parts["proposal"]], outputs, **alone)
    parts["undo"].click(on_undo, state, outputs, **alone)
    parts["redo"].click(on_redo, state, outputs, **alone)
    allowed = [parts[name] for name in (*buttons, *reasons)]
    parts["label"].input(on_label, [*state, parts["proposal"]], allowed, show_progress="hidden", **alone)
    if "save" in parts:
        saved = parts["saved"]
        parts["save"].click(on_save, [*state, parts["proposal"], parts["name"]], [*outputs, saved], **alone)
        saved.change(lambda name: gr.update(interactive=bool(name)), [saved], [parts["open"]], show_progress="hidden")
        parts["open"].click(on_open, [*state, saved], outputs, **alone)
