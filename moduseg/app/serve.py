"""The demo in a browser: a page on this machine, with a finished bank behind it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moduseg.api import Segmenter
from moduseg.app.layout import build_page, import_gradio, style_page
from moduseg.app.page import Page
from moduseg.app.session import Session
from moduseg.bank.derived import open_bank
from moduseg.bank.store import Bank
from moduseg.config import compose
from moduseg.config.command_keys import DemoOptions
from moduseg.config.stored import reconfigure
from moduseg.learning import find_bank_folder
from moduseg.pipeline.workspace import log
from moduseg.report.bank_regions import PictureLimits

_MAX_UPLOAD = "100mb"
NEW = "new"
"""In place of a bank: begin without one."""
PRESET = "experiment=photos_light"


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
    segmenter = open_segmenter(options.bank, overrides)
    limits = PictureLimits([Path(path).expanduser() for path in options.pictures], options.is_public)
    segmenter.picture_limits = limits

    def open_saved(folder: Path) -> Session:
        """Open a bank that the page saved; it has the models of the page if it was made with these."""
        bank = Bank.load(folder)
        # What the page was started with holds for each of its banks; `new` has models of its own.
        cfg = reconfigure(bank.info["config"], () if options.bank == NEW else overrides)
        if (cfg.proposer, cfg.backbone) == (segmenter.cfg.proposer, segmenter.cfg.backbone):
            opened = segmenter.with_bank(bank, cfg, folder)
        else:
            opened = Segmenter.from_bank(folder, segmenter.cfg.runtime.device, cfg.as_dict())
        opened.picture_limits = limits
        return Session(opened)

    save_folder = None if options.is_public else Path(options.save_folder).expanduser()
    page = Page(lambda: Session(segmenter), save_folder, options.max_pixels, open_saved)
    return build_page(page, segmenter.classes)


def open_segmenter(bank: str, overrides: Sequence[str]) -> Segmenter:
    """Return the segmenter that the page begins with.

    Args:
        bank: as `Segmenter.from_bank` takes it, or `new` for one without regions.
        overrides: of its configuration; of `new`, of the preset for photographs on a CPU.
    """
    if bank == NEW:
        chosen = (PRESET, *overrides)
        return Segmenter.begin(chosen, compose(chosen).runtime.device)
    folder = find_bank_folder(bank)
    cfg = reconfigure(open_bank(folder).info["config"], overrides)
    return Segmenter.from_bank(folder, cfg.runtime.device, cfg.as_dict())


def launch(blocks: Any, options: DemoOptions, wait: bool) -> str:
    """Serve a page, and return its address; with `wait`, not before it is interrupted."""
    _, address, _ = blocks.launch(
        server_name=options.host,
        server_port=options.port,
        share=False,
        prevent_thread_lock=not wait,
        quiet=not wait,
        max_file_size=_MAX_UPLOAD,
        **style_page(import_gradio()),
    )
    return str(address)
