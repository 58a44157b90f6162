"""Stage `queries`: the pooled vector of every proposal of the evaluated split (METHOD, step 6), cached.

What follows (centring, search, vote, suppression) costs little, so ablations of it start here and run no model.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save as save_tensors

from moduseg.bank.aggregation import aggregate, harden, proposal_coverage
from moduseg.config import Config
from moduseg.pipeline.batches import Files, Loop, sizes
from moduseg.pipeline.workspace import Plan, Workspace, carry_out, failures_of, finish, image_file, safe_name
from moduseg.proposers import sa1b
from moduseg.stages import propose
from moduseg.structures import Proposals, Sample


def run(cfg: Config, work: Workspace | None = None) -> Path:
    """Pool the patch tokens of the evaluated split under its proposals.

    Returns:
        The artefact's folder: `vectors/<id>.safetensors` with `pooled` `[N, C]` float32, in the proposals' order.
    """
    work = work or Workspace(cfg)

    def make() -> Path:
        todo, total = plan(cfg, work), len(work.dataset(work.eval_split).ids)
        return carry_out(work, todo, __name__, lambda outcome: finish(todo.loop.artefact, outcome, total, todo.inputs))

    return work.once(cfg, "queries", work.eval_split, make)


def plan(cfg: Config, work: Workspace) -> Plan:
    """What `run` does with each image."""
    dataset = work.dataset(work.eval_split)
    proposals = propose.run(cfg, work)
    artefact = work.artefact(
        "queries",
        f"{cfg.backbone['name']}-{work.eval_split}",
        {
            "dataset": work.dataset_parts(work.eval_split),
            "proposals": proposals.name,
            "backbone": work.backbone_parts(),
            "aggregation": cfg.bank.aggregation,
        },
    )

    def load(image_id: str) -> tuple[Sample, Proposals]:
        sample = dataset.load(image_id)
        return sample, sa1b.read_proposals(proposals / safe_name(f"masks/{image_id}", ".json"), sample.size)

    def process(items: list[tuple[Sample, Proposals]]) -> list[Files]:
        maps = work.backbone.tokens([sample.image for sample, _ in items])
        files: list[Files] = []
        for (sample, found), tokens in zip(items, maps, strict=True):
            weights = proposal_coverage(found, tokens)
            if cfg.bank.aggregation == "hard":
                weights = harden(weights)
            pooled = aggregate(tokens.tokens, weights, normalize=False)
            content = save_tensors({"pooled": pooled.cpu().contiguous()})
            files.append({safe_name(f"vectors/{sample.id}", ".safetensors"): content})
        return files

    def stamp(image_id: str) -> list[int]:
        return sizes(image_file(dataset, image_id), proposals / safe_name(f"masks/{image_id}", ".json"))

    left_out = failures_of(proposals, "propose")
    loop = Loop(artefact, dataset.ids, load, process, cfg.runtime.batch_size, left_out, "queries", stamp, work.spread)
    return Plan(loop, {"propose": proposals})
