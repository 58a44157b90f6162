"""The paper's tables: every row is a configuration, every published figure is the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moduseg import discovery
from moduseg.config import Config, compose, config_dir
from moduseg.errors import ConfigError
from moduseg.studies.ablate import load_table
from moduseg.studies.paper_tables import BASE, ORIENTATION, load_paper_table, merge, pick
from tests.support.devices import CPU

TABLES = sorted(path.stem for path in (config_dir() / "reproduce").glob("*.yaml"))
DATASETS = (
    "voc", "coco", "ade20k", "cityscapes", "miniature", "voc21", "context60", "coco_object", "voc20", "context59",
    "coco_stuff", "cityscapes27", "coco_stuff27",
)  # fmt: skip
NAMES = {"voc21": "voc", "voc20": "voc", "context60": "context", "context59": "context"}
"""Names of data sets that tables call by their protocol."""
OPEN_ROWS = (
    "CLIP B/16", "SCLIP", "ClearCLIP", "NACLIP", "NACLIP + PAMR", "ProxyCLIP", "Trident B", "CorrCLIP, SAM 2",
    "CorrCLIP, EntitySeg", "CorrCLIP v2, COCO bank", "SAM 3", "ActiveSAM", "DiffSegmenter", "iSeg",
)  # fmt: skip


def list_open(*figures: float) -> dict[str, float]:
    """The figures of one protocol, in the order of `OPEN_ROWS`; the last two rows may have none."""
    return dict(zip(OPEN_ROWS, figures, strict=False))


# Data set -> row -> figure, as published (mIoU in percent).
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "main": {
        "voc": {
            "EntitySeg": 86.3, "EntitySeg, published pseudo masks": 86.3, "SAM ViT-H": 86.3,
            "SAM ViT-H, published pseudo masks": 86.3, "CD-CLIP (CVPR 26)": 82.5, "SSR (AAAI 26)": 79.5,
            "VPL (CVPR 25)": 79.3, "ExCEL (CVPR 25)": 78.4, "S2C (CVPR 24)": 78.2, "WeCLIP (CVPR 24)": 76.4,
            "MoRe": 76.4,
        },
        "coco": {
            "EntitySeg": 56.7, "EntitySeg, published pseudo masks": 56.7, "SAM ViT-H": 56.7,
            "SAM ViT-H, published pseudo masks": 56.7, "CD-CLIP (CVPR 26)": 54.1, "SSR (AAAI 26)": 50.6,
            "VPL (CVPR 25)": 49.8, "ExCEL (CVPR 25)": 50.3, "WeCLIP (CVPR 24)": 47.1, "MoRe": 47.4,
        },
        "ade20k": {"SAM ViT-H": 44.7},
        "cityscapes": {"SAM ViT-H": 66.0},
    },
    "ablation_modules": {"voc": {"baseline": 84.3, "+ SMFA": 84.6, "+ SBP": 85.2, "both": 86.3}},
    "ablation_backbone": {
        "voc": {"DINOv2-B": 82.9, "DINOv3-B": 84.7, "DINOv3-L": 85.3, "C-RADIOv4-SO400M": 86.3},
        "coco": {"DINOv2-B": 51.0, "DINOv3-B": 53.5, "DINOv3-L": 55.8, "C-RADIOv4-SO400M": 56.7},
    },
    "ablation_proposer": {"voc": {"EntitySeg": 86.3, "SAM 2": 82.6}},
    "ablation_oracles": {
        "voc": {
            "neither": 86.3, "ground-truth masks for the bank": 86.7, "ground-truth masks as proposals": 95.7,
        },
    },
    "ablation_images": {"voc": {"20": 69.8, "50": 80.2, "all": 86.3}},
    "ablation_pseudo_masks": {
        "voc": {
            "CorrCLIP, no label filter": 68.7, "CorrCLIP, label filter": 78.8, "CorrCLIP, published masks": 78.8,
            "Mask Adapter, no label filter": 76.6, "Mask Adapter, label filter": 82.4,
        },
        "coco": {
            "CorrCLIP, no label filter": 42.5, "CorrCLIP, label filter": 54.6, "CorrCLIP, published masks": 54.6,
            "Mask Adapter, no label filter": 55.1, "Mask Adapter, label filter": 60.2,
        },
    },
    "ablation_train_split": {"voc": {"train": 86.3, "train_aug": 86.3}},
    "students": {
        "voc": {
            "DiffSegmenter, DeepLabV3-R101": 69.1, "CLIP-ES, DeepLabV2-R101": 71.1, "token masking, ViT-B": 72.7,
        },
    },
    "iseg_main": {"voc": {"iSeg": 75.2}, "coco": {"iSeg": 45.5}},
    "iseg_modules": {
        "voc": {"neither": 68.2, "entropy reduction": 72.0, "both": 75.2},
        "coco": {"neither": 40.1, "entropy reduction": 42.5, "both": 45.5},
    },
    "iseg_iterations": {
        "voc": {"1": 71.0, "2": 72.9, "4": 74.5, "6": 75.0, "8": 75.1, "10": 75.2, "12": 74.9},
    },
    "iseg_lambda": {
        "voc": {"0": 69.1, "0.001": 74.3, "0.005": 75.0, "0.01": 75.2, "0.05": 74.6, "0.1": 74.1},
    },
    "iseg_gamma": {"voc": {"1": 72.0, "1.2": 73.6, "1.4": 74.7, "1.6": 75.2, "1.8": 75.2, "2": 74.9}},
    "iseg_cross_level": {"voc": {"16": 74.8, "32": 56.9, "both": 75.2}},
    "iseg_self_layer": {"voc": {"-3": 68.5, "-2": 71.1, "-1": 75.2}},
    "iseg_timestep": {"voc": {"1": 73.2, "50": 74.6, "100": 75.2, "150": 74.5, "200": 74.3}},
    "diffsegmenter_main": {"voc": {"DiffSegmenter": 70.49}},
    "diffsegmenter_ablation": {
        "voc": {
            "cross-attention alone": 61.25, "+ all self-attention": 65.01,
            "+ self-attention of the largest size": 67.89, "size weights": 65.32, "captions": 67.99, "++": 69.46,
            "everything": 70.49,
        },
    },
    "diffsegmenter_timesteps": {"voc": {"1": 69.1, "50": 69.94, "100": 70.3, "150": 69.69, "mean": 70.49}},
    "token_masking_main": {
        "voc": {"token masking": 74.5, "MCTformer+": 68.8}, "coco": {"token masking": 43.2},
    },
    "token_masking_ablation": {
        "voc": {"everything": 74.5, "no masking": 71.6, "no register": 72.3, "no pruning": 72.0},
        "coco": {"everything": 43.2, "no masking": 41.9, "no register": 42.8, "no pruning": 41.7},
    },
    "sweep_erosion": {"voc": {"20": 86.3}, "coco": {"20": 56.7}},
    "sweep_top_k": {"voc": {"25": 86.3}, "coco": {"25": 56.7}},
    "sweep_drop_ratio": {"voc": {"0.25": 86.3}, "coco": {"0.25": 56.7}},
    "sweep_nms": {"voc": {"0.4": 86.3}, "coco": {"0.4": 56.7}},
    "sweep_min_area": {"voc": {"300": 86.3}, "coco": {"300": 56.7}},
    "unsupervised": {
        "cityscapes27": {"DiffSeg": 21.2, "iSeg": 25.0, "iSeg, no entropy reduction": 22.8},
        "coco_stuff27": {"DiffSeg": 43.6, "iSeg": 45.2, "iSeg, no entropy reduction": 44.4},
    },
    "open_vocabulary": {
        "voc21": list_open(18.6, 59.1, 51.8, 58.9, 64.1, 61.3, 67.1, 74.8, 76.2, 82.2, 81.9, 83.8, 60.1, 68.2),
        "context60": list_open(7.8, 30.4, 32.6, 32.2, 35.0, 35.3, 38.6, 44.2, 45.7, 50.8, 46.1, 55.4, 27.5, 30.9),
        "coco_object": list_open(6.5, 30.5, 33.0, 33.2, 36.2, 37.5, 41.1, 43.7, 44.5, 54.6, 65.4, 72.0, 37.9, 38.4),
        "voc20": list_open(49.1, 80.4, 80.9, 79.7, 83.0, 80.3, 84.5, 88.8, 89.6, 93.6, 88.9, 97.0),
        "context59": list_open(11.2, 34.1, 35.9, 35.2, 38.4, 39.1, 42.2, 48.8, 50.7, 56.3, 50.0, 60.1),
        "coco_stuff": list_open(7.2, 22.4, 23.9, 23.3, 25.7, 26.5, 28.3, 31.6, 32.4, 38.5, 33.3, 44.4),
        "cityscapes": list_open(6.7, 32.2, 30.0, 35.5, 38.3, 38.1, 42.9, 49.4, 51.6, 58.7, 62.3, 69.7),
        "ade20k": list_open(3.2, 16.1, 16.7, 17.4, 19.1, 20.2, 21.9, 26.9, 28.6, 33.2, 31.8, 40.0),
    },
}  # fmt: skip


def test_every_table_is_checked() -> None:
    assert set(TABLES) == set(PUBLISHED)


@pytest.mark.parametrize("name", TABLES)
def test_published_figures_are_the_papers(name: str) -> None:
    table = load_paper_table(name)
    for dataset in (name for name in DATASETS if name != "miniature"):
        value_by_row = {row: figure.value for row in table.rows if (figure := table.figure_of(row, dataset))}
        runnable = set(table.names(dataset)) | {row for row in table.rows if table.rows[row].is_quoted}
        shown = {row: value for row, value in value_by_row.items() if row in runnable}
        assert shown == PUBLISHED[name].get(dataset, {})
    assert table.published_on == [d for d in DATASETS if d in PUBLISHED[name]]


@pytest.mark.parametrize("name", TABLES)
def test_every_row_composes(name: str) -> None:
    """Rows of one table differ from each other; what COCO shares with VOC is composed on VOC alone."""
    table = load_paper_table(name)
    first = ORIENTATION[table.stage]
    assert {first, "miniature"} <= set(table.datasets) <= set(BASE)
    for dataset in table.datasets:
        coco_rows = [row for row in table.names(dataset) if getattr(table.rows[row], dataset) is not None]
        rows = table.names(dataset) if dataset in (first, "miniature") else coco_rows or table.names(dataset)[:1]
        configurations = [compose(table.runs(row, dataset, 1)[0]).as_dict() for row in rows]
        assert all(configurations.count(one) == 1 for one in configurations)
        assert {one["dataset"]["name"] for one in configurations} == {NAMES.get(dataset, dataset)}


def full(table: str, row: str, *overrides: str, dataset: str = "voc") -> Config:
    return compose(load_paper_table(table).runs(row, dataset, 1, overrides)[0])


def test_the_papers_settings_are_in_the_experiments() -> None:
    for name, dataset, words, val in (
        ("voc", "voc", "voc", "val"),
        ("coco", "coco", "coco", "val"),
        ("ade20k", "ade20k", "none", "val"),
        ("cityscapes", "cityscapes", "none", "val"),
    ):
        cfg = compose([f"experiment={name}"])
        bank, retrieval, generator = cfg.bank, cfg.retrieval, cfg.pseudo_masks.generator
        assert (cfg.dataset["name"], cfg.dataset["train_split"], cfg.dataset["val_split"]) == (dataset, "train", val)
        assert cfg.dataset.get("year", 2014) == 2014
        assert (bank.purify.enabled, bank.purify.kernel_size, bank.purify.iterations) == (True, 3, 20)
        assert (bank.min_area, bank.aggregation, bank.centre) == (300, "soft", False)
        assert (bank.outliers.enabled, bank.outliers.drop_ratio, bank.outliers.drop_ratio_background) == (True, 0.25, 0)
        assert (retrieval.top_k, retrieval.nms_iou, retrieval.min_area) == (25, 0.4, 300)
        assert retrieval.vote_temperature is None
        assert cfg.backbone["model"] == "naflexvit_so400m_patch16_radio_v4.c_radio"
        assert (cfg.proposer["name"], cfg.proposer["model"]) == ("sam", "vit_h")
        assert (generator["name"], generator["class_words"], generator["background_words"]) == ("corrclip", name, words)
        assert (generator["short_side"], generator["filter_labels"], generator["min_area"]) == (None, True, 0)
        assert cfg.pseudo_masks.refine == "region_vote"


@pytest.mark.parametrize("name", ["voc_entityseg", "coco_entityseg"])
def test_entityseg_has_two_thresholds(name: str) -> None:
    cfg = compose([f"experiment={name}"])
    assert cfg.proposer["name"] == "files"
    assert (cfg.pseudo_masks.generator["min_score"], cfg.pseudo_masks.vote_min_score) == (0.5, 0.5)
    assert (cfg.retrieval.min_predicted_iou, cfg.retrieval.min_area) == (0.6, 300)
    assert (cfg.pseudo_masks.generator["class_words"], cfg.dataset["name"]) == (cfg.dataset["name"],) * 2


def test_rows_are_what_their_names_say() -> None:
    assert full("ablation_modules", "baseline").bank.aggregation == "hard"
    assert not full("ablation_modules", "baseline").bank.purify.enabled
    assert full("ablation_modules", "+ SMFA").bank.aggregation == "soft"
    assert not full("ablation_modules", "+ SMFA").bank.purify.enabled
    assert full("ablation_modules", "+ SBP").bank.aggregation == "hard"
    assert full("ablation_modules", "+ SBP").bank.purify.enabled
    assert full("ablation_modules", "both").as_dict() == compose(["experiment=voc"]).as_dict()
    assert "hiera" in full("ablation_proposer", "SAM 2").proposer["weights"]
    assert full("ablation_proposer", "EntitySeg").retrieval.min_predicted_iou == 0.6
    assert "dinov2" in full("ablation_backbone", "DINOv2-B", dataset="coco").backbone["model"]
    assert not full("ablation_pseudo_masks", "CorrCLIP, no label filter").pseudo_masks.generator["filter_labels"]
    assert full("ablation_images", "50").bank.images_per_class == 50
    assert full("ablation_images", "all").dataset["train_split"] == "train_aug"
    bound = full("ablation_oracles", "ground-truth masks as proposals")
    assert bound.proposer["name"] == "ground_truth"
    assert bound.train_proposer is not None
    assert bound.train_proposer["model"] == "vit_h"
    assert full("ablation_oracles", "ground-truth masks for the bank").pseudo_masks.generator["name"] == "ground_truth"


def test_mask_adapters_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODUSEG_MASK_ADAPTER", "there")
    assert full("ablation_pseudo_masks", "Mask Adapter, label filter").pseudo_masks.generator["folder"] == "there"


def test_the_users_overrides_change_what_the_row_is_not_about() -> None:
    cfg = full("ablation_backbone", "DINOv2-B", "experiment=voc_entityseg", "backbone=dinov3_vitl16", "bank.min_area=7")
    assert cfg.proposer["name"] == "files"
    assert "dinov2" in cfg.backbone["model"]
    assert cfg.bank.min_area == 7


def test_seeds() -> None:
    table = load_paper_table("ablation_images")
    assert [run[-1] for run in table.runs("3", "miniature", 2)] == ["dataset.seed=0", "dataset.seed=1"]
    assert [run[-1] for run in table.runs("20", "voc", 2)] == ["bank.images_seed=0", "bank.images_seed=1"]
    modules = load_paper_table("ablation_modules")
    assert len(modules.runs("both", "voc", 3)) == 1
    assert modules.runs("both", "miniature", 1, ["dataset.seed=5"]) == [["dataset.seed=5"]]


def test_merge_and_pick() -> None:
    assert merge(["a=1", "b=2"], ["c=3", "a=4"], ["+b=5"]) == ["c=3", "a=4", "+b=5"]
    assert merge(["a=b=c"], ["a=d=e"]) == ["a=d=e"]
    value = {"full": 1, "coco": 2, "miniature": 3}
    assert [pick(value, d) for d in DATASETS[:5]] == [1, 2, None, None, 3]
    assert pick("same", "voc") == "same"
    assert pick(None, "voc") is None


GOOD: dict[str, Any] = {"title": "T", "published": "ablation", "rows": {"both": {"all": []}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"published": "nothing"}, r"table bad: published: got 'nothing', expected one of main, "),
        ({"figure": "recall"}, r"figure: got 'recall', expected one of mIoU, pseudo-mask mIoU"),
        ({"columns": ["speed"]}, r"columns: got 'speed', expected some of mIoU"),
        ({"reference": "neither"}, r"reference: got 'neither', expected a row of voc: both"),
        ({"seeds": 0}, r"seeds: got 0, expected 1 or more"),
        ({"base": {"vox": []}}, r"base: got 'vox', expected some of full, voc"),
        ({"notes": {"vox": []}}, r"notes: got 'vox', expected some of full, voc"),
        ({"rows": {}}, r"rows: got none"),
        ({"rows": ["both"]}, r"table bad\.rows: got \['both'\], expected name -> row"),
        ({"rows": {"both": {}}}, r"rows\.both: got neither overrides nor a published figure"),
        ({"rows": {"both": {"all": "x"}}}, r"table bad\.rows\.both\.all: got 'x'"),
        ({"rows": {"both": {"vox": []}}}, r"table bad\.rows\.both\.vox: unknown key.*did you mean .*voc"),
        ({"rows": {"both": {"all": [], "published": "sum"}}}, r"rows\.both\.published: got 'sum', expected one of "),
        ({"rows": {"both": {"all": [], "published": {"full": "sum"}}}}, r"published: got 'sum'"),
        ({"axes": {}}, r"table bad\.axes: unknown key"),
    ],
)
def test_mistakes_in_a_table(
    change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omegaconf import OmegaConf

    (tmp_path / "reproduce").mkdir()
    monkeypatch.setattr("moduseg.studies.ablate.config_dir", lambda: tmp_path)
    OmegaConf.save(OmegaConf.create(GOOD), tmp_path / "reproduce" / "bad.yaml")
    assert load_paper_table("bad").names("voc") == ["both"]
    OmegaConf.save(OmegaConf.create({**GOOD, **change}), tmp_path / "reproduce" / "bad.yaml")
    with pytest.raises(ConfigError, match=message):
        load_paper_table("bad")


def test_a_table_of_the_other_command_is_pointed_to() -> None:
    with pytest.raises(ConfigError, match=r"got 'ablation_modules'.*try: python scripts/reproduce\.py table=ablation_"):
        load_table("ablation_modules")
    with pytest.raises(ConfigError, match=r"got 'modules', expected one of ablation_.*try: python scripts/ablate\.py"):
        load_paper_table("modules")
    with pytest.raises(
        ConfigError, match=r"table: got '', expected one of .*try: python scripts/reproduce\.py table=<"
    ):
        load_paper_table("")


@pytest.mark.parametrize("dataset", ["cityscapes27", "coco_stuff27", "miniature"])
def test_every_discoverer_of_the_table_takes_its_settings(dataset: str) -> None:
    """A protocol's own discoverer leaves no settings behind where a row has another one."""
    table = load_paper_table("unsupervised")
    taus = {}
    for row in table.names(dataset):
        settings = compose(table.runs(row, dataset, 1)[0]).discoverer
        assert settings is not None
        discovery.build(settings, CPU)
        taus[row] = settings.get("tau")
    published = {"cityscapes27": 0.9, "coco_stuff27": 1.1, "miniature": 0.04}[dataset]
    assert taus["DiffSeg"] == taus["iSeg"] == published
    assert taus["k-means of tokens"] is None
