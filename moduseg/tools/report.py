"""Write the report of a finished run, of another tool's label maps, or of two of them side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from moduseg.config import compose
from moduseg.config.command_keys import ReportOptions
from moduseg.errors import ConfigError
from moduseg.files import read_json
from moduseg.pipeline.workspace import Workspace
from moduseg.report.build import FOLDER, Comparison, add_figures, write_report
from moduseg.report.finished_run import open_run, read_run_config
from moduseg.stages import evaluate_folder
from moduseg.tools import compare


def main(options: ReportOptions, overrides: Sequence[str]) -> int:
    """Write the report; for a run the overrides change its own configuration."""
    run(options.run, overrides, options.predictions, options.compare)
    return 0


def run(
    target: str | None, overrides: Sequence[str] = (), predictions: str | None = None, against: str | None = None
) -> Path:
    """Write the report of a finished run, or of PNGs, alone or compared with a second one.

    Args:
        target: folder of a run (`infer`, `evaluate`, `pseudo_masks`); `None` if `predictions` is given.
        overrides: for a run `key=value` over its own configuration; for PNGs as on the command line (`dataset=voc`).
        predictions: a folder of `<id>.png` in place of a run.
        against: a second run or folder of PNGs.

    Returns:
        The path of `index.html`: in the run's `report/`, or in that of the comparison.

    Raises:
        ConfigError: neither or both of `target` and `predictions`.
        ModusegError: what is named cannot be used.
    """
    if (target is None) == (predictions is None):
        raise ConfigError(
            f"report: got run={target} and predictions={predictions}, expected one of them; set run=<folder of a run>, "
            "or predictions=<folder of PNGs> dataset=<name>"
        )
    if target is not None:
        path = Path(target).expanduser()
        cfg = read_run_config(path, overrides)
    else:
        cfg = dataclasses.replace(compose(overrides), predictions=str(predictions))
        path = evaluate_folder.run(cfg)
    work = Workspace(cfg)
    finished = open_run(path, work)
    if against is None:
        index = write_report(work, finished, finished.path / FOLDER)
        if path != finished.path:
            # `path` is of stage `evaluate`, whose figures the report of the run behind it shows as well.
            add_figures(finished.path, read_json(path / "results.json"))
        return index
    other = Path(against).expanduser()
    if (other / "results.json").is_file():
        second = open_run(other, Workspace(read_run_config(other)))
    else:
        second = open_run(evaluate_folder.run(dataclasses.replace(cfg, predictions=str(other))), work)
    compared = compare.run(str(finished.path), str(second.path), cfg, names_dataset=True)
    return write_report(work, finished, compared / FOLDER, Comparison(second, read_json(compared / "results.json")))
