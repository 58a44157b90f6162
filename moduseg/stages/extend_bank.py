"""Add tagged images to a finished bank without computing its own vectors again.

The new images go through the stages that built the bank, with the bank's own configuration and a class list to which
new names are appended; their vectors are appended to the bank's. A bank rebuilt from the same list of images has the
same rows, and the same bytes if its batches hold the same images.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moduseg.bank import edit
from moduseg.bank.derived import check_target, open_bank, write_derived
from moduseg.bank.store import Bank
from moduseg.config import Config
from moduseg.config.command_keys import AddOptions
from moduseg.config.stored import reconfigure
from moduseg.datasets.image_files import find_images
from moduseg.datasets.io import check_image_range
from moduseg.datasets.labels import LABEL_SUFFIXES, LabelFile, read_label_file, resolve_labels
from moduseg.datasets.tagged_images import TaggedImages
from moduseg.errors import ArtefactError, ConfigError, DataError, MissingError
from moduseg.pipeline.manifests import count_failures
from moduseg.pipeline.workspace import Workspace, log
from moduseg.pseudo_masks.prompts import resolve_background_words
from moduseg.stages.build_bank import BuildBank

SPLIT = "added"
"""What the new images are called as a split."""


@dataclass(frozen=True)
class NewImages:
    """Tagged images to be added to a bank.

    Attributes:
        files: image file of each new id, in the order in which they are appended.
        tags: ascending ids of `classes` for each image.
        classes: names that tags and label maps count in, background first: the bank's and new ones, in any order. The
            new ones are appended to the bank's own.
        masks: label maps `<id>.png` used in place of pseudo masks; with the oracle `ground_truth` its truth.
        tag_source: what results call the source of the tags.
        needs_regions: whether a new class that no region got is an error, not a warning.
    """

    files: Mapping[str, Path]
    tags: Mapping[str, tuple[int, ...]]
    classes: Sequence[str]
    masks: Mapping[str, Path]
    tag_source: str
    needs_regions: bool = False


def run(options: AddOptions, overrides: Sequence[str] = ()) -> Path:
    """Add images to a bank.

    Args:
        options: what to add.
        overrides: of the bank's configuration; `pseudo_masks=<file>` labels the new images by another generator.

    Returns:
        The folder of the new bank.

    Raises:
        ConfigError: a tag that is no class, or a generator that is fitted on all training images together.
        ArtefactError: no bank, or weights that have changed since it was built.
        DataError, MissingError: the images or their tags cannot be used.
    """
    start = time.perf_counter()
    source = Path(options.bank).expanduser()
    bank = open_bank(source)
    cfg = reconfigure(bank.info["config"], ["runtime.outputs=outputs", *overrides])
    folder = None if options.out is None else Path(options.out).expanduser()
    if folder is not None:
        check_target(folder, "add", [source])
    if options.words:
        return _add_words(bank, source, options.words, folder=folder, outputs=Path(cfg.runtime.outputs))
    for name in options.new:
        if name in bank.classes:
            log.warning("add: new=%s is a class of the bank already; its regions are added to that class", name)
    images = gather_images(options, edit.append_classes(bank.classes, options.new))
    path, seconds = add_images(bank, source, cfg, images, folder=folder, start=start)
    counts = open_bank(path).counts
    log.info(
        "add: %d images, %d + %d vectors, %s; %.1f s -> %s",
        len(images.files),
        len(bank),
        sum(counts.values()) - len(bank),
        ", ".join(f"{name}: {counts[name] - bank.counts.get(name, 0)}" for name in _find_named(images)),
        seconds,
        path,
    )
    return path


def _add_words(bank: Bank, source: Path, words: Sequence[str], *, folder: Path | None, outputs: Path) -> Path:
    """Write a bank that knows more classes by their names alone; its regions stay as they are."""
    path = write_derived(
        edit.append_words(bank, words),
        "add",
        sources=[source],
        details={"words": list(words)},
        folder=folder,
        outputs=outputs,
        config=bank.info["config"],
    )
    log.info("add: %d vectors, classes by name: %s -> %s", len(bank), ", ".join(words), path)
    return path


def add_images(
    bank: Bank,
    source: Path,
    cfg: Config,
    images: NewImages,
    *,
    folder: Path | None = None,
    outputs: Path | None = None,
    start: float | None = None,
) -> tuple[Path, float]:
    """Write a bank with more images.

    Args:
        bank: the bank.
        source: its folder.
        cfg: the configuration that labels and pools the new images.
        images: what to add.
        folder: folder of the new bank; chosen below `outputs` if omitted.
        outputs: root of all artefacts; that of `cfg` if omitted.
        start: when the clock started (`time.perf_counter`); now if omitted.

    Returns:
        The folder, and the seconds it took.

    Raises:
        ModusegError: as for `run`, or an image that the bank has already.
        DataError: no region got a new class, or any class that the images are tagged with, and `needs_regions`.
    """
    start = time.perf_counter() if start is None else start
    repeated = sorted(set(images.files) & set(bank.image_ids))
    if repeated:
        raise ArtefactError(
            f"add: image {repeated[0]!r} is in the bank already ({len(repeated)} such), expected new ids; set "
            "prefix=<word>, or take it out with scripts/bank.py remove image=<id>"
        )
    new_classes = [name for name in images.classes if name not in bank.classes]
    work = _open_workspace(bank, cfg, images)
    _check_generator(work, new_classes)
    if work.backbone.digest != bank.info.get("backbone_digest"):
        bank.check_fits(work.backbone.digest, work.backbone.dim, bank.classes)
    built = BuildBank.run(work.cfg, work)
    addition = edit.append_files(open_bank(built), {i: str(file.resolve()) for i, file in images.files.items()})
    label_source = work.dataset(SPLIT).label_source
    addition = dataclasses.replace(addition, info={**addition.info, "label_source": label_source})
    _check_regions(addition, images, new_classes)
    extended = edit.merge([bank, addition])
    seconds = time.perf_counter() - start
    path = write_derived(
        extended,
        "add",
        sources=[source],
        details={"images": list(images.files), "new": new_classes},
        folder=folder,
        outputs=outputs or work.outputs,
        config=bank.info["config"],
        inputs={"build_bank": str(built)},
        failures=count_failures(built),
        seconds={"add": round(seconds, 3)},
    )
    return path, seconds


def gather_images(options: AddOptions, classes: Sequence[str]) -> NewImages:
    """Find the images that the options name, with their tags and label maps.

    Args:
        options: what to add.
        classes: names of the longer class list, background first.

    Raises:
        ConfigError: no image, no tag, a tag that is no class, or a new class without an image.
        DataError, MissingError: the images, their tags or their label maps cannot be used.
    """
    paths = [Path(path).expanduser() for path in options.images]
    if not paths:
        raise ConfigError("images: got nothing, expected a folder or files; set images=<folder>")
    folder = paths[0] if len(paths) == 1 and paths[0].is_dir() else None
    has_layout = folder is not None and (folder / "images").is_dir()
    files = find_images([folder / "images"] if folder is not None and has_layout else paths)
    label_file = _read_label_file(options.tags, folder)
    if label_file is None:
        names = [part.strip() for part in (options.tags or "").split(";") if part.strip()] or list(options.new)
        if not names:
            raise ConfigError("tags: got none, expected class names or a label file; set tags=<name;name>")
        label_file = LabelFile({image_id: tuple(names) for image_id in files}, "tags", "tags")
    else:
        files = _select_tagged(files, label_file)
    tags = _resolve_tags(files, label_file, classes)
    for name in options.new:
        if not any(classes.index(name) in ids for ids in tags.values()):
            raise ConfigError(f"new: got {name!r}, which no image is tagged with; add it to the tags or leave it out")
    masks = _find_masks(options.masks, files)
    prefix = f"{options.prefix}/" if options.prefix else ""
    return NewImages(
        {prefix + image_id: file for image_id, file in files.items()},
        {prefix + image_id: ids for image_id, ids in tags.items()},
        classes,
        {prefix + image_id: file for image_id, file in masks.items()},
        label_file.source,
        needs_regions=True,
    )


def _find_named(images: NewImages) -> list[str]:
    """Return the classes that images are tagged with, in the order of their ids."""
    return [images.classes[label] for label in sorted({label for ids in images.tags.values() for label in ids})]


def _check_regions(addition: Bank, images: NewImages, new_classes: Sequence[str]) -> None:
    """Warn of classes that images are tagged with and that no region got, or refuse them, as `needs_regions` says.

    Raises:
        DataError: a new class has no region, or no class has one.
    """
    named = _find_named(images)
    absent = [name for name in named if not addition.counts.get(name)]
    if not absent:
        return
    remedy = "look at the pseudo masks, or set masks=<folder of label PNGs>"
    if images.needs_regions and (len(absent) == len(named) or not set(absent).isdisjoint(new_classes)):
        raise DataError(
            f"add: got no region of {', '.join(absent)} in {len(images.files)} images, expected one or more; {remedy}"
        )
    log.warning("add: no region got %s; %s", ", ".join(absent), remedy)


def _open_workspace(bank: Bank, cfg: Config, images: NewImages) -> Workspace:
    """Return a workspace whose training split is the new images."""
    if images.masks and cfg.pseudo_masks.generator["name"] != "ground_truth":
        background = dataclasses.replace(cfg.pseudo_masks.background, rule="given")
        generator = {"name": "ground_truth", "filter_labels": True}
        pseudo_masks = dataclasses.replace(cfg.pseudo_masks, generator=generator, background=background, refine="none")
        cfg = dataclasses.replace(cfg, pseudo_masks=pseudo_masks)
    dataset = TaggedImages(
        str(bank.info.get("dataset", "folder")),
        SPLIT,
        classes=images.classes,
        files=images.files,
        tags=images.tags,
        masks=images.masks,
        source=images.tag_source,
    )
    dataset.image_range = check_image_range(cfg.dataset.get("image_range"))
    settings = {**cfg.dataset, "train_split": SPLIT}
    cfg = dataclasses.replace(cfg, dataset=settings, bank=dataclasses.replace(cfg.bank, path=None))
    return Workspace(cfg, {SPLIT: dataset})


def _select_tagged(files: Mapping[str, Path], label_file: LabelFile) -> dict[str, Path]:
    """Return the images that a label file names.

    Raises:
        DataError: it names none of them.
    """
    untagged = [image_id for image_id in files if image_id not in label_file.entries]
    if len(untagged) == len(files):
        raise DataError(
            f"{label_file.where}: names none of the {len(files)} images ({untagged[0]!r}, ...); correct the file"
        )
    if untagged:
        log.warning("add: %d images without tags are left out, such as %s", len(untagged), untagged[0])
    return {image_id: file for image_id, file in files.items() if image_id in label_file.entries}


def _resolve_tags(
    files: Mapping[str, Path], label_file: LabelFile, classes: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Return the ascending class ids of each image.

    Raises:
        ConfigError: a tag that is no class.
    """
    tags = {}
    for image_id in files:
        labels = label_file.entries[image_id]
        for label in labels:
            try:
                resolve_labels([label], classes, image_id, label_file.locate(image_id))
            except DataError as error:
                if isinstance(label, int) or label.isdigit():
                    raise
                raise ConfigError(f"tags: {error}; for a new class set new={label!r}") from error
        tags[image_id] = resolve_labels(labels, classes, image_id, label_file.locate(image_id))
    return tags


