"""Data sets of a few tiny pictures, in the layouts of the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moduseg.datasets.classes import COCO_CATEGORIES, VOC_CLASSES
from moduseg.datasets.io import write_label_png

H, W = 48, 64
COLOURS = {1: (200, 40, 40), 8: (40, 200, 40), 12: (40, 40, 220), 15: (220, 220, 40)}


def picture(path: Path, array: np.ndarray) -> None:
    """Write `[H, W, 3]` or `[H, W]` uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def grey(path: Path, array: np.ndarray) -> None:
    """Write ids as a grey PNG, as ADE20K and Cityscapes have them."""
    picture(path, array.astype(np.uint8))


def indexed(path: Path, array: np.ndarray) -> None:
    """Write ids as an indexed PNG with the VOC palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(write_label_png(array))


def noise(seed: int, size: tuple[int, int] = (H, W)) -> np.ndarray:
    """A picture of any content."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def scene(seed: int, label: int) -> tuple[np.ndarray, np.ndarray]:
    """A coloured block on a dark ground, and its label map with an ignored contour."""
    rng = np.random.default_rng(seed)
    y, x = rng.integers(4, 12, 2)
    semantic = np.zeros((H, W), np.uint8)
    semantic[y : y + 30, x : x + 40] = label
    image = np.where(semantic[..., None] > 0, np.array(COLOURS[label]), 20) + rng.integers(0, 20, (H, W, 3))
    semantic[y, x : x + 40] = 255
    return image.astype(np.uint8), semantic


VOC_LISTS = {
    "train": ("2007_000032", "2007_000033", "2007_000039", "2008_000001"),
    "val": ("2007_000042", "2007_000061"),
    "train_aug": ("2007_000032", "2007_000033", "2007_000039", "2008_000001", "2008_000005"),
    "test": ("2008_000006",),
}
VOC_LABELS = {
    "2007_000032": 1, "2007_000033": 8, "2007_000039": 12, "2008_000001": 15, "2007_000042": 1, "2007_000061": 8,
    "2008_000005": 12,
}  # fmt: skip


def write_voc(root: Path) -> Path:
    """A devkit with SBD's masks beside it; `test` has no truth, and SBD's image is in `SegmentationClassAug` alone."""
    for i, id in enumerate(dict.fromkeys(id for ids in VOC_LISTS.values() for id in ids)):
        image, semantic = scene(i, VOC_LABELS.get(id, 15))
        picture(root / "JPEGImages" / f"{id}.jpg", image)
        if id not in VOC_LABELS:
            continue
        indexed(root / "SegmentationClassAug" / f"{id}.png", semantic)
        write_xml(root, id, VOC_CLASSES[VOC_LABELS[id]])
        if id != "2008_000005":
            indexed(root / "SegmentationClass" / f"{id}.png", semantic)
            indexed(root / "SegmentationObject" / f"{id}.png", np.where(semantic == 255, 255, semantic > 0))
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name, ids in VOC_LISTS.items():
        line = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n" if name == "train_aug" else "{0}\n"
        (lists / f"{name}.txt").write_text("".join(line.format(id) for id in ids))
    (lists / "train_aug.txt").rename(lists / "trainaug.txt")
    return root


def write_xml(root: Path, id: str, *names: str) -> None:
    """An annotation whose objects have parts, one of them difficult."""
    parts = "<part><name>head</name></part>"
    objects = "".join(
        f"<object><name>{n}</name><difficult>{i}</difficult>{parts}</object>" for i, n in enumerate(names)
    )
    path = root / "Annotations" / f"{id}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<annotation><filename>{id}.jpg</filename>{objects}</annotation>")


