"""Published figures of the paper's tables and of sibling systems: mIoU in percent, and what a run costs.

Every row names its source. ModuSeg's figures have no test-time augmentation and no CRF. Whether VOC's bank was made
from `train` or from `train_aug` is not settled (docs/method.md, "Data protocol").
"""

from __future__ import annotations

from dataclasses import dataclass

from moduseg.evaluation.tables import markdown_table

NOT_MEASURED = "not measured"
PAPER = "arXiv 2604.07021"
LATER = "arXiv 2604.07021, later public version"
OPEN = "the methods' papers and the tables of their successors"


@dataclass(frozen=True)
class PublishedRow:
    """One published figure.

    Attributes:
        table: `main`, `backbone`, `proposer`, `ablation`, `upper bound`, `images per class`, `pseudo masks`,
            `open vocabulary`, or one of a sibling system, named with it.
        method: the row's name.
        benchmark: data set and split, such as `voc/val`; `voc/train` for the quality of pseudo masks.
        value: mIoU in percent.
        source: where it was published.
        note: what one must know to compare with it; empty if there is nothing.
    """

    table: str
    method: str
    benchmark: str
    value: float
    source: str = PAPER
    note: str = ""


@dataclass(frozen=True)
class PublishedCost:
    """What a method costs on VOC, as published.

    Attributes:
        method: the row's name.
        minutes: as published.
        gpu_memory_gb: peak memory of the GPU.
        source: where it was published.
    """

    method: str
    minutes: int
    gpu_memory_gb: float
    source: str = PAPER


_OURS = "ModuSeg (C-RADIOv4-SO400M)"

_MAIN: tuple[tuple[str, float, float, float | None], ...] = (
    (_OURS, 86.3, 86.6, 56.7),
    ("CD-CLIP (CVPR 26)", 82.5, 82.4, 54.1),
    ("SSR (AAAI 26)", 79.5, 79.6, 50.6),
    ("VPL (CVPR 25)", 79.3, 79.0, 49.8),
    ("ExCEL (CVPR 25)", 78.4, 78.5, 50.3),
    ("S2C (CVPR 24)", 78.2, 77.5, None),
    ("WeCLIP (CVPR 24)", 76.4, 77.2, 47.1),
    ("MoRe", 76.4, 75.0, 47.4),
)
_PAIRS: tuple[tuple[str, str, str, str, float, float], ...] = (
    ("backbone", "DINOv2-B", "voc/val", "coco/val", 82.9, 51.0),
    ("backbone", "DINOv3-B", "voc/val", "coco/val", 84.7, 53.5),
    ("backbone", "DINOv3-L", "voc/val", "coco/val", 85.3, 55.8),
    ("backbone", "C-RADIOv4-SO400M", "voc/val", "coco/val", 86.3, 56.7),
    ("pseudo masks", "CorrCLIP, no label filter", "voc/train", "coco/train", 68.7, 42.5),
    ("pseudo masks", "CorrCLIP, label filter", "voc/train", "coco/train", 78.8, 54.6),
    ("pseudo masks", "Mask Adapter, no label filter", "voc/train", "coco/train", 76.6, 55.1),
    ("pseudo masks", "Mask Adapter, label filter", "voc/train", "coco/train", 82.4, 60.2),
)
_SINGLE: tuple[tuple[str, str, str, float], ...] = (
    ("ablation", "baseline", "voc/val", 84.3),
    ("ablation", "+ SMFA", "voc/val", 84.6),
    ("ablation", "+ SBP", "voc/val", 85.2),
    ("ablation", "+ SMFA + SBP", "voc/val", 86.3),
    ("proposer", "EntitySeg", "voc/val", 86.3),
    ("proposer", "SAM 2", "voc/val", 82.6),
    ("upper bound", "neither", "voc/val", 86.3),
    ("upper bound", "ground-truth masks for the bank", "voc/val", 86.7),
    ("upper bound", "ground-truth masks as proposals", "voc/val", 95.7),
    ("images per class", "20", "voc/val", 69.8),
    ("images per class", "50", "voc/val", 80.2),
    ("images per class", "all", "voc/val", 86.3),
)
_OPEN_BENCHMARKS = ("voc21", "context60", "coco_object", "voc20", "context59", "coco_stuff", "cityscapes", "ade20k")
_OPEN: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("CLIP B/16", (18.6, 7.8, 6.5, 49.1, 11.2, 7.2, 6.7, 3.2)),
    ("SCLIP", (59.1, 30.4, 30.5, 80.4, 34.1, 22.4, 32.2, 16.1)),
    ("ClearCLIP", (51.8, 32.6, 33.0, 80.9, 35.9, 23.9, 30.0, 16.7)),
    ("NACLIP", (58.9, 32.2, 33.2, 79.7, 35.2, 23.3, 35.5, 17.4)),
    ("NACLIP + PAMR", (64.1, 35.0, 36.2, 83.0, 38.4, 25.7, 38.3, 19.1)),
    ("ProxyCLIP B, DINO B/8", (61.3, 35.3, 37.5, 80.3, 39.1, 26.5, 38.1, 20.2)),
    ("Trident B", (67.1, 38.6, 41.1, 84.5, 42.2, 28.3, 42.9, 21.9)),
    ("CorrCLIP B, SAM 2", (74.8, 44.2, 43.7, 88.8, 48.8, 31.6, 49.4, 26.9)),
    ("CorrCLIP B, EntitySeg", (76.2, 45.7, 44.5, 89.6, 50.7, 32.4, 51.6, 28.6)),
    ("CorrCLIP v2 B, COCO bank", (82.2, 50.8, 54.6, 93.6, 56.3, 38.5, 58.7, 33.2)),
    ("SAM 3", (81.9, 46.1, 65.4, 88.9, 50.0, 33.3, 62.3, 31.8)),
    ("ActiveSAM (SAM 3)", (83.8, 55.4, 72.0, 97.0, 60.1, 44.4, 69.7, 40.0)),
    ("DiffSegmenter", (60.1, 27.5, 37.9)),
    ("iSeg", (68.2, 30.9, 38.4)),
)
"""Figures in the order of `_OPEN_BENCHMARKS`; the last two rows have the first three."""
_LATER: tuple[PublishedRow, ...] = (
    PublishedRow(
        table="main",
        method=_OURS,
        benchmark="ade20k/val",
        value=44.7,
        source=LATER,
        note="uncovered pixels counted as class 1",
    ),
    PublishedRow(
        table="main",
        method=_OURS,
        benchmark="cityscapes/val",
        value=66.0,
        source=LATER,
        note="uncovered pixels ignored, which flatters",
    ),
)


