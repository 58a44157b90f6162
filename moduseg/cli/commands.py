"""The table of commands. A new command is one entry here and one function, imported when the command runs.

A command that reads the configuration alone is a function of a checked `Config`. One with keys of its own is a function
`main(options, overrides)` of its options dataclass and of the overrides of the configuration that were given beside
them. Both return an exit code, or the folder of a finished artefact, whose failures decide the exit code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moduseg.cli.options import Overrides


@dataclass(frozen=True)
class Command:
    """One command of `moduseg`.

    Attributes:
        name: one word, or two where a command has several verbs (`bank info`).
        group: its chapter in the list of commands.
        summary: what it does, in one line.
        function: `module:function`, or `module:class.method`.
        options: `module:class` of its own keys; `None` if it reads the configuration alone.
        words: keys that arguments without `=` fill; see `moduseg.cli.options.parse`.
        repeated: keys that may be given several times; see `moduseg.cli.options.parse`.
        accepts: which overrides a command with keys of its own takes: `groups` for those of a bank's configuration,
            `all` for those of a run.
        is_quiet: whether only warnings are logged, because the command prints its result.
        config_name: the file of `configs/` that it reads; another than `config` is handed over as Hydra composed it.
    """

    name: str
    group: Literal["data", "pipeline", "experiments", "tools"]
    summary: str
    function: str
    options: str | None = None
    words: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    accepts: Overrides = "groups"
    is_quiet: bool = False
    config_name: str = "config"


_TABLE = (
    Command(
        "propose",
        "pipeline",
        "Find class-agnostic masks in every image.",
        "moduseg.stages.propose:Propose.run",
    ),
    Command(
        "pseudo_masks",
        "pipeline",
        "Label the training images from their tags.",
        "moduseg.stages.pseudo_masks:PseudoMasks.run",
    ),
    Command(
        "build_bank",
        "pipeline",
        "Build the bank of feature vectors from the training images.",
        "moduseg.stages.build_bank:BuildBank.run",
    ),
    Command(
        "infer",
        "pipeline",
        "Label and score the evaluated split by retrieval from the bank.",
        "moduseg.stages.infer:Infer.run",
    ),
    Command(
        "evaluate",
        "pipeline",
        "Score a run, its pseudo masks and proposals, or anyone's label maps.",
        "moduseg.stages.evaluate:run",
    ),
    Command(
        "prepare_data",
        "data",
        "Write what a data set needs once: masks, image-level labels, lists.",
        "moduseg.tools.prepare_data:main",
    ),
    Command(
        "check_data",
        "data",
        "Check a data set: one table, and every problem in a file.",
        "moduseg.tools.check_data:main",
    ),
    Command(
        "convert_proposals",
        "data",
        "Convert maps of ids (.npz, 16-bit PNG) into proposals as SA-1B JSON files.",
        "moduseg.tools.convert:main",
        options="moduseg.tools.convert:ConvertOptions",
        words=("source", "out"),
        accepts="none",
    ),
    Command(
        "make_coco150",
        "data",
        "Write the data set coco150 from a COCO 2017 download with panoptic annotations.",
        "moduseg.tools.make_coco150:main",
        options="moduseg.tools.make_coco150:Coco150Options",
        words=("coco", "out"),
        accepts="none",
    ),
    Command(
        "voc_package",
        "tools",
        "Pack predictions for the VOC 2012 evaluation server.",
        "moduseg.tools.voc_package:run",
    ),
    Command(
        "ablate",
        "experiments",
        "Make a table of `configs/table/`: a grid of runs.",
        "moduseg.studies.ablate:main",
        options="moduseg.studies.ablate:AblateOptions",
        accepts="all",
        is_quiet=True,
    ),
    Command(
        "reproduce",
        "experiments",
        "Make a table of the paper, published figures beside ours.",
        "moduseg.studies.reproduce:main",
        options="moduseg.studies.reproduce:ReproduceOptions",
        accepts="all",
        is_quiet=True,
    ),
    Command(
        "sweep",
        "experiments",
        "Score a grid of retrieval settings from caches; no model runs.",
        "moduseg.studies.sweep:main",
        options="moduseg.studies.sweep:SweepOptions",
        repeated=("select",),
        accepts="all",
        is_quiet=True,
    ),
    Command(
        "new_class",
        "experiments",
        "Withhold a class from the bank, then add it from a few tagged images.",
        "moduseg.studies.new_class:main",
        options="moduseg.studies.new_class:NewClassOptions",
        is_quiet=True,
    ),
    Command(
        "train_miniature",
        "experiments",
        "Train a miniature model, or print the quality of the shipped ones.",
        "moduseg.miniature.training.train:main",
        config_name="train_miniature",
    ),
    Command(
        "compare",
        "tools",
        "Compare two folders of results or of label maps.",
        "moduseg.tools.compare:main",
        options="moduseg.tools.compare:CompareOptions",
        words=("folders",),
        repeated=("folders",),
        accepts="all",
    ),
    Command(
        "bank info",
        "tools",
        "Print what a bank holds: its classes, or the regions of one class.",
        "moduseg.tools.bank:info",
        options="moduseg.tools.bank:InfoOptions",
    ),
    Command(
        "bank add",
        "tools",
        "Add tagged images to a bank.",
        "moduseg.tools.bank:add",
        options="moduseg.stages.extend_bank:AddOptions",
    ),
    Command(
        "bank remove",
        "tools",
        "Remove classes, images or regions from a bank.",
        "moduseg.tools.bank:remove",
        options="moduseg.tools.bank:RemoveOptions",
    ),
    Command(
        "bank merge",
        "tools",
        "Join banks of one backbone.",
        "moduseg.tools.bank:merge",
        options="moduseg.tools.bank:MergeOptions",
    ),
    Command(
        "bank export",
        "tools",
        "Write a bank's vectors for another program.",
        "moduseg.tools.bank:export",
        options="moduseg.tools.bank:ExportOptions",
    ),
    Command(
        "predict",
        "tools",
        "Label your own images with a bank.",
        "moduseg.tools.predict:main",
        options="moduseg.tools.predict:PredictOptions",
    ),
    Command(
        "demo_app",
        "tools",
        "Look into a bank in a browser.",
        "moduseg.app.serve:main",
        options="moduseg.app.serve:DemoOptions",
    ),
    Command(
        "report",
        "tools",
        "Write the report of a run, a page that opens from disk.",
        "moduseg.tools.report:main",
        options="moduseg.tools.report:ReportOptions",
        accepts="all",
    ),
)  # fmt: skip
COMMANDS: dict[str, Command] = {command.name: command for command in _TABLE}
"""Every command by its name, in the order in which they are listed."""
