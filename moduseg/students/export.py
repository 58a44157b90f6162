"""A trained student as an ONNX file, which runs without this package and without PyTorch."""

from __future__ import annotations

import io
import json
import warnings
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moduseg.errors import ConfigError, ModusegError
from moduseg.files import replace_atomic
from moduseg.students.base import Outputs

_OPSET = 18
MAX_DIFFERENCE = 1e-4
"""How much a logit of the file may differ from PyTorch's, as a share of the largest logit where that is above 1."""


@dataclass(frozen=True)
class ExportCheck:
    """What a file gives beside PyTorch on pictures of noise.

    Attributes:
        max_difference: largest difference of a logit, as a share of the largest logit where that is above 1.
        num_bytes: size of the file.
    """

    max_difference: float
    num_bytes: int


def export_network(
    network: nn.Module, outputs: Outputs, path: Path, size: tuple[int, int], *, is_flexible: bool
) -> ExportCheck:
    """Write a network as an ONNX file and compare it with PyTorch.

    The file takes `image` `[B, 3, H, W]` float32 RGB in [0, 1] and gives `logits` `[B, K, H, W]` float32. Its metadata
    holds `classes` (JSON, background first) and `first_id`, the class id of the first channel.

    Args:
        network: image -> logits, on the CPU, in evaluation mode.
        outputs: what the channels stand for.
        path: the file to write.
        size: `(height, width)` of the picture that the export is traced with.
        is_flexible: whether the file takes pictures of any number and size; else one of `size`.

    Raises:
        ConfigError: a package is missing that exports or checks.
        ModusegError: the file gave other logits than PyTorch, and is removed.
        StorageError: the file cannot be written.
    """
    _check_packages()
    # Two pictures, since a tracer takes a single one for a constant.
    example = torch.rand(2 if is_flexible else 1, 3, *size, generator=torch.Generator().manual_seed(0))
    shapes: Any = None
    if is_flexible:
        dim = torch.export.Dim
        shapes = ({0: dim("batch"), 2: dim("height", min=32), 3: dim("width", min=32)},)
    with torch.no_grad(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of the exporter, about its own coming versions
        program = torch.onnx.export(
            network,
            (example,),
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=shapes,
            opset_version=_OPSET,
            dynamo=True,
            optimize=False,  # whoever opens the file does that, and it takes most of the time here
            external_data=False,
            verbose=False,
        )
    if program is None:
        raise ModusegError(f"{path}: PyTorch exported nothing; update torch and onnxscript")
    program.model.metadata_props.update(
        {"classes": json.dumps(list(outputs.classes), ensure_ascii=False), "first_id": str(outputs.first_id)}
    )
    replace_atomic(path, lambda temporary: program.save(str(temporary), external_data=False))
    try:
        return check_export(network, path, size, is_flexible=is_flexible)
    except ModusegError:
        # Whoever misses the message is not to find a file that looks like a good one.
        path.unlink(missing_ok=True)
        raise


def check_export(network: nn.Module, path: Path, size: tuple[int, int], *, is_flexible: bool) -> ExportCheck:
    """Compare a file with PyTorch on pictures of noise, of other sizes too if it takes any.

    Raises:
        ModusegError: they differ by more than `MAX_DIFFERENCE`.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, *size), (3, size[0] + 37, size[1] + 10)] if is_flexible else [(1, *size)]
    largest = 0.0
    for count, height, width in shapes:
        pictures = torch.rand(count, 3, height, width, generator=generator)
        with torch.no_grad():
            expected = network(pictures).numpy()
        logits = session.run(["logits"], {"image": pictures.numpy()})[0]
        scale = max(1.0, float(np.abs(expected).max()))
        largest = max(largest, float(np.abs(logits - expected).max()) / scale)
    if not largest <= MAX_DIFFERENCE:
        raise ModusegError(
            f"{path}: its logits differ from PyTorch's by {largest:.2g}, expected at most {MAX_DIFFERENCE}; do not use "
            "the file, and report the versions of torch, onnxscript and onnxruntime"
        )
    return ExportCheck(largest, path.stat().st_size)


def _check_packages() -> None:
    """Raise ConfigError if a package is missing that exports or checks."""
    import importlib.util

    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"export_student: {', '.join(missing)} not installed; pip install 'moduseg[onnx]'")
