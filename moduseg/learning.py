"""What a bank learns while a program runs: tagged images, regions that a person named; and where banks are found."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moduseg.backbones.base import Backbone
from moduseg.bank import edit
from moduseg.bank.derived import describe_no_bank, write_derived
from moduseg.bank.parts import find_parts
from moduseg.bank.regions import labelled_regions, region_vectors
from moduseg.bank.store import Bank
from moduseg.config import Config
from moduseg.datasets.io import write_label_png, write_rgb_png
from moduseg.datasets.photographs import NamedPicture
from moduseg.devices import Device
from moduseg.errors import ArtefactError, ConfigError
from moduseg.files import read_json, write_atomic
from moduseg.proposers.base import Proposer
from moduseg.pseudo_masks.base import PseudoMaskGenerator
from moduseg.pseudo_masks.clip_words import ClipWordsGenerator
from moduseg.pseudo_masks.labelling import ScoredImage, to_label_map
from moduseg.structures import IGNORE_INDEX, Proposals

LATEST = "latest"


def find_bank_folder(where: str | Path) -> Path:
    """Return the folder of a bank.

    Args:
        where: the folder itself; the folder of a finished run, whose bank is meant; or `latest`, the bank below
            `outputs/` of the current folder that was finished last.

    Raises:
        ArtefactError: there is none.
    """
    if str(where) == LATEST and not (Path(LATEST) / "bank.json").is_file():
        manifests = [
            path
            for pattern in ("outputs/*/build_bank/*/manifest.json", "outputs/*/bank/*/manifest.json")
            for path in Path().glob(pattern)
            if path.parent.name != LATEST and (path.parent / "bank.json").is_file()
        ]
        if not manifests:
            raise ArtefactError(
                "bank: got 'latest', found none below outputs/ of this folder, expected one; run scripts/build_bank.py "
                "first, or name its folder"
            )
        return max(manifests, key=lambda path: (path.stat().st_mtime_ns, str(path))).parent
    folder = Path(where).expanduser()
    if (folder / "bank.json").is_file():
        return folder
    for candidate in _list_banks_of_run(folder.resolve()):
        if (candidate / "bank.json").is_file():
            return candidate
    raise ArtefactError(describe_no_bank(folder, "a bank's folder, or that of a run"))


def _list_banks_of_run(folder: Path) -> list[Path]:
    """Return where the bank of a finished run may be: as its manifest says, or beside it where both were moved."""
    manifest = read_json(folder / "manifest.json") if (folder / "manifest.json").is_file() else {}
    inputs = manifest.get("inputs") if isinstance(manifest, dict) else None
    stored = inputs.get("build_bank") if isinstance(inputs, dict) else None
    if not isinstance(stored, str):
        return []
    # outputs/<data set>/infer/<run> lies beside outputs/<data set>/build_bank/<bank>.
    beside = folder.parents[2].joinpath(*Path(stored).parts[-3:]) if len(folder.parents) > 2 else Path(stored)
    return [Path(stored), beside]


def read_tags(tags: str | Sequence[str]) -> tuple[str, ...]:
    """Return class names: `"dog;sofa"` and `["dog", "sofa"]` are the same.

    Raises:
        ConfigError: no name.
    """
    parts = tags.split(";") if isinstance(tags, str) else tags
    names = tuple(dict.fromkeys(name.strip() for name in parts if name.strip() and name.strip() != "background"))
    if not names:
        raise ConfigError(f"tags: got {tags!r}, expected one class name or more; write 'dog' or 'dog;sofa'")
    return names


@dataclass(frozen=True)
class TaggedImage:
    """A photograph from which a bank is to learn.

    Attributes:
        picture: the photograph.
        tags: names of the classes that it shows.
        mask: label map `[H, W]` of integers in place of a pseudo mask; `None` for none.
    """

    picture: NamedPicture
    tags: tuple[str, ...]
    mask: np.ndarray | None = None


def pair_with_tags(
    pictures: Sequence[NamedPicture],
    tags: Sequence[str | Sequence[str]],
    masks: Sequence[np.ndarray] | None,
) -> list[TaggedImage]:
    """Return photographs with their tags and, if there are any, their label maps, in order.

    Raises:
        ConfigError: numbers that differ, or an entry of tags without a name.
    """
    names = [read_tags(entry) for entry in tags]
    if len(names) != len(pictures) or (masks is not None and len(masks) != len(pictures)):
        raise ConfigError(
            f"add: got {len(pictures)} images, {len(names)} entries of tags and "
            f"{'no' if masks is None else len(masks)} masks, expected as many of each"
        )
    label_maps = [None] * len(pictures) if masks is None else list(masks)
    return [TaggedImage(*entry) for entry in zip(pictures, names, label_maps, strict=True)]


@dataclass(frozen=True)
class TaggedImageLabeller:
    """Labels the pixels of tagged images as the bank's training images were labelled, and pools their regions.

    Attributes:
        cfg: configuration of the bank.
        device: where the models run.
        proposer: of training images.
        backbone: of the bank.
        generator: for the class list with the new names.
        words: gives regions their CLIP features, if the bank has them.
    """

    cfg: Config
    device: Device
    proposer: Proposer
    backbone: Backbone
    generator: PseudoMaskGenerator
    words: ClipWordsGenerator | None = None

    def check(self, *, has_masks: bool) -> None:
        """Refuse generators that need more than one image and its tags, unless label maps are given.

        Raises:
            ConfigError: the generator is fitted on all training images together, or reads ground truth.
        """
        name = self.cfg.pseudo_masks.generator["name"]
        if not has_masks and (self.generator.is_fitted or self.generator.needs_truth):
            why = "is fitted on all training images together" if self.generator.is_fitted else "reads ground truth"
            raise ConfigError(
                f"add: the bank's pseudo masks are {name!r}, which {why}, so that tags alone are not enough; give "
                "masks=, name regions with correct, or build the bank again with the new images"
            )

    def propose(self, picture: NamedPicture, *, has_mask: bool) -> Proposals | None:
        """Return the proposals of an image if its pseudo mask or its parts need them; a label map may be given."""
        is_labelled_by_them = self.generator.needs_proposals or self.cfg.pseudo_masks.refine == "region_vote"
        if self.cfg.bank.parts or (is_labelled_by_them and not has_mask):
            return self.proposer.propose(picture.sample)
        return None

    def label(self, picture: NamedPicture, labels: Sequence[int], proposals: Proposals | None) -> np.ndarray:
        """Return the pseudo mask of an image, `[H, W]` uint8, from the ascending class ids of its tags."""
        settings, sample = self.cfg.pseudo_masks, picture.sample
        scores = self.generator.generate(sample, tuple(labels), proposals if self.generator.needs_proposals else None)
        voters = proposals if settings.refine == "region_vote" else None
        item = ScoredImage(sample.id, scores, picture.pixels, voters)
        return to_label_map(item, settings, self.device.torch_device).cpu().numpy()

    def pool(self, pixels: np.ndarray, label_map: np.ndarray, proposals: Proposals | None) -> dict[str, Tensor]:
        """Return what an image adds to the bank: `pooled`, `labels`, `areas` and, with words, `word_values`.

        Args:
            pixels: `[H, W, 3]` uint8.
            label_map: `[H, W]` uint8, 255 where nothing is known.
            proposals: of which `bank.parts` are stored, if they lie in one class.
        """
        num_parts = self.cfg.bank.parts
        parts = None if proposals is None or not num_parts else proposals.masks[:num_parts]
        entries = [self._pool(pixels, label_map, parts)]
        if self.cfg.bank.flips:
            mirrored = np.ascontiguousarray(pixels[:, ::-1]), np.ascontiguousarray(label_map[:, ::-1])
            entries.append(self._pool(*mirrored, None if parts is None else parts.flip(-1)))
        return {name: torch.cat([entry[name].cpu() for entry in entries]) for name in entries[0]}

    def _pool(self, pixels: np.ndarray, label_map: np.ndarray, candidates: Tensor | None) -> dict[str, Tensor]:
        tokens = self.backbone.tokens([pixels])[0]
        device = tokens.tokens.device
        map_on_device = torch.from_numpy(label_map).to(device)
        labels, masks = labelled_regions(map_on_device, self.cfg.bank)
        if candidates is not None:
            parts = find_parts(map_on_device, candidates.to(device))
            labels, masks = torch.cat((labels, parts[0])), torch.cat((masks, parts[1]))
        entry = region_vectors(labels, masks, tokens, self.cfg.bank)
        if self.words is not None:
            entry["word_values"] = self.words.pool_regions(pixels, masks)
        return entry


def append_image(bank: Bank, image_id: str, classes: Sequence[str], entry: dict[str, Tensor]) -> Bank:
    """Return the bank with the regions of one more image.

    Args:
        bank: the bank.
        image_id: an id that it does not have.
        classes: the class list that labels count in: the bank's, with new names appended.
        entry: what the image adds, as `TaggedImageLabeller.pool` returns it. Regions without CLIP features, of a
            segmenter that asks no words, have none in a bank that has them.
    """
    word_values = entry.get("word_values")
    if bank.word_values is not None and word_values is None:
        word_values = bank.word_values.new_zeros(len(entry["labels"]), bank.word_values.shape[1])
    addition = Bank(
        pooled=entry["pooled"].float(),
        labels=entry["labels"].long(),
        image_index=torch.zeros(len(entry["labels"]), dtype=torch.int64),
        areas=entry["areas"].long(),
        image_ids=(image_id,),
        classes=tuple(classes),
        info={key: value for key, value in bank.info.items() if key != "files"},
        word_values=word_values,
    )
    return edit.merge([bank, addition])


def choose_image_id(bank: Bank, prefix: str, name: str) -> str:
    """Return `<prefix>/<name>`, with a number appended where the bank has it already."""
    taken = set(bank.image_ids)
    numbered = (
        f"{prefix}/{name}" if number == 1 else f"{prefix}/{name}-{number}" for number in range(1, len(taken) + 3)
    )
    return next(image_id for image_id in numbered if image_id not in taken)


@torch.inference_mode()
def learn_images(
    labeller: TaggedImageLabeller, bank: Bank, images: Sequence[TaggedImage], classes: Sequence[str]
) -> tuple[Bank, list[tuple[str, np.ndarray, np.ndarray]]]:
    """Label photographs, and return the bank with their regions.

    Args:
        labeller: for these classes.
        bank: the bank, which stays as it is.
        images: the photographs.
        classes: the bank's class list, with the new names of the tags appended.

    Returns:
        The new bank, and of each photograph its id in it, its pixels and its label map.

    Raises:
        ConfigError: tags alone do not suffice for the generator.
        ValueError: a label map that does not fit its photograph.
    """
    labeller.check(has_masks=all(image.mask is not None for image in images))
    learned = []
    for image in images:
        picture = image.picture
        proposals = labeller.propose(picture, has_mask=image.mask is not None)
        if image.mask is None:
            label_map = labeller.label(picture, sorted(classes.index(name) for name in image.tags), proposals)
        else:
            label_map = check_mask(image.mask, picture, len(classes))
        image_id = choose_image_id(bank, "added", picture.name)
        bank = append_image(bank, image_id, classes, labeller.pool(picture.pixels, label_map, proposals))
        learned.append((image_id, picture.pixels, label_map))
    return bank, learned


def check_mask(mask: np.ndarray, picture: NamedPicture, num_classes: int) -> np.ndarray:
    """Return a label map that was given for a photograph, `[H, W]` uint8.

    Raises:
        ValueError: another size, no integers, or ids that are no classes.
    """
    values = np.asarray(mask)
    is_id = ((values >= 0) & (values < num_classes)) | (values == 255)
    if values.shape != picture.pixels.shape[:2] or not np.issubdtype(values.dtype, np.integer) or not is_id.all():
        raise ValueError(
            f"masks: got {values.shape} {values.dtype} from {values.min(initial=0)} up to {values.max(initial=0)}, "
            f"expected the photograph's {picture.pixels.shape[:2]} with ids 0..{num_classes - 1} or 255"
        )
    return np.ascontiguousarray(values, dtype=np.uint8)


@dataclass(frozen=True)
class NamedRegion:
    """A region that a person named.

    Attributes:
        picture: its photograph.
        mask: `[H, W]` bool.
        pooled: `[C]` float, the vector with which it was labelled.
        label: its name: a class of the bank, `background`, or a new one.
    """

    picture: NamedPicture
    mask: np.ndarray
    pooled: Tensor
    label: str

    @property
    def image_id(self) -> str:
        """What its photograph is called in a bank; photographs of one name differ in their pixels' digest."""
        return f"corrected/{self.picture.name}-{self.picture.digest[:8]}"