def _find_masks(path: str | None, files: Mapping[str, Path]) -> dict[str, Path]:
    """Return the label map of each image; none if no folder is named."""
    if not path:
        return {}
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise MissingError(f"masks: got '{path}', no such folder; set masks=<folder of label PNGs>")
    return {image_id: folder / f"{image_id}.png" for image_id in files}


def _read_label_file(tags: str | None, folder: Path | None) -> LabelFile | None:
    """Return the label file that `tags` names, else that of the folder; `None` if there is none."""
    if tags is not None and Path(tags).suffix.lower() in LABEL_SUFFIXES:
        path = Path(tags).expanduser()
        if not path.is_file():
            raise MissingError(f"tags: got '{tags}', no such file; name a label file, or class names")
        return read_label_file(path)
    if tags is None and folder is not None:
        for name in ("labels.csv", "labels.json"):
            if (folder / name).is_file():
                return read_label_file(folder / name)
    return None


def _check_generator(work: Workspace, new_classes: Sequence[str]) -> None:
    """Refuse generators whose result for one image depends on all the others; warn of words used twice."""
    generator, settings = work.generator, work.cfg.pseudo_masks.generator
    name = settings["name"]
    if generator.is_fitted:
        raise ConfigError(
            f"pseudo_masks.generator: the bank's {name!r} is fitted on all training images together, so an image "
            "cannot be added without making all pseudo masks again; set masks=<folder of label PNGs> or "
            "pseudo_masks=<file of another generator>, or build the bank again"
        )
    if generator.needs_truth and not work.dataset(SPLIT).has_truth:
        raise ConfigError(
            f"masks: got none, expected label maps, as the bank's pseudo masks are {name!r}; set masks=<folder>, or "
            "pseudo_masks=<file of another generator>"
        )
    words = settings.get("background_words")
    if words is not None:
        shared = [name for name in new_classes if name in resolve_background_words(words)]
        if shared:
            log.warning(
                "add: the new class %r is one of the background words too and would lose against itself; set "
                "pseudo_masks.generator.background_words=[<the others>]",
                shared[0],
            )
