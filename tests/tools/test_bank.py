"""Finished banks on the command line: what is added, removed, joined and exported, and what is done with the result."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moduseg import Segmenter
from moduseg.bank.store import Bank
from moduseg.cli import entry
from moduseg.cli.commands import COMMANDS
from moduseg.cli.main import bind_command, to_exit_code
from moduseg.cli.options import parse
from moduseg.config import compose
from moduseg.config.stored import reconfigure
from moduseg.datasets.image_files import find_images
from moduseg.datasets.io import write_label_png
from moduseg.datasets.tagged_images import TaggedImages
from moduseg.errors import ArtefactError, ConfigError, DataError, MissingError, ModusegError
from moduseg.miniature.world.scenes import CLASSES
from moduseg.stages import evaluate
from moduseg.stages.build_bank import BuildBank
from moduseg.stages.infer import Infer
from moduseg.tools.bank import InfoOptions
from tests.support.runs import overrides
from tests.support.tagged_world import CLIP, NEW, ORACLE, holding, image_id, settings, write_folder

OLD = tuple(name for name in CLASSES if name != NEW)
LONGER = (*OLD, NEW)


def run_verb(verb: str, arguments: list[str]) -> int:
    """Return the exit code of `moduseg bank <verb>`; its errors are raised."""
    return to_exit_code(bind_command(COMMANDS[f"bank {verb}"], arguments)())


@pytest.fixture(scope="module")
def scenes() -> tuple[list[int], list[int]]:
    """Six scenes without the new class, three with it."""
    return holding(NEW, 6, yes=False), holding(NEW, 3)


def test_adding_equals_rebuilding(tmp_path: Path, scenes: tuple[list[int], list[int]]) -> None:
    """The same bytes where the batches hold the same images, the same vectors to rounding where they do not."""
    without, holders = scenes
    for name, source, count in (("oracle", ORACLE, 6), ("clip", CLIP, 6), ("odd", ORACLE, 5)):
        own, more, joint = (tmp_path / name / part for part in ("own", "more", "joint"))
        write_folder(own, without[:count], OLD)
        write_folder(more, holders, LONGER)
        write_folder(joint, without[:count] + holders, LONGER)
        outputs = tmp_path / name / "outputs"
        first = BuildBank.run(compose(settings(own, outputs, *source)))
        before = {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
        code = run_verb(
            "add",
            [
                f"bank={first}",
                f"images={more}",
                f"new={NEW}",
                f"out={tmp_path / name / 'longer'}",
                f"runtime.outputs={outputs}",
                "runtime.device=cpu",
                *([f"masks={more / 'masks'}"] if source is ORACLE else []),
            ],
        )
        assert code == 0
        added = Bank.load(tmp_path / name / "longer")
        rebuilt = Bank.load(BuildBank.run(compose(settings(joint, outputs, *source))))
        assert (added.image_ids, added.classes) == (rebuilt.image_ids, rebuilt.classes)
        for part in ("labels", "image_index", "areas"):
            assert torch.equal(getattr(added, part), getattr(rebuilt, part)), part
        assert NEW in added.classes
        assert added.counts[NEW] > 0
        if name == "odd":
            assert torch.allclose(added.pooled, rebuilt.pooled, atol=1e-5)
        else:
            whole = BuildBank.run(compose(settings(joint, outputs, *source)))
            assert (tmp_path / name / "longer" / "bank.safetensors").read_bytes() == (
                whole / "bank.safetensors"
            ).read_bytes()
        assert {p: p.read_bytes() for p in first.rglob("*") if p.is_file()} == before
        manifest = json.loads((tmp_path / name / "longer" / "manifest.json").read_text())
        assert manifest["derived_from"][0]["path"] == str(first)
        assert manifest["seconds"]["add"] > 0


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of a folder of twelve images with all classes, labelled by CLIP and superpixels."""
    root = tmp_path_factory.mktemp("bank")
    write_folder(root / "own", range(12), CLASSES)
    return BuildBank.run(compose(settings(root / "own", root / "outputs", *CLIP)))


def add(bank: Path, tmp_path: Path, *arguments: str) -> Bank:
    common = [
        f"bank={bank}",
        f"runtime.outputs={tmp_path / 'outputs'}",
        "runtime.device=cpu",
        f"out={tmp_path / 'new'}",
    ]
    assert run_verb("add", [*common, *arguments]) == 0
    return Bank.load(tmp_path / "new")


def paint(path: Path, label: int) -> None:
    """Write a label map whose left half is one class."""
    label_map = np.zeros((64, 64), dtype=np.uint8)
    label_map[:, :32] = label
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(write_label_png(label_map))


