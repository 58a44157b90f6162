"""Write the masks of EntitySeg as proposal files, to be run inside your own EntitySeg (detectron2) installation.

    cd <Entity>/Entityv2/CropFormer
    python <here>/entityseg_export.py --config-file configs/entityv2/entity_segmentation/mask2former_hornet_3x.yaml \\
        --images <folder of images> --out <folder of JSON files> --opts MODEL.WEIGHTS <checkpoint>.pth

One JSON an image, every mask with its score. It needs nothing of moduseg, which reads the files afterwards:

    python scripts/infer.py proposer=files proposer.folder=<folder of JSON files>

Masks are written down to a low score, because the readers apply thresholds of their own. A run that was stopped goes on
where it was: files appear whole or not at all, and those that are there are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def to_proposals(instances: Any, image_id: str, min_score: float = 0.0) -> dict[str, Any]:
    """The JSON object of one image, in the annotation format of SA-1B.

    Args:
        instances: detectron2's `Instances` of one image: `pred_masks` `[N, H, W]` (bool, or 0 and 1), `scores` `[N]`.
        image_id: path of the image inside its folder, without suffix.
        min_score: masks of a lower score, and those without a pixel, are left out.
    """
    from pycocotools import mask as coco

    masks = np.asarray(instances.pred_masks.cpu()) > 0.5
    scores = np.asarray(instances.scores.cpu(), dtype=np.float64)
    height, width = masks.shape[1:]
    annotations = []
    for mask, score in zip(masks, scores):  # noqa: B905 (EntitySeg runs on Python versions without zip's strict)
        if score < min_score or not mask.any():
            continue
        run = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
        annotations.append(
            {
                "id": len(annotations) + 1,
                "segmentation": {"size": [height, width], "counts": run["counts"].decode("ascii")},
                "area": int(mask.sum()),
                "bbox": coco.toBbox(run).tolist(),
                "predicted_iou": float(score),
            }
        )
    image = {"image_id": image_id, "width": width, "height": height, "file_name": image_id}
    return {"image": image, "annotations": annotations}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a file so that it is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)


def build_predictor(config_file: str, options: list[str], crops: bool) -> Any:
    """EntitySeg's predictor; `crops` is CropFormer's, which looks at the image and at crops of it."""
    sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "demo_cropformer")]
    from detectron2.config import get_cfg
    from detectron2.engine import DefaultPredictor
    from detectron2.projects.deeplab import add_deeplab_config
    from mask2former import add_maskformer2_config

    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_maskformer2_config(cfg)
    cfg.merge_from_file(config_file)
    cfg.merge_from_list(options)
    cfg.freeze()
    if crops:
        from predictor import CropFormerPredictor

        return CropFormerPredictor(cfg)
    return DefaultPredictor(cfg)


def main() -> int:
    """Exit code 0, or 1 where images were left out, each with a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config-file", required=True, help="configs/entityv2/entity_segmentation/<model>.yaml")
    parser.add_argument("--images", type=Path, required=True, help="folder of images, sub-folders included")
    parser.add_argument("--out", type=Path, required=True, help="folder to write <id>.json to")
    parser.add_argument("--min-score", type=float, default=0.05, help="least score that is written")
    parser.add_argument("--crops", action="store_true", help="for configurations of CropFormer (cropformer_*.yaml)")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs of the configuration")
    arguments = parser.parse_args()
    paths = sorted(p for p in arguments.images.rglob("*") if p.suffix.lower() in IMAGES)
    if not paths:
        parser.error(f"{arguments.images}: no image in it")
    targets = {p: arguments.out / p.relative_to(arguments.images).with_suffix(".json") for p in paths}
    left = [path for path in paths if not targets[path].exists()]
    print(f"{len(paths)} images, {len(paths) - len(left)} done before")
    if not left:
        return 0
    from detectron2.data.detection_utils import read_image

    predict = build_predictor(arguments.config_file, arguments.opts, arguments.crops)
    failures = 0
    for path in left:
        image_id = path.relative_to(arguments.images).with_suffix("").as_posix()
        try:
            instances = predict(read_image(str(path), format="BGR"))["instances"]
        except (OSError, ValueError) as error:
            print(f"left out: {path}: {' '.join(str(error).split())}", file=sys.stderr)
            failures += 1
            continue
        write_json(targets[path], to_proposals(instances, image_id, arguments.min_score))
    print(f"{len(left) - failures} written, {failures} left out; proposals are in {arguments.out}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
