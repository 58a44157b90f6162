"""The demo in a browser: a page on this machine, with a finished bank behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moduseg.api import Segmenter
from moduseg.app.page import build_page, import_gradio
from moduseg.app.session import Session
from moduseg.bank.derived import open_bank
from moduseg.config.stored import reconfigure
from moduseg.pipeline.workspace import log


@dataclass(frozen=True)
class DemoOptions:
    """Keys of the command `demo_app`.

    Attributes:
        bank: folder of the bank.
        host: address to listen on; the default is this machine only.
        port: port to listen on; a free one if omitted.
    """

    bank: str
    host: str = "127.0.0.1"
    port: int | None = None

    def __post_init__(self) -> None:
        if self.port is not None and not 1 <= self.port <= 65535:
            raise ValueError(f"port: got {self.port}, expected 1 to 65535; leave it out for a free one")


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
    return build_page(lambda: Session(segmenter, folder), segmenter.classes)


def launch(blocks: Any, options: DemoOptions, wait: bool) -> str:
    """Serve a page, and return its address; with `wait`, not before it is interrupted."""
    _, address, _ = blocks.launch(
        server_name=options.host, server_port=options.port, share=False, prevent_thread_lock=not wait, quiet=not wait
    )
    return str(address)
