"""The lowest versions that `make test CONSTRAINTS=oldest` installs are those that the package says it allows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENT = re.compile(r"([\w.-]+)(?:\[\w+\])?>=([\w.]+)")


def read_lower_bounds() -> dict[str, str]:
    # tomllib came with Python 3.11, and every requirement of the file is a quoted line of its own or one of a list.
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    tables = text.split("\ndependencies = [")[1].split("\n[project.scripts]")[0]
    quoted = re.findall(r'"([^"]+)"', tables)
    return {match[1]: match[2] for item in quoted if (match := REQUIREMENT.fullmatch(item))}


def read_constraints(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_constraints_of_the_oldest_are_the_lower_bounds() -> None:
    bounds = read_lower_bounds()
    assert {"torch", "numpy", "diffusers", "pytest"} <= bounds.keys()
    assert read_constraints("constraints-oldest.txt") == bounds


@pytest.mark.parametrize("package", ["torch", "torchvision", "transformers", "timm", "diffusers", "numpy"])
def test_tested_versions_are_allowed(package: str) -> None:
    tested = read_constraints("constraints.txt")[package].split(" ;")[0]

    def numbers(version: str) -> list[int]:
        return [int(part) for part in version.split(".")]

    assert numbers(tested) >= numbers(read_lower_bounds()[package])
