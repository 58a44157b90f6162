"""Run notebooks in a clean kernel and keep their outputs: `python examples/run_notebooks.py <notebook> ...`."""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

TIMEOUT = 900
"""Seconds that a cell may take."""


def run_notebook(path: Path) -> nbformat.NotebookNode:
    """Return a notebook with the outputs of a run from its first cell; pictures are kept once, not as PNG too.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", record_timing=False).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        # Progress and logs differ from run to run.
        kept = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
        for output in kept:
            data = output.get("data", {})
            if "text/html" in data:
                data.pop("image/png", None)
        if "outputs" in cell:
            cell.outputs = kept
    return notebook


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        nbformat.write(run_notebook(Path(argument)), argument)
