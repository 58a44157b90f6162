"""Stage `propose`: images -> class-agnostic masks, one SA-1B JSON each."""

from __future__ import annotations

from pathlib import Path

from moduseg.config import Config
from moduseg.proposers import sa1b
from moduseg.runtime.engine import Files, Loop, sizes
from moduseg.stages.common import Workspace, finish, image_file, plain, safe_name
from moduseg.structures import Sample


def run(cfg: Config, work: Workspace | None = None, split: str | None = None) -> Path:
    """Propose masks for a split (the evaluated one by default).

    Where the training split is named, `train_proposer` makes them, if the configuration has one. Proposals are written
    unfiltered; each reader applies its own thresholds (METHOD, step 5).

    Returns:
        The artefact's folder: `masks/<id>.json`, `failures.jsonl`, `manifest.json`.
    """
    work = work or Workspace(cfg)
    for_training = split == work.train_split
    split = split or work.eval_split
    dataset, settings, proposer = work.dataset(split), cfg.proposer, work.proposer
    if for_training and cfg.train_proposer is not None:
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

    outcome = Loop(
        artefact,
        dataset.ids,
        load,
        process,
        cfg.runtime.batch_size,
        title=f"propose {split}",
        stamp=lambda i: sizes(image_file(dataset, i)),
    ).run()
    return finish(artefact, outcome, len(dataset.ids), {}, split=split)
