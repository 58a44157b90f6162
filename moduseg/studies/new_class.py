"""How well a class is learned from a few tagged images, after it was withheld from a bank.

For each class, every training image that shows it is taken out of the full bank, and the class with it. What is left is
the bank that would have been built without these images. Then the first few of them are added with their tags, as
`scripts/bank.py add` does it. The table shows the IoU of the class on the evaluated split before, after, and with all
images, and the time that the addition took, loading the models included: on the clock, and of all processors together.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from moduseg.bank import edit
from moduseg.bank.derived import write_derived
from moduseg.bank.store import Bank
from moduseg.config import Config, compose
from moduseg.config.command_keys import NewClassOptions
from moduseg.errors import ConfigError, DataError
from moduseg.evaluation.measures import format_value
from moduseg.evaluation.tables import find_supervision, mark_supervision, markdown_table, versions
from moduseg.files import read_json, write_atomic, write_json
from moduseg.pipeline.manifests import name_supervision
from moduseg.pipeline.workspace import Workspace, log
from moduseg.stages import extend_bank
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.infer import Infer


def main(options: NewClassOptions, overrides: Sequence[str]) -> int:
    """Make the table and print it."""
    print(run(options, compose(overrides)).read_text(encoding="utf-8"))
    return 0


def run(options: NewClassOptions, cfg: Config) -> Path:
    """Withhold each class and add it.

    Returns:
        The Markdown file `<outputs>/tables/<name>.md`, with `<name>.json` beside it.

    Raises:
        ConfigError: a class that the data set does not have.
        DataError: the evaluated split has no ground truth, or no training image shows the class.
    """
    work = Workspace(cfg)
    dataset = work.dataset(work.train_split)
    names = list(dataset.classes[1:]) if options.class_ == ("all",) else list(options.class_)
    for name in names:
        if name not in dataset.classes[1:]:
            raise ConfigError(f"class: got {name!r}, expected all or some of {', '.join(dataset.classes[1:])}")
    if not work.dataset(work.eval_split).has_truth:
        raise DataError(f"{dataset.name} {work.eval_split}: got no ground truth, expected label maps to score against")
    source = BuildBank.run(cfg, work)
    full_results = read_json(Infer.run(cfg, work) / "results.json")
    rows = [_withhold(name, options.images, work, source, full_results) for name in names]
    folder = work.outputs / "tables"
    supervision = name_supervision(find_supervision(full_results))
    record = {"images": options.images, "rows": rows, **supervision, "config": cfg.as_dict(), "versions": versions()}
    write_json(folder / f"{options.name}.json", record)
    write_atomic(folder / f"{options.name}.md", _make_table(rows, full_results).encode())
    return folder / f"{options.name}.md"


def _withhold(
    name: str, num_images: int, work: Workspace, source: Path, full_results: Mapping[str, Any]
) -> dict[str, Any]:
    """Withhold one class, add it, and return its row of the table.

    Args:
        name: of the class.
        num_images: how many of its images are added.
        work: the run.
        source: folder of the full bank.
        full_results: results of the full bank.
    """
    cfg = work.cfg
    dataset = work.dataset(work.train_split)
    label = dataset.classes.index(name)
    bank = Bank.load(source)
    tags = {i: dataset.labels_of(i) or () for i in bank.image_ids}
    showing = [i for i in bank.image_ids if label in tags[i]]
    if not showing:
        raise DataError(f"{name}: no training image shows it, expected {num_images} to add; pick another class")
    base = edit.remove(bank, classes=[name], images=showing)
    without = write_derived(
        base,
        "remove",
        sources=[source],
        details={"class": [name], "image": showing},
        folder=None,
        outputs=work.outputs,
    )
    chosen = showing[:num_images]
    masks = {i: file for i in chosen if (file := dataset.mask_path(i)) and work.generator.needs_truth}
    # An empty output folder, so that the time includes what an earlier run may have computed already.
    with tempfile.TemporaryDirectory() as scratch:
        runtime = dataclasses.replace(cfg.runtime, outputs=scratch)
        cpu = time.process_time()
        images = extend_bank.NewImages(
            files={i: dataset.image_path(i) for i in chosen},
            tags={i: tags[i] for i in chosen},
            classes=dataset.classes,
            masks=masks,
            tag_source=dataset.label_source,
        )
        scratch_cfg = dataclasses.replace(cfg, runtime=runtime)
        path, seconds = extend_bank.add_images(base, without, scratch_cfg, images, outputs=work.outputs)
        cpu = time.process_time() - cpu
    figures = {"before": _score_bank(name, cfg, without), "after": _score_bank(name, cfg, path)}
    figures["all"] = {"iou": full_results["iou"][name], "miou": full_results["miou"]}
    log.info("new_class: %s: %s", name, figures)
    return {
        "class": name,
        "added": len(chosen),
        "of": len(showing),
        "images_before": len(base.image_ids),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        **figures,
    }


def _score_bank(name: str, cfg: Config, bank: Path) -> dict[str, float | None]:
    """Return the IoU of the class and the mIoU of the evaluated split with a bank, in percent."""
    with_bank = dataclasses.replace(
        cfg,
        bank=dataclasses.replace(cfg.bank, path=str(bank)),
        evaluation=dataclasses.replace(cfg.evaluation, report=False),  # nobody looks at one of many runs
    )
    results = read_json(Infer.run(with_bank) / "results.json")
    return {"iou": results["iou"][name], "miou": results["miou"]}


def _make_table(rows: Sequence[Mapping[str, Any]], full_results: Mapping[str, Any]) -> str:
    header = (
        "class withheld", "added", "of", "IoU before", "after", "all images", "mIoU before", "after", "all images",
        "seconds", "CPU seconds",
    )  # fmt: skip
    stages = ("before", "after", "all")
    cells = [
        [
            row["class"],
            row["added"],
            row["of"],
            *(format_value(row[stage]["iou"]) for stage in stages),
            *(format_value(row[stage]["miou"]) for stage in stages),
            f"{row['seconds']:.1f}",
            f"{row['cpu_seconds']:.1f}",
        ]
        for row in rows
    ]
    if len(rows) > 1:
        means = [
            format_value(mean(row[stage][figure] or 0.0 for row in rows))
            for figure in ("iou", "miou")
            for stage in stages
        ]
        times = [f"{mean(row[key] for row in rows):.1f}" for key in ("seconds", "cpu_seconds")]
        cells.append(["mean", "", "", *means, *times])
    where = mark_supervision(
        f"{full_results['dataset']} {full_results['split']}, {full_results['images']} images, percent",
        find_supervision(full_results),
    )
    return f"A class withheld from the bank, then added from tagged images. {where}.\n\n{markdown_table(header, cells)}"
