"""Place the vectors of a bank on a plane, for a map to look at."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moduseg.config import Config
from moduseg.errors import ConfigError
from moduseg.report.packing import pack_numbers
from moduseg.structures import SearchBank

_COORDINATE_STEPS = 65_535


def make_maps(cfg: Config, bank: SearchBank) -> dict[str, Any]:
    """Return the maps of a bank by name, packed: `pca`, and `umap` if `evaluation.report_map` asks for it.

    Raises:
        ConfigError: the package for `umap` is not installed.
    """
    rows, vectors = bank.rows.cpu().numpy(), bank.vectors.float()
    planes = {"pca": project_to_plane(vectors)}
    if cfg.evaluation.report_map == "umap" and len(rows) > 3:
        planes["umap"] = fit_unit_square(_run_umap(vectors.cpu().numpy(), cfg.runtime.seed))
    return {
        name: {
            "rows": pack_numbers(rows, "u4"),
            "x": _pack_coordinates(points[:, 0]),
            "y": _pack_coordinates(points[:, 1]),
        }
        for name, points in planes.items()
    }


def project_to_plane(vectors: Tensor, max_sampled: int = 1500) -> np.ndarray:
    """Project vectors onto their two principal axes.

    Args:
        vectors: `[M, C]` float, as they are searched.
        max_sampled: the axes are computed from at most this many vectors, evenly chosen; all are projected.

    Returns:
        `[M, 2]` float64 in [0, 1], with one scale for both axes; the sign of an axis makes its largest entry positive.
    """
    count, width = vectors.shape
    if count < 2:
        return np.full((count, 2), 0.5)
    chosen = torch.linspace(0, count - 1, min(count, max_sampled)).round().long()
    sample = vectors[chosen].double().cpu()
    mean = sample.mean(0)
    sample = sample - mean
    # Both Gram matrices give the same axes; the smaller one is much faster.
    if len(sample) <= width:
        lengths, left = torch.linalg.eigh(sample @ sample.T)
        axes = (sample.T @ left[:, -2:]) / lengths[-2:].clamp(min=1e-12).sqrt()
    else:
        axes = torch.linalg.eigh(sample.T @ sample)[1][:, -2:]
    axes = axes.flip(1)
    if axes.shape[1] < 2:
        axes = torch.cat((axes, torch.zeros_like(axes)), 1)
    signs = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return fit_unit_square(((vectors.double().cpu() - mean) @ (axes * torch.where(signs == 0, 1, signs))).numpy())


def fit_unit_square(points: np.ndarray) -> np.ndarray:
    """Move and scale `[M, 2]` points into the unit square; the aspect ratio is kept."""
    low, high = points.min(0), points.max(0)
    extent = float((high - low).max())
    if not extent:
        return np.full(points.shape, 0.5)
    return (points - (low + high) / 2) / extent + 0.5


def _pack_coordinates(values: np.ndarray) -> str:
    return pack_numbers(np.clip(np.round(values * _COORDINATE_STEPS), 0, _COORDINATE_STEPS), "u2")


def _run_umap(vectors: np.ndarray, seed: int) -> np.ndarray:
    try:
        import umap  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ConfigError(
            "evaluation.report_map: got 'umap', but the package umap-learn is not installed; pip install umap-learn, "
            "or set evaluation.report_map=pca"
        ) from error
    points = umap.UMAP(n_neighbors=min(15, len(vectors) - 1), metric="cosine", random_state=seed).fit_transform(vectors)
    return np.asarray(points, dtype=np.float64)
