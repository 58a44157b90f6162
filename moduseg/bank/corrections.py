"""Corrections of a bank's regions that were collected in the report, and the bank that they make."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moduseg.bank import edit
from moduseg.bank.derived import digest_bank
from moduseg.bank.store import Bank
from moduseg.errors import ArtefactError, ConfigError
from moduseg.files import read_json

VERSION = 1
"""Version of the file's format."""


@dataclass(frozen=True)
class Correction:
    """What is wrong with one region of a bank.

    Attributes:
        row: of the bank, from 0.
        image: id of the training image that the region comes from.
        before: name of the class that the bank gives it.
        after: name of the right class; `None` removes the region.
    """

    row: int
    image: str
    before: str
    after: str | None


@dataclass(frozen=True)
class CorrectionFile:
    """The content of a file of corrections.

    Attributes:
        bank: sha256 of the bank that was looked at (`moduseg.bank.derived.digest_bank`).
        corrections: at most one for each row.
    """

    bank: str
    corrections: tuple[Correction, ...]


def read_corrections(path: Path) -> CorrectionFile:
    """Read a file that the report's page "Bank" saved.

    Args:
        path: JSON, `{"version": 1, "bank": "<sha256>", "corrections": [{"row", "image", "before", "after"}]}`.

    Raises:
        ArtefactError: no such file.
        ConfigError: no JSON, JSON of another form, or two corrections of one row.
    """
    if not path.is_file():
        raise ArtefactError(f"corrections: got '{path}', no such file; save one in the report's page Bank")
    form = 'expected {"version": 1, "bank": "<sha256>", "corrections": [...]}; save it again in the report\'s page Bank'
    try:
        content = read_json(path)
    except ArtefactError as error:  # whose remedy is for the folder of an artefact
        raise ConfigError(f"{path}: got no JSON, {form}") from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ConfigError(f"{path}: got another kind of JSON, {form}")
    entries = content.get("corrections")
    if not isinstance(content.get("bank"), str) or not isinstance(entries, list):
        raise ConfigError(f"{path}: got no bank or no list of corrections, {form}")
    corrections = tuple(_read_entry(path, number, entry) for number, entry in enumerate(entries))
    counts = Counter(correction.row for correction in corrections)
    repeated = sorted(row for row, count in counts.items() if count > 1)
    if repeated:
        raise ConfigError(f"{path}: got two corrections of row {repeated[0]}, expected one; remove one of them")
    return CorrectionFile(content["bank"], corrections)


def apply_corrections(bank: Bank, file: CorrectionFile) -> Bank:
    """Return the bank with other labels for some regions, which are trusted from then on, and without others.

    Args:
        bank: the bank that the corrections were made for; it stays as it is.
        file: the corrections.

    Raises:
        ConfigError: no correction, another bank, or a class that it does not have.
    """
    if not file.corrections:
        raise ConfigError("corrections: got an empty list, expected one or more; mark a region in the report first")
    if digest_bank(bank) != file.bank:
        raise ConfigError(
            f"corrections: got those of another bank (sha256 {file.bank[:12]}, this one has {digest_bank(bank)[:12]}), "
            "expected those of this one; name the bank that the report shows in bank=<folder>"
        )
    labels = bank.labels.clone()
    is_trusted = torch.zeros(len(bank), dtype=torch.bool) if bank.is_trusted is None else bank.is_trusted.clone()
    removed = []
    for correction in file.corrections:
        _check(bank, correction)
        if correction.after is None:
            removed.append(correction.row)
        else:
            labels[correction.row] = bank.classes.index(correction.after)
            is_trusted[correction.row] = True
    relabelled = dataclasses.replace(bank, labels=labels, is_trusted=is_trusted if is_trusted.any() else None)
    return edit.remove(relabelled, rows=removed) if removed else relabelled


def describe(corrections: Sequence[Correction]) -> list[list[Any]]:
    """Return `[row, image, before, after]` of each, as the manifest of the corrected bank has them."""
    return [[entry.row, entry.image, entry.before, entry.after] for entry in corrections]


def _read_entry(path: Path, number: int, entry: Any) -> Correction:
    row, image, before = (entry.get(key) if isinstance(entry, dict) else None for key in ("row", "image", "before"))
    # Without the key, which is not the same as null, the entry says nothing.
    after: Any = entry.get("after", 0) if isinstance(entry, dict) else 0
    is_entry = isinstance(image, str) and isinstance(before, str) and isinstance(after, str | None)
    if not is_entry or not isinstance(row, int) or isinstance(row, bool) or row < 0:
        raise ConfigError(
            f"{path}: correction {number}: got {entry!r}, expected row (0 or more), image, before and after "
            "(a class, or null to remove the region)"
        )
    return Correction(int(row), str(image), str(before), after)


def _check(bank: Bank, correction: Correction) -> None:
    if correction.row >= len(bank):
        raise ConfigError(f"corrections: got row {correction.row}, expected 0..{len(bank) - 1}")
    image = bank.image_ids[int(bank.image_index[correction.row])]
    label = bank.classes[int(bank.labels[correction.row])]
    if (image, label) != (correction.image, correction.before):
        raise ConfigError(
            f"corrections: got row {correction.row} as {correction.before!r} of {correction.image!r}, the bank has "
            f"{label!r} of {image!r} there; save the corrections again from this bank's report"
        )
    if correction.after is not None and correction.after not in bank.classes:
        raise ConfigError(f"corrections: got class {correction.after!r}, expected one of {', '.join(bank.classes)}")
