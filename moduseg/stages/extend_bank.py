"""Tagged images added to a finished bank: what is there is not computed again.

The new images go through the stages that built the bank, with the bank's own configuration and a class list to which
new names are appended; their vectors are put behind the bank's. A rebuilt bank of the same list of images has the same
rows, and the same bytes where batches hold the same images.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moduseg.bank import edit
from moduseg.bank.derived import open_bank, write_derived
from moduseg.bank.store import Bank
from moduseg.config import Config, PseudoMasksConfig
from moduseg.config.stored import reconfigure
from moduseg.datasets.image_files import find_images
from moduseg.datasets.labels import LABEL_SUFFIXES, LabelFile, RawLabels, read_label_file, resolve_labels
from moduseg.datasets.tagged_images import TaggedImages
from moduseg.errors import ArtefactError, ConfigError, DataError, MissingError, suggest
from moduseg.pipeline.manifests import count_failures
from moduseg.pipeline.workspace import Workspace, log
from moduseg.pseudo_masks.prompts import resolve_background_words
from moduseg.stages.build_bank import BuildBank

SPLIT = "added"
"""What the new images are called as a split."""


@dataclass(frozen=True)
class AddOptions:
    """Keys of `scripts/bank.py add`.

    Attributes:
        bank: folder of the bank.
        images: folders of images, or single files. A folder with `images/` inside is taken as data sets of one's own
            are laid out (`labels.csv`, `masks/`).
        tags: class names that all of them show, or a file of labels (`labels.csv`, `.json`); the folder's own file
            where left out, and where there is none, the new classes.
        new: classes that the bank does not have yet; a name that is neither there nor here is taken for a slip.
        masks: folder of label maps `<id>.png` with the ids of the longer class list, used in place of pseudo masks.
        prefix: put before the ids of the images, as `<prefix>/<id>`.
        out: folder of the new bank; chosen below `runtime.outputs` where left out.
    """

    bank: str
    images: tuple[str, ...]
    tags: str | None = None
    new: tuple[str, ...] = ()
    masks: str | None = None
    prefix: str | None = None
    out: str | None = None


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
    classes = edit.append_classes(bank.classes, options.new)
    files, tags, masks, tag_source = gather(options, classes)
    path, seconds = add(bank, source, cfg, files, tags, classes, masks, tag_source, options.out, start)
    counts = open_bank(path).counts
    log.info(
        "add: %d images, %d + %d vectors, %s; %.1f s -> %s",
        len(files),
        len(bank),
        sum(counts.values()) - len(bank),
        ", ".join(f"{name}: {counts[name]}" for name in options.new) or "no new class",
        seconds,
        path,
    )
    return path


def add(
    bank: Bank,
    source: Path,
    cfg: Config,
    files: Mapping[str, Path],
    tags: Mapping[str, tuple[int, ...]],
    classes: Sequence[str],
    masks: Mapping[str, Path] | None = None,
    tag_source: str = "tags",
    out: str | None = None,
    start: float | None = None,
    outputs: Path | None = None,
) -> tuple[Path, float]:
    """Add images by id; see `run`.

    Args:
        bank: the bank, and `source` its folder.
        cfg: the configuration that labels and pools the new images.
        files: image file of each new id, in the order in which they go behind the others.
        tags: ascending ids of `classes` for each image.
        classes: names that tags and label maps count in, background first: the bank's and new ones, in any order. The
            new ones go behind the bank's own.
        masks: label maps in place of pseudo masks; with the oracle `ground_truth` its truth.
        tag_source: what results call the source of the tags.
        out: folder of the new bank.
        start: when the clock started (`time.perf_counter`).
        outputs: root that the new bank's folder is chosen below; that of `cfg` where left out.

    Returns:
        The folder, and the seconds it took.
    """
    start = time.perf_counter() if start is None else start
    known = sorted(set(files) & set(bank.image_ids))
    if known:
        raise ArtefactError(
            f"add: image {known[0]!r} is in the bank already ({len(known)} such), expected new ids; set "
            "prefix=<word>, or take it out with scripts/bank.py remove image=<id>"
        )
    if masks and cfg.pseudo_masks.generator["name"] != "ground_truth":
        given: dict[str, Any] = {"name": "ground_truth", "filter_labels": True}
        cfg = dataclasses.replace(cfg, pseudo_masks=_given_masks(cfg.pseudo_masks, given))
    dataset = TaggedImages(
        str(bank.info.get("dataset", "folder")),
        SPLIT,
        classes=classes,
        files=files,
        tags=tags,
        masks=masks,
        source=tag_source,
    )
    settings = {**cfg.dataset, "train_split": SPLIT}
    cfg = dataclasses.replace(cfg, dataset=settings, bank=dataclasses.replace(cfg.bank, path=None))
    work = Workspace(cfg, {SPLIT: dataset})
    _check_generator(work, cfg, [name for name in classes if name not in bank.classes])
    if work.backbone.digest != bank.info.get("backbone_digest"):
        bank.check_fits(work.backbone.digest, work.backbone.dim, bank.classes)
    built = BuildBank.run(cfg, work)
    added = edit.append_files(open_bank(built), {i: str(file.resolve()) for i, file in files.items()})
    added = dataclasses.replace(added, info={**added.info, "label_source": dataset.label_source})
    result = edit.merge([bank, added])
    seconds = time.perf_counter() - start
    path = write_derived(
        result,
        "add",
        sources=[source],
        details={"images": list(files), "new": [name for name in classes if name not in bank.classes]},
        folder=None if out is None else Path(out).expanduser(),
        outputs=outputs or work.outputs,
        config=bank.info["config"],
        inputs={"build_bank": str(built)},
        failures=count_failures(built),
        seconds={"add": round(seconds, 3)},
    )
    return path, seconds


def gather(
    options: AddOptions, classes: Sequence[str]
) -> tuple[dict[str, Path], dict[str, tuple[int, ...]], dict[str, Path], str]:
    """Files, tags and label maps of the images that the options name, and where the tags come from.

    Raises:
        ConfigError, DataError, MissingError: see `run`.
    """
    places = [Path(place).expanduser() for place in options.images]
    if not places:
        raise ConfigError("images: got nothing, expected a folder or files; set images=<folder>")
    root = places[0] if len(places) == 1 and (places[0] / "images").is_dir() else None
    found = find_images([root / "images"] if root else places)
    stored = _label_file(options.tags, root or (places[0] if len(places) == 1 and places[0].is_dir() else None))
    if stored is None:
        names = [part.strip() for part in (options.tags or "").split(";") if part.strip()] or list(options.new)
        if not names:
            raise ConfigError("tags: got none, expected class names or a label file; set tags=<name;name>")
        labels: RawLabels = {image_id: tuple(names) for image_id in found}
        where, tag_source = "tags", "tags"
    else:
        labels, where, tag_source = dict(stored.entries), stored.where, stored.source
        untagged = [image_id for image_id in found if image_id not in labels]
        if len(untagged) == len(found):
            raise DataError(f"{where}: names none of the {len(found)} images ({untagged[0]!r}, ...); correct the file")
        if untagged:
            log.warning("add: %d images without tags are left out, such as %s", len(untagged), untagged[0])
        found = {image_id: path for image_id, path in found.items() if image_id in labels}
    tags = {}
    for image_id in found:
        for label in labels[image_id]:
            if isinstance(label, str) and not label.isdigit() and label not in classes:
                close = suggest(label, classes[1:])
                hint = f"did you mean {close!r}? " if close else ""
                raise ConfigError(
                    f"tags: image {image_id!r} has {label!r}, which is no class of the bank; {hint}for a new class set "
                    f"new={label!r}"
                )
        tags[image_id] = resolve_labels(labels[image_id], classes, image_id, where)
    unused = [name for name in options.new if not any(classes.index(name) in ids for ids in tags.values())]
    if unused:
        raise ConfigError(f"new: got {unused[0]!r}, which no image is tagged with; add it to the tags or leave it out")
    folder = Path(options.masks).expanduser() if options.masks else None
    if folder is not None and not folder.is_dir():
        raise MissingError(f"masks: got '{options.masks}', no such folder; set masks=<folder of label PNGs>")
    masks = {i: folder / f"{i}.png" for i in found} if folder is not None else {}
    if options.prefix:
        rename = {image_id: f"{options.prefix}/{image_id}" for image_id in found}
        found, tags, masks = ({rename[i]: v for i, v in d.items()} for d in (found, tags, masks))  # type: ignore
    return found, tags, masks, tag_source


def _label_file(tags: str | None, folder: Path | None) -> LabelFile | None:
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


def _given_masks(settings: PseudoMasksConfig, generator: Mapping[str, Any]) -> PseudoMasksConfig:
    background = dataclasses.replace(settings.background, rule="given")
    return dataclasses.replace(settings, generator=generator, background=background, refine="none")


def _check_generator(work: Workspace, cfg: Config, new: Sequence[str]) -> None:
    """Refuse generators whose result for one image depends on all the others; warn of words used twice."""
    generator = work.generator
    name = cfg.pseudo_masks.generator["name"]
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
    words = cfg.pseudo_masks.generator.get("background_words")
    if words is not None:
        shared = [name for name in new if name in resolve_background_words(words)]
        if shared:
            log.warning(
                "add: the new class %r is one of the background words too and would lose against itself; set "
                "pseudo_masks.generator.background_words=[<the others>]",
                shared[0],
            )
