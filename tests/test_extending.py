"""Parts of one's own: the files of docs/extending.md, written to a folder and run as its commands say."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moduseg import Segmenter, backbones, datasets, proposers, pseudo_masks
from moduseg.backbones import Backbone
from moduseg.config import compose, config_dir
from moduseg.config.overrides import check_names
from moduseg.errors import ConfigError
from moduseg.files import read_json
from moduseg.miniature.world import CLASSES, render_scene
from moduseg.pseudo_masks import PseudoMaskGenerator
from moduseg.stages.infer import Infer
from moduseg.stages.pseudo_masks import PseudoMasks
from moduseg.structures import Sample
from moduseg.tools.check_data import run as check_data
from tests.backbones.contract import BackboneContract
from tests.proposers.contract import ProposerContract
from tests.pseudo_masks.contract import GeneratorContract
from tests.support.devices import CPU

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^`(\w+\.py)`:\n\n```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = re.findall(r"^    python scripts/(\w+)\.py (.*:.*)$", PAGE, re.MULTILINE)


@pytest.fixture(autouse=True)
def _parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The files in the current folder, and nothing of them left in the process afterwards."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_the_page_has_four_complete_files() -> None:
    assert sorted(FILES) == ["colour_statistics.py", "colour_words.py", "flat_colours.py", "tags_in_names.py"]
    assert all(len(text.splitlines()) <= 50 for text in FILES.values())
    assert {name.removesuffix(".py") for name in FILES} == {
        address.partition(":")[0] for _, line in COMMANDS for address in re.findall(r"\w+:\w+", line)
    }


class TestFlatColours(ProposerContract):
    def config(self, folder: Path, samples: Sequence[Sample]) -> dict[str, object]:
        return {"name": "flat_colours:FlatColours", "min_area": 1}


class TestColourStatistics(BackboneContract):
    @pytest.fixture
    def backbone(self) -> Backbone:
        return backbones.build({"name": "colour_statistics:ColourStatistics"}, CPU)

    @pytest.fixture(params=["cpu"])
    def device(self, request: pytest.FixtureRequest) -> torch.device:
        return torch.device(request.param)


class TestColourWords(GeneratorContract):
    @pytest.fixture
    def generator(self) -> PseudoMaskGenerator:
        classes = ("background", "green disc", "blue disc", "green ring", "green cross", "cyan disc")
        build = pseudo_masks.build
        return build({"name": "colour_words:ColourWords"}, CPU, lambda: pytest.fail("needs no backbone"), classes)

    @pytest.fixture(params=["cpu"])
    def device(self, request: pytest.FixtureRequest) -> torch.device:
        return torch.device(request.param)


def draw_tagged_pictures(root: Path) -> None:
    """Write scenes of the embedded world whose file names are their tags, with ground truth."""
    scenes = {
        (split, i): render_scene(0, split, i) for split, count in (("train", 4), ("val", 2)) for i in range(count)
    }
    names = sorted({CLASSES[label] for scene in scenes.values() for label in scene.labels})
    new_ids = np.array([1 + names.index(name) if name in names else 0 for name in CLASSES], np.uint8)
    for (split, index), scene in scenes.items():
        (root / split).mkdir(parents=True, exist_ok=True)
        (root / "masks" / split).mkdir(parents=True, exist_ok=True)
        name = f"{'+'.join(CLASSES[label] for label in scene.labels)} {index:04d}.png"
        Image.fromarray(scene.image).save(root / split / name)
        Image.fromarray(new_ids[scene.semantic]).save(root / "masks" / split / name)


@pytest.mark.parametrize(("script", "line"), [pytest.param(*command, id=command[1]) for command in COMMANDS])
def test_each_command_of_the_page_runs(tmp_path: Path, script: str, line: str) -> None:
    arguments = line.split()
    quick = ["runtime.device=cpu", "evaluation.bootstrap=50", "evaluation.panels=1", "evaluation.report=false"]
    if "dataset.root=pictures" in arguments:
        draw_tagged_pictures(tmp_path / "pictures")
    else:
        quick += ["dataset.train=4", "dataset.val=2"]
        quick += [] if line.startswith("proposer") else ["proposer=ground_truth"]
    cfg = compose([*arguments, *quick, f"runtime.outputs={tmp_path / 'outputs'}"])
    if script == "check_data":
        report = check_data(cfg)
        assert not report.is_broken, report.table
        return
    folder = {"infer": Infer, "pseudo_masks": PseudoMasks}[script].run(cfg)
    assert ":" not in folder.name
    assert len(list(folder.glob("labels/**/*.png"))) == {"infer": 2, "pseudo_masks": 4}[script]
    measures = {name: read_json(folder / "results.json")[name] for name in ("miou", "pixel_accuracy")}
    assert measures["pixel_accuracy"] > 60
    # Label maps of background alone have one class of two or more right at best.
    assert measures["miou"] > 100 / len(CLASSES)


def test_a_bank_made_with_own_parts_is_opened_again(tmp_path: Path) -> None:
    arguments = [
        "proposer=flat_colours:FlatColours", "backbone=colour_statistics:ColourStatistics",
        "pseudo_masks=colour_words:ColourWords", "dataset.train=4", "dataset.val=1",
        f"runtime.outputs={tmp_path / 'outputs'}", "runtime.device=cpu", "evaluation.report=false",
    ]  # fmt: skip
    folder = Infer.run(compose(arguments))
    scene = render_scene(0, "val", 0)
    prediction = Segmenter.from_bank(folder, "cpu").predict(scene.image)
    stored = np.asarray(Image.open(sorted(folder.glob("labels/**/*.png"))[0]))
    assert np.array_equal(prediction.label_map, stored)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        pytest.param("proposer=nowhere:Thing", "found no module 'nowhere', expected nowhere.py in", id="module"),
        pytest.param("proposer=flat_colours:Other", "expected a subclass of Proposer in .*flat_col", id="class"),
        pytest.param("proposer=colour_words:ColourWords", "expected a subclass of Proposer", id="another kind"),
        pytest.param("proposer=time:Thing", "in the module 'time' of Python, whose name hides", id="hidden by Python"),
        pytest.param("proposer=moduseg.proposers.base:Proposer", "without propose, expected all", id="a method lacks"),
    ],
)  # fmt: skip
def test_a_part_that_cannot_be_used_is_named(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"proposer\.name: got .*{message}"):
        proposers.build(compose([argument]).proposer, CPU)


def test_keys_of_own_parts_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"proposer\.steps: unknown key, .*did you mean proposer\.step"):
        proposers.build(compose(["proposer=flat_colours:FlatColours", "proposer.steps=3"]).proposer, CPU)
    with pytest.raises(ConfigError, match="proposer: step: got 1, expected 2 to 128"):
        proposers.build(compose(["proposer=flat_colours:FlatColours", "proposer.step=1"]).proposer, CPU)
    with pytest.raises(ConfigError, match="retrieval: got 'flat_colours:FlatColours', expected a file of configs/"):
        compose(["retrieval=flat_colours:FlatColours"])
    check_names(["proposer=flat_colours:FlatColours", "proposer.anything=1"], config_dir())


def test_a_module_that_is_broken_shows_where(tmp_path: Path) -> None:
    (tmp_path / "broken_part.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        proposers.build({"name": "broken_part:Thing"}, CPU)


def test_tags_are_read_from_names(tmp_path: Path) -> None:
    draw_tagged_pictures(tmp_path / "pictures")
    cfg = compose(["dataset=tags_in_names:TagsInNames", f"dataset.root={tmp_path / 'pictures'}"])
    dataset = datasets.build(cfg.dataset, "val")
    for index, image_id in enumerate(sorted(dataset.ids, key=lambda name: name[-4:])):
        labels = dataset.labels_of(image_id)
        assert labels is not None
        assert [dataset.classes[label] for label in labels] == sorted(
            CLASSES[label] for label in render_scene(0, "val", index).labels
        )
