"""Command `export_student`: a trained student -> an ONNX file that agrees with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moduseg.config.command_keys import ExportStudentOptions
from moduseg.devices import resolve_device
from moduseg.students.export import export_network
from moduseg.students.store import load_student


def main(options: ExportStudentOptions, overrides: Sequence[str] = ()) -> int:
    """Write the file, compare it with PyTorch and say how far they differ.

    Raises:
        ArtefactError: there is no trained student, or it is damaged.
        ConfigError: a package is missing, or the student's backbone cannot be written as one graph.
        ModusegError: the file gives other logits than PyTorch.
    """
    folder = Path(options.student).expanduser()
    student, _ = load_student(folder, resolve_device("cpu"))
    path = folder / "student.onnx" if options.out is None else Path(options.out).expanduser()
    size = (options.height, options.width)
    network = student.make_exportable(size)
    check = export_network(network, student.outputs, path, size, is_flexible=student.takes_any_size)
    sizes = "any size" if student.takes_any_size else f"{size[0]} x {size[1]} pixels"
    print(
        f"{path}: {check.num_bytes / 1e6:.1f} MB, pictures of {sizes}, logits within {check.max_difference:.1g} of "
        "PyTorch's"
    )
    return 0
