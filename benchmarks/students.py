"""Seconds a picture of a bank, of a trained student in PyTorch and of its ONNX file, and what each weighs on disk.

    python -m benchmarks.students <student's folder> [--bank <bank's folder>] [--images <folder>] [--count 20]

All take the same pictures, one at a time, after one that is not timed; the median counts. The number of threads is
PyTorch's (`OMP_NUM_THREADS`), which the ONNX file gets too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from moduseg import Segmenter
from moduseg.datasets.io import read_image
from moduseg.devices import resolve_device
from moduseg.evaluation.tables import markdown_table
from moduseg.students.base import to_label_map
from moduseg.students.export import export_network
from moduseg.students.store import WEIGHTS, load_student

Predict = Callable[[np.ndarray], object]


def measure(predict: Predict, images: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the medians of the milliseconds that a picture takes, by the clock and of all cores."""
    predict(images[0])
    seconds, cpu_seconds = [], []
    for image in images:
        start, cpu_start = time.perf_counter(), time.process_time()
        predict(image)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    return 1000 * median(seconds), 1000 * median(cpu_seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.students", description="Seconds of students.")
    parser.add_argument("student", type=Path)
    parser.add_argument("--bank", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--count", type=int, default=20)
    options = parser.parse_args(arguments)
    images = [read_image(path) for path in sorted(options.images.iterdir())[: options.count]]
    device = resolve_device("cpu")
    student, description = load_student(options.student, device)
    rows: list[tuple[str, ...]] = []
    if options.bank is not None:
        segmenter = Segmenter.from_bank(options.bank, device="cpu")
        size = sum((options.bank / name).stat().st_size for name in ("bank.safetensors", "bank.json"))
        rows.append(_row("bank", measure(lambda image: segmenter.predict(image).label_map, images), size))

    def predict(image: np.ndarray) -> object:
        return to_label_map(student.compute_probabilities([image])[0], student.outputs)

    rows.append(_row("student", measure(predict, images), (options.student / WEIGHTS).stat().st_size))
    rows.append(_measure_file(options.student, images))
    height, width = images[0].shape[:2]
    print(f"{len(images)} pictures, the first of {width} x {height}, {torch.get_num_threads()} threads")
    print(markdown_table((description.model["name"], "ms a picture", "ms of CPU", "MB"), rows))


def _measure_file(folder: Path, images: Sequence[np.ndarray]) -> tuple[str, ...]:
    """Export a student to the size of the first picture and return the row of its file."""
    import onnxruntime

    student, _ = load_student(folder, resolve_device("cpu"))
    height, width = images[0].shape[:2]
    path, size = folder / "student.onnx", (height, width)
    check = export_network(
        student.make_exportable(size), student.outputs, path, size, is_flexible=student.takes_any_size
    )
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])

    def predict(image: np.ndarray) -> object:
        pixels = image.astype(np.float32).transpose(2, 0, 1)[None] / 255
        return session.run(["logits"], {"image": pixels})[0].argmax(1)

    fitting = images if student.takes_any_size else [image for image in images if image.shape[:2] == size]
    return _row(f"ONNX, within {check.max_difference:.0e}", measure(predict, fitting), Path(path).stat().st_size)


def _row(name: str, milliseconds: tuple[float, float], num_bytes: int) -> tuple[str, ...]:
    return name, f"{milliseconds[0]:.1f}", f"{milliseconds[1]:.1f}", f"{num_bytes / 1e6:.2f}"


if __name__ == "__main__":
    main()
