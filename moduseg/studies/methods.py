"""All methods side by side: each as masks, after the proposals' vote, after retrieval, and as a student.

`python scripts/methods.py [dataset=miniature] [worlds=<n>] [methods=[CAM,iSeg]] [key=value ...]`
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from moduseg.config import Config, compose
from moduseg.config.command_keys import MethodsOptions
from moduseg.errors import ConfigError, MissingError, ModusegError, StorageError
from moduseg.evaluation.counts import FILE, SplitCounts
from moduseg.evaluation.tables import find_supervision, versions
from moduseg.files import read_json, to_json_values, write_atomic, write_json
from moduseg.pipeline.artefacts import Artefact
from moduseg.pipeline.manifests import StageFolder, count_failures
from moduseg.pipeline.workspace import Workspace, log
from moduseg.progress import Progress
from moduseg.report.methods_page import write_methods_page
from moduseg.report.quality_time import draw_quality_time
from moduseg.stages.class_scores import FIT_FILE
from moduseg.stages.infer import Infer
from moduseg.stages.predict_student import PredictStudent
from moduseg.stages.pseudo_masks import PseudoMasks
from moduseg.studies.costs import LabellingCost, measure_labelling
from moduseg.studies.method_markdown import make_csv, make_markdown
from moduseg.studies.method_results import ScoredWorld, compare_rows, list_points, summarise
from moduseg.studies.method_table import (
    DATASETS,
    MethodTable,
    check_overrides,
    is_optional,
    load_method_table,
    read_key,
    select_fitting,
)
from moduseg.studies.reproduce import ALIASES, command, find_missing, one_line

FIGURE = "quality_time"
"""Name of the figure's files, without their suffix."""
DEFAULT_WORLDS = 3
"""Worlds of the embedded data set, unless another number is asked for."""


def main(options: MethodsOptions, overrides: Sequence[str]) -> int:
    """Make the table of all methods and print it.

    Returns:
        0 if every row was run or lacks data or weights, 1 if one failed or left images out.
    """
    folder, num_failed = run(options, overrides)
    print((folder / "table.md").read_text(encoding="utf-8"))
    names = ("table.md", "table.csv", "table.json", f"{FIGURE}.png", f"{FIGURE}.svg", "report/index.html")
    print("written: " + ", ".join(str(folder / name) for name in names))
    return 1 if num_failed else 0


def run(options: MethodsOptions, overrides: Sequence[str] = ()) -> tuple[Path, int]:
    """Run every form of every method, world by world, and write the table again after each method.

    What an earlier run has finished is taken from its folders.

    Args:
        options: what to run.
        overrides: for every run that has a place for them; what a row is about stays as the table has it.

    Returns:
        The folder `<outputs>/<data set>/methods/<table>-<key8>/`, and the number of rows that failed or lost images.

    Raises:
        ConfigError: no such table, data set, method or number of worlds, or an override that does not fit.
        StorageError: nothing can be written any more.
    """
    study = MethodStudy(options, overrides)
    with Progress(study.num_runs, "methods", unit="run") as progress:
        for world in study.worlds:
            for method in study.methods:
                for form in study.table.forms:
                    study.run_row(method, form, world)
                    progress.update()
                study.write()
    study.finish()
    return study.artefact.path, study.num_failed


@dataclass
class Row:
    """A form of a method: what it runs on each world, and what came of it.

    Attributes:
        method, form: of the table.
        cfgs: world -> configuration; the world is `None` where nothing is drawn by a seed.
        commands: world -> command line.
        scored: world -> result.
        missing, errors: lines on what it lacks, and on what went wrong.
        left_out: images that some stage of it lost.
    """

    method: str
    form: str
    cfgs: dict[int | None, Config]
    commands: dict[int | None, str]
    scored: dict[int | None, ScoredWorld] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    left_out: int = 0

    @property
    def status(self) -> str:
        """`failed`, `missing`, `done`, or `to do` before its first world."""
        if self.errors or self.missing:
            return "failed" if self.errors else "missing"
        return "done" if self.scored else "to do"


