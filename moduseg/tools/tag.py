"""Write image-level labels for a folder of images that has none, so that a bank can be built from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moduseg.config import Config, compose
from moduseg.config.command_keys import TagOptions
from moduseg.datasets.image_files import find_images
from moduseg.datasets.tagged_images import TaggedImages
from moduseg.datasets.vocabulary import read_word_list
from moduseg.errors import ConfigError, MissingError
from moduseg.files import write_atomic
from moduseg.pipeline.manifests import count_failures
from moduseg.pipeline.workspace import Workspace, log
from moduseg.stages.tag import FILE, TagImages


def main(options: TagOptions, overrides: Sequence[str]) -> int | Path:
    """Tag a folder of images and write its label file, or tag the evaluated split of the data set.

    Returns:
        0, or 1 if images failed; of a data set, the folder of the stage.

    Raises:
        ConfigError: no vocabulary, or the label file is there already.
        MissingError: no image, or weights are not there.
    """
    words = [f"vocabulary={options.vocabulary}"] if options.vocabulary else []
    has_tagger = any(override.startswith("tagger=") for override in overrides)
    cfg = compose([*([] if has_tagger else ["tagger=tagclip"]), *overrides, *words])
    if options.images is None:
        return TagImages.run(cfg)
    folder = Path(options.images).expanduser()
    root, images = find_root(folder)
    target = Path(options.out).expanduser() if options.out is not None else root / "labels.csv"
    if target.exists():
        raise ConfigError(f"out: got '{target}', which exists; remove it, or choose another file with out=<file>")
    tags = run(cfg, images, root.resolve().name)
    write_atomic(target, (tags / FILE).read_bytes())
    log.info("labels: %s", target)
    if root != folder or (root / "images").is_dir():
        log.info("next: moduseg build_bank dataset=folder dataset.root=%s", root)
    return 1 if count_failures(tags) else 0


def find_root(folder: Path) -> tuple[Path, Path]:
    """Return the root of a data set of one's own and the folder of its images, from either of them.

    Raises:
        MissingError: no such folder.
    """
    if not folder.is_dir():
        raise MissingError(f"images: got '{folder}', no such folder; expected one of images; set images=<folder>")
    if (folder / "images").is_dir():
        return folder, folder / "images"
    return (folder.parent, folder) if folder.name == "images" else (folder, folder)


def run(cfg: Config, images: Path, name: str) -> Path:
    """Tag the images of a folder, resumable like every stage, and return the folder of the tags.

    Args:
        cfg: the configuration, with a vocabulary.
        images: the folder.
        name: data set that the tags are filed under.

    Raises:
        ConfigError: no vocabulary.
        MissingError: no image, or weights are not there.
    """
    words = read_word_list(cfg.vocabulary)
    if words is None:
        raise ConfigError("vocabulary: got none, expected words for what the images may show; try vocabulary='dog;cat'")
    dataset = TaggedImages(name, "images", classes=words.classes, files=find_images([images]), tags={}, source="none")
    work = Workspace(cfg, splits={str(cfg.dataset[key]): dataset for key in ("train_split", "val_split")})
    return TagImages.run(cfg, work)
