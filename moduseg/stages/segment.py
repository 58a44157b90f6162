"""Stage `segment`: words -> a label for every pixel of the evaluated split, without training images or a bank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from moduseg.config import PseudoMasksConfig
from moduseg.datasets.base import Dataset
from moduseg.files import to_json_values
from moduseg.masks.encoded import WaitingProposals, decode
from moduseg.pipeline.batches import Files, Outcome
from moduseg.pipeline.manifests import name_supervision, stored_name
from moduseg.pipeline.preflight import HasDigest
from moduseg.pipeline.stage import Stage
from moduseg.pseudo_masks import PseudoMaskGenerator
from moduseg.pseudo_masks.labelling import DIFFUSIONS, ScoredImage, fit_rule, to_label_map
from moduseg.report import build
from moduseg.stages.class_scores import ClassScores
from moduseg.stages.evaluate_masks import LabelOrigin, score_or_draw
from moduseg.stages.propose import Propose
from moduseg.stages.pseudo_masks import encode_label_map, labelling_parts
from moduseg.stages.tag import TagImages
from moduseg.structures import Sample


@dataclass(frozen=True)
class WordedImage:
    """One image with the classes that compete for its pixels.

    Attributes:
        sample: the image.
        class_ids: ascending foreground ids.
        proposals: of the image, if generator or refiner look at them.
    """

    sample: Sample
    class_ids: tuple[int, ...]
    proposals: WaitingProposals | None = None


class Segment(Stage[WordedImage]):
    """Labels the evaluated split from words: the generator's scores of all classes, or of those that a tagger names.

    Background rule, refiner and vote are those of the pseudo masks (group `pseudo_masks`). Scores are not stored, as
    they take 2 bytes a pixel and class. If `vocabulary` has other classes than the data set, label maps have its ids
    and are not scored.

    The folder holds `labels/<id>.png`, `failures.jsonl` and `manifest.json`; if the split has ground truth, also
    `results.json`, `results.md` and `panels/`. `report/index.html` shows it all (`evaluation.report`).
    """

    name = "segment"
    uses = "eval"

    @property
    def title(self) -> str:
        """Text of the progress bar."""
        return f"segment {self.split}"

    @property
    def dataset(self) -> Dataset:
        """The split, with the classes of the vocabulary."""
        return self.work.reworded_dataset(self.split)

    @property
    def generator(self) -> PseudoMaskGenerator:
        """What scores the classes at every pixel."""
        return self.work.word_generator

    def inputs(self) -> dict[str, Stage[Any]]:
        """Return `propose` if generator or refiner look at proposals, and `tags` if a model names the classes."""
        stages: dict[str, Stage[Any]] = {}
        if self.generator.needs_proposals or self.cfg.pseudo_masks.refine == "region_vote":
            stages["propose"] = Propose(self.work, self._requested_split)
        if self.work.tagger.runs_model:
            stages["tags"] = TagImages(self.work, self._requested_split)
        return stages

    def models(self) -> dict[str, HasDigest]:
        """Return the generator."""
        return {"pseudo_masks.generator": self.generator}

    @property
    def has_known_key(self) -> bool:
        """Whether nothing has to be fitted on training images, whose result is part of the key."""
        return not self.generator.is_fitted

    def folder_name(self) -> str:
        """Return the readable part of the folder's name."""
        return f"{self.cfg.pseudo_masks.generator['name']}-{self.work.tagger_settings['name']}-{self.split}"

    def key(self) -> dict[str, Any]:
        """Return everything that decides the label maps."""
        proposals, tags = self.input_folders.get("propose"), self.input_folders.get("tags")
        parts = {
            "dataset": self.work.dataset_parts(self.split),
            "generator": to_json_values(self.cfg.pseudo_masks.generator),
            "digest": self.generator.digest,
            "fit": self._fit_digest,
            "tagger": [to_json_values(self.work.tagger_settings), self.work.tagger.digest]
            if tags is None
            else tags.name,
            "labelling": labelling_parts(self.cfg, proposals),
            **self.work.device.key_parts(),
            **self.work.token_parts(),
        }
        if self.work.vocabulary is not None:
            parts["vocabulary"] = to_json_values(self.work.vocabulary.as_settings())
        return parts

    def load(self, image_id: str) -> WordedImage:
        """Return an image, its classes and, if they are looked at, its proposals."""
        tags, proposals, tagger = self.input_folders.get("tags"), self.input_folders.get("propose"), self.work.tagger
        sample = self.dataset.load(image_id, truth=self.generator.needs_truth, labels=tagger.needs_labels)
        class_ids = (tagger.tag(sample) if tags is None else tags.tags(image_id)).class_ids
        return WordedImage(
            sample, class_ids, None if proposals is None else proposals.waiting_proposals(image_id, sample.size)
        )

    def process(self, items: list[WordedImage]) -> list[Files]:
        """Return the label maps of several images."""
        settings, device = self._settings, self.work.device.torch_device
        files: list[Files] = []
        for item in items:
            # One image's masks are in memory at a time.
            proposals = None if item.proposals is None else decode(item.proposals)
            scores = self.generator.generate(item.sample, item.class_ids, proposals)
            image = item.sample.image if settings.refine in DIFFUSIONS else None
            voters = proposals if settings.refine == "region_vote" else None
            label_map = to_label_map(ScoredImage(item.sample.id, scores, image, voters), settings, device)
            files.append({stored_name("label_map", item.sample.id): partial(encode_label_map, label_map)})
        return files

    def reads(self, image_id: str) -> list[Path]:
        """Return the files of the image and of what earlier stages say of it."""
        kinds = {"propose": "proposals", "tags": "tags"}
        files = [folder.file(kinds[name], image_id) for name, folder in self.input_folders.items()]  # type: ignore[arg-type]
        return [self.image_file(image_id), *files]

    def merge(self, outcome: Outcome) -> dict[str, Any]:
        """Score the label maps and draw panels, unless that is done; return how they were made, for the manifest."""
        source = self._label_source
        score_or_draw(
            self.work,
            self.artefact,
            outcome,
            self.dataset,
            proposals=self.input_folders.get("propose"),
            inputs=self.input_folders,
            origin=LabelOrigin(source, self.generator.supervision),
        )
        supervision = name_supervision(self.generator.supervision)
        return {"split": self.split, "label_source": source, "config": self.cfg.as_dict(), **supervision}

    def report(self, outcome: Outcome) -> None:
        """Write the report."""
        build.write_report_of_run(self.work, self.artefact.path, outcome.changed)

    @property
    def _label_source(self) -> str:
        """Where the classes of an image come from, as results call it."""
        name = str(self.work.tagger_settings["name"])
        return {"all": "none, all words compete", "given": self.dataset.label_source}.get(name, f"tagger {name}")

    @cached_property
    def _settings(self) -> PseudoMasksConfig:
        """Background rule and refiner, with a rule that the words can follow."""
        words = self.work.vocabulary
        return fit_rule(self.cfg.pseudo_masks, has_background_words=words is None or bool(words.background))

    @cached_property
    def _fit_digest(self) -> str:
        """Digest of what the generator was fitted to on the training images, which then take part; empty without."""
        return ClassScores(self.work).fit_digest if self.generator.is_fitted else ""
