"""A finished run that no model made, of any number of images, to measure reports with.

`python -m tests.support.synthetic <empty folder> [images]` writes one and its report, and prints what it took: seconds,
bytes, and where a browser is at hand the time until the first picture is seen.
"""

from __future__ import annotations

import sys
import time
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
    data = root / "data"
    ids = {"train": [f"train/{i:05d}" for i in range(train)], "val": [f"val/{i:05d}" for i in range(images)]}
    (data / "images").mkdir(parents=True)
    names = ["background", *(f"class {i}" for i in range(1, CLASSES + 1))]
    (data / "classes.txt").write_text("\n".join(names) + "\n")
    cells = _cells(size, proposals)
    centres = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(CLASSES + 1, DIM))).float(), dim=1)
    truths: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    for split, listed in ids.items():
        (data / f"{split}.txt").write_text("\n".join(listed) + "\n")
        for image_id in listed:
            label = rng.choice([0, 0, *rng.integers(1, CLASSES + 1, 3)], len(cells))
            truth = np.zeros(size, np.uint8)
            for cell, value in zip(cells, label, strict=True):
                truth[cell] = value
            _write(data / "images" / f"{image_id}.jpg", _photograph(truth, rng))
            _write(data / "masks" / f"{image_id}.png", truth)
            truths[image_id], labels[image_id] = truth, label
    cfg = compose(
        [
            "dataset=folder",
            f"dataset.root={data}",
            f"runtime.outputs={root / 'outputs'}",
            "runtime.device=cpu",
            "retrieval.top_k=9",
            "retrieval.min_area=1",
            "evaluation.bootstrap=100",
            "evaluation.panels=0",
        ]
    )
    return _artefacts(cfg, ids, truths, labels, cells, centres, rng)


def _artefacts(
    cfg: Config,
    ids: dict[str, list[str]],
    truths: dict[str, np.ndarray],
    labels: dict[str, np.ndarray],
    cells: np.ndarray,
    centres: torch.Tensor,
    rng: np.random.Generator,
) -> Path:
    work = Workspace(cfg)
    stages = {
        name: work.artefact(name, "synthetic", {}) for name in ("propose", "queries", "pseudo_masks", "build_bank")
    }
    infer = work.artefact("infer", "synthetic", {})
    for image_id in ids["train"]:
        write_atomic(stages["pseudo_masks"].file(f"labels/{image_id}.png"), write_label_png(truths[image_id]))
    rows = [(i, int(label)) for i, image_id in enumerate(ids["train"]) for label in np.unique(truths[image_id])]
    image_index, row_labels = (torch.tensor(column) for column in zip(*rows, strict=True))
    pooled = centres[row_labels] + 0.25 * torch.from_numpy(rng.normal(size=(len(rows), DIM))).float()
    bank = Bank(
        pooled, row_labels, image_index, torch.full((len(rows),), 500), tuple(ids["train"]),
        work.dataset("train").classes, {"backbone_digest": "none", "config": cfg.as_dict()},
    )  # fmt: skip
    bank.save(stages["build_bank"].path)
    retriever = Retriever(bank.select_vectors(cfg.bank.centre, cfg.bank.outliers), cfg.retrieval)
    # Each cell, and each with its right neighbour: masks that overlap, as SAM's do.
    masks = torch.from_numpy(np.concatenate([cells, cells | np.roll(cells, -1, 0)]))
    found = Proposals(masks, torch.linspace(0.5, 1, len(masks)))
    for image_id in ids["val"]:
        kind = torch.from_numpy(labels[image_id].astype(np.int64)).repeat(2)
        vectors = centres[kind] + 0.3 * torch.from_numpy(rng.normal(size=(len(masks), DIM))).float()
        write_atomic(stages["queries"].file(f"vectors/{image_id}.safetensors"), save_tensors({"pooled": vectors}))
        content = sa1b.dump(sa1b.to_annotations(found, image_id))
        write_atomic(stages["propose"].file(f"masks/{image_id}.json"), content)
        label_map = retriever.predict(found, vectors).label_map
        write_atomic(infer.file(f"labels/{image_id}.png"), write_label_png(label_map))
    _complete(stages["propose"], {})
    _complete(stages["queries"], {"propose": stages["propose"]})
    _complete(stages["pseudo_masks"], {})
    _complete(stages["build_bank"], {"pseudo_masks": stages["pseudo_masks"]})
    score_label_maps(work, infer, Outcome(), work.dataset("val"))
    _complete(infer, {name: stages[name] for name in ("build_bank", "queries")}, config=cfg.as_dict())
    return infer.path


def _complete(artefact: Artefact, inputs: dict[str, Artefact], **fields: object) -> None:
    named = {name: str(one.path) for name, one in inputs.items()}
    artefact.write_manifest(status="complete", failures=0, seconds={"work": 1.0}, inputs=named, **fields)


def _cells(size: tuple[int, int], count: int) -> np.ndarray:
    """`[count, H, W]` bool: a grid whose lines wave, so that the cells look and weigh as regions do."""
    columns = int(np.ceil(np.sqrt(count * size[1] / size[0])))
    rows = int(np.ceil(count / columns))
    y, x = np.mgrid[: size[0], : size[1]].astype(float)
    row = np.clip((y + 12 * np.sin(x / 31)) * rows / size[0], 0, rows - 1).astype(int)
    column = np.clip((x + 12 * np.sin(y / 23)) * columns / size[1], 0, columns - 1).astype(int)
    return np.stack([(row * columns + column) == i for i in range(count)])


def _photograph(truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A texture of its own for every label: compresses like a photograph, not like a drawing."""
    height, width = truth.shape
    smooth = cv2.resize(
        rng.integers(0, 255, (24, 32, 3), dtype=np.uint8), (width, height), interpolation=cv2.INTER_CUBIC
    )
    tint = np.stack([truth * np.uint8(11), truth * np.uint8(7) + 60, 255 - truth * np.uint8(9)], 2)
    noise = rng.integers(0, 24, (height, width, 1), dtype=np.uint8)
    return cv2.addWeighted(smooth, 0.6, tint, 0.35, 0) // 2 * 2 + noise // 2


def _write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def main() -> None:
    """See the module."""
    root, images = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1500
    run = make_run(root, images, train=min(images, 400))
    start, worked = time.perf_counter(), time.process_time()
    index = report.run(str(run))
    print(f"written in {time.perf_counter() - start:.1f} s ({time.process_time() - worked:.1f} s of processor time)")
    files = [path for path in index.parent.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    print(f"{total / 1e6:.1f} MB in {len(files)} files, {total / images / 1e3:.1f} kB an image")
    from tests.support.browser import first_picture

    print(f"first picture after {first_picture(index):.0f} ms")


if __name__ == "__main__":
    main()
