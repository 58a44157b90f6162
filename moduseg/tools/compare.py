"""The command `compare`: two results side by side, each a folder of results or a folder of PNGs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moduseg.config import Config, compose
from moduseg.config.command_keys import CompareOptions
from moduseg.errors import ArtefactError, ConfigError, MissingError
from moduseg.evaluation.compare import CompareSettings, compare, compare_markdown
from moduseg.evaluation.confusion import Uncovered
from moduseg.evaluation.counts import FILE, SplitCounts
from moduseg.evaluation.measures import single_measures
from moduseg.evaluation.tables import find_supervision, mark_supervision
from moduseg.files import read_json, write_atomic, write_json
from moduseg.pipeline.artefacts import Artefact
from moduseg.pipeline.workspace import log
from moduseg.stages import evaluate_folder


def main(options: CompareOptions, overrides: Sequence[str]) -> int:
    """Compare two folders."""
    if len(options.folders) != 2:
        raise ConfigError(
            f"compare: got {len(options.folders)} folders ({', '.join(options.folders) or 'none'}), expected two; try: "
            "python scripts/compare.py <folder> <folder> [dataset=<name>]"
        )
    names_dataset = any(override.startswith(("dataset=", "experiment=")) for override in overrides)
    run(*options.folders, compose(overrides), names_dataset=names_dataset)
    return 0


@dataclass(frozen=True)
class Side:
    """One of the two results.

    Attributes:
        path: the folder of results.
        counts: of each image.
        digest: of the counts' file.
        classes: names, background first.
        setting: what both sides must share to be compared: data set, split, treatment of uncovered pixels.
        has_background: whether label 0 is a class.
        uncovered: what pixels without a prediction count as, see `moduseg.evaluation.confusion`.
        supervision: masks that a part of the run was trained on, `pixel:<data set>`.
    """

    path: Path
    counts: SplitCounts
    digest: str
    classes: tuple[str, ...]
    setting: tuple[str, str, str]
    has_background: bool
    uncovered: Uncovered
    supervision: str | None = None


def run(first: str, second: str, cfg: Config, *, names_dataset: bool) -> Path:
    """Compare two results; folders of PNGs are scored first, on the evaluated split of `cfg.dataset`.

    Args:
        first, second: folders, each an artefact of `infer`, `evaluate` or `pseudo_masks`, or PNGs named `<id>.png`.
        cfg: data set, evaluation settings (`bootstrap` resamples) and where to write.
        names_dataset: whether the user named a data set; a folder of PNGs is not scored on the default one.

    Returns:
        The artefact's folder: `results.json` and `results.md`.

    Raises:
        ConfigError, MissingError, ArtefactError, DataError: the two cannot be compared.
    """
    resamples = cfg.evaluation.bootstrap
    if not resamples:
        raise ConfigError("evaluation.bootstrap: got 0, expected 1 resample or more to compare; try 1000")
    left, right = (_open_side(folder, cfg, names_dataset) for folder in (first, second))
    for what, ours, theirs in zip(("data set", "split", "uncovered pixels"), left.setting, right.setting, strict=True):
        if ours != theirs:
            raise ArtefactError(
                f"compare: {first} has {what} {ours!r}, {second} has {theirs!r}; expected the same; score both alike"
            )
    if left.classes != right.classes:
        raise ArtefactError(f"compare: {first} and {second} have different class lists; score both on one data set")
    names = _name_sides(left.path, right.path)
    parts: dict[str, Any] = {
        "first": left.digest,
        "second": right.digest,
        "names": list(names),
        "setting": list(left.setting),
        "resamples": resamples,
        "seed": cfg.runtime.seed,
    }
    artefact = Artefact(Path(cfg.runtime.outputs), left.setting[0], "compare", "--".join(names)[:100], parts)
    measures = [measure.name for measure in single_measures()]
    if not _is_finished(artefact, measures):
        settings = CompareSettings(resamples, cfg.runtime.seed, left.has_background, left.uncovered)
        shown = (mark_supervision(names[0], left.supervision), mark_supervision(names[1], right.supervision))
        record = compare(left.counts, right.counts, left.classes, names=shown, settings=settings)
        folders = {"dataset": left.setting[0], "split": left.setting[1], "folders": [first, second]}
        write_json(artefact.path / "results.json", {**folders, **record})
        write_atomic(artefact.path / "results.md", compare_markdown(record).encode())
        artefact.write_manifest(status="complete", images=record["images"], failures=0, measures=measures)
    text = (artefact.path / "results.md").read_text(encoding="utf-8").rstrip()
    log.info("%s\ncompare -> %s", text, artefact.path)
    return artefact.path


def _is_finished(artefact: Artefact, measures: list[str]) -> bool:
    """Return whether the two have been compared by all measures."""
    has_files = all((artefact.path / name).is_file() for name in ("results.json", "results.md"))
    return artefact.is_complete and has_files and artefact.manifest.get("measures") == measures


def _open_side(folder: str, cfg: Config, names_dataset: bool) -> Side:
    """Return one of the two results; a folder of PNGs is scored first."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise MissingError(
            f"compare: got '{folder}', no such folder; expected a folder of results (results.json) or of <id>.png"
        )
    if not (path / "results.json").is_file():
        if not names_dataset:
            raise ConfigError(
                f"compare: got '{folder}', which holds no results.json; expected a folder of results, or of PNGs and "
                "what to score them on; add dataset=<name>"
            )
        path = evaluate_folder.run(dataclasses.replace(cfg, predictions=str(path)))
    content = read_json(path / "results.json")
    record: Any = content.get("prediction", content) if isinstance(content, dict) else None
    if not (path / FILE).is_file():
        raise ArtefactError(
            f"{path}: holds results.json but not {FILE}, expected the counts of each image; run the command that made "
            f"it again, or compare {path / 'labels'} with dataset=<name>"
        )
    data = (path / FILE).read_bytes()
    counts = SplitCounts.from_bytes(data, str(path / FILE))
    try:
        classes = tuple(record["classes"])
        rule = record["uncovered"]["rule"] if "uncovered" in record else "background"
        setting = (str(record["dataset"]), str(record["split"]), str(rule))
    except (KeyError, TypeError) as error:
        raise ArtefactError(
            f"{path / 'results.json'}: lacks {error}, expected what evaluation writes; run it again"
        ) from error
    if counts.num_labels != len(classes):
        raise ArtefactError(f"{path}: {FILE} has {counts.num_labels} labels, results.json {len(classes)}; run it again")
    has_background = rule == "background"
    uncovered: Uncovered = "ignore" if rule == "ignore" else "wrong"
    digest = hashlib.sha256(data).hexdigest()
    return Side(
        path=path,
        counts=counts,
        digest=digest,
        classes=classes,
        setting=setting,
        has_background=has_background,
        uncovered=uncovered,
        supervision=find_supervision(content),
    )


def _name_sides(first: Path, second: Path) -> tuple[str, str]:
    """Return the folders' names, with as many parents as it takes to tell them apart."""
    parts = first.resolve().parts, second.resolve().parts
    for length in range(1, min(map(len, parts)) + 1):
        names = "-".join(parts[0][-length:]), "-".join(parts[1][-length:])
        if names[0] != names[1]:
            return names
    return "a", "b"
