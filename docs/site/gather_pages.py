"""Copy the documentation's pages into one folder, as their links expect: `python docs/site/gather_pages.py <folder>`.

The pages lie where they are read in the repository: README.md at its root, data/README.md beside the data, docs/ for
the rest. MkDocs wants one folder, so the tree is copied with what the pages link to, and a page is added for each part
of the Python interface, whose text comes from the docstrings.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = (
    "*.md",
    "CITATION.cff",
    "LICENSE",
    "docs/*.md",
    "docs/images/*",
    "data/README.md",
    "examples/*.md",
    "examples/*.py",
    "examples/*.ipynb",
    "moduseg/miniature/*.md",
    "moduseg/miniature/*.png",
)
# Title and modules of each page of the Python interface.
INTERFACE = {
    "segmenter": (
        "Segmenter",
        [f"moduseg.{name}" for name in ("api", "result", "explanation", "observation", "show", "vocabulary")],
    ),
    "structures": ("Data structures", ["moduseg.structures", "moduseg.errors"]),
    "bank": (
        "Bank",
        ["moduseg.bank.store", "moduseg.bank.purification", "moduseg.bank.aggregation", "moduseg.bank.outliers"],
    ),
    "retrieval": (
        "Retrieval",
        [f"moduseg.retrieval.{name}" for name in ("retriever", "search", "vote", "suppress", "rasterize")],
    ),
    "evaluation": ("Evaluation", ["moduseg.evaluation.confusion", "moduseg.evaluation.measures"]),
}


def gather_pages(folder: Path) -> None:
    """Fill `folder`, which is emptied first, with the pages and what they link to.

    Args:
        folder: becomes MkDocs' `docs_dir`.
    """
    if folder.exists():
        shutil.rmtree(folder)
    for pattern in PATTERNS:
        for source in sorted(ROOT.glob(pattern)):
            target = folder / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    (folder / "api").mkdir()
    for name, (title, modules) in INTERFACE.items():
        sections = "\n\n".join(f"::: {module}" for module in modules)
        (folder / "api" / f"{name}.md").write_text(f"# {title}\n\n{sections}\n", encoding="utf-8")


if __name__ == "__main__":
    gather_pages(Path(sys.argv[1]).resolve())