class MethodStudy:
    """The rows of a table of methods on one data set, and the files that show them.

    Args:
        options: what was asked for.
        overrides: for every run.

    Raises:
        ConfigError: as `run`.
    """

    def __init__(self, options: MethodsOptions, overrides: Sequence[str]) -> None:
        self.table: MethodTable = load_method_table(options.table)
        self.shown = options.dataset
        self.dataset = ALIASES.get(options.dataset, options.dataset)
        if self.dataset not in DATASETS:
            allowed = ", ".join([*DATASETS, *ALIASES])
            raise ConfigError(
                f"dataset: got {options.dataset!r}, expected one of {allowed}; leave it out for miniature"
            )
        self.overrides = [*([f"dataset={self.shown}"] if self.shown in ALIASES else []), *overrides]
        self.methods = self.table.choose(self.dataset, options.methods)
        self.worlds = _choose_worlds(self.table, self.dataset, options.worlds)
        # Every mistake in the configuration comes before the first run.
        check_overrides(self.table, self.dataset, overrides)
        self._placed: set[str] = set()
        keys = itertools.product(self.methods, self.table.forms)
        self.rows = {(method, form): self._make_row(method, form) for method, form in keys}
        if unplaced := [override for override in self.overrides if override not in self._placed]:
            raise ConfigError(
                f"{read_key(unplaced[0])}: got {unplaced[0]!r}, expected a key that a row of the table has; correct "
                "it, or leave it out"
            )
        first = next(iter(next(iter(self.rows.values())).cfgs.values()))
        self._resamples, self._seed = first.evaluation.bootstrap, first.runtime.seed
        self._is_on_cpu = Workspace(first).device.torch_device.type == "cpu"
        self.artefact = Artefact(Path(first.runtime.outputs), self.shown, "methods", options.table, self._list_parts())

    @property
    def num_runs(self) -> int:
        """Number of runs, all worlds together."""
        return len(self.rows) * len(self.worlds)

    @property
    def num_failed(self) -> int:
        """Number of rows that broke off or left images out."""
        return sum(row.status == "failed" or row.left_out > 0 for row in self.rows.values())

    def _make_row(self, method: str, form: str) -> Row:
        """Return a row before its runs."""
        cfgs, commands, fitting = {}, {}, self.overrides
        if any(map(is_optional, self.overrides)):
            fitting = self._select_fitting(method, form)
        self._placed.update(fitting)
        for world in self.worlds:
            chosen = self.table.list_overrides(method, form, self.dataset, fitting, world)
            cfgs[world] = compose(["evaluation.report=false", *chosen])
            commands[world] = command(chosen, self.table.forms[form].stage)
        return Row(method, form, cfgs, commands)

    def _select_fitting(self, method: str, form: str) -> list[str]:
        """Return the user's overrides that a row has a place for."""
        chosen = [override for override in self.overrides if read_key(override) == "student"]
        cfg = compose(self.table.list_overrides(method, form, self.dataset))
        if chosen and cfg.student is not None:
            # The keys are those of the student that the user names, not of the table's.
            cfg = compose(self.table.list_overrides(method, form, self.dataset, chosen))
        return select_fitting(self.overrides, cfg)

    def _list_parts(self) -> dict[str, Any]:
        """Return what the folder's key is made of."""
        content = to_json_values([row.commands[self.worlds[0]] for row in self.rows.values()])
        return {"dataset": self.shown, "rows": content, "worlds": list(self.worlds)}

    def run_row(self, method: str, form: str, world: int | None) -> None:
        """Run a row on one world, or record what it lacks."""
        row = self.rows[method, form]
        if row.status in ("failed", "missing"):
            return
        stage, cfg = self.table.forms[form].stage, row.cfgs[world]
        try:
            row.missing = find_missing(Workspace(cfg), stage)
            if not row.missing:
                # Each run has a workspace of its own, so that one run's models are in memory at a time.
                scored = run_form(stage, Workspace(cfg))
                row.scored[world] = scored
                row.left_out += count_failures(scored.path)
        except StorageError:
            raise
        except MissingError as error:
            row.missing = [one_line(error)]
        except ModusegError as error:
            row.errors = [one_line(error)]
        except Exception as error:  # other rows still run; the traceback is logged and the exit code is 1
            log.exception("methods, %s, %s", method, form)
            row.errors = [f"{type(error).__name__}: {one_line(error)}"]

    def summarise(self) -> dict[str, Any]:
        """Return everything that the table, the figure and the page show, as JSON values."""
        entries = []
        for (name, form), row in self.rows.items():
            method, published = self.table.methods[name], self.table.methods[name].find_published(form, self.dataset)
            entries.append(
                {
                    "method": name,
                    "form": form,
                    "status": row.status,
                    "missing": row.missing,
                    "errors": row.errors,
                    "left_out": row.left_out,
                    "needs_tags": self.table.forms[form].needs_tags,
                    "published": None if published is None else published.value,
                    "published_on": None if published is None else published.benchmark,
                    "published_source": None if published is None else published.source,
                    "parts": method.parts,
                    "command": next(iter(row.commands.values())),
                    **summarise(list(row.scored.values()), self._resamples, self._seed),
                }
            )
        scored = {key: list(row.scored.values()) for key, row in self.rows.items() if row.scored}
        comparisons = compare_rows(scored, list(self.table.forms), self._resamples, self._seed)
        for entry in entries:
            key = entry["method"], entry["form"]
            entry["alike"], entry["gain"] = comparisons.alike.get(key), comparisons.gains.get(key)
        return {
            "title": self.table.title,
            "dataset": self.shown,
            "split": next((world.split for row in self.rows.values() for world in row.scored.values()), "val"),
            "worlds": [world for world in self.worlds if world is not None],
            "forms": list(self.table.forms),
            "methods": self.methods,
            "time": "cpu" if self._is_on_cpu else "wall",
            "rows": entries,
            "differences": comparisons.differences,
            "confidence": comparisons.confidence,
            "resamples": self._resamples,
            "notes": self.table.notes,
            "overrides": self.overrides,
            "versions": versions(),
        }

    def write(self) -> dict[str, Any]:
        """Write the table so far, as JSON, Markdown and CSV, and return its record."""
        record, folder = self.summarise(), self.artefact.path
        write_json(folder / "table.json", record)
        write_atomic(folder / "table.md", make_markdown(record).encode())
        write_atomic(folder / "table.csv", make_csv(record).encode())
        return record

    def finish(self) -> None:
        """Write the table with its figure and page."""
        record, folder = self.write(), self.artefact.path
        label = "seconds of the processor a picture" if self._is_on_cpu else "seconds a picture"
        where = f"{record['dataset']} {record['split']}"
        for suffix, data in draw_quality_time(list_points(record), f"{record['title']} {where}", label).items():
            write_atomic(folder / f"{FIGURE}.{suffix}", data)
        write_methods_page(folder, record, (folder / f"{FIGURE}.svg").read_bytes())
        images = max((entry["images"] or 0 for entry in record["rows"]), default=0)
        self.artefact.write_manifest(status="complete", images=images, failures=self.num_failed)