def box(y: int, x: int, h: int, w: int) -> list[list[float]]:
    """The polygon of a rectangle."""
    return [[float(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]]


def runs(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed run lengths of `[H, W]` bool, as COCO stores crowds."""
    flat = np.concatenate([[0], mask.T.ravel().astype(int), [2]])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges])).tolist()
    return {"size": list(mask.shape), "counts": [int(c) for c in counts]}


def coco_entries(year: int = 2014, split: str = "train") -> dict[str, Any]:
    """Three images: objects that overlap, a crowd over a large object, and nothing."""
    prefix = f"COCO_{split}{year}_" if year == 2014 else ""
    crowd = np.zeros((H, W), bool)
    crowd[10:20, 10:30] = True
    crowd[12, 12] = False
    objects = [
        (70, 1, box(4, 4, 30, 40), 0), (9, 18, box(10, 20, 10, 10), 0), (9, 1, box(5, 10, 30, 40), 0),
        (70, 90, runs(crowd), 1),
    ]  # fmt: skip
    return {
        "info": {"description": "tiny, with a \u201cquote\u201d"},
        "images": [{"id": i, "file_name": f"{prefix}{i:012d}.jpg", "height": H, "width": W} for i in (70, 9, 25)],
        "licenses": [],
        "annotations": [
            {"id": 100 + i, "image_id": image, "category_id": category, "segmentation": outline, "iscrowd": crowd}
            for i, (image, category, outline, crowd) in enumerate(objects)
        ],
        "categories": [{"id": id, "name": name, "supercategory": ""} for id, name in COCO_CATEGORIES.items()],
    }


def write_coco(root: Path, year: int = 2014) -> Path:
    """`train` and `val` of the same content."""
    for split in ("train", "val"):
        content = coco_entries(year, split)
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        path = root / "annotations" / f"instances_{split}{year}.json"
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        for entry in content["images"]:
            picture(root / f"{split}{year}" / entry["file_name"], noise(entry["id"]))
    return root


def write_ade20k(root: Path) -> Path:
    """Two training images and one for validation, with "other" (0), the first and the last class."""
    ids = np.zeros((H, W), np.uint8)
    ids[:, 20:], ids[30:] = 1, 150
    for folder, name, count in (("training", "ADE_train", 2), ("validation", "ADE_val", 1)):
        for i in range(1, count + 1):
            picture(root / "images" / folder / f"{name}_{i:08d}.jpg", noise(i))
            grey(root / "annotations" / folder / f"{name}_{i:08d}.png", ids)
    return root


def write_cityscapes(root: Path) -> Path:
    """Two cities of `train`, one of `val`, one of `test` with the blank annotations that the test split has."""
    ids = np.zeros((H, W), np.uint8)
    ids[:10], ids[10:20], ids[20:30], ids[30:40] = 23, 7, 33, 29
    for split, city, count in (("train", "aachen", 2), ("train", "ulm", 1), ("val", "lindau", 1), ("test", "bonn", 1)):
        for i in range(count):
            stem = f"{city}/{city}_{i:06d}_000019"
            picture(root / "leftImg8bit" / split / f"{stem}_leftImg8bit.png", noise(i))
            blank = split == "test"
            grey(root / "gtFine" / split / f"{stem}_gtFine_labelIds.png", ids * (0 if blank else 1))
    return root


def write_context(root: Path) -> Path:
    """VOC 2010's images with the release of PASCAL Context: of the 459 labels two of the 59, another one and 0."""
    from scipy.io import savemat

    labels = np.zeros((H, W), np.uint16)
    labels[:12], labels[12:24], labels[24:36] = 2, 458, 300
    for i, id in enumerate(("2008_000008", "2008_000015", "2008_000019")):
        picture(root / "JPEGImages" / f"{id}.jpg", noise(i))
        (root / "trainval").mkdir(parents=True, exist_ok=True)
        savemat(root / "trainval" / f"{id}.mat", {"LabelMap": labels})
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2008_000008\n2008_000015\n")
    (lists / "val.txt").write_text("2008_000019\n")
    return root


def write_coco_stuff27(root: Path) -> Path:
    """The same, with the list of the images of val that are evaluated."""
    write_coco_stuff(root)
    (root / "curated").mkdir()
    (root / "curated" / "val2017.txt").write_text("000000000139\n")
    return root


def write_coco_stuff(root: Path) -> Path:
    """Maps with the first and the last thing, the first and the last stuff, an id that no category has, and 255."""
    ids = np.full((H, W), 255, np.uint8)
    for row, label in enumerate((0, 89, 91, 181, 11)):
        ids[8 * row : 8 * row + 8] = label
    for split, numbers in (("train", (9, 25)), ("val", (139,))):
        for number in numbers:
            picture(root / f"{split}2017" / f"{number:012d}.jpg", noise(number))
            grey(root / "stuffthingmaps" / f"{split}2017" / f"{number:012d}.png", ids)
    return root