def test_images_of_a_new_class_by_its_name_alone(bank: Path, tmp_path: Path) -> None:
    """All images of a folder, sub-folders included, show what `new` names."""
    write_folder(tmp_path / "more", [30, 31])
    images = tmp_path / "more" / "images"
    (images / "trip").mkdir()
    (images / "scene031.png").rename(images / "trip" / "scene031.png")
    before = Bank.load(bank)
    for name in ("scene030", "trip/scene031"):
        paint(tmp_path / "given" / f"{name}.png", len(before.classes))
    got = add(bank, tmp_path, f"images={images}", "new=purple blob", f"masks={tmp_path / 'given'}")
    assert got.classes == (*before.classes, "purple blob")
    assert got.image_ids == (*before.image_ids, "scene030", "trip/scene031")
    assert torch.equal(got.pooled[: len(before)], before.pooled)
    assert set(got.labels[len(before) :].tolist()) <= {0, len(before.classes)}
    files = got.info["files"]
    assert Path(files["trip/scene031"]) == (images / "trip" / "scene031.png").resolve()
    Segmenter.from_bank(tmp_path / "new", device="cpu").predict(images / "scene030.png")


def test_given_masks_take_the_place_of_pseudo_masks(bank: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "more", [30])
    got = add(bank, tmp_path, f"images={tmp_path / 'more'}", f"masks={tmp_path / 'more' / 'masks'}", "prefix=later")
    assert got.image_ids[-1] == "later/scene030"
    pictures = list((tmp_path / "outputs" / "folder").glob("pseudo_masks/*/labels/later/*.png"))
    assert len(pictures) == 1
    from moduseg.datasets.io import read_label_png

    given = read_label_png(tmp_path / "more" / "masks" / "scene030.png")
    assert np.array_equal(read_label_png(pictures[0]), given)