def append_named(bank: Bank, regions: Sequence[NamedRegion]) -> Bank:
    """Return the bank with regions that a person named, one after the other (`moduseg.bank.edit.correct_region`).

    Raises:
        ConfigError: a region without a vector, or an empty name.
    """
    for region in regions:
        if not region.label.strip():
            raise ConfigError(f"label: got {region.label!r}, expected the name of a class; write cat, or background")
        area = int(region.mask.sum())
        bank = edit.correct_region(bank, region.image_id, region.label.strip(), region.pooled, area)
    return bank


@dataclass(frozen=True)
class LearnedImage:
    """An image that a bank has learned from.

    Attributes:
        pixels: `[H, W, 3]` uint8.
        label_map: `[H, W]` uint8 in the ids of the class list, which only grows; 255 where nothing was learned.
    """

    pixels: np.ndarray
    label_map: np.ndarray


@dataclass
class LearnedImages:
    """The images that a bank has learned from since it was read, for their pictures and for `save`.

    One thread may add images while others look for them.

    Attributes:
        images: by id.
    """

    images: dict[str, LearnedImage] = field(default_factory=dict)

    def add(self, image_id: str, image: np.ndarray, label_map: np.ndarray) -> None:
        """Remember a tagged image with its label map."""
        self.images[image_id] = LearnedImage(image, label_map)

    def name_region(
        self, image_id: str, image: np.ndarray, mask: np.ndarray, label: int, stored: np.ndarray | None = None
    ) -> None:
        """Remember that a region was named.

        Args:
            image_id: of its image in the bank.
            image: `[H, W, 3]` uint8.
            mask: `[H, W]` bool.
            label: class id.
            stored: what was learned of the image before the bank was read, `[H, W]` uint8; `None` for nothing.
        """
        before = self.images[image_id].label_map if image_id in self.images else stored
        label_map = np.full(mask.shape, IGNORE_INDEX, np.uint8) if before is None else before.copy()
        label_map[mask] = label
        self.add(image_id, image, label_map)

    def find_region(self, image_id: str, label: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the image and the `[H, W]` bool mask of a class in it; `None` for other images."""
        learned = self.images.get(image_id)
        return None if learned is None else (learned.pixels, learned.label_map == label)

    def keep_for(self, bank: Bank, before: Bank) -> LearnedImages:
        """Return those that another bank has too, in the ids of its classes.

        Photographs of one name may be in two banks. They are one image if a vector of it is in both.

        Args:
            bank: the other bank.
            before: the bank that learned them, whose ids the label maps have.
        """
        new_ids = map_class_ids(before.classes, bank.classes)
        kept = [
            (i, entry) for i, entry in list(self.images.items()) if _list_vectors(bank, i) & _list_vectors(before, i)
        ]
        return LearnedImages({i: LearnedImage(entry.pixels, new_ids[entry.label_map]) for i, entry in kept})


def map_class_ids(before: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Return the id in a class list of each id of another one, `[256]` uint8; 255 for classes that it lacks."""
    new_ids = np.full(256, IGNORE_INDEX, np.uint8)
    for label, name in enumerate(before):
        if name in classes:
            new_ids[label] = classes.index(name)
    return new_ids


def _list_vectors(bank: Bank, image_id: str) -> set[bytes]:
    """Return the vectors of an image's regions, as bytes; none if the bank does not have it."""
    if image_id not in bank.image_ids:
        return set()
    rows = bank.pooled[bank.image_index == bank.image_ids.index(image_id)]
    return {row.tobytes() for row in rows.cpu().numpy()}


def save_bank(bank: Bank, target: Path, cfg: Config, *, source: Path | None, learned: LearnedImages) -> Path:
    """Write a bank with what it has learned, and return its folder.

    Args:
        bank: the bank.
        target: a new folder.
        cfg: the configuration with which it is read.
        source: the folder that it was read from; `None` if it was made in memory.
        learned: images whose pictures and label maps are written beside it.

    Raises:
        ArtefactError: the folder holds something else, or is that of the source.
    """
    files = {image_id: str((target / "images" / f"{image_id}.png").resolve()) for image_id in learned.images}
    named = edit.append_files(bank, {**edit.files_of(bank), **files})
    info: dict[str, Any] = {"config": cfg.as_dict(), **named.info}
    path = write_derived(
        dataclasses.replace(named, info=info),
        "correct",
        sources=[] if source is None else [source],
        details={"learned": sorted(learned.images)},
        folder=target,
        outputs=target,
        config=info["config"],
    )
    for image_id, image in learned.images.items():
        write_atomic(path / "images" / f"{image_id}.png", write_rgb_png(image.pixels))
        write_atomic(path / "labels" / f"{image_id}.png", write_label_png(image.label_map))
    return path
