"""Every command of the documentation runs, on a few scenes, or says in the line above it what it needs.

Commands that need more (data, weights, time) are read and composed as their program does, and not run.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from omegaconf import DictConfig

from benchmarks import FIGURES
from moduseg.cli.main import bind_command, find_command, resolve_bank_path, split_name, to_exit_code
from moduseg.config import config_dir
from moduseg.config.files import compose_hydra, from_hydra
from moduseg.config.overrides import check_choice, read_override, set_value
from moduseg.errors import ConfigError
from tests.support.documented_commands import DocumentedCommand, list_commands, list_settings

ROOT = Path(__file__).parent.parent
TESTED_ELSEWHERE = {"extending.md": "tests/test_extending.py", "own_images.md": "tests/test_walk_through.py"}
"""Pages whose commands that need nothing are run by another file of tests."""
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/*.md")),
]
PAGES += [ROOT / "data" / "README.md", ROOT / "moduseg" / "miniature" / "README.md"]
COMMANDS = [command for page in PAGES for command in list_commands(page)]
TO_RUN = [c for c in COMMANDS if not c.needs_more and c.page.name not in TESTED_ELSEWHERE]
TO_READ = [c for c in COMMANDS if c.needs_more]

SETTINGS = [(page, line, setting) for page in PAGES for line, setting in list_settings(page)]
GROUPS = (
    "dataset", "proposer", "proposer@train_proposer", "backbone", "pseudo_masks", "bank", "retrieval", "evaluation",
    "runtime", "experiment", "protocol", "tagger", "discoverer", "student",
)  # fmt: skip
PARTS: tuple[list[str], ...] = (
    [], ["proposer=sam_grid"], ["proposer=mask2former"], ["proposer=contours"], ["backbone=mobilenetv2"],
    ["backbone=dinov2_vitb14"], ["dataset=folder"], ["dataset=voc"], ["dataset=coco2014"], ["dataset=coco150"],
    ["dataset=coco_stuff27"], ["pseudo_masks=corrclip_moduseg"], ["pseudo_masks=sam3_concepts"],
    ["student=lraspp_mobilenet_v3"], ["discoverer=iseg_propagation"], ["tagger=tagclip"],
    ["retrieval.answer=words"], ["runtime.shard.count=8"],
)  # fmt: skip
"""Overrides of which at least one has the key of each setting that a page names."""

SMALL = (
    "dataset.train=4", "dataset.val=2", "runtime.device=cpu", "evaluation.bootstrap=20", "evaluation.panels=1",
    "evaluation.report=false", "bank.min_area=30",
)  # fmt: skip
"""What makes a run of the embedded world one of seconds."""
OF_SCRIPTS = {
    "train_student": ("student.training.steps=2",), "predict_student": ("student.training.steps=2",),
    "discover": ("num_clusters=4",), "report": ("evaluation.report_images=2",),
}  # fmt: skip
NO_SETTINGS = ("bank", "predict", "compare", "export_student", "report")
"""Scripts that read the configuration of what they are given."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The current folder of all commands, which share their results."""
    return tmp_path_factory.mktemp("documented")


def fill_in(word: str) -> str:
    """Return a word with something in place of what a page leaves to the reader."""
    outputs = Path("outputs") / "miniature"
    values: dict[str, Callable[[], Path]] = {
        "<folder of pseudo_masks>": lambda: outputs / "pseudo_masks" / "latest",
        "<other run>": lambda: sorted(path for path in outputs.glob("infer/*-val-*"))[-1],
        "<run>": lambda: sorted(path for path in outputs.glob("infer/*-val-*"))[0],
        "<images>": lambda: next(iter(outputs.glob("world-*/JPEGImages"))),
        "<masks>": lambda: Path("masks"),
        "<folder>": lambda: outputs / "build_bank" / "latest",
    }
    for name, find in values.items():
        if name in word:
            word = word.replace(name, str(find()))
    return word


