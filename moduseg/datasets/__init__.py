"""Data sets: images by id, image-level labels, ground truth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from moduseg.config.construct import build_named
from moduseg.datasets.ade20k import Ade20kDataset
from moduseg.datasets.base import Dataset
from moduseg.datasets.cityscapes import CityscapesDataset
from moduseg.datasets.coarse_sets import Cityscapes27Dataset, CocoStuff27Dataset
from moduseg.datasets.coco import CocoDataset
from moduseg.datasets.coco150 import Coco150Dataset
from moduseg.datasets.coco_export import CocoExport
from moduseg.datasets.coco_stuff import CocoObjectDataset, CocoStuffDataset
from moduseg.datasets.context import ContextDataset
from moduseg.datasets.folder import FolderDataset
from moduseg.datasets.miniature import MiniatureDataset
from moduseg.datasets.voc import VocDataset

__all__ = ["DATASETS", "Dataset", "build"]

DATASETS: dict[str, type[Dataset]] = {
    "ade20k": Ade20kDataset,
    "cityscapes": CityscapesDataset,
    "cityscapes27": Cityscapes27Dataset,
    "coco": CocoDataset,
    "coco150": Coco150Dataset,
    "coco_json": CocoExport,
    "coco_object": CocoObjectDataset,
    "coco_stuff": CocoStuffDataset,
    "coco_stuff27": CocoStuff27Dataset,
    "context": ContextDataset,
    "folder": FolderDataset,
    "miniature": MiniatureDataset,
    "voc": VocDataset,
}


def build(cfg: Mapping[str, Any] | DictConfig, split: str) -> Dataset:
    """Build the data set that the configuration group `dataset` describes.

    Args:
        cfg: `name`, `train_split`, `val_split` and the arguments or options of the class.
        split: the split to open, one of the two that `cfg` names or another that the data set has.

    Raises:
        ConfigError: an unknown name or key, or a value out of range.
    """
    plain = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
    arguments = {str(k): v for k, v in dict(plain).items() if k not in ("train_split", "val_split")}  # type: ignore[arg-type]
    return build_named("dataset", DATASETS, arguments, split=split)