ISEG = "arXiv 2409.03209"
DIFFSEGMENTER = "arXiv 2309.02773"
TOKEN_MASKING = "arXiv 2507.06848"
MCTFORMER = "arXiv 2308.03005"
_SIBLINGS: tuple[tuple[str, str, dict[str, float], str], ...] = (
    ("iSeg", "voc/train", {"iSeg": 75.2}, ISEG),
    ("iSeg", "coco/train", {"iSeg": 45.5}, ISEG),
    ("iSeg modules", "voc/train",
     {"neither": 68.2, "entropy reduction": 72.0, "entropy reduction and category enhancement": 75.2}, ISEG),
    ("iSeg modules", "coco/train",
     {"neither": 40.1, "entropy reduction": 42.5, "entropy reduction and category enhancement": 45.5}, ISEG),
    ("iSeg iterations", "voc/train",
     {"1": 71.0, "2": 72.9, "4": 74.5, "6": 75.0, "8": 75.1, "10": 75.2, "12": 74.9}, ISEG),
    ("iSeg lambda", "voc/train",
     {"0": 69.1, "0.001": 74.3, "0.005": 75.0, "0.01": 75.2, "0.05": 74.6, "0.1": 74.1}, ISEG),
    ("iSeg gamma", "voc/train", {"1": 72.0, "1.2": 73.6, "1.4": 74.7, "1.6": 75.2, "1.8": 75.2, "2": 74.9}, ISEG),
    ("iSeg cross level", "voc/train", {"16": 74.8, "32": 56.9, "both": 75.2}, ISEG),
    ("iSeg self layer", "voc/train", {"-3": 68.5, "-2": 71.1, "-1": 75.2}, ISEG),
    ("iSeg time step", "voc/train", {"1": 73.2, "50": 74.6, "100": 75.2, "150": 74.5, "200": 74.3}, ISEG),
    ("DiffSegmenter", "voc/train", {"DiffSegmenter": 70.49}, DIFFSEGMENTER),
    ("DiffSegmenter ablation", "voc/train",
     {"cross-attention alone": 61.25, "+ all self-attention": 65.01, "+ self-attention of the largest size": 67.89,
      "size weights": 65.32, "captions": 67.99, "++": 69.46, "everything": 70.49}, DIFFSEGMENTER),
    ("DiffSegmenter time steps", "voc/train",
     {"1": 69.10, "50": 69.94, "100": 70.30, "150": 69.69, "mean": 70.49}, DIFFSEGMENTER),
    ("class tokens", "voc/train", {"token masking": 74.5}, TOKEN_MASKING),
    ("class tokens", "coco/train", {"token masking": 43.2}, TOKEN_MASKING),
    ("class tokens", "voc/train", {"MCTformer+": 68.8}, MCTFORMER),
    ("token masking", "voc/train",
     {"everything": 74.5, "no masking": 71.6, "no register": 72.3, "no pruning": 72.0}, TOKEN_MASKING),
    ("token masking", "coco/train",
     {"everything": 43.2, "no masking": 41.9, "no register": 42.8, "no pruning": 41.7}, TOKEN_MASKING),
)  # fmt: skip
"""Of sibling systems, the quality of pseudo masks: table, benchmark, method -> mIoU, source."""

