"""Make a finished run of any number of images without a model, to measure reports with.

`python -m tests.support.synthetic <empty folder> [images]` writes one and its report, and prints seconds, bytes, and
the time until a browser shows the first picture.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save as save_tensors

from moduseg.bank.store import Bank
from moduseg.config import Config, compose
from moduseg.datasets.io import write_label_png
from moduseg.files import write_atomic
from moduseg.pipeline.artefacts import Artefact
from moduseg.pipeline.batches import Outcome
from moduseg.pipeline.workspace import Workspace
from moduseg.proposers import sa1b
from moduseg.retrieval.retriever import Retriever
from moduseg.stages.evaluate_masks import score_label_maps
from moduseg.structures import Proposals
from moduseg.tools import report

CLASSES = 20
DIM = 32


@dataclass(frozen=True)
class SyntheticImages:
    """The images of a synthetic data set.

    Attributes:
        ids: split -> image ids.
        truths: image id -> `[H, W]` uint8 label map.
        cell_labels: image id -> `[K]` label of each cell.
        cells: `[K, H, W]` bool, regions that tile every image.
    """

    ids: dict[str, list[str]]
    truths: dict[str, np.ndarray]
    cell_labels: dict[str, np.ndarray]
    cells: np.ndarray


def make_run(root: Path, images: int, train: int = 40, size: tuple[int, int] = (375, 500), proposals: int = 24) -> Path:
    """Write a folder data set and the artefacts of a run on it, its label maps scored.

    Args:
        root: an empty folder.
        images: of the evaluated split.
        train: of the training split.
        size: `(H, W)` of each.
        proposals: a cell of a grid each, and as many again that overlap them.

    Returns:
        The folder of the infer artefact; its report is not written.
    """
    rng = np.random.default_rng(7)
    ids = {"train": [f"train/{i:05d}" for i in range(train)], "val": [f"val/{i:05d}" for i in range(images)]}
    dataset = _write_images(root / "data", ids, _make_cells(size, proposals), rng)
    cfg = compose(
        [
            "dataset=folder",
            f"dataset.root={root / 'data'}",
            f"runtime.outputs={root / 'outputs'}",
            "runtime.device=cpu",
            "retrieval.top_k=9",
            "retrieval.min_area=1",
            "evaluation.bootstrap=100",
            "evaluation.panels=0",
        ]
    )
    return _write_artefacts(cfg, dataset, rng)


def _write_images(
    root: Path, ids: dict[str, list[str]], cells: np.ndarray, rng: np.random.Generator
) -> SyntheticImages:
    (root / "images").mkdir(parents=True)
    names = ["background", *(f"class {i}" for i in range(1, CLASSES + 1))]
    (root / "classes.txt").write_text("\n".join(names) + "\n")
    dataset = SyntheticImages(ids, {}, {}, cells)
    for split, listed in ids.items():
        (root / f"{split}.txt").write_text("\n".join(listed) + "\n")
        for image_id in listed:
            labels = rng.choice([0, 0, *rng.integers(1, CLASSES + 1, 3)], len(cells))
            truth = np.zeros(cells.shape[1:], np.uint8)
            for cell, label in zip(cells, labels, strict=True):
                truth[cell] = label
            _write_picture(root / "images" / f"{image_id}.jpg", _draw_photograph(truth, rng))
            _write_picture(root / "masks" / f"{image_id}.png", truth)
            dataset.truths[image_id], dataset.cell_labels[image_id] = truth, labels
    return dataset


def _write_artefacts(cfg: Config, dataset: SyntheticImages, rng: np.random.Generator) -> Path:
    """Write what every stage would have stored, and return the folder of stage `infer`."""
    work = Workspace(cfg)
    names = ("propose", "queries", "pseudo_masks", "build_bank", "infer")
    stages = {name: work.artefact(name, "synthetic", {}) for name in names}
    centres = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(CLASSES + 1, DIM))).float(), dim=1)
    for image_id in dataset.ids["train"]:
        write_atomic(stages["pseudo_masks"].file(f"labels/{image_id}.png"), write_label_png(dataset.truths[image_id]))
    bank = _make_bank(work, dataset, centres, rng)
    bank.save(stages["build_bank"].path)
    _write_predictions(
        stages, Retriever(bank.select_vectors(cfg.bank.centre, cfg.bank.outliers), cfg.retrieval), dataset, centres, rng
    )
    _complete(stages["propose"], {})
    _complete(stages["queries"], {"propose": stages["propose"]})
    _complete(stages["pseudo_masks"], {})
    _complete(stages["build_bank"], {"pseudo_masks": stages["pseudo_masks"]})
    score_label_maps(work, stages["infer"], Outcome(), work.dataset("val"))
    inputs = {name: stages[name] for name in ("build_bank", "queries")}
    _complete(stages["infer"], inputs, config=cfg.as_dict())
    return stages["infer"].path


def _make_bank(work: Workspace, dataset: SyntheticImages, centres: torch.Tensor, rng: np.random.Generator) -> Bank:
    """Return a bank with a vector near the centre of its class for each class of each training image."""
    ids = dataset.ids["train"]
    rows = [(i, int(label)) for i, image_id in enumerate(ids) for label in np.unique(dataset.truths[image_id])]
    image_index, row_labels = (torch.tensor(column) for column in zip(*rows, strict=True))
    pooled = centres[row_labels] + 0.25 * torch.from_numpy(rng.normal(size=(len(rows), DIM))).float()
    return Bank(
        pooled, row_labels, image_index, torch.full((len(rows),), 500), tuple(ids),
        work.dataset("train").classes, {"backbone_digest": "none", "config": work.cfg.as_dict()},
    )  # fmt: skip


def _write_predictions(
    stages: dict[str, Artefact],
    retriever: Retriever,
    dataset: SyntheticImages,
    centres: torch.Tensor,
    rng: np.random.Generator,
) -> None:
    """Write proposals, query vectors and label maps of the evaluated split."""
    # Each cell, and each with its right neighbour: masks that overlap, as SAM's do.
    masks = torch.from_numpy(np.concatenate([dataset.cells, dataset.cells | np.roll(dataset.cells, -1, 0)]))
    proposals = Proposals(masks, torch.linspace(0.5, 1, len(masks)))
    for image_id in dataset.ids["val"]:
        labels = torch.from_numpy(dataset.cell_labels[image_id].astype(np.int64)).repeat(2)
        vectors = centres[labels] + 0.3 * torch.from_numpy(rng.normal(size=(len(masks), DIM))).float()
        queries = save_tensors({"pooled": vectors})
        write_atomic(stages["queries"].file(f"vectors/{image_id}.safetensors"), queries)
        annotations = sa1b.dump(sa1b.to_annotations(proposals, image_id))
        write_atomic(stages["propose"].file(f"masks/{image_id}.json"), annotations)
        label_map = retriever.predict(proposals, vectors).label_map
        write_atomic(stages["infer"].file(f"labels/{image_id}.png"), write_label_png(label_map))


def _complete(artefact: Artefact, inputs: dict[str, Artefact], **fields: object) -> None:
    paths = {name: str(source.path) for name, source in inputs.items()}
    artefact.write_manifest(status="complete", failures=0, seconds={"work": 1.0}, inputs=paths, **fields)


def _make_cells(size: tuple[int, int], count: int) -> np.ndarray:
    """Return `[count, H, W]` bool cells of a grid with wavy lines, whose shapes and sizes are like those of regions."""
    columns = int(np.ceil(np.sqrt(count * size[1] / size[0])))
    rows = int(np.ceil(count / columns))
    y, x = np.mgrid[: size[0], : size[1]].astype(float)
    row = np.clip((y + 12 * np.sin(x / 31)) * rows / size[0], 0, rows - 1).astype(int)
    column = np.clip((x + 12 * np.sin(y / 23)) * columns / size[1], 0, columns - 1).astype(int)
    return np.stack([(row * columns + column) == i for i in range(count)])


def _draw_photograph(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a texture for every label, which compresses like a photograph, not like a drawing."""
    height, width = truth.shape
    smooth = cv2.resize(
        rng.integers(0, 255, (24, 32, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC
    )
    tint = np.stack([truth * np.uint8(11), truth * np.uint8(7) + 60, 255 - truth * np.uint8(9)], 2)
    noise = rng.integers(0, 24, (height, width, 1), dtype=np.uint8)
    return cv2.addWeighted(smooth, 0.6, tint, 0.35, 0) // 2 * 2 + noise // 2


def _write_picture(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def main() -> None:
    """Write a run and its report, and print what it took."""
    root, images = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1500
    run = make_run(root, images, train=min(images, 400))
    start, worked = time.perf_counter(), time.process_time()
    index = report.run(str(run))
    print(f"written in {time.perf_counter() - start:.1f} s ({time.process_time() - worked:.1f} s of processor time)")
    files = [path for path in index.parent.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    print(f"{total / 1e6:.1f} MB in {len(files)} files, {total / images / 1e3:.1f} kB an image")
    from tests.support.browser import measure_first_picture

    print(f"first picture after {measure_first_picture(index):.0f} ms")


if __name__ == "__main__":
    main()