def bind(command: DocumentedCommand, arguments: list[str]) -> Callable[[], int | Path]:
    """Return what the program would run."""
    assert command.script is not None
    entry, rest = find_command(command.script, arguments)
    _, rest = split_name(entry, resolve_bank_path(rest))
    return bind_command(entry, rest)


def test_pages_name_what_is_run_elsewhere() -> None:
    for page, test in TESTED_ELSEWHERE.items():
        assert page in (ROOT / test).read_text(encoding="utf-8")
    assert len(TO_RUN) > 20


def test_every_command_that_needs_nothing_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for command in TO_RUN:
        script = command.script
        assert script is not None, f"{command}: no script of this program; say above it what it needs (*Needs: ...*)"
        arguments = [fill_in(word) for word in command.words[2:]]
        arguments += [] if script in NO_SETTINGS else SMALL
        arguments += OF_SCRIPTS.get(script, ())
        assert to_exit_code(bind(command, arguments)()) == 0, str(command)
    # What the last command of each kind wrote is there.
    outputs = folder / "outputs" / "miniature"
    assert (outputs / "infer" / "latest" / "labels").is_dir()
    assert list(outputs.glob("infer/*/report/index.html"))
    assert list((folder / "masks").glob("**/*.png"))


def is_understood(setting: str, configurations: Sequence[DictConfig]) -> bool:
    """Whether a file has this name, or at least one of the configurations has this key and takes this value."""
    override = read_override(setting)
    for configuration in configurations:
        try:
            if override.is_choice(config_dir()):
                check_choice(override, config_dir())
            else:
                changed = copy.deepcopy(configuration)
                set_value(changed, override)
                from_hydra(changed)
        except ConfigError:
            continue
        return True
    return False


def test_every_setting_in_a_sentence_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    of_groups: dict[str, str] = {}
    for page, line, setting in SETTINGS:
        group, has_key, _ = setting.partition("=")[0].lstrip("+").partition(".")
        # `bank=latest` is a key of other commands.
        if group in GROUPS and (has_key or group != "bank"):
            of_groups.setdefault(setting, f"{page.name}:{line}: {setting}")
    assert len(of_groups) > 100
    configurations = [compose_hydra(part) for part in PARTS]
    assert [where for setting, where in of_groups.items() if not is_understood(setting, configurations)] == []


@pytest.mark.parametrize("command", [pytest.param(c, id=f"{i}-{c}"[:90]) for i, c in enumerate(TO_READ)])
def test_every_other_command_is_understood(
    command: DocumentedCommand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program, *rest = command.words
    # What may be left out is left out; what the reader fills in, and the latest run, is a name.
    arguments = [
        re.sub(r"<[^>]*>", "named", re.sub("=latest$", "=named", word))
        for word in command.words[2:]
        if not word.startswith("[")
    ]
    arguments = [word.replace("dataset=named", "dataset=folder") for word in arguments]
    if command.script == "benchmark":
        keys = dict(word.removeprefix("--").partition("=")[::2] for word in arguments)
        assert keys.keys() <= {"device", "only", "repeats", "threads", "out", "small"}
        assert set(filter(None, keys.get("only", "").split(","))) <= set(FIGURES)
    elif command.script is not None:
        bind(command, arguments)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert rest[0] in targets
    elif program == "pip":
        extras = re.findall(r"\[([\w,]+)\]", rest[-1])
        declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert all(re.search(rf"^{extra} = \[", declared, re.MULTILINE) for extra in extras)
    elif program == "export":
        name = rest[0].partition("=")[0]
        assert any(name in path.read_text(encoding="utf-8") for path in config_dir().rglob("*.yaml"))
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]) is not None
    elif program == "python":
        assert (ROOT / rest[0].removeprefix("<moduseg>/")).is_file()
    else:
        assert program in ("cd", "hf", "torchrun"), f"{command}: an unknown program"
