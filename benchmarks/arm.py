"""What an ARM adds to the time of each CLIP host, image -> scores.

    python -m benchmarks.arm dataset.seed=1
    python -m benchmarks.arm dataset=coco150 pseudo_masks=clip_dense_vit_b16 pseudo_masks.generator.arm=<file>

Arguments are those of `train_arm`. Milliseconds are CPU time of one image with its tags, the median over repetitions
that take turns with and without, so that other programs disturb both alike. Proposals are made before. CorrCLIP is that
of `pseudo_masks@corrclip=<file>`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from statistics import median

from moduseg.backbones.arm import Arm, ArmShape, choose_blocks, load_arm
from moduseg.config import compose_hydra
from moduseg.evaluation.tables import markdown_table
from moduseg.pipeline.workspace import Workspace
from moduseg.pseudo_masks.clip_words import ClipWordsGenerator
from moduseg.structures import Proposals, Sample
from moduseg.tools.train_arm import build_hosts, split_settings
from moduseg.weights.sources import find_weights

KEY = "pseudo_masks.generator.arm"
REPETITIONS = 40


def measure_host(
    host: ClipWordsGenerator, arm: Arm, sample: Sample, proposals: Proposals | None, repetitions: int = REPETITIONS
) -> tuple[float, float]:
    """Return the milliseconds of CPU time of an image without and with an ARM, medians.

    Args:
        host: the generator.
        arm: the module, on the host's device.
        sample: the image, with its tags.
        proposals: of the image, if the host looks at them.
        repetitions: passes of each kind; the first of each loads the model and does not count.
    """
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repetitions + 1):
        for has_arm in (False, True):
            host.use_arm(arm if has_arm else None)
            started = time.process_time()
            host.generate(sample, sample.labels or (), proposals)
            times[has_arm].append(1000 * (time.process_time() - started))
    return median(times[False][1:]), median(times[True][1:])


def main(arguments: Sequence[str]) -> str:
    """Return a table of all hosts, for the first image of the training split."""
    cfg, settings, _, corrclip = split_settings(compose_hydra(arguments, "train_arm"))
    work = Workspace(cfg)
    sample = work.dataset(work.train_split).load(work.dataset(work.train_split).ids[0])
    proposals = work.train_proposer.propose(sample)
    hosts = build_hosts(work, settings.hosts, corrclip)
    source = next(iter(hosts.values())).source
    weights = cfg.pseudo_masks.generator.get("arm")
    if weights is not None:
        arm = load_arm(find_weights(str(weights), KEY), KEY)
    else:
        sizes = source.sizes
        blocks = settings.blocks or choose_blocks(sizes.depth)
        widths = {"width": settings.width, "heads": settings.heads, "mlp_width": settings.mlp_width}
        shape = ArmShape(deep_width=sizes.joint_width, shallow_width=sizes.width, blocks=blocks, **widths)
        arm = Arm(shape).eval().requires_grad_(False)
    arm.to(source.device.torch_device)
    rows = []
    for name, host in hosts.items():
        without, with_arm = measure_host(host, arm, sample, proposals if host.needs_proposals else None)
        added = with_arm - without
        rows.append([name, f"{without:.2f}", f"{with_arm:.2f}", f"{added:+.2f}", f"{100 * added / without:.1f}"])
    head = f"an ARM of {arm.num_parameters:,} parameters, an image of {sample.size[0]} x {sample.size[1]} pixels"
    return f"{head}\n\n{markdown_table(('host', 'ms without', 'ms with', 'ms added', 'percent'), rows)}"


if __name__ == "__main__":
    print(main(sys.argv[1:]))
