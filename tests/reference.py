"""The steps of docs/method.md as they read, one mask at a time in numpy and OpenCV.

Tests compare results with it, the benchmark times.
"""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

GOLDEN = Path(__file__).parent / "data" / "golden"


def load_golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of one golden file, masks unpacked to `[N, H, W]` bool."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    if "masks" in arrays:
        arrays["masks"] = np.unpackbits(arrays["masks"], axis=-1, count=int(arrays["width"])).astype(bool)
    return arrays


def tensors(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """Every array that is not a single number, on a device."""
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items() if array.ndim}


def random_masks(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """`[count, height, width]` bool: overlapping ellipses of all sizes, some cut off at the border."""
    y, x = np.mgrid[:height, :width]
    masks = np.zeros((count, height, width), bool)
    for mask in masks:
        cy, cx, ry, rx = rng.uniform([0, 0, 1, 1], [height, width, height / 2, width / 2])
        mask[:] = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1
    return masks


def purify(label_map: np.ndarray, kernel_size: int, iterations: int, ignore_index: int = 255) -> np.ndarray:
    """Each class's binary mask eroded by OpenCV, whose default border does not erode."""
    kernel = np.ones((kernel_size, kernel_size), np.uint8)
    result = np.full_like(label_map, ignore_index)
    for value in np.unique(label_map):
        if value != ignore_index:
            mask = cv2.erode((label_map == value).astype(np.uint8), kernel, iterations=iterations)
            result[mask > 0] = value
    return result


def patch_coverage(mask: np.ndarray, patch_size: int) -> np.ndarray:
    """The mask, padded to whole patches, resized to the patch grid by area."""
    rows, columns = (-(-side // patch_size) for side in mask.shape)
    padded = np.zeros((rows * patch_size, columns * patch_size), np.float32)
    padded[: mask.shape[0], : mask.shape[1]] = mask
    means = cv2.resize(padded, (columns, rows), interpolation=cv2.INTER_AREA)
    area = np.float32(patch_size**2)
    return np.rint(means * area) / area  # whole pixels, whatever the resizing rounded


def resized_coverage(mask: np.ndarray, input_size: tuple[int, int], stride: int) -> np.ndarray:
    """The mask supersampled to a lattice that holds both pixel and patch edges, then counted patch by patch."""
    units = []
    for axis, (size, resized) in enumerate(zip(mask.shape, input_size, strict=True)):
        mask = np.repeat(mask, resized, axis)  # size * resized cells: a pixel has `resized`, an input pixel `size`
        units.append(stride * size)
    rows, columns = (range(0, length, unit) for length, unit in zip(mask.shape, units, strict=True))
    counts = [[mask[y : y + units[0], x : x + units[1]].sum() for x in columns] for y in rows]
    return np.array(counts) / (units[0] * units[1])


def pool(tokens: np.ndarray, coverage: np.ndarray, normalize: bool = True) -> np.ndarray:
    """`sum(W * F) / sum(W)` of one mask."""
    total = (coverage[:, :, None] * tokens).sum((0, 1))
    if coverage.sum() == 0:
        return total
    vector = total / coverage.sum()
    return vector / np.linalg.norm(vector) if normalize else vector


def nearest_to_centre(vectors: np.ndarray, drop_ratio: float) -> list[int]:
    """All indices but those of the `floor(drop_ratio * M)` vectors farthest from the mean."""
    if not len(vectors):
        return []
    centre = vectors.astype(np.float64).mean(0)
    ranked = sorted(range(len(vectors)), key=lambda i: (np.linalg.norm(vectors[i] - centre), i))
    return sorted(ranked[: len(vectors) - int(np.floor(drop_ratio * len(vectors)))])


def search(query: np.ndarray, bank: np.ndarray, top_k: int) -> tuple[list[float], list[int]]:
    """Cosine similarity with one bank vector after the other, sorted."""
    similarities = []
    for vector in bank.astype(np.float64):
        norm = np.linalg.norm(query.astype(np.float64)) * np.linalg.norm(vector)
        similarities.append(float(query.astype(np.float64) @ vector / norm) if norm > 0 else 0.0)
    ranked = sorted(range(len(bank)), key=lambda i: (-similarities[i], i))[:top_k]
    return [similarities[i] for i in ranked], ranked


def vote(labels: list[int], similarities: list[float]) -> tuple[int, float]:
    """Most neighbours, then the larger sum, then the first to appear."""
    if not labels:
        return 0, 0.0

    def rank(label: int) -> tuple[int, float, int]:
        own = [s for n, s in zip(labels, similarities, strict=True) if n == label]
        return len(own), sum(own), -labels.index(label)

    winner = max(set(labels), key=rank)
    count, total, _ = rank(winner)
    return winner, total / count


def answer_by_words(
    value: np.ndarray,
    neighbours: list[np.ndarray],
    texts: np.ndarray,
    labels: tuple[int, ...],
    *,
    scale: float,
    share: float,
) -> tuple[int, float]:
    """The label of the most similar word and its probability (docs/words.md)."""
    mean = np.mean([neighbour.astype(np.float64) for neighbour in neighbours], axis=0)
    if not value.any():
        share = 1.0
    elif not mean.any():
        share = 0.0
    else:
        mean = mean / np.linalg.norm(mean)
    if share == 1.0 and mean.any():
        mean = mean / np.linalg.norm(mean)
    powers = [math.exp(scale * ((1 - share) * float(value @ text) + share * float(mean @ text))) for text in texts]
    best = max(range(len(labels)), key=lambda word: (powers[word], -word))
    return labels[best], powers[best] / sum(powers)


def suppress(masks: np.ndarray, labels: np.ndarray, scores: np.ndarray, iou_threshold: float) -> list[int]:
    """Every mask compared with every kept one of its label, at full resolution."""
    kept: list[int] = []
    for i in sorted(range(len(masks)), key=lambda i: (-scores[i], i)):
        for j in kept:
            if labels[i] != labels[j]:
                continue
            union = (masks[i] | masks[j]).sum()
            if union and (masks[i] & masks[j]).sum() / union > iou_threshold:
                break
        else:
            kept.append(i)
    return kept


def rasterize(masks: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Painted one by one into the pixels that are still empty."""
    canvas = np.zeros(masks.shape[1:], np.uint8)
    for i in sorted(range(len(masks)), key=lambda i: (-scores[i], i)):
        canvas[masks[i] & (canvas == 0)] = labels[i]
    return canvas


def confusion_of_files(pairs: list[tuple[Path, Path]], size: int) -> np.ndarray:
    """`[size, size]` of truth and prediction read by Pillow, counted by numpy, one pair after the other."""
    matrix = np.zeros((size, size), np.int64)
    for truth_file, prediction_file in pairs:
        truth, prediction = np.asarray(Image.open(truth_file)), np.asarray(Image.open(prediction_file))
        counted = truth != 255
        codes = size * truth[counted].astype(np.int64) + prediction[counted]
        matrix += np.bincount(codes, minlength=size * size).reshape(size, size)
    return matrix


def boundary(mask: np.ndarray, width: int) -> np.ndarray:
    """Pixels of a binary mask that `width` erosions by 3 x 3 take away, a frame of zeros around it."""
    framed = np.pad(mask.astype(np.uint8), 1)
    eroded = cv2.erode(framed, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1]
    return mask & (eroded == 0)


def boundary_counts(truth: np.ndarray, prediction: np.ndarray, size: int, width: int) -> np.ndarray:
    """`[3, size]`: each label's boundaries, what is ignored being of no label in either map."""
    counts = np.zeros((3, size), np.int64)
    for label in range(size):
        true = boundary(truth == label, width)
        predicted = boundary((prediction == label) & (truth != 255), width)
        counts[:, label] = (true & predicted).sum(), true.sum(), predicted.sum()
    return counts
