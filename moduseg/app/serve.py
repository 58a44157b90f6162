"""The demo in a browser: a page on this machine, with a finished bank behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moduseg.api import Segmenter
from moduseg.app.page import Page, build_page, import_gradio
from moduseg.app.session import Session
from moduseg.bank.derived import open_bank
from moduseg.config.command_keys import DemoOptions
from moduseg.config.stored import reconfigure
from moduseg.pipeline.workspace import log

_MAX_UPLOAD = "100mb"


def main(options: DemoOptions, overrides: Sequence[str]) -> int:
    """Serve the page until it is interrupted."""
    blocks = open_page(options, overrides)
    log.info("demo_app: the bank is %s; stop with Ctrl-C", options.bank)
    launch(blocks, options, wait=True)
    return 0


def open_page(options: DemoOptions, overrides: Sequence[str] = ()) -> Any:
    """Return the page, not yet served.

    Raises:
        MissingError: gradio is not installed, or too old.
        ArtefactError: no bank is there, or it is damaged.
        ConfigError: an override is not allowed.
    """
    import_gradio()
    folder = Path(options.bank).expanduser()
    cfg = reconfigure(open_bank(folder).info["config"], overrides)
    segmenter = Segmenter.from_bank(folder, cfg.runtime.device, cfg.as_dict())
    picture_folders = [Path(path).expanduser() for path in options.pictures]

    def open_session() -> Session:
        return Session(segmenter, folder, picture_folders=picture_folders, is_public=options.is_public)

    save_folder = None if options.is_public else Path(options.save_folder).expanduser()
    return build_page(Page(open_session, save_folder, options.max_pixels), segmenter.classes)


def launch(blocks: Any, options: DemoOptions, wait: bool) -> str:
    """Serve a page, and return its address; with `wait`, not before it is interrupted."""
    _, address, _ = blocks.launch(
        server_name=options.host,
        server_port=options.port,
        share=False,
        prevent_thread_lock=not wait,
        quiet=not wait,
        max_file_size=_MAX_UPLOAD,
    )
    return str(address)