def run_form(stage: str, work: Workspace) -> ScoredWorld:
    """Run one form of a method on one world.

    Args:
        stage: as `Form.stage`.
        work: of the run.
    """
    cfg, train_miou = work.cfg, None
    if stage == "pseudo_masks":
        train = PseudoMasks.run(cfg, work)
        path = PseudoMasks.run(cfg, work, work.eval_split)
        if (train / "results.json").is_file():
            train_miou = read_json(train / "results.json")["miou"]
    else:
        path = Infer.run(cfg, work) if stage == "infer" else PredictStudent.run(cfg, work)
    results = read_json(path / "results.json")
    counts = SplitCounts.from_bytes((path / FILE).read_bytes(), str(path / FILE))
    cost: LabellingCost = measure_labelling(path)
    return ScoredWorld(
        path=path,
        split=results["split"],
        counts=counts,
        has_background=work.dataset(work.eval_split).has_background,
        miou=results["miou"],
        train_miou=train_miou,
        cost=cost,
        num_parameters=_count_parameters(work, path),
        supervision=find_supervision(results),
    )


def _count_parameters(work: Workspace, path: Path) -> int:
    """Return how many numbers were learnt for a run: by the generator's fit, and by its student."""
    # Both splits are scored with the fit of the training images.
    fits = [folder for (stage, _), folder in work.finished_stages.items() if stage == "fit"]
    total = sum(work.generator.count_learnt(load_file(folder / FIT_FILE)) for folder in fits[:1])
    student = StageFolder(path).inputs.get("train_student")
    return total + (int(student.manifest["parameters"]["trained_parameters"]) if student is not None else 0)


def _choose_worlds(table: MethodTable, dataset: str, number: int | None) -> list[int | None]:
    """Return the seeds of the worlds to run; `[None]` on a data set that is not drawn.

    Raises:
        ConfigError: more worlds than there are.
    """
    available = len(table.worlds) if dataset == "miniature" else 1
    if number is not None and not 1 <= number <= available:
        limits = f"1 to {available}" if available > 1 else f"1 on {dataset}, where nothing is drawn by a seed"
        raise ConfigError(f"worlds: got {number}, expected {limits}; leave it out")
    if dataset != "miniature":
        return [None]
    return list(table.worlds[: number or min(DEFAULT_WORLDS, available)])
