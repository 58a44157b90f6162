"""Every shipped configuration composes and builds; every mistake is one line."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir

from moduseg.config import compose, config_dir
from moduseg.config.overrides import keys_of_group
from moduseg.errors import ConfigError, ModusegError
from moduseg.pipeline.workspace import Workspace
from moduseg.studies.ablate import load_table

GROUPS = (
    "dataset", "proposer", "backbone", "pseudo_masks", "tagger", "bank", "retrieval", "evaluation", "runtime",
    "experiment", "student",
)  # fmt: skip
FILES = [(g, p.stem) for g in GROUPS for p in sorted((config_dir() / g).glob("*.yaml"))]
TABLES = sorted(p.stem for p in (config_dir() / "table").glob("*.yaml"))


def test_every_group_has_files() -> None:
    assert {g for g, _ in FILES} == set(GROUPS)
    assert TABLES


@pytest.mark.parametrize(("group", "name"), FILES, ids=[f"{g}={n}" for g, n in FILES])
def test_every_file_composes_and_builds(group: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends check their arguments when they are built; no model is loaded and no image is read."""
    monkeypatch.setenv("MODUSEG_PROPOSALS", str(tmp_path))
    monkeypatch.setenv("MODUSEG_PSEUDO_MASKS", str(tmp_path))
    monkeypatch.chdir(Path(__file__).parents[2])
    work = Workspace(
        compose(
            [f"{group}={name}", "runtime.device=cpu", "dataset.train=2", "dataset.val=1"][
                : 2 + 2 * (group not in ("dataset", "experiment"))
            ]
        )
    )
    assert work.proposer is not None
    assert work.backbone is not None
    assert work.dataset(work.eval_split).name
    assert group != "tagger" or work.tagger is not None
    assert work.cfg.as_dict()["runtime"]["device"] == "cpu"


def test_a_launcher_of_job_arrays_composes() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed")
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        cfg = hydra_compose(
            "config",
            ["hydra/launcher=submitit_slurm", "hydra.launcher.gpus_per_node=1", "runtime.shard.count=8"],
            return_hydra_config=True,
        )
    assert cfg.hydra.launcher.gpus_per_node == 1
    assert cfg.runtime.shard.count == 8


@pytest.mark.parametrize("name", TABLES)
def test_every_table_composes(name: str) -> None:
    table = load_table(name)
    for options in itertools.chain(table.axes.values()):
        for overrides in options.values():
            runs = overrides if overrides and isinstance(overrides[0], list) else [overrides]
            for run in runs:
                compose([*table.base, *run])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["retrieval.topk=3"], r"topk.*unknown key"),
        (["retrieval.top_k=many"], r"retrieval\.top_k: got 'many' \(str\), expected a whole number"),
        (["retrieval.top_k=0"], r"top_k: got 0, expected 1 to"),
        (["retrieval.nms_iou=1.5"], r"nms_iou: got 1\.5, expected 0 to 1"),
        (["retrieval.engine=fast"], r"retrieval\.engine: got 'fast'.*one of exact, faiss"),
        (["retrieval.min_object_area=-1"], r"retrieval: min_object_area: got -1, expected 0 to .*0 keeps every object"),
        (["retrieval.max_hole_area=-1"], r"retrieval: max_hole_area: got -1.*0 leaves holes open"),
        (["retrieval.smoothing_radius=101"], r"retrieval: smoothing_radius: got 101, expected 0 to 100"),
        (["retrieval.storage=int8"], r"retrieval\.storage: got 'int8'.*one of float32, float16"),
        (
            ["retrieval.selection=best"],
            r"retrieval\.selection: got 'best'.*one of nms, nms_quality, margin, similarity",
        ),
        (["retrieval.vote_balance=fair"], r"vote_balance: got 'fair'.*one of none, cap, distance"),
        (["bank.prototypes=0"], r"prototypes: got 0, expected 1 to"),
        (["bank.purify.kernel_size=4"], r"kernel_size: got 4, expected an odd number"),
        (["bank.aggregation=firm"], r"bank\.aggregation: got 'firm'.*one of soft, hard"),
        (["bank.outliers.drop_ratio=1"], r"drop_ratio: got 1\.0, expected 0 <= ratio < 1"),
        (["proposer=sum"], r"proposer=sum: no such file.*did you mean sam"),
        (["proposer=superpixels", "+proposer.scal=[1]"], r"proposer\.scal: unknown key.*did you mean proposer\.scales"),
        (["backbone=miniature_random", "backbone.model=no_such_model"], r"no_such_model"),
        (["dataset.seed=zero"], r"dataset\.seed: got 'zero'"),
        (["+extra=1"], r"extra: unknown key"),
        (["pseudo_masks.background.rule=magic"], r"rule: got 'magic'.*one of"),
        (["runtime.device=gpu"], r"runtime\.device: got 'gpu'"),
        (["runtime.batch_size=0"], r"batch_size: got 0"),
        (["evaluation.boundary_width=2"], r"boundary_width: got 2\.0, expected 0 to 0\.5"),
        (["evaluation.uncovered=maybe"], r"evaluation\.uncovered: got 'maybe'.*one of wrong, ignore"),
        (["evaluation.workers=-1"], r"workers: got -1, expected 0 to 256"),
    ],
)
def test_mistakes_are_one_line(overrides: list[str], message: str) -> None:
    def build() -> None:
        work = Workspace(compose(overrides))
        assert work.proposer
        assert work.dataset("train")
        assert work.backbone.dim
        assert work.generator

    with pytest.raises(ModusegError, match=message) as caught:
        build()
    assert "Traceback" not in str(caught.value)


def test_later_settings_at_default_leave_keys_alone() -> None:
    parts = compose().retrieval.key_parts()
    assert {"engine", "storage", "min_object_area", "max_hole_area", "smoothing_radius", "confidence"}.isdisjoint(parts)
    assert parts["top_k"] == 5
    changed = compose(["retrieval.engine=faiss", "retrieval.storage=float16"]).retrieval.key_parts()
    assert changed == {**parts, "engine": "faiss", "storage": "float16"}
    tidied = compose(["retrieval.min_object_area=50", "retrieval.smoothing_radius=2"]).retrieval.key_parts()
    assert tidied == {**parts, "min_object_area": 50, "smoothing_radius": 2}


def test_an_unknown_table_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"table: got 'nope', expected one of .*coco150"):
        load_table("nope")


@pytest.mark.parametrize("path", sorted((config_dir() / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_experiments_set_no_key_of_one_choice(path: Path) -> None:
    """Any part of an experiment may be switched: it sets keys only of groups whose files all have the same keys."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert all(keys_of_group(group) for group in content if group != "defaults")


@pytest.mark.parametrize("backbone", ["mobilenetv2", "dinov2_vits14", "clip_miniature"])
def test_backbone_of_an_experiment_is_switched(backbone: str, tmp_path: Path) -> None:
    cfg = compose(["experiment=folder", f"backbone={backbone}", f"dataset.root={tmp_path}"])
    assert cfg.backbone == compose([f"backbone={backbone}"]).backbone
    assert Workspace(cfg).backbone is not None


def test_experiment_coco150_keeps_its_backbone() -> None:
    expected = compose(["backbone=mobilenetv2_scales", "backbone.context=0.7"]).backbone
    assert compose(["experiment=coco150"]).backbone == expected
