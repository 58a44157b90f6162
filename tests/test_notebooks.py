"""The notebooks run from a clean kernel, and what is stored in them is small and free of machine paths."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support.real_weights import use_real_weights

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = ("quickstart", "own_photographs")


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_a_clean_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient", reason="nbclient is not installed (pip install 'moduseg[dev]')")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (pip install 'moduseg[dev]')")
    if name == "own_photographs":
        use_real_weights(monkeypatch)
    spec = importlib.util.spec_from_file_location("run_notebooks", EXAMPLES / "run_notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    notebook = module.run_notebook(EXAMPLES / f"{name}.ipynb")
    pictures = [output["data"]["text/html"] for cell in notebook.cells for output in cell.get("outputs", [])
                if "text/html" in output.get("data", {})]  # fmt: skip
    assert sum("data:image/jpeg" in html for html in pictures) >= 2
    stored = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert describe_values(notebook) == describe_values(stored)


def describe_values(notebook: Any) -> list[str]:
    """Return how a notebook shows its objects, `<Segmenter with # regions ...>`, without the figures."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    texts = ["".join(output.get("data", {}).get("text/plain", "")) for output in outputs]
    return [re.sub(r"[\d.]+", "#", text) for text in texts if text.startswith("<")]


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_small(name: str) -> None:
    text = (EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text) < 500_000
    assert "data:image/jpeg" in text
    folders_of_people = [f"/{name}/" for name in ("home", "Users", "root")] + [str(Path.home())]
    assert [folder for folder in folders_of_people if folder in text] == []
