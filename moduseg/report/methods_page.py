"""Write the page of the table of all methods: the report's program with a view of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moduseg.pipeline.workspace import log
from moduseg.report.page import FORMAT, Page

FOLDER = "report"


def write_methods_page(folder: Path, record: Mapping[str, Any], figure: bytes) -> Path:
    """Write the page beside the table and return the path of `index.html`.

    Args:
        folder: of the table; the page is its folder `report`.
        record: of `moduseg.studies.methods.MethodStudy.summarise`.
        figure: quality against time, an SVG.
    """
    page = Page(folder / FOLDER)
    page.write_picture("fit/quality_time.svg", figure)
    page.write_data("images", {"ids": [], "sizes": []})
    summary = {
        "format": FORMAT,
        "run": folder.name,
        "dataset": record["dataset"],
        "split": record["split"],
        "record": None,
        "methods": record,
    }
    page.write_data("summary", summary)
    index = page.write_index()
    log.info("report:  %s", index)
    return index
