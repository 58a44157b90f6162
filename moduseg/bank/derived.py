"""Write banks that were made from other banks into folders of their own; the sources stay unchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moduseg.bank.store import Bank
from moduseg.errors import ArtefactError, suggest
from moduseg.files import FORMAT, digest_of, file_digest, read_json, write_atomic, write_json

RANKING = "ranking.safetensors"
"""What a bank's folder holds besides, if `retrieval.selection=learnt` was fitted to it."""
STAGE = "bank"
"""The folder of derived banks below a data set's, and the `stage` of their manifest."""


def open_bank(path: str | Path) -> Bank:
    """Read the bank in a folder.

    Raises:
        ArtefactError: there is none, or it is damaged.
    """
    folder = Path(path).expanduser()
    if not (folder / "bank.json").is_file():
        raise ArtefactError(describe_no_bank(folder))
    return Bank.load(folder)


def describe_no_bank(folder: Path, expected: str = "a bank's folder") -> str:
    """Return the message for a folder that is not there, or does not hold what is expected."""
    if folder.exists():
        return f"{folder}: got no bank.json, expected {expected}; run scripts/build_bank.py first"
    remedy = "did you mean latest?" if suggest(str(folder), ["latest"]) else "run scripts/build_bank.py first"
    return f"bank: got {str(folder)!r}, no such folder, expected a bank's, a run's name, or latest; {remedy}"


def digest_bank(bank: Bank) -> str:
    """Return the sha256 of what a bank holds: vectors, labels, images and class names."""
    total = hashlib.sha256()
    for tensor in (bank.pooled, bank.labels, bank.image_index, bank.areas):
        total.update(tensor.contiguous().cpu().numpy().tobytes())
    if bank.word_values is not None:
        total.update(bank.word_values.contiguous().cpu().numpy().tobytes())
    if bank.is_trusted is not None:
        total.update(bank.is_trusted.cpu().numpy().tobytes())
    total.update(digest_of([list(bank.image_ids), list(bank.classes)]).encode())
    return total.hexdigest()


def write_derived(
    bank: Bank,
    operation: str,
    *,
    sources: Sequence[Path],
    details: Mapping[str, Any],
    folder: Path | None,
    outputs: Path,
    **fields: Any,
) -> Path:
    """Write a bank that was made from others.

    Args:
        bank: what to write.
        operation: `add`, `remove`, `merge` or `correct`.
        sources: folders of the banks that it was made from.
        details: arguments of the operation, JSON values.
        folder: folder to write to; `None` for `<outputs>/<data set>/bank/<operation>-<key8>`.
        outputs: root of all artefacts.
        fields: further entries of the manifest (`seconds`, `inputs`, `failures`).

    Returns:
        The folder: `bank.safetensors`, `bank.json`, `manifest.json` with `derived_from`, and a source's ranking.

    Raises:
        ArtefactError: the folder is that of a source, or holds another artefact.
    """
    came_from = [
        {"path": str(path), "bank_sha256": file_digest(path / "bank.safetensors"), "vectors": len(open_bank(path))}
        for path in sources
    ]
    parts = {
        "format": FORMAT,
        "operation": operation,
        "details": dict(details),
        "sources": [source["bank_sha256"] for source in came_from],
        "bank": digest_bank(bank),
    }
    key = digest_of(parts)
    target = folder or outputs / str(bank.info.get("dataset", "bank")) / STAGE / f"{operation}-{key[:8]}"
    _check_not_source(target, sources)
    _check_free(target, key)
    bank.save(target)
    # A ranking says what regions look like, whichever vectors the bank holds: that of the first bank goes on.
    ranking = next((path / RANKING for path in sources if (path / RANKING).is_file()), None)
    if ranking is not None:
        write_atomic(target / RANKING, ranking.read_bytes())
    write_json(
        target / "manifest.json",
        {
            "stage": STAGE,
            "key": key,
            "parts": parts,
            "status": "complete",
            "derived_from": came_from,
            "vectors": len(bank),
            "bank_sha256": file_digest(target / "bank.safetensors"),
            "failures": 0,
            "seconds": {},
            **fields,
        },
    )
    return target


def check_target(folder: Path, operation: str, sources: Sequence[Path]) -> None:
    """Refuse a folder that could not be written to in the end, before the work for it is done.

    A bank of this operation, made of the same sources, passes: `write_derived` decides whether it is the same one.

    Raises:
        ArtefactError: the folder is a file or that of a source, or holds something else.
    """
    _check_not_source(folder, sources)
    if folder.exists() and not folder.is_dir():
        raise ArtefactError(f"{folder}: got a file, expected a folder; set out=<new folder>")
    manifest = folder / "manifest.json"
    parts = read_json(manifest).get("parts") if manifest.is_file() else None
    made_from = [file_digest(path / "bank.safetensors") for path in sources]
    is_same = isinstance(parts, dict) and (parts.get("operation"), parts.get("sources")) == (operation, made_from)
    if folder.is_dir() and any(folder.iterdir()) and not is_same:
        raise ArtefactError(
            f"{folder}: holds something else, expected a new folder; set out=<new folder>, or remove it"
        )


def _check_not_source(folder: Path, sources: Sequence[Path]) -> None:
    """Refuse a folder that is one of the sources.

    Raises:
        ArtefactError: it is.
    """
    if folder.resolve() in [path.resolve() for path in sources]:
        raise ArtefactError(f"{folder}: is the folder of the bank itself, which is never changed; set out=<new folder>")


def _check_free(folder: Path, key: str) -> None:
    """Refuse a folder that holds anything but the artefact of this key."""
    if folder.exists() and any(folder.iterdir()):
        manifest = folder / "manifest.json"
        held = read_json(manifest).get("key") if manifest.is_file() else None
        if held != key:
            raise ArtefactError(f"{folder}: holds something else (key {held!r}); set out=<new folder>, or remove it")