def test_what_cannot_be_added_is_one_line(bank: Path, tmp_path: Path) -> None:
    more = write_folder(tmp_path / "more", [30, 31], masks=False)
    own = write_folder(tmp_path / "own", [30, 31])
    cam = BuildBank.run(compose(settings(own, tmp_path / "o", "pseudo_masks=cam", "proposer=superpixels")))
    oracle = BuildBank.run(compose(settings(own, tmp_path / "o", *ORACLE)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "tags.csv").write_text("image,labels\nnobody.png,red disc\n")
    images = f"images={more / 'images'}"
    for arguments, kind, message in (
        ([f"bank={cam}", f"images={more}", "prefix=x"], ConfigError, r"'cam' is fitted on all training images.*masks="),
        ([f"bank={oracle}", f"images={more}", "prefix=x"], ConfigError, r"masks: got none.*'ground_truth'"),
        (
            [f"bank={bank}", images, "tags=red dics"],
            ConfigError,
            r"'red dics'.*did you mean 'red disc'.*new='red dics'",
        ),
        ([f"bank={bank}", images], ConfigError, r"tags: got none, expected class names or a label file"),
        ([f"bank={bank}", images, "tags=red disc", "new=blob"], ConfigError, r"new: got 'blob', which no image"),
        ([f"bank={bank}", images, f"tags={tmp_path}/no.csv"], MissingError, r"tags: got .*no\.csv', no such file"),
        ([f"bank={bank}", images, f"tags={tmp_path}/tags.csv"], DataError, r"names none of the 2 images"),
        ([f"bank={bank}", f"images={tmp_path}/empty", "new=a"], MissingError, r"holds no image"),
        (
            [f"bank={bank}", f"images={tmp_path}/no", "new=a"],
            MissingError,
            r"images: got .*no', no such file or folder",
        ),
        ([f"bank={bank}", images, "new=a", "masks=nowhere"], MissingError, r"masks: got 'nowhere', no such folder"),
        ([f"bank={tmp_path}", images, "new=a"], ArtefactError, r"got no bank\.json"),
        ([f"bank={bank}", images, "new=a", "bank=b"], ConfigError, r"bank: given twice"),
        ([f"bank={bank}", images, "nwe=a"], ConfigError, r"nwe: unknown key of add.*did you mean new\?"),
        ([images], ConfigError, r"bank: missing; set bank=<value> for add"),
        ([f"bank={bank}", images, "new=a", "runtime.devise=cpu"], ConfigError, r"runtime\.devise: unknown key"),
    ):
        with pytest.raises(kind, match=message) as caught:
            run_verb("add", [*arguments, f"runtime.outputs={tmp_path / 'outputs'}"])
        assert "\n" not in str(caught.value)
    again = write_folder(tmp_path / "again", [3])
    with pytest.raises(ArtefactError, match=r"image 'scene003' is in the bank already.*prefix=<word>"):
        run_verb("add", [f"bank={bank}", f"images={again}", f"runtime.outputs={tmp_path / 'outputs'}"])


def test_another_generator_may_label_what_is_added(tmp_path: Path) -> None:
    own, more = write_folder(tmp_path / "own", range(4)), write_folder(tmp_path / "more", [30], masks=False)
    cam = BuildBank.run(compose(settings(own, tmp_path / "o", "pseudo_masks=cam", "proposer=superpixels")))
    got = add(cam, tmp_path, f"images={more}", "pseudo_masks=clip_dense")
    assert got.image_ids[-1] == "scene030"
    assert got.info["config"]["pseudo_masks"]["generator"]["name"] == "cam"


def test_a_class_called_like_a_background_word_is_warned_of(
    bank: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from moduseg.miniature.world.drawing import STUFF

    write_folder(tmp_path / "more", [30])
    with (
        caplog.at_level("WARNING", logger="moduseg"),
        pytest.raises(DataError, match=f"add: got no region of {STUFF[0]} in 1 images"),
    ):
        add(bank, tmp_path, f"images={tmp_path / 'more' / 'images'}", f"new={STUFF[0]}")
    assert f"the new class {STUFF[0]!r} is one of the background words" in caplog.text


def test_adding_says_how_many_regions_got_each_named_class(
    bank: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = write_folder(tmp_path / "more", [30, 31])
    before = Bank.load(bank)
    with caplog.at_level("INFO", logger="moduseg"):
        got = add(bank, tmp_path, f"images={more}", f"masks={more / 'masks'}")
    counts = {name: got.counts[name] - before.counts[name] for name in before.classes[1:]}
    said = ", ".join(f"{name}: {count}" for name, count in counts.items() if count)
    assert f"add: 2 images, {len(before)} + {len(got) - len(before)} vectors, {said}; " in caplog.text


def test_a_new_class_without_a_region_is_not_added(bank: Path, tmp_path: Path) -> None:
    more = write_folder(tmp_path / "more", [30])
    paint(tmp_path / "given" / f"{image_id(30)}.png", 1)
    given = f"masks={tmp_path / 'given'}"
    arguments = [f"bank={bank}", f"images={more / 'images'}", given, f"out={tmp_path / 'new'}"]
    with pytest.raises(DataError, match=r"add: got no region of blob in 1 images, expected one or more; look at"):
        run_verb("add", [*arguments, "new=blob", f"runtime.outputs={tmp_path / 'outputs'}"])
    assert not (tmp_path / "new").exists()


def test_a_new_class_that_the_bank_has_is_told(bank: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = write_folder(tmp_path / "more", [30]) / "images"
    before = Bank.load(bank)
    paint(tmp_path / "given" / f"{image_id(30)}.png", 1)
    with caplog.at_level("WARNING", logger="moduseg"):
        got = add(bank, tmp_path, f"images={images}", f"masks={tmp_path / 'given'}", f"new={before.classes[1]}")
    assert f"add: new={before.classes[1]} is a class of the bank already" in caplog.text
    assert (got.classes, got.counts[got.classes[1]]) == (before.classes, before.counts[got.classes[1]] + 1)


@pytest.mark.parametrize("kind", ["other files", "a file", "the bank itself"])
def test_out_is_checked_before_any_image(
    bank: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = write_folder(tmp_path / "more", [30])
    out = {"other files": more, "a file": tmp_path / "file", "the bank itself": bank}[kind]
    (tmp_path / "file").touch()
    monkeypatch.setattr(BuildBank, "run", lambda *_: pytest.fail("images were processed"))
    with pytest.raises(ArtefactError, match=r"set out=<new folder>"):
        run_verb("add", [f"bank={bank}", f"images={more}", f"out={out}", f"runtime.outputs={tmp_path / 'outputs'}"])


def test_an_image_that_cannot_be_read_is_recorded(bank: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "more", [30, 31])
    broken = tmp_path / "more" / "images" / "scene031.png"
    broken.write_bytes(broken.read_bytes()[:100])
    code = run_verb(
        "add",
        [f"bank={bank}", f"images={tmp_path / 'more'}", f"out={tmp_path / 'new'}", f"runtime.outputs={tmp_path / 'o'}"],
    )
    assert code == 1
    got = Bank.load(tmp_path / "new")
    assert got.image_ids[-2:] == ("scene030", "scene031")
    assert len(got.image_ids) - 1 not in got.image_index.tolist()


def test_info_remove_merge_and_export_on_the_command_line(
    bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr("sys.argv", ["moduseg", "bank", *arguments])
        with pytest.raises(SystemExit) as ended:
            entry()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    stored = Bank.load(bank)
    code, out, _ = run("info", f"bank={bank}")
    assert code == 0
    assert f"{len(stored)} vectors of 128 numbers from 12 images of folder train, 13 classes" in out
    assert "| background" in out
    assert re.search(r"^- Of \d+ regions, \d+ \(\d+ %\) are nearest to one of their own class", out, re.MULTILINE)
    code, out, _ = run("info", f"bank={bank}", "class=background", "json=true")
    regions = json.loads(out)
    assert sorted(r["row"] for r in regions) == torch.nonzero(stored.labels == 0).flatten().tolist()
    code, out, _ = run("info", f"bank={bank}", "json=true")
    assert [c["vectors"] for c in json.loads(out)["classes"]] == list(stored.counts.values())
    assert json.loads(out)["told_apart"][0].startswith("Of ")

    shown = next(name for name, count in stored.counts.items() if count > 1 and name != "background")
    left = tmp_path / "left"
    code, out, _ = run("remove", f"bank={bank}", f"class={shown}", f"image={image_id(0)};{image_id(1)}", f"out={left}")
    assert (code, str(left) in out) == (0, True)
    got = Bank.load(left)
    assert shown not in got.classes
    assert image_id(0) not in got.image_ids
    region = f"region={image_id(2)}:background;{len(stored) - 1}"
    code, out, _ = run("remove", f"bank={bank}", region, f"runtime.outputs={tmp_path}")
    removed = next((tmp_path / "folder" / "bank").iterdir())
    assert len(Bank.load(removed)) == len(stored) - 2
    assert f"outputs/<dataset>/bank/{removed.name.rpartition('-')[0]}-<key>/" in COMMANDS["bank remove"].writes
    code, _, err = run("remove", f"bank={bank}", "region=nobody:background")
    assert code == 2
    assert err.startswith("moduseg: error: region: got 'nobody:background', expected a row")
    code, _, err = run("remove", f"bank={bank}")
    assert "nothing to remove, expected class=<name>, image=<id> or region=<row>" in err

    code, _, err = run("merge", f"banks=[{bank},{left}]")
    assert (code, "is in two banks" in err) == (2, True)
    code, _, _ = run("merge", f"banks=[{bank},{left}]", "prefix=true", f"out={tmp_path / 'both'}")
    both = Bank.load(tmp_path / "both")
    assert len(both) == len(stored) + len(got)
    assert both.image_ids[0] == f"{bank.name}/{image_id(0)}"
    assert both.image_ids[-1] == f"left/{image_id(11)}"
    code, _, err = run("merge", f"banks={bank}")
    assert "banks: got 1 folder, expected two or more" in err

    code, out, _ = run("export", f"bank={bank}", f"out={tmp_path / 'e'}", "outliers=false")
    assert code == 0
    with np.load(tmp_path / "e" / "bank.npz") as arrays:
        assert len(arrays["vectors"]) == len(stored)
    for arguments, message in (
        (["export", f"bank={bank}", "out=x", "format=xml"], r"format: got 'xml' (str), expected one of npz, faiss"),
        (["show"], "bank: got 'show', expected one of info, add, remove, merge, apply, export"),
        ([], "bank: got 'nothing', expected one of"),
        (["info", f"bank={bank}", "json=maybe"], "json: got 'maybe' (str), expected true or false"),
        (["info", f"bank={bank}", "class=bird"], "class: got 'bird', expected one of background"),
        (["info", f"bank={bank}", "quick"], "info: got 'quick', expected key=value"),
    ):
        code, _, err = run(*arguments)
        assert (code, message in err, err.count("\n")) == (2, True, 1), err


def test_infer_and_evaluate_use_the_bank_that_is_named(tmp_path: Path) -> None:
    """A bank with fewer classes, in another order, serves the data set; keys of the default are as they were."""
    base = overrides(tmp_path, train=8, val=4)
    whole = Infer.run(compose(base))
    first = BuildBank.run(compose(base))
    stored = Bank.load(first)
    gone = next(name for name, count in stored.counts.items() if count and name != "background")
    run_verb("remove", [f"bank={first}", f"class={gone}", f"out={tmp_path / 'fewer'}"])
    named = Infer.run(compose([*base, f"bank.path={tmp_path / 'fewer'}"]))
    assert named != whole
    results = json.loads((named / "results.json").read_text())
    assert results["classes"] == list(CLASSES)
    label = CLASSES.index(gone)
    from moduseg.datasets.io import read_label_png

    assert all(label not in read_label_png(p) for p in (named / "labels").iterdir())
    # All of the bank, named, gives the same label maps as the bank that was built.
    run_verb(
        "merge",
        [f"banks={tmp_path / 'fewer'};{_only(first, gone, tmp_path)}", f"out={tmp_path / 'again'}"],
    )
    again = Infer.run(compose([*base, f"bank.path={tmp_path / 'again'}", "bank.outliers.enabled=false"]))
    plain = Infer.run(compose([*base, "bank.outliers.enabled=false"]))
    for path in (plain / "labels").iterdir():
        assert np.array_equal(read_label_png(path), read_label_png(again / "labels" / path.name))
    assert Infer.run(compose(base)) == whole
    scored = evaluate.run(compose([*base, f"bank.path={tmp_path / 'fewer'}"]))
    record = json.loads((scored / "results.json").read_text())
    assert record["pseudo_masks"] is None
    assert gone not in record["bank"]["vectors"]
    for path, more, message in (
        (tmp_path, (), r"bank\.path: got .*expected a folder with bank\.json"),
        (
            tmp_path / "fewer",
            ("bank.aggregation=hard",),
            r"bank\.aggregation=soft, got hard; set bank\.aggregation=soft",
        ),
    ):
        with pytest.raises(ArtefactError, match=message):
            Infer.run(compose([*base, f"bank.path={path}", *more]))


def _only(folder: Path, name: str, tmp_path: Path) -> Path:
    """The regions of one class, under image ids of their own."""
    from moduseg.bank import edit

    bank = Bank.load(folder)
    rows = [i for i, label in enumerate(bank.labels.tolist()) if bank.classes[label] != name]
    only = edit.prefix_images(edit.remove(bank, rows=rows), "only")
    only.save(tmp_path / "only")
    return tmp_path / "only"


def test_tagged_images_keep_the_contract_of_data_sets(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "own", [0, 1])
    files = find_images([root / "images"])
    assert list(files) == [image_id(0), image_id(1)]
    dataset = TaggedImages("pets", "added", classes=CLASSES, files=files, tags={image_id(0): (1, 2)})
    assert dataset.load(image_id(0)).labels == (1, 2)
    assert dataset.load(image_id(1)).labels is None
    assert (dataset.label_source, dataset.has_truth, dataset.name) == ("tags", False, "pets")
    other = TaggedImages("pets", "added", classes=CLASSES, files=files, tags={image_id(0): (1, 3)})
    assert other.fingerprint() != dataset.fingerprint()
    masks = {i: root / "masks" / f"{i}.png" for i in files}
    with_truth = TaggedImages("pets", "added", classes=CLASSES, files=files, tags={}, masks=masks)
    assert with_truth.has_truth
    assert with_truth.load(image_id(0), truth=True).semantic is not None
    with pytest.raises(DataError, match="not in split"):
        dataset.image_path("nobody")
    single = find_images([root / "images" / f"{image_id(1)}.png"])
    assert list(single) == [image_id(1)]
    with pytest.raises(DataError, match=r"got image id 'scene000' twice"):
        find_images([root / "images", root / "masks"])
    with pytest.raises(DataError, match=r"labels\.csv, expected a file that ends in"):
        find_images([root / "labels.csv"])


def test_stored_configurations_take_overrides(bank: Path) -> None:
    stored = Bank.load(bank).info["config"]
    cfg = reconfigure(stored, ["retrieval.top_k=7", "proposer=ground_truth", "bank.outliers.enabled=false"])
    assert (cfg.retrieval.top_k, cfg.proposer["name"], cfg.bank.outliers.enabled) == (7, "ground_truth", False)
    assert reconfigure(stored, ["retrieval=paper", "retrieval.top_k=3"]).retrieval.top_k == 3
    assert reconfigure(stored, []).as_dict()["retrieval"] == stored["retrieval"]
    for override, message in (
        ("retrieval.topk=3", r"retrieval\.topk: unknown key; did you mean retrieval\.top_k"),
        ("retrieval.top_k=many", r"retrieval\.top_k: got 'many'"),
        ("proposer=nothing", r"nothing"),
    ):
        with pytest.raises(ModusegError, match=message):
            reconfigure(stored, [override])
    with pytest.raises(ConfigError, match=r"pets: unknown key of info.*group of the configuration"):
        parse(["pets=1"], InfoOptions, "info")


def test_the_script_runs(bank: Path) -> None:
    script = Path(__file__).parents[2] / "scripts" / "bank.py"
    done = subprocess.run(
        [sys.executable, str(script), "info", f"bank={bank}"], capture_output=True, text=True, check=True
    )
    assert "13 classes" in done.stdout