_UNSUPERVISED: tuple[tuple[str, str, float, float | None, str], ...] = (
    ("DiffSeg", "cityscapes27/val", 21.2, 76.0, "arXiv 2308.12469"),
    ("DiffSeg", "coco_stuff27/val", 43.6, 72.5, "arXiv 2308.12469"),
    ("iSeg", "cityscapes27/val", 25.0, 78.7, ISEG),
    ("iSeg", "coco_stuff27/val", 45.2, 74.5, ISEG),
    ("iSeg, no entropy reduction", "cityscapes27/val", 22.8, None, ISEG),
    ("iSeg, no entropy reduction", "coco_stuff27/val", 44.4, None, ISEG),
)
"""Segments without names, matched image by image: method, benchmark, mIoU, pixel accuracy, source."""
CLIP_ES = "arXiv 2212.09506"
_STUDENTS: tuple[PublishedRow, ...] = tuple(
    PublishedRow("students", method, benchmark, value, source, note)
    for method, source, note, values in (
        ("DiffSegmenter, DeepLabV2-R101", DIFFSEGMENTER, "multi-scale, mirror images and CRF", (69.1, 68.6)),
        ("CLIP-ES, DeepLabV2-R101", CLIP_ES, "multi-scale, mirror images and CRF", (71.1, 71.4)),
        ("token masking, ViT-B", TOKEN_MASKING, "on COCO only the quality of its pseudo masks, 43.2", (72.7, 73.5)),
    )
    for benchmark, value in zip(("voc/val", "voc/test"), values, strict=True)
)
"""Networks that were trained on the pseudo masks of sibling systems."""


def _make_rows() -> tuple[PublishedRow, ...]:
    rows = [
        PublishedRow("main", method, benchmark, value)
        for method, *values in _MAIN
        for benchmark, value in zip(("voc/val", "voc/test", "coco/val"), values, strict=True)
        if value is not None
    ]
    for table, method, first, second, first_value, second_value in _PAIRS:
        rows.append(PublishedRow(table, method, first, first_value))
        rows.append(PublishedRow(table, method, second, second_value))
    for method, figures in _OPEN:
        for benchmark, value in zip(_OPEN_BENCHMARKS, figures, strict=False):
            rows.append(PublishedRow("open vocabulary", method, f"{benchmark}/val", value, OPEN))
    siblings = [
        PublishedRow(table, method, benchmark, value, source)
        for table, benchmark, value_by_method, source in _SIBLINGS
        for method, value in value_by_method.items()
    ]
    unsupervised = [
        PublishedRow("unsupervised", method, benchmark, value, source, f"pixel accuracy {accuracy}" if accuracy else "")
        for method, benchmark, value, accuracy, source in _UNSUPERVISED
    ]
    return (*rows, *(PublishedRow(*row) for row in _SINGLE), *_LATER, *siblings, *unsupervised, *_STUDENTS)


PUBLISHED: tuple[PublishedRow, ...] = _make_rows()
BENCHMARKS: tuple[str, ...] = tuple(dict.fromkeys(row.benchmark for row in PUBLISHED))
TABLES: tuple[str, ...] = tuple(dict.fromkeys(row.table for row in PUBLISHED))

PUBLISHED_COSTS: tuple[PublishedCost, ...] = (
    PublishedCost("CLIMS", 1068, 18.0),
    PublishedCost("MCTformer+", 1496, 18.0),
    PublishedCost("WeCLIP", 270, 6.2),
    PublishedCost("ModuSeg", 84, 5.3),
)


def published_rows(
    table: str, benchmark: str, ours: dict[str, float] | None = None
) -> list[tuple[str, float, float | None]]:
    """Return `(method, published, ours)` of one table on one benchmark, in the paper's order.

    Args:
        table: one of `TABLES`.
        benchmark: one of `BENCHMARKS`; a data set that is not in the paper has no rows.
        ours: method -> mIoU in percent measured with that setting; others were not measured.

    Raises:
        ValueError: unknown table or benchmark, or a method that the table does not have.
    """
    if table not in TABLES or benchmark not in BENCHMARKS:
        raise ValueError(
            f"published rows: got {table!r} on {benchmark!r}, expected one of {', '.join(TABLES)} on one of "
            f"{', '.join(BENCHMARKS)}"
        )
    rows = [row for row in PUBLISHED if row.table == table and row.benchmark == benchmark]
    our_values = ours or {}
    unknown = sorted(set(our_values) - {row.method for row in rows})
    if unknown:
        raise ValueError(
            f"published rows: got {unknown[0]!r}, expected one of {', '.join(row.method for row in rows) or 'none'}"
        )
    return [(row.method, row.value, our_values.get(row.method)) for row in rows]


def published_markdown(table: str, benchmark: str, ours: dict[str, float] | None = None) -> str:
    """Return `published_rows` as a Markdown table; it has the same arguments and errors."""
    rows = [
        (method, f"{published:.1f}", NOT_MEASURED if measured is None else f"{measured:.1f}")
        for method, published, measured in published_rows(table, benchmark, ours)
    ]
    return markdown_table((f"{table}, {benchmark} (mIoU)", "published", "ours"), rows)
