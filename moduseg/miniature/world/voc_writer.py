"""The miniature world on disk, in the layout of PASCAL VOC 2012."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from moduseg.errors import ArtefactError, ConfigError
from moduseg.files import remove_leftovers, write_atomic
from moduseg.masks.palette import voc_palette
from moduseg.miniature.world.scenes import CLASSES, WORLD_VERSION, WorldConfig, render_scene


def write_voc(root: Path, seed: int, train: int = 160, val: int = 80, config: WorldConfig | None = None) -> Path:
    """Write a data set in the layout of PASCAL VOC 2012.

    `JPEGImages/<id>.png` (the folder keeps VOC's name; the files are lossless PNG), `SegmentationClass/<id>.png` and
    `SegmentationObject/<id>.png` (indexed PNG with the VOC palette), `ImageSets/Segmentation/{train,val}.txt`,
    `image_labels.json`, `classes.txt` and `world.json` (settings). Every file is written to a temporary name and
    renamed, the lists last: a call that was killed is completed by the next one, and a complete folder is left alone.

    Args:
        root: folder to write to, made if absent.
        seed: world seed; `DATASET_SEEDS` are free of scenes that the miniature models have seen.
        train, val: number of images of each split, 0 or more.
        config: settings; the defaults if omitted.

    Returns:
        `root`.

    Raises:
        ArtefactError: `root` holds a world of other settings.
        ConfigError: a number is negative.
        StorageError: a file cannot be written.
    """
    config, root = config or WorldConfig(), Path(root)
    if min(seed, train, val) < 0:
        raise ConfigError(f"seed, train, val: got {(seed, train, val)}, expected numbers >= 0; try 0, 160, 80")
    settings = {"version": WORLD_VERSION, "seed": seed, "train": train, "val": val, "config": config.settings}
    settings = json.loads(json.dumps(settings))
    _check_settings(root, settings)
    splits = {"train": train, "val": val}
    ids = {split: [f"{split}_{i:05d}" for i in range(count)] for split, count in splits.items()}
    folders = [root / name for name in ("JPEGImages", "SegmentationClass", "SegmentationObject")]
    lists = [root / "ImageSets" / "Segmentation" / f"{split}.txt" for split in splits]
    lists += [root / "image_labels.json", root / "classes.txt"]
    pictures = [folder / f"{img_id}.png" for names in ids.values() for img_id in names for folder in folders]
    if all(path.is_file() for path in (*lists, *pictures)):
        return root
    remove_leftovers(root)
    write_atomic(root / "world.json", (json.dumps(settings, indent=2) + "\n").encode())

    entries = []
    palette = voc_palette().tobytes()
    for split, names in ids.items():
        for index, img_id in enumerate(names):
            scene = render_scene(seed, split, index, config)
            for folder, array in zip(
                folders, (scene.image, scene.semantic, scene.instances.astype(np.uint8)), strict=True
            ):
                if not (folder / f"{img_id}.png").is_file():
                    picture = Image.fromarray(array)
                    if array.ndim == 2:
                        picture.putpalette(palette)
                    content = io.BytesIO()
                    picture.save(content, format="PNG")
                    write_atomic(folder / f"{img_id}.png", content.getvalue())
            entries.append({"img_id": img_id, "file_name": f"{img_id}.png", "labels": list(scene.labels)})
    write_atomic(root / "classes.txt", ("\n".join(CLASSES) + "\n").encode())
    write_atomic(root / "image_labels.json", (json.dumps({"images": entries}, indent=1) + "\n").encode())
    for path, names in zip(lists, ids.values(), strict=False):
        write_atomic(path, "".join(f"{name}\n" for name in names).encode())
    return root


def _check_settings(root: Path, settings: dict) -> None:
    path = root / "world.json"
    if not path.is_file():
        return
    try:
        stored = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ArtefactError(
            f"{path}: got a file that is not JSON ({error}), expected the settings of a world; remove the folder"
        ) from error
    if stored != settings:
        different = sorted(key for key in settings if stored.get(key) != settings[key])
        got = {key: stored.get(key) for key in different}
        raise ArtefactError(
            f"{root} holds another world: got {got}, expected { ({key: settings[key] for key in different}) }; "
            "try another folder, or remove this one"
        )
