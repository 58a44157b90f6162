"""Write a bank in formats that other programs read."""

from __future__ import annotations

import csv
import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np

from moduseg.bank.store import Bank
from moduseg.errors import MissingError
from moduseg.files import write_atomic, write_json
from moduseg.structures import SearchBank

FORMATS = ("npz", "faiss", "csv", "projector")
"""`npz`: NumPy arrays; `faiss`: an index of inner products, its rows described in a JSON file beside it; `csv`: one
table; `projector`: the two tables without header and with header that embedding projectors load."""


def export(bank: Bank, search: SearchBank, format: str, folder: Path) -> list[Path]:
    """Write the vectors of a bank that are searched (centred, L2-normalised, without outliers).

    Args:
        bank: the stored bank.
        search: the vectors to write, from `bank.select_vectors`.
        format: one of `FORMATS`.
        folder: folder to write to.

    Returns:
        The files: `bank.npz`; `bank.faiss` and `bank.faiss.json`; `bank.csv`; `vectors.tsv` and `metadata.tsv`.

    Raises:
        MissingError: faiss is not installed.
        StorageError: a file cannot be written.
        ValueError: another format.
    """
    writers = {"npz": _write_npz, "faiss": _write_faiss, "csv": _write_csv, "projector": _write_projector}
    if format not in writers:
        raise ValueError(f"format: got {format!r}, expected one of {', '.join(FORMATS)}; try npz")
    return writers[format](bank, search, folder)


def _write_npz(bank: Bank, search: SearchBank, folder: Path) -> list[Path]:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {
        "vectors": search.vectors.cpu().numpy(),
        "labels": search.labels.cpu().numpy(),
        "rows": search.rows.cpu().numpy(),
        "areas": bank.areas[search.rows.cpu()].numpy(),
        "images": np.array(_image_ids(bank, search), dtype=np.str_),
        "classes": np.array(bank.classes, dtype=np.str_),
    }
    if search.centre is not None:
        arrays["centre"] = search.centre.cpu().numpy()
    np.savez(buffer, **arrays)
    write_atomic(folder / "bank.npz", buffer.getvalue())
    return [folder / "bank.npz"]


def _write_faiss(bank: Bank, search: SearchBank, folder: Path) -> list[Path]:
    try:
        faiss: Any = importlib.import_module("faiss")
    except ImportError as error:
        raise MissingError("format: got 'faiss', which is not there; pip install faiss-cpu, or format=npz") from error
    index = faiss.IndexFlatIP(search.vectors.shape[1])
    index.add(np.ascontiguousarray(search.vectors.cpu().numpy(), dtype=np.float32))
    write_atomic(folder / "bank.faiss", faiss.serialize_index(index).tobytes())
    description = {
        "classes": list(bank.classes),
        "labels": search.labels.tolist(),
        "rows": search.rows.tolist(),
        "images": _image_ids(bank, search),
        "areas": bank.areas[search.rows.cpu()].tolist(),
        "centre": None if search.centre is None else search.centre.tolist(),
    }
    write_json(folder / "bank.faiss.json", description)
    return [folder / "bank.faiss", folder / "bank.faiss.json"]


def _write_csv(bank: Bank, search: SearchBank, folder: Path) -> list[Path]:
    header = ["row", "label", "image", "area", *(f"v{i}" for i in range(search.vectors.shape[1]))]
    lines = [[*row, *vector] for row, vector in zip(_describe_rows(bank, search), _format_vectors(search), strict=True)]
    write_atomic(folder / "bank.csv", _encode_table([header, *lines], ","))
    return [folder / "bank.csv"]


def _write_projector(bank: Bank, search: SearchBank, folder: Path) -> list[Path]:
    metadata = [["row", "label", "image", "area"], *_describe_rows(bank, search)]
    write_atomic(folder / "vectors.tsv", _encode_table(_format_vectors(search), "\t"))
    write_atomic(folder / "metadata.tsv", _encode_table(metadata, "\t"))
    return [folder / "vectors.tsv", folder / "metadata.tsv"]


def _image_ids(bank: Bank, search: SearchBank) -> list[str]:
    return [bank.image_ids[i] for i in bank.image_index[search.rows.cpu()].tolist()]


def _describe_rows(bank: Bank, search: SearchBank) -> list[list[str]]:
    """Return row, label, image and area of each vector."""
    rows, labels = search.rows.tolist(), search.labels.tolist()
    areas = bank.areas[search.rows.cpu()].tolist()
    return [
        [str(row), bank.classes[label], image, str(area)]
        for row, label, image, area in zip(rows, labels, _image_ids(bank, search), areas, strict=True)
    ]


def _format_vectors(search: SearchBank) -> list[list[str]]:
    """Format vectors as decimals that read back as the same float32."""
    return [[str(value) for value in vector] for vector in search.vectors.cpu().numpy()]


def _encode_table(rows: list[list[str]], delimiter: str) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode()
