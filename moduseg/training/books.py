"""What a training writes while it runs: checkpoints, the log and its curve."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moduseg.errors import ArtefactError, ConfigError
from moduseg.files import replace_atomic, write_atomic

CHECKPOINT = "training.pt"
LOG, MEASURES, CURVE = "training.csv", "measures.csv", "training.png"


def write_checkpoint(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the state of a training, so that the file is complete whenever the process dies.

    Raises:
        StorageError: disk full, no permission, read-only file system.
    """

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            torch.save(dict(state), file)

    replace_atomic(folder / CHECKPOINT, save)


def read_checkpoint(folder: Path, identity: str) -> dict[str, Any] | None:
    """Return the state that `write_checkpoint` wrote, its tensors on the CPU, or `None` if there is none.

    Args:
        folder: of the training.
        identity: of the training; the state of another one is refused.

    Raises:
        ArtefactError: the file is damaged, or of a training with other settings, data or model.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    try:
        # An optimiser counts its steps on the CPU: on a device, the host would wait for each count in each step.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ArtefactError(
            f"{path}: not readable ({type(error).__name__}); remove the folder and run again"
        ) from error
    if not isinstance(state, dict) or state.get("identity") != identity:
        raise ArtefactError(
            f"{path}: got the checkpoint of a training with other settings, data or model, expected this one's; "
            "remove the folder, or choose another"
        )
    return state


class TableLog:
    """A CSV file with a line for each logged step; the first column is `step`.

    Args:
        path: the file.
        first_step: lines of this step and later ones are dropped: the training writes them again.
        is_active: whether this process writes.
    """

    def __init__(self, path: Path, first_step: int, is_active: bool) -> None:
        self._path, self._is_active = path, is_active
        self._columns: list[str] = []
        if is_active:
            header, *rows = _read_lines(path) or [[]]
            kept = [row for row in rows if float(row[header.index("step")]) < first_step]
            self._columns = header if kept else []
            write_atomic(path, _encode([header, *kept] if kept else []))

    def write(self, row: Mapping[str, float]) -> None:
        """Append a line.

        Raises:
            ValueError: other columns than those of the lines before.
        """
        if not self._is_active:
            return
        is_first = not self._columns
        self._columns = self._columns or list(row)
        if list(row) != self._columns:
            raise ValueError(f"{self._path}: got columns {list(row)}, expected {self._columns} as before")
        values = [value if isinstance(value, int) else f"{value:.6g}" for value in row.values()]
        with self._path.open("ab") as file:
            file.write(_encode([self._columns, values] if is_first else [values]))


def _encode(lines: list[Any]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()


def read_table(path: Path) -> list[dict[str, float]]:
    """Return the lines of a log, oldest first; none if there is no file, nor a last line that a kill cut off."""
    header, *rows = _read_lines(path) or [[]]
    return [{name: float(value) for name, value in zip(header, row, strict=True)} for row in rows]


def _read_lines(path: Path) -> list[list[str]]:
    """Return the cells of the complete lines of a log as they are written, the names of its columns first."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    return list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))


def draw_training(rows: list[dict[str, float]], measures: list[dict[str, float]], title: str) -> bytes:
    """Return a PNG: what the losses and the learning rate were, and what was measured, over the steps.

    Args:
        rows: of the log, one or more.
        measures: of the measurements.
        title: of the figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    losses = [name for name in rows[0] if name.endswith("loss")]
    measured = [name for name in (measures[0] if measures else {}) if name != "step"]
    panels = [(rows, losses), (rows, ["learning_rate"]), *([(measures, measured)] if measured else [])]
    figure = Figure(figsize=(4.2 * len(panels), 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    for axes, (table, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            # A single point is no line.
            marker = "o" if len(table) == 1 else None
            steps, values = [row["step"] for row in table], [row[name] for row in table]
            axes.plot(steps, values, marker=marker, label=name.replace("_", " "))
        axes.set_xlabel("step", fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


class EventLog:
    """Events for TensorBoard in a training's folder.

    Args:
        folder: of the training.
        is_active: whether anything is written.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, is_active: bool) -> None:
        self._writer: Any = None
        if is_active:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ConfigError(
                    "training.tensorboard: got true, but TensorBoard is not installed; pip install "
                    "'moduseg[tensorboard]', or leave it out: the log is a CSV file too"
                ) from error
            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, row: Mapping[str, float]) -> None:
        """Write the values of a line of a log at its step."""
        if self._writer is not None:
            for name, value in row.items():
                if name != "step":
                    self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Write what waits."""
        if self._writer is not None:
            self._writer.close()
