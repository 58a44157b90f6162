"""Stage `infer`: bank + queries -> a label for every pixel of the evaluated split (METHOD, stage 2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from moduseg.bank.edit import in_classes
from moduseg.bank.store import Bank, read_vectors
from moduseg.config import Config
from moduseg.datasets.io import write_label_png
from moduseg.errors import ArtefactError, DataError
from moduseg.files import digest_of, file_digest
from moduseg.pipeline.batches import Files, Loop, Outcome, sizes
from moduseg.pipeline.workspace import Plan, Workspace, carry_out, failures_of, finish, log, plain, safe_name
from moduseg.proposers import sa1b
from moduseg.report import build
from moduseg.report.image_data import answer_of
from moduseg.report.why import Answer
from moduseg.retrieval.retriever import Retriever
from moduseg.stages import build_bank, propose, queries
from moduseg.stages.evaluate_masks import draw_panels, needs_scoring, score_label_maps
from moduseg.structures import Proposals


def run(cfg: Config, work: Workspace | None = None) -> Path:
    """Label the evaluated split by retrieval from the bank.

    Returns:
        The artefact's folder: `labels/<id>.png`, `failures.jsonl`, `manifest.json`; where the split has ground truth,
        also `results.json`, `results.md` and `panels/`. `report/index.html` shows it all (`evaluation.report`).
    """
    work = work or Workspace(cfg)

    def make() -> Path:
        known: dict[str, Answer] = {}
        todo = plan(cfg, work, known)
        return carry_out(work, todo, __name__, lambda outcome: _finish(cfg, work, todo, outcome, known))

    return work.once(cfg, "infer", work.eval_split, make)


def plan(cfg: Config, work: Workspace, known: dict[str, Answer] | None = None) -> Plan:
    """What `run` does with each image; `known` is filled with what retrieval says of the images of the report."""
    dataset, settings = work.dataset(work.eval_split), cfg.retrieval
    bank_path = build_bank.run(cfg, work)
    vectors = queries.run(cfg, work)
    proposals = propose.run(cfg, work)
    stored = Bank.load(bank_path)
    if cfg.bank.path is not None:
        stored = adapted(stored, cfg, dataset.classes)
    stored.check_fits(work.backbone.digest, work.backbone.dim, dataset.classes)
    if 0 < len(stored) < settings.top_k:
        log.warning(
            "infer: the bank holds %d vectors, fewer than retrieval.top_k=%d; all of them vote, so that the label with "
            "the most vectors wins everywhere; set retrieval.top_k to at most the images of the rarest class (%d)",
            len(stored),
            settings.top_k,
            min(count for count in stored.counts.values() if count),
        )
    bank_settings = cfg.as_dict()["bank"]
    artefact = work.artefact(
        "infer",
        f"{cfg.backbone['name']}-{work.eval_split}",
        {
            "dataset": work.dataset_parts(work.eval_split),
            "queries": vectors.name,
            "bank": bank_path.name,
            "bank_sha256": file_digest(bank_path / "bank.safetensors"),
            "centre": cfg.bank.centre,
            "shuffle_labels": cfg.bank.shuffle_labels,
            "outliers": plain(bank_settings["outliers"]) if cfg.bank.outliers.enabled else None,
            "retrieval": settings.key_parts(),
            **(
                {"images_per_class": [cfg.bank.images_per_class, cfg.bank.images_seed]}
                if cfg.bank.images_per_class is not None
                else {}
            ),
            **{n: bank_settings[n] for n in ("classes", "prototypes") if bank_settings[n] is not None},
            # The class list of a bank that is built here is the data set's, which the queries' key holds.
            **({} if cfg.bank.path is None else {"bank_labels": digest_of(stored.labels.tolist())}),
        },
    )
    device = work.device.torch_device
    bank = stored.configured(cfg.bank).to(device)
    retriever = Retriever(bank.vectors, bank.labels, bank.centre, settings)
    # The report tells why; what it needs is at hand here, and bounded by the images that it shows.
    shown = frozenset(build.shown_ids(cfg, dataset.ids) if cfg.evaluation.report and known is not None else ())

    def load(image_id: str) -> tuple[str, Proposals, Tensor]:
        found = sa1b.read_proposals(proposals / safe_name(f"masks/{image_id}", ".json"), dataset.image_size(image_id))
        pooled = read_vectors(vectors / safe_name(f"vectors/{image_id}", ".safetensors"), ("pooled",))["pooled"]
        if len(pooled) != len(found):
            raise DataError(
                f"{image_id}: {len(pooled)} query vectors for {len(found)} proposals; remove {vectors} and run again"
            )
        return image_id, found, pooled

    def process(items: list[tuple[str, Proposals, Tensor]]) -> list[Files]:
        files: list[Files] = []
        for image_id, found, pooled in items:
            keep = (found.areas >= settings.min_area) & (found.predicted_iou >= settings.min_predicted_iou)
            found, pooled = found.select(keep), pooled[keep].to(device)
            labels, scores, neighbours, similarities = retriever.label(pooled)
            label_map, kept = retriever.assemble(found, pooled, labels, scores)
            if known is not None and image_id in shown:
                known[image_id] = answer_of(bank, labels, scores, kept, neighbours, similarities)
            files.append({safe_name(f"labels/{image_id}", ".png"): write_label_png(label_map.cpu().numpy())})
        return files

    def stamp(image_id: str) -> list[int]:
        files = (
            proposals / safe_name(f"masks/{image_id}", ".json"),
            vectors / safe_name(f"vectors/{image_id}", ".safetensors"),
        )
        return sizes(*files)

    left_out = {**failures_of(proposals, "propose"), **failures_of(vectors, "queries")}
    loop = Loop(artefact, dataset.ids, load, process, cfg.runtime.batch_size, left_out, "infer", stamp, work.spread)
    return Plan(loop, {"build_bank": bank_path, "queries": vectors})


def _finish(cfg: Config, work: Workspace, todo: Plan, outcome: Outcome, known: dict[str, Answer]) -> Path:
    """Score the label maps, draw panels and write the report, unless that is done."""
    dataset, artefact = work.dataset(work.eval_split), todo.loop.artefact
    proposals = propose.run(cfg, work)
    if dataset.has_truth and needs_scoring(work, artefact, outcome):
        inputs = {"propose": proposals, **todo.inputs}
        score_label_maps(work, artefact, outcome, dataset, proposals, "prediction", inputs)
    elif not dataset.has_truth and outcome.changed:
        labelled = [image_id for image_id in dataset.ids if image_id not in outcome.failed]
        draw_panels(artefact, dataset, labelled, proposals, "prediction", cfg.evaluation.panels)
        if cfg.evaluation.panels:
            log.info("panels:  %s", artefact.path / "panels")
    done = finish(artefact, outcome, len(dataset.ids), todo.inputs, config=cfg.as_dict())
    build.write_report_of_run(work, done, outcome.changed, known)
    return done


def adapted(bank: Bank, cfg: Config, classes: Sequence[str]) -> Bank:
    """A bank named by `bank.path` with the ids of the data set's classes.

    Raises:
        ArtefactError: a class that the data set lacks, or vectors pooled in another way than the queries.
    """
    pooled = bank.info.get("config", {}).get("bank", {}).get("aggregation", cfg.bank.aggregation)
    if pooled != cfg.bank.aggregation:
        raise ArtefactError(
            f"bank.path: the bank was made with bank.aggregation={pooled}, got {cfg.bank.aggregation}; set "
            f"bank.aggregation={pooled}"
        )
    missing = [name for name in classes if bank.counts.get(name, 0) == 0]
    if missing:
        log.warning("infer: the bank has no vector for %s; no pixel can get these labels", ", ".join(missing))
    return in_classes(bank, classes)
