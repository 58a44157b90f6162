"""Stage `infer`: bank + queries -> a label for every pixel of the evaluated split (docs/method.md, steps 4 to 8)."""

from __future__ import annotations

from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from moduseg.bank.edit import align_classes
from moduseg.bank.overlaps import count_nearest_classes, worst_lines
from moduseg.bank.store import Bank
from moduseg.config import OutliersConfig
from moduseg.datasets.io import write_grey_png, write_label_png
from moduseg.errors import DataError
from moduseg.files import digest_of, file_digest, to_json_values
from moduseg.masks.encoded import WaitingProposals, decode
from moduseg.pipeline.batches import BatchRunner, Files, Outcome
from moduseg.pipeline.manifests import StageFolder, name_supervision, stored_name
from moduseg.pipeline.stage import Stage, skipped_images
from moduseg.pipeline.workspace import log
from moduseg.report import build
from moduseg.retrieval.ranking import RANKING_FILE, Ranking, find_ranking
from moduseg.retrieval.retriever import Retriever
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.evaluate_masks import LabelOrigin, score_or_draw
from moduseg.stages.fit_ranking import FitRanking
from moduseg.stages.queries import Queries
from moduseg.structures import Proposals


class Infer(Stage[tuple[str, WaitingProposals, dict[str, Tensor]]]):
    """Labels the evaluated split by retrieval from the bank. An item is an image's id, its proposals and their vectors.

    The folder holds `labels/<id>.png`, with `retrieval.confidence` also `scores/<id>.png`, `failures.jsonl` and
    `manifest.json`; if the split has ground truth, also `results.json`, `results.md` and `panels/`. `report/index.html`
    shows it all (`evaluation.report`).
    """

    name = "infer"
    uses = "eval"

    def inputs(self) -> dict[str, Stage[Any]]:
        """Return `build_bank`, with `retrieval.selection=learnt` what fits its ranking, and `queries`, in this order.

        The ranking of a bank that `bank.path` names is in its folder.
        """
        ranking = {"fit_ranking": FitRanking(self.work)} if self._fits_ranking else {}
        return {"build_bank": BuildBank(self.work), **ranking, "queries": Queries(self.work, self._requested_split)}

    @property
    def _fits_ranking(self) -> bool:
        return self.cfg.retrieval.selection == "learnt" and self.cfg.bank.path is None

    @property
    def has_known_key(self) -> bool:
        """Whether the bank and its ranking, if it has one, are there: their content is part of the key."""
        made_before = ("build_bank", *(("fit_ranking",) if self._fits_ranking else ()))
        folders = (self.input_folders[name].path for name in made_before)
        return all(StageFolder(folder).is_complete for folder in folders)

    @cached_property
    def proposals(self) -> StageFolder:
        """The proposals that the queries were made from."""
        return self.input_folders["queries"].inputs["propose"]

    @cached_property
    def stored_bank(self) -> Bank:
        """The bank with the ids of the data set's classes.

        Raises:
            ArtefactError: the bank does not fit the backbone or the classes.
        """
        classes, top_k = self.dataset.classes, self.cfg.retrieval.top_k
        bank = Bank.load(self.input_folders["build_bank"].path)
        if self.cfg.bank.path is not None:
            bank = align_classes(bank, self.cfg.bank.aggregation, classes, needs_vectors=not self.cfg.uses_words)
        bank.check_fits(self.work.backbone.digest, self.work.backbone.dim, classes)
        if self.cfg.uses_words:
            bank.check_words_fit(self.work.region_encoder.digest)
        elif 0 < len(bank) < top_k:
            log.warning(
                "infer: the bank holds %d vectors, fewer than retrieval.top_k=%d; all of them vote, so that the label "
                "with the most vectors wins everywhere; set retrieval.top_k to at most the images of the rarest class "
                "(%d)",
                len(bank),
                top_k,
                min(count for count in bank.counts.values() if count),
            )
        return bank

    @cached_property
    def ranking(self) -> Ranking | None:
        """What proposals are labelled and chosen by with `retrieval.selection=learnt`, with the data set's classes.

        Raises:
            ArtefactError: the bank that `bank.path` names has none, or one that does not fit.
        """
        if self.cfg.retrieval.selection != "learnt":
            return None
        return find_ranking(self._ranking_folder).align(self.dataset.classes)

    @property
    def _ranking_folder(self) -> Path:
        return self.input_folders["fit_ranking" if self._fits_ranking else "build_bank"].path

    @cached_property
    def retriever(self) -> Retriever:
        """What labels proposals by their neighbours in the bank, which is filtered as the configuration says."""
        bank = self.stored_bank.configured(self.cfg.searched_bank).to(self.work.device.torch_device)
        words = self.work.region_encoder.words if self.cfg.uses_words else None
        return Retriever(bank, self.cfg.retrieval, words, self.ranking)

    def retriever_of(self, image_id: str) -> Retriever:
        """Return what labels the proposals of an image: the same for each."""
        return self.retriever

    def folder_name(self) -> str:
        """Return the readable part of the folder's name."""
        return f"{self.cfg.backbone['name']}-{self.split}"

    def key(self) -> dict[str, Any]:
        """Return everything that decides the label maps; settings that came later only where they change something."""
        bank, bank_settings = self.cfg.searched_bank, self.cfg.as_dict()["bank"]
        bank_path = self.input_folders["build_bank"].path
        parts = {
            "dataset": self.work.dataset_parts(self.split),
            "queries": self.input_folders["queries"].name,
            "bank": bank_path.name,
            "bank_sha256": file_digest(bank_path / "bank.safetensors"),
            "centre": bank.centre,
            "shuffle_labels": bank.shuffle_labels,
            "outliers": to_json_values(bank_settings["outliers"]) if bank.outliers.enabled else None,
            "retrieval": self.cfg.retrieval.key_parts(),
        }
        if bank.images_per_class is not None:
            parts["images_per_class"] = [bank.images_per_class, bank.images_seed]
        parts |= {name: bank_settings[name] for name in ("classes", "prototypes") if bank_settings[name] is not None}
        if self.ranking is not None:
            parts["ranking"] = file_digest(self._ranking_folder / RANKING_FILE)
        # The class list of a bank that is built here is the data set's, which the key of the queries holds.
        if bank.path is not None:
            parts["bank_labels"] = digest_of(self.stored_bank.labels.tolist())
        return parts

    def runner(self) -> BatchRunner[tuple[str, WaitingProposals, dict[str, Tensor]]]:
        """Return what processes the images; a bank that does not fit is an error before the first of them."""
        _ = self.stored_bank
        return super().runner()

    def skipped(self) -> dict[str, str]:
        """Return the images without proposals or queries; those that the bank lacks are of another split."""
        return skipped_images({"propose": self.proposals, "queries": self.input_folders["queries"]})

    def load(self, image_id: str) -> tuple[str, WaitingProposals, dict[str, Tensor]]:
        """Return an image's proposals and their vectors."""
        queries = self.input_folders["queries"]
        proposals = self.proposals.waiting_proposals(image_id, self.dataset.image_size(image_id))
        vectors = queries.vectors(image_id, ("pooled", "word_values") if self.cfg.uses_words else ("pooled",))
        if len(vectors["pooled"]) != len(proposals):
            raise DataError(
                f"{image_id}: {len(vectors['pooled'])} query vectors for {len(proposals)} proposals; remove "
                f"{queries.path} and run again"
            )
        return image_id, proposals, vectors

    def process(self, items: list[tuple[str, WaitingProposals, dict[str, Tensor]]]) -> list[Files]:
        """Return the label maps of several images, and how sure they are if that is asked for."""
        # One image's masks are in memory at a time.
        return [self._label(image_id, decode(proposals), vectors) for image_id, proposals, vectors in items]

    def _label(self, image_id: str, proposals: Proposals, vectors: dict[str, Tensor]) -> Files:
        """Return the files of one image."""
        retriever = self.retriever_of(image_id)
        prediction = retriever.predict(proposals, vectors["pooled"], vectors.get("word_values"))
        label_map = {stored_name("label_map", image_id): partial(write_label_png, prediction.label_map)}
        if prediction.confidence is None:
            return label_map
        return {**label_map, stored_name("confidence", image_id): partial(write_grey_png, prediction.confidence)}

    def reads(self, image_id: str) -> list[Path]:
        """Return the files of the image's proposals and their vectors."""
        return [self.proposals.file("proposals", image_id), self.input_folders["queries"].file("vectors", image_id)]

    def merge(self, outcome: Outcome) -> dict[str, Any]:
        """Score the label maps and draw panels, unless that is done."""
        inputs = {"propose": self.proposals, **self.input_folders}
        # The CLIP features of queries come from the generator, whoever made the bank.
        parts = [self.stored_bank.info.get("supervision")]
        parts += [self.work.region_encoder.supervision] if self.cfg.uses_words else []
        supervision = "+".join(dict.fromkeys(str(part) for part in parts if part)) or None
        score_or_draw(
            self.work,
            self.artefact,
            outcome,
            self.dataset,
            proposals=self.proposals,
            inputs=inputs,
            origin=LabelOrigin(supervision=supervision),
        )
        return {"config": self.cfg.as_dict(), **name_supervision(supervision)}

    def report(self, outcome: Outcome) -> None:
        """Write the report, and say which classes of the bank cannot be told apart."""
        build.write_report_of_run(self.work, self.artefact.path, outcome.changed)
        if self.cfg.bank.shuffle_labels is None and not self.cfg.uses_words:
            self._warn_of_overlaps()

    def _warn_of_overlaps(self) -> None:
        """Log the classes of the bank that overlap most, in three lines at most; nothing if there are none."""
        bank, device = self.stored_bank, self.work.device.torch_device
        vectors = bank.select_vectors(self.cfg.bank.centre, OutliersConfig(enabled=False)).vectors.to(device)
        command = f"scripts/bank.py info bank={self.input_folders['build_bank'].path}"
        for line in worst_lines(count_nearest_classes(bank, vectors, classes=self.cfg.bank.classes), command):
            log.warning("bank: %s", line)
