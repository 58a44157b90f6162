"""Every import of the package against the table of docs/architecture.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASE = ("errors", "structures", "config", "files", "clock", "allocator", "devices", "progress")
Table = dict[str, frozenset[str]]
"""Package -> the packages that it may import."""


def read_table(text: str) -> Table:
    """Read the table `package | holds | may import`."""
    table: Table = {}
    for name, cell in re.findall(r"^\| `([^`]+)` \|[^|]*\|([^|]*)\|$", text, re.MULTILINE):
        allowed = set(re.findall(r"`([^`]+)`", cell))
        words = set(re.sub(r"`[^`]+`", "", cell).replace(",", " ").split())
        if words == {"all", "above"}:
            allowed |= table.keys()
        elif words == {"base"}:
            allowed |= set(BASE)
        elif words not in (set(), {"nothing"}):
            raise ValueError(f"{name}: got {sorted(words)}, expected names in backticks, base, all above or nothing")
        table[name] = frozenset(allowed)
    return table


def find_package(module: str, table: Collection[str]) -> str:
    """Return the package of the table that a module belongs to, the most specific one."""
    path = module.replace(".", "/").removeprefix("moduseg/")
    fitting = [name for name in table if path == name or path.startswith(f"{name}/")]
    return max(fitting, key=len, default=module)


def find_imports(module: str, source: str, modules: Collection[str]) -> Iterator[str]:
    """Yield the modules of the package that a source imports anywhere, as `import`, `from` or relatively."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # A relative import counts its dots from the module's own package.
            parents = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            names = [child if (child := f"{origin}.{alias.name}") in modules else origin for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "moduseg")


def find_forbidden(sources: dict[str, str], table: Table) -> list[str]:
    """Return `importer -> imported` of every import that the table does not allow."""
    forbidden = []
    for module, source in sources.items():
        importer = find_package(module, table)
        for name in find_imports(module, source, sources):
            imported = find_package(name, table)
            if imported != importer and imported not in table[importer]:
                forbidden.append(f"{module} -> {name}")
    return sorted(set(forbidden))


def read_sources(package: Path) -> dict[str, str]:
    """Return the text of every module by its dotted name."""
    names = {path: ".".join(path.relative_to(package.parent).with_suffix("").parts) for path in package.rglob("*.py")}
    return {name.removesuffix(".__init__"): path.read_text("utf-8") for path, name in names.items()}


@pytest.fixture(scope="module")
def table() -> Table:
    return read_table((ROOT / "docs" / "architecture.md").read_text("utf-8"))


def test_imports_keep_to_the_table(table: Table) -> None:
    assert find_forbidden(read_sources(ROOT / "moduseg"), table) == []


def test_table_names_every_package(table: Table) -> None:
    sources = read_sources(ROOT / "moduseg")
    assert {find_package(name, table) for name in sources if name.rpartition(".")[2] != "miniature"} == table.keys()


@pytest.mark.parametrize(
    ("line", "forbidden"),
    [
        pytest.param("import moduseg.stages.infer", "moduseg.stages.infer", id="import"),
        pytest.param("from moduseg.stages import infer", "moduseg.stages.infer", id="from a package"),
        pytest.param("from moduseg.stages.infer import Infer", "moduseg.stages.infer", id="from a module"),
        pytest.param("from moduseg import stages", "moduseg.stages", id="from the root"),
        pytest.param("from ..stages import infer", "moduseg.stages.infer", id="relative"),
        pytest.param("def late():\n    import moduseg.stages.infer", "moduseg.stages.infer", id="inside a function"),
        pytest.param("from moduseg import files", None, id="allowed"),
        pytest.param("from moduseg.bank import store", None, id="its own package"),
        pytest.param("import torch", None, id="another distribution"),
    ],
)
def test_forbidden_import_is_found(line: str, forbidden: str | None, table: Table) -> None:
    sources = dict.fromkeys(("moduseg.stages", "moduseg.stages.infer", "moduseg.files", "moduseg.bank.store"), "")
    expected = [f"moduseg.bank.made_up -> {forbidden}"] if forbidden else []
    assert find_forbidden({**sources, "moduseg.bank.made_up": line}, table) == expected


def test_unknown_word_in_table_is_refused() -> None:
    with pytest.raises(ValueError, match="most"):
        read_table("| `bank` | vectors | most |")
