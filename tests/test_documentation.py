"""The documentation: a README that can be read, links that lead somewhere, a site that builds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md"), ROOT / "data" / "README.md"]
    + [ROOT / "moduseg" / "miniature" / "README.md"]
)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 220


@pytest.mark.parametrize("page", [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES])
def test_every_link_leads_to_a_file(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert missing == []


def test_every_preset_is_named() -> None:
    page = (ROOT / "docs" / "parts.md").read_text(encoding="utf-8")
    groups = ("dataset", "proposer", "backbone", "pseudo_masks", "tagger", "discoverer", "student")
    presets = [path.stem for group in groups for path in sorted((ROOT / "configs" / group).glob("*.yaml"))]
    assert [name for name in presets if f"`{name}`" not in page] == []


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    names = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"]
    assert [name for name in names if f"]({name})" not in index] == []


@pytest.mark.parametrize(
    ("addition", "code"),
    [
        pytest.param("", 0, id="the pages as they are"),
        pytest.param("\n[nowhere](docs/nowhere.md)\n", 1, id="a link that leads nowhere"),
    ],
)
def test_the_site_builds_unless_a_link_is_broken(tmp_path: Path, addition: str, code: int) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs-material is not installed (pip install 'moduseg[docs]')")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed (pip install 'moduseg[docs]')")
    pages = tmp_path / "pages"
    subprocess.run([sys.executable, str(ROOT / "docs" / "site" / "gather_pages.py"), str(pages)], check=True)
    with (pages / "README.md").open("a", encoding="utf-8") as file:
        file.write(addition)
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / "docs" / "site" / "mkdocs.yml")]
    environment = {**os.environ, "MODUSEG_SITE_PAGES": str(pages), "NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(
        [*build, "-d", str(tmp_path / "site")], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == code, run.stderr
    assert ("docs/nowhere.md" in run.stderr) == bool(addition)
    if not addition:
        assert "Segmenter" in (tmp_path / "site" / "api" / "segmenter.html").read_text(encoding="utf-8")
