"""The table of commands. A new command is one entry here and one function, imported when the command runs.

A command that reads the configuration alone is a function of a checked `Config`. One with keys of its own is a function
`main(options, overrides)` of its options dataclass and of the overrides of the configuration that were given beside
them. Both return an exit code, or the folder of a finished artefact, whose failures decide the exit code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moduseg.cli.options import Overrides
from moduseg.config.command_keys import (
    AblateOptions,
    AddOptions,
    ApplyOptions,
    Coco150Options,
    CompareOptions,
    ConvertOptions,
    DemoOptions,
    ExportOptions,
    ExportStudentOptions,
    InfoOptions,
    MergeOptions,
    MethodsOptions,
    NewClassOptions,
    PredictOptions,
    RemoveOptions,
    ReportOptions,
    ReproduceOptions,
    ShowAttentionOptions,
    SweepOptions,
    TagOptions,
)


@dataclass(frozen=True)
class Command:
    """One command of `moduseg`.

    Attributes:
        name: one word, or two where a command has several verbs (`bank info`).
        group: its chapter in the list of commands.
        summary: what it does, in one line.
        function: `module:function`, or `module:class.method`.
        reads: what has to be there before.
        writes: what is there afterwards, and where.
        examples: two command lines, without `moduseg`.
        options: its own keys; `None` if it reads the configuration alone.
        words: keys that arguments without `=` fill; see `moduseg.cli.options.parse`.
        repeated: keys that may be given several times; see `moduseg.cli.options.parse`.
        accepts: which overrides a command with keys of its own takes: `groups` for those of a bank's configuration,
            `all` for those of a run.
        is_quiet: whether only warnings are logged, because the command prints its result.
        groups: groups of the configuration that it reads, for its help.
        stage: `module:class` of the last stage that it runs, for `--dry-run`; `None` if it runs none.
        config_name: the file of `configs/` that it reads; another than `config` is handed over as Hydra composed it.
    """

    name: str
    group: Literal["data", "pipeline", "experiments", "tools"]
    summary: str
    function: str
    reads: str
    writes: str
    examples: tuple[str, str]
    options: type | None = None
    words: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    accepts: Overrides = "groups"
    is_quiet: bool = False
    groups: tuple[str, ...] = ()
    stage: str | None = None
    config_name: str = "config"


_WORDS = (
    "dataset", "proposer", "backbone", "pseudo_masks", "tagger", "evaluation", "runtime", "experiment", "protocol",
)  # fmt: skip
_UNNAMED = ("dataset", "discoverer", "backbone", "evaluation", "runtime", "experiment", "protocol")
_ALL = (
    "dataset", "proposer", "backbone", "pseudo_masks", "bank", "retrieval", "evaluation", "runtime", "experiment",
)  # fmt: skip
_STUDENT = (
    "student", "dataset", "proposer", "backbone", "pseudo_masks", "bank", "retrieval", "evaluation", "runtime",
    "experiment",
)  # fmt: skip
_TABLE = (
    Command(
        "propose",
        "pipeline",
        "Find class-agnostic masks in the images of the evaluated split.",
        "moduseg.stages.propose:Propose.run",
        reads="the images of the evaluated split",
        writes="outputs/<dataset>/propose/<name>-<key>/: masks/<id>.json, SA-1B annotations",
        examples=("propose", "propose experiment=folder dataset.root=my"),
        groups=("dataset", "proposer", "runtime", "experiment",),
        stage="moduseg.stages.propose:Propose",
    ),
    Command(
        "pseudo_masks",
        "pipeline",
        "Label the training images from their tags.",
        "moduseg.stages.pseudo_masks:PseudoMasks.run",
        reads="the training images and their tags; proposals, which are made if absent",
        writes="outputs/<dataset>/pseudo_masks/<name>-<key>/: labels/<id>.png and a report",
        examples=("pseudo_masks", "pseudo_masks dataset=voc pseudo_masks=corrclip_moduseg"),
        groups=("dataset", "proposer", "backbone", "pseudo_masks", "evaluation", "runtime", "experiment",),
        stage="moduseg.stages.pseudo_masks:PseudoMasks",
    ),
    Command(
        "build_bank",
        "pipeline",
        "Build the bank of feature vectors from the training images.",
        "moduseg.stages.build_bank:BuildBank.run",
        reads="the training images and their tags; earlier stages are run if absent",
        writes="outputs/<dataset>/build_bank/<name>-<key>/: bank.safetensors, bank.json",
        examples=("build_bank", "build_bank experiment=folder dataset.root=my name=first"),
        groups=("dataset", "proposer", "backbone", "pseudo_masks", "bank", "runtime", "experiment",),
        stage="moduseg.stages.build_bank:BuildBank",
    ),
    Command(
        "infer",
        "pipeline",
        "Label and score the evaluated split by retrieval from the bank.",
        "moduseg.stages.infer:Infer.run",
        reads="the images of both splits; earlier stages are run if absent",
        writes="outputs/<dataset>/infer/<name>-<key>/: labels/<id>.png, results.json, report/index.html",
        examples=("infer", "infer experiment=folder dataset.root=my"),
        groups=_ALL,
        stage="moduseg.stages.infer:Infer",
    ),
    Command(
        "segment",
        "pipeline",
        "Label and score the evaluated split from words alone, without training images.",
        "moduseg.stages.segment:Segment.run",
        reads="the images of the evaluated split; proposals and tags, which are made if needed and absent",
        writes="outputs/<dataset>/segment/<name>-<key>/: labels/<id>.png, results.json, report/index.html",
        examples=("segment", "segment dataset=folder dataset.root=my vocabulary='a dog;grass'"),
        groups=_WORDS,
        stage="moduseg.stages.segment:Segment",
    ),
    Command(
        "discover",
        "pipeline",
        "Find segments without names in the evaluated split, and score them by a matching to the truth.",
        "moduseg.stages.discover:Discover.run",
        reads="the images of the evaluated split; their truth for scores alone",
        writes="outputs/<dataset>/discover/<name>-<key>/: labels/<id>.png, results.json, report/index.html",
        examples=("discover", "discover discoverer=diffseg_miniature dataset.train=1"),
        groups=_UNNAMED,
        stage="moduseg.stages.discover:Discover",
    ),
    Command(
        "train_student",
        "pipeline",
        "Train a network on label maps of the training images.",
        "moduseg.stages.train_student:TrainStudent.run",
        reads="the training images and label maps of them: pseudo masks, predictions of the bank, truth, or files",
        writes="outputs/<dataset>/train_student/<name>-<key>/: student.safetensors, student.json, training.csv",
        examples=("train_student student=linear", "train_student student=segformer_b5 experiment=voc"),
        groups=_STUDENT,
        stage="moduseg.stages.train_student:TrainStudent",
    ),
    Command(
        "predict_student",
        "pipeline",
        "Label and score the evaluated split with a trained network.",
        "moduseg.stages.predict_student:PredictStudent.run",
        reads="the images of both splits; the student is trained if absent",
        writes="outputs/<dataset>/predict_student/<name>-<key>/: labels/<id>.png, results.json, report/index.html",
        examples=("predict_student student=linear", "predict_student student=linear student.labels=predictions"),
        groups=_STUDENT,
        stage="moduseg.stages.predict_student:PredictStudent",
    ),
    Command(
        "export_student",
        "tools",
        "Write a trained network as an ONNX file, and compare it with PyTorch.",
        "moduseg.tools.export_student:main",
        reads="a trained student",
        writes="<out>, which examples/student_onnx.py runs without this package",
        examples=("export_student student=latest", "export_student student=latest out=my.onnx height=128 width=128"),
        options=ExportStudentOptions,
        accepts="none",
    ),
    Command(
        "tag",
        "data",
        "Write labels.csv for a folder of images without tags.",
        "moduseg.tools.tag:main",
        reads="images, and words for what they may show",
        writes="<folder>/labels.csv, which build_bank takes (dataset=folder)",
        examples=("tag images=my vocabulary='dog;cat;bus'", "tag images=my vocabulary=words.txt tagger=clip"),
        options=TagOptions,
    ),
    Command(
        "evaluate",
        "pipeline",
        "Score a run, its pseudo masks and proposals, or anyone's label maps.",
        "moduseg.stages.evaluate:run",
        reads="a run of infer, which is made if absent, or a folder of label maps",
        writes="outputs/<dataset>/evaluate/<name>-<key>/: results.json, results.md, report/index.html",
        examples=("evaluate experiment=coco150", "evaluate dataset=voc predictions=masks"),
        groups=_ALL,
        stage="moduseg.stages.infer:Infer",
    ),
    Command(
        "prepare_data",
        "data",
        "Write what a data set needs once: masks, image-level labels, lists.",
        "moduseg.tools.prepare_data:main",
        reads="the data set as it was downloaded",
        writes="below the root of the data set: SegmentationClass/, image_labels/, lists/",
        examples=("prepare_data dataset=coco2014", "prepare_data dataset=voc dataset.root=VOC2012"),
        groups=("dataset", "runtime",),
    ),
    Command(
        "check_data",
        "data",
        "Check a data set: one table, and every problem in a file.",
        "moduseg.tools.check_data:main",
        reads="every image, mask and label of both splits",
        writes="a table, and outputs/<dataset>/check_data/: problems.jsonl",
        examples=("check_data dataset=voc", "check_data dataset=folder dataset.root=my"),
        groups=("dataset", "runtime",),
    ),
    Command(
        "convert_proposals",
        "data",
        "Convert maps of ids (.npz, 16-bit PNG) into proposals as SA-1B JSON files.",
        "moduseg.tools.convert:main",
        reads="<source>/<id>.npz or .png",
        writes="<out>/<id>.json",
        examples=("convert_proposals entityseg proposals", "convert_proposals source=maps out=proposals"),
        options=ConvertOptions,
        words=("source", "out"),
        accepts="none",
    ),
    Command(
        "make_coco150",
        "data",
        "Write the data set coco150 from a COCO 2017 download with panoptic annotations.",
        "moduseg.tools.make_coco150:main",
        reads="train2017/, val2017/ and annotations/ of a COCO download",
        writes="<out>/, 150 images with their labels and masks",
        examples=("make_coco150 COCO", "make_coco150 COCO data/coco150"),
        options=Coco150Options,
        words=("coco", "out"),
        accepts="none",
    ),
    Command(
        "voc_package",
        "tools",
        "Pack predictions for the VOC 2012 evaluation server.",
        "moduseg.tools.voc_package:run",
        reads="a run of infer, or predictions=<folder>",
        writes="outputs/<dataset>/voc_package/: an archive in the server's layout",
        examples=("voc_package experiment=voc", "voc_package dataset=voc predictions=masks"),
        groups=_ALL,
    ),
    Command(
        "ablate",
        "experiments",
        "Make a table of `configs/table/`: a grid of runs.",
        "moduseg.studies.ablate:main",
        reads="a table of configs/table/; its runs are made if absent",
        writes="outputs/tables/<table>.md and .json",
        examples=("ablate table=miniature", "ablate table=top_k runtime.device=cuda"),
        groups=_ALL,
        options=AblateOptions,
        accepts="all",
        is_quiet=True,
    ),
    Command(
        "reproduce",
        "experiments",
        "Make a table of the paper, published figures beside ours.",
        "moduseg.studies.reproduce:main",
        reads="a table of configs/reproduce/; its runs are made if absent",
        writes="outputs/tables/<table>-<dataset>.md and .json",
        examples=("reproduce table=main show", "reproduce table=ablation_modules dataset=miniature"),
        groups=("runtime",),
        options=ReproduceOptions,
        accepts="all",
        is_quiet=True,
    ),
    Command(
        "methods",
        "experiments",
        "Set all methods side by side: masks, region vote, retrieval, students; quality against time.",
        "moduseg.studies.methods:main",
        reads="nothing on the miniature; its runs are made if absent, and rows that lack data or weights say so",
        writes="outputs/<dataset>/methods/<table>-<key>/: table.md, table.csv, quality_time.png, report/index.html",
        examples=("methods worlds=1", "methods methods=[CAM,iSeg] student.training.steps=300"),
        groups=_STUDENT,
        options=MethodsOptions,
        accepts="all",
        is_quiet=True,
    ),
    Command(
        "sweep",
        "experiments",
        "Score a grid of retrieval settings from caches; no model runs.",
        "moduseg.studies.sweep:main",
        reads="the caches of a run, which is made if absent",
        writes="outputs/<dataset>/sweep/<name>-<key>/: sweep.md, sweep.csv, sweep.png",
        examples=("sweep retrieval.top_k=1,5,9", "sweep retrieval.top_k=1,5,9 retrieval.nms_iou=0.4,0.6 select=train"),
        groups=_ALL,
        options=SweepOptions,
        repeated=("select",),
        accepts="all",
        is_quiet=True,
    ),
    Command(
        "new_class",
        "experiments",
        "Withhold a class from the bank, then add it from a few tagged images.",
        "moduseg.studies.new_class:main",
        reads="the images of both splits",
        writes="outputs/tables/<name>.md and .json",
        examples=("new_class", "new_class class='red disc' images=5"),
        groups=_ALL,
        options=NewClassOptions,
        is_quiet=True,
    ),
    Command(
        "train_miniature",
        "experiments",
        "Train a miniature model, or print the quality of the shipped ones.",
        "moduseg.miniature.training.train:main",
        reads="nothing; scenes are drawn",
        writes="outputs/train_miniature/<name>",
        examples=("train_miniature model=vit", "train_miniature model=all quality_only=true"),
        config_name="train_miniature",
    ),
    Command(
        "train_arm",
        "experiments",
        "Train a module on masks that sharpens the features of every CLIP host.",
        "moduseg.tools.train_arm:main",
        reads="training images with masks; proposals, which are made if CorrCLIP is among the hosts",
        writes="outputs/<dataset>/train_arm/arm-<key>/: arm.safetensors, training.csv, measures.csv, training.png",
        examples=(
            "train_arm dataset.seed=10100 dataset.train=1000",
            "train_arm dataset=coco_stuff pseudo_masks=clip_dense_vit_b16 arm.hosts=[clearclip,naclip]",
        ),
        config_name="train_arm",
    ),
    Command(
        "compare",
        "tools",
        "Compare two folders of results or of label maps.",
        "moduseg.tools.compare:main",
        reads="two folders of results, or of <id>.png",
        writes="outputs/<dataset>/compare/: compare.md and pictures",
        examples=("compare outputs/voc/infer/first outputs/voc/infer/latest", "compare masks1 masks2 dataset=voc"),
        groups=("dataset", "evaluation", "runtime",),
        options=CompareOptions,
        words=("folders",),
        repeated=("folders",),
        accepts="all",
    ),
    Command(
        "bank info",
        "tools",
        "Print what a bank holds: its classes, or the regions of one class.",
        "moduseg.tools.bank:info",
        reads="a bank",
        writes="nothing; a table is printed",
        examples=("bank info bank=latest", "bank info bank=latest class=dog"),
        options=InfoOptions,
    ),
    Command(
        "bank add",
        "tools",
        "Add tagged images to a bank, or classes by name.",
        "moduseg.tools.bank:add",
        reads="a bank, images and their tags",
        writes="a new bank: <out>, or outputs/<dataset>/bank/add-<key>/",
        examples=(
            "bank add bank=latest images=stars new='yellow star'",
            "bank add bank=latest words='yellow star'",
        ),
        options=AddOptions,
    ),
    Command(
        "bank remove",
        "tools",
        "Remove classes, images or regions from a bank.",
        "moduseg.tools.bank:remove",
        reads="a bank",
        writes="a new bank: <out>, or outputs/<dataset>/bank/remove-<key>/",
        examples=("bank remove bank=latest class=dog out=bank2", "bank remove bank=latest image='a;b'"),
        options=RemoveOptions,
    ),
    Command(
        "bank merge",
        "tools",
        "Join banks of one backbone.",
        "moduseg.tools.bank:merge",
        reads="two or more banks of one backbone",
        writes="a new bank: <out>, or outputs/<dataset>/bank/merge-<key>/",
        examples=("bank merge banks='bank1;bank2' out=bank3", "bank merge banks='bank1;bank2' prefix"),
        options=MergeOptions,
    ),
    Command(
        "bank apply",
        "tools",
        "Correct the regions of a bank as marked in the report.",
        "moduseg.tools.bank:apply",
        reads="a bank, and the file of corrections that the report's page Bank saved",
        writes="a new bank: <out>, or outputs/<dataset>/bank/correct-<key>/",
        examples=(
            "bank apply bank=latest corrections=corrections.json out=bank2",
            "bank apply bank=bank2 corrections=more.json",
        ),
        options=ApplyOptions,
    ),
    Command(
        "bank export",
        "tools",
        "Write a bank's vectors for another program.",
        "moduseg.tools.bank:export",
        reads="a bank",
        writes="<out>/: vectors and names in the format that was asked for",
        examples=("bank export bank=latest out=vectors", "bank export bank=latest out=vectors format=csv"),
        options=ExportOptions,
    ),
    Command(
        "predict",
        "tools",
        "Label your own images with a bank.",
        "moduseg.tools.predict:main",
        reads="a bank and images",
        writes="<out>/: labels/<id>.png, overlays/, and the formats that were asked for",
        examples=("predict bank=latest images=photos", "predict bank=latest images=photos formats='png;coco'"),
        options=PredictOptions,
    ),
    Command(
        "show_attention",
        "tools",
        "Draw where a text-to-image model sees words in an image.",
        "moduseg.tools.show_attention:main",
        reads="an image, and a generator that reads a diffusion model (pseudo_masks=iseg_voc)",
        writes="<out>, a PNG file: for each word its map before and after completion",
        examples=(
            "show_attention image=photo.jpg words='dog;grass' pseudo_masks=iseg_voc",
            "show_attention image=photo.jpg words=dog out=dog.png pseudo_masks=diffsegmenter_voc",
        ),
        groups=("pseudo_masks", "runtime"),
        options=ShowAttentionOptions,
    ),
    Command(
        "demo_app",
        "tools",
        "Correct pictures in a browser, and see what changes.",
        "moduseg.app.serve:main",
        reads="a bank, or none (bank=new)",
        writes="nothing, until a bank is saved in the page",
        examples=("demo_app bank=latest", "demo_app bank=new port=8000"),
        options=DemoOptions,
    ),
    Command(
        "report",
        "tools",
        "Write the report of a run, a page that opens from disk.",
        "moduseg.tools.report:main",
        reads="a finished run, or a folder of <id>.png",
        writes="report/index.html in the folder of the run",
        examples=("report run=latest", "report predictions=masks dataset=voc"),
        options=ReportOptions,
        accepts="all",
    ),
)  # fmt: skip
COMMANDS: dict[str, Command] = {command.name: command for command in _TABLE}
"""Every command by its name, in the order in which they are listed."""
