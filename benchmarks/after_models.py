"""All that follows the models, from patch tokens to the label map, for an image of 640 x 480, and its steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import Row, Setting, interleave, summarise
from benchmarks.steps import draw_id_map
from moduseg.bank.aggregation import aggregate, proposal_coverage
from moduseg.config import RetrievalConfig
from moduseg.retrieval.retriever import Retriever
from moduseg.structures import Proposals, SearchBank, TokenMap
from tests import reference

PATCH, NUM_CLASSES, NUM_REGIONS = 16, 21, 200
TARGETS_MS = {"id map": 15.0, "overlapping": 22.0}


@dataclass(frozen=True)
class Case:
    """One image and the bank that it is compared with.

    Attributes:
        proposals: its `N` proposals.
        tokens: its patch tokens.
        retriever: the search and what follows, with the paper's settings.
    """

    proposals: Proposals
    tokens: TokenMap
    retriever: Retriever

    def pool(self) -> Tensor:
        """Return the vectors of the proposals, `[N, C]` float32."""
        return aggregate(self.tokens.tokens, proposal_coverage(self.proposals, self.tokens), normalize=False)

    def label(self) -> np.ndarray:
        """Return the label map, `[H, W]` uint8."""
        return self.retriever.predict(self.proposals, self.pool()).label_map


def make_case(proposals: Proposals, bank_size: int, dim: int, seed: int = 0) -> Case:
    """Draw tokens and a bank whose classes are clusters, so that neighbours mostly agree."""
    rng = np.random.default_rng(seed)
    height, width = proposals.masks.shape[1:]
    centres = rng.normal(size=(NUM_CLASSES, dim))
    labels = rng.integers(0, NUM_CLASSES, bank_size)
    vectors = centres[labels] + 2 * rng.normal(size=(bank_size, dim))
    grid = -(-height // PATCH), -(-width // PATCH)
    # Neighbouring patches mostly look alike, as things are larger than patches.
    coarse = rng.integers(0, NUM_CLASSES, (-(-grid[0] // 5), -(-grid[1] // 5)))
    classes = np.kron(coarse, np.ones((5, 5), int))[: grid[0], : grid[1]]
    tokens = centres[classes] + 2 * rng.normal(size=(*grid, dim))
    bank = SearchBank(
        torch.from_numpy(vectors.astype(np.float32)), torch.from_numpy(labels), torch.arange(bank_size)
    ).to(proposals.predicted_iou.device)
    on_device = torch.from_numpy(tokens.astype(np.float32)).to(proposals.predicted_iou.device)
    return Case(
        proposals,
        TokenMap(on_device, PATCH, (height, width), (height, width)),
        Retriever(bank, RetrievalConfig(top_k=25, min_area=300, nms_iou=0.4)),
    )


def label_plainly(case: Case) -> np.ndarray:
    """Return the label map by the steps of the reference, one mask at a time; the search in float64, all at once."""
    masks, settings = case.proposals.masks.cpu().numpy(), case.retriever.settings
    masks = masks[masks.sum((1, 2)) >= settings.min_area]
    tokens = case.tokens.tokens.cpu().numpy()
    pooled = np.stack([reference.pool(tokens, reference.patch_coverage(mask, PATCH)) for mask in masks])
    bank, bank_labels = case.retriever.bank.vectors.cpu().numpy(), case.retriever.bank.labels.cpu().numpy()
    unit, stored = (v.astype(np.float64) / np.linalg.norm(v, axis=1, keepdims=True) for v in (pooled, bank))
    similarities = unit @ stored.T
    nearest = np.argsort(-similarities, axis=1, kind="stable")[:, : settings.top_k]
    votes = [
        reference.vote(bank_labels[rows].tolist(), row[rows].tolist())
        for rows, row in zip(nearest, similarities, strict=True)
    ]
    labels, scores = (np.array(values) for values in zip(*votes, strict=True))
    kept = reference.suppress(masks, labels, scores, settings.nms_iou)
    return reference.rasterize(masks[kept], labels[kept], scores[kept])


def measure_steps(case: Case, repeats: int) -> dict[str, float]:
    """Return the median milliseconds of CPU time of each step."""
    proposals, retriever, tokens = case.proposals, case.retriever, case.tokens
    weights = proposal_coverage(proposals, tokens)
    pooled = case.pool()
    steps: dict[str, Callable[[], object]] = {
        "coverage": lambda: proposal_coverage(proposals, tokens),
        "pooling": lambda: aggregate(tokens.tokens, weights, normalize=False),
        "search and vote": lambda: retriever.vote(pooled),
        "areas, suppression, painting and the search": lambda: retriever.predict(proposals, pooled),
    }
    milliseconds = {}
    for name, step in steps.items():
        seconds = []
        for _ in range(repeats + 1):
            begun = time.process_time()
            step()
            seconds.append(time.process_time() - begun)
        milliseconds[name] = 1000 * median(seconds[1:])
    total = milliseconds.pop("areas, suppression, painting and the search")
    milliseconds["areas, suppression, painting"] = total - milliseconds["search and vote"]
    return milliseconds


@torch.inference_mode()
def after_models(setting: Setting) -> list[Row]:
    """Measure an id map of disjoint regions, and as many overlapping masks."""
    height, width, count = (40, 60, 12) if setting.is_small else (480, 640, NUM_REGIONS)
    bank_size, dim = (300, 16) if setting.is_small else (20_000, 192)
    rng = np.random.default_rng(0)
    masks = torch.from_numpy(reference.random_masks(rng, count, height, width)).to(setting.device)
    ids = torch.from_numpy(draw_id_map(rng, count, height, width)).to(setting.device)
    all_proposals = {"id map": Proposals.of_id_map(ids, count), "overlapping": Proposals(masks)}
    rows = []
    for name, proposals in all_proposals.items():
        case = make_case(proposals, bank_size, dim)
        np.testing.assert_array_equal(case.label(), label_plainly(case))
        times = interleave({"ours": case.label}, setting.repeats, setting.device)["ours"]
        steps = measure_steps(case, setting.repeats)
        wall, cpu = (summarise([1000 * value for value in values]) for values in (times.wall, times.cpu))
        parts = ", ".join(f"{step} {value:.1f}" for step, value in steps.items())
        target = TARGETS_MS[name]
        spread = f"{wall['min']:.1f} to {wall['max']:.1f}; CPU time {cpu['median']:.1f} ms"
        text = f"{wall['median']:.1f} ms ({spread}): {parts}"
        figure = f"after the models, {width}x{height}, {count} regions, {name}, bank {bank_size:,} x {dim}, K 25"
        details = {"milliseconds": wall, "cpu_milliseconds": cpu, "steps": steps}
        rows.append(Row(figure, f"at most {target:g} ms", text, wall["median"] <= target, details))
    return rows
