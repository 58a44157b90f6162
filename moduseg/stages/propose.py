"""Stage `propose`: images -> class-agnostic masks, one SA-1B JSON each."""

from __future__ import annotations

from pathlib import Path

from moduseg.config import Config
from moduseg.pipeline.batches import Files, Loop, Outcome, sizes
from moduseg.pipeline.workspace import Plan, Workspace, carry_out, finish, image_file, plain, safe_name
from moduseg.proposers import sa1b
from moduseg.structures import Sample


def run(cfg: Config, work: Workspace | None = None, split: str | None = None) -> Path:
    """Propose masks for a split (the evaluated one by default).

    Where the training split is named, `train_proposer` makes them, if the configuration has one. Proposals are written
    unfiltered; each reader applies its own thresholds (METHOD, step 5).

    Returns:
        The artefact's folder: `masks/<id>.json`, `failures.jsonl`, `manifest.json`.
    """
    work = work or Workspace(cfg)
    # The training images may have a proposer of their own, also where they are the evaluated split.
    chosen, use = split or work.eval_split, "train" if split == work.train_split else "eval"

    def make() -> Path:
        todo, total = plan(cfg, work, chosen, use), len(work.dataset(chosen).ids)

        def merge(outcome: Outcome) -> Path:
            return finish(todo.loop.artefact, outcome, total, {}, split=chosen)

        return carry_out(work, todo, __name__, merge, chosen, use)

    own = use == "train" and cfg.train_proposer is not None
    return work.once(cfg, "propose of the bank" if own else "propose", chosen, make)


def plan(cfg: Config, work: Workspace, split: str, use: str) -> Plan:
    """What `run` does with each image of the split, used as `train` or `eval`."""
    dataset, settings, proposer = work.dataset(split), cfg.proposer, work.proposer
    if use == "train" and cfg.train_proposer is not None:
        settings, proposer = cfg.train_proposer, work.train_proposer
    artefact = work.artefact(
        "propose",
        f"{settings['name']}-{split}",
        {
            "dataset": work.dataset_parts(split),
            "proposer": plain(settings),
            "digest": proposer.digest,
            "precision": work.device.precision,
        },
    )

    def load(image_id: str) -> Sample:
        return dataset.load(image_id, truth=proposer.needs_truth)

    def process(samples: list[Sample]) -> list[Files]:
        return [
            {safe_name(f"masks/{s.id}", ".json"): sa1b.dump(sa1b.to_annotations(p, s.id))}
            for s, p in zip(samples, proposer.propose_batch(samples), strict=True)
        ]

    return Plan(
        Loop(
            artefact,
            dataset.ids,
            load,
            process,
            cfg.runtime.batch_size,
            title=f"propose {split}",
            stamp=lambda i: sizes(image_file(dataset, i)),
            spread=work.spread,
        )
    )
