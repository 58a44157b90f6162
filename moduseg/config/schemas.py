"""The groups of the configuration as dataclasses, which check types and ranges.

Every mistake ends in one line that names the key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


def _between(name: str, value: float, low: float, high: float, remedy: str) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, expected {low} to {high}; {remedy}")


@dataclass(frozen=True)
class PurifyConfig:
    """Semantic boundary purification (METHOD, stage 1, step 2)."""

    enabled: bool = True
    kernel_size: int = 3
    iterations: int = 20

    def __post_init__(self) -> None:
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(
                f"purify.kernel_size: got {self.kernel_size}, expected an odd number >= 1; the paper uses 3"
            )
        _between("purify.iterations", self.iterations, 0, 1000, "the paper uses 20 at 500 pixels")


@dataclass(frozen=True)
class OutliersConfig:
    """Prototype purification (METHOD, stage 1, step 4)."""

    enabled: bool = True
    drop_ratio: float = 0.25
    drop_ratio_background: float = 0.0

    def __post_init__(self) -> None:
        for name in ("drop_ratio", "drop_ratio_background"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ValueError(f"outliers.{name}: got {value}, expected 0 <= ratio < 1; the paper uses 0.25")


@dataclass(frozen=True)
class BankConfig:
    """How the bank is made of pseudo masks and patch tokens.

    `purify`, `min_area`, `aggregation` and `flips` (every training image's mirror image too) decide what is stored; the
    others are applied when the bank is read, so that changing them runs no model. `images_per_class` keeps the vectors
    of that many images of each class, chosen by `images_seed` (see `moduseg.bank.subset`), `classes` those of the named
    classes and of the background; `prototypes` puts so many k-means centres of each class in place of its vectors (see
    `moduseg.bank.prototypes`). `shuffle_labels` is the control experiment of a table: the seed of a permutation of the
    bank's labels, which leaves retrieval nothing to know. `path` is the folder of a finished bank
    (of `scripts/bank.py`, say) that is used in place of one built from the training split.
    """

    purify: PurifyConfig = field(default_factory=PurifyConfig)
    min_area: int = 300
    aggregation: Literal["soft", "hard"] = "soft"
    centre: bool = False
    images_per_class: int | None = None
    images_seed: int = 0
    shuffle_labels: int | None = None
    outliers: OutliersConfig = field(default_factory=OutliersConfig)
    classes: tuple[str, ...] | None = None
    prototypes: int | None = None
    flips: bool = False
    path: str | None = None

    def __post_init__(self) -> None:
        if self.prototypes is not None:
            _between("prototypes", self.prototypes, 1, 10**6, "null keeps every vector")
        _between("min_area", self.min_area, 0, 10**9, "the paper uses 300 pixels")
        if self.images_per_class is not None:
            _between("images_per_class", self.images_per_class, 1, 10**9, "null keeps every image")


@dataclass(frozen=True)
class RetrievalConfig:
    """Search, vote and suppression (METHOD, stage 2).

    From `vote_temperature` to `selection` these are options beyond the paper: see `moduseg.retrieval.vote`, `.balance`,
    `.selection` and `.majority`. `cap_top_k` lets no more neighbours vote than the smallest class of the bank has
    vectors. `engine` and `storage` of the bank's vectors are part of keys where they are not the default.
    """

    top_k: int = 25
    nms_iou: float = 0.4
    min_area: int = 300
    min_predicted_iou: float = 0.0
    vote_temperature: float | None = None
    vote_balance: Literal["none", "cap", "distance"] = "none"
    cap_top_k: bool = False
    selection: Literal["nms", "nms_quality", "margin", "similarity", "majority"] = "nms"
    engine: Literal["exact", "faiss"] = "exact"
    storage: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        _between("top_k", self.top_k, 1, 10**6, "the paper uses 25")
        _between("nms_iou", self.nms_iou, 0, 1, "the paper uses 0.4")
        _between("min_area", self.min_area, 0, 10**9, "the paper uses 300 pixels")
        _between("min_predicted_iou", self.min_predicted_iou, 0, 1, "0 keeps every proposal")
        if self.vote_temperature is not None and self.vote_temperature <= 0:
            raise ValueError(
                f"vote_temperature: got {self.vote_temperature}, expected more than 0, or null for equal votes"
            )

    def key_parts(self) -> dict[str, Any]:
        """What of it decides a result: settings that came later are left out while they change nothing."""
        unchanged = {
            "vote_balance": "none",
            "cap_top_k": False,
            "selection": "nms",
            "engine": "exact",
            "storage": "float32",
        }
        return {name: value for name, value in _plain(self).items() if unchanged.get(name, ...) != value}


@dataclass(frozen=True)
class BackgroundConfig:
    """What score the background gets against the classes: see `moduseg.pseudo_masks.labels.make_label_map`."""

    rule: Literal["constant", "power", "threshold", "given", "words", "probability"] = "constant"
    value: float = 0.5
    low: float | None = None


@dataclass(frozen=True)
class PseudoMasksConfig:
    """A generator, and how its scores become labels: what follows `generator` is changed without running a model.

    `dilations` and `iterations` are those of `pamr` and `par`; see `moduseg.pseudo_masks.refine`. Proposals whose
    `predicted_iou` is below `vote_min_score` have no say in `region_vote`.
    """

    generator: Mapping[str, Any]
    background: BackgroundConfig = field(default_factory=BackgroundConfig)
    refine: Literal["none", "region_vote", "pamr", "par"] = "none"
    dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    iterations: int = 10
    vote_min_score: float = 0.0

    def __post_init__(self) -> None:
        _between("vote_min_score", self.vote_min_score, 0, 1, "0 lets every proposal vote, the paper uses 0.5")
        if not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"dilations: got {list(self.dilations)}, expected pixels >= 1; the papers use 1 to 24")
        _between("iterations", self.iterations, 0, 1000, "the papers use 10")


@dataclass(frozen=True)
class EvaluationConfig:
    """Figures beside mIoU, and pictures. All but `workers` and what begins with `report` are part of keys."""

    bootstrap: int = 1000
    boundary_width: float = 0.02
    uncovered: Literal["wrong", "ignore"] = "wrong"
    object_min_area: int = 100
    panels: int = 12
    workers: int = 0
    report: bool = True
    report_images: int = 2000
    report_size: int = 384
    report_regions: int = 3000
    report_map: Literal["pca", "umap"] = "pca"

    def __post_init__(self) -> None:
        _between("bootstrap", self.bootstrap, 0, 10**6, "0 leaves the interval out")
        _between("boundary_width", self.boundary_width, 0, 0.5, "0.02 of the diagonal is usual, 0 leaves it out")
        _between("object_min_area", self.object_min_area, 1, 10**9, "100 pixels is usual")
        _between("panels", self.panels, 0, 10**6, "0 makes none")
        _between("workers", self.workers, 0, 256, "0 takes one a core, 4 at most")
        _between("report_images", self.report_images, 1, 10**6, "2000 images take about 100 MB")
        _between("report_size", self.report_size, 32, 4096, "384 pixels are enough for a screen")
        _between("report_regions", self.report_regions, 0, 10**6, "0 makes no pictures of bank regions")


@dataclass(frozen=True)
class ShardConfig:
    """One of several processes that share the batches of every stage (a job array)."""

    index: int = 0
    count: int = 1
    wait: float = 0.0

    def __post_init__(self) -> None:
        _between("shard.count", self.count, 1, 10**6, "1 is a run of its own")
        _between("shard.index", self.index, 0, self.count - 1, "shards count from 0, runtime.shard.count says to where")
        _between("shard.wait", self.wait, 0, 10**7, "seconds, 0 ends when the other shards have work left")


@dataclass(frozen=True)
class RayConfig:
    """The workers of `runtime.engine=ray`."""

    address: str | None = None
    actors: int = 2
    cpus: float = 1.0
    gpus: float = 0.0
    batches: int = 4

    def __post_init__(self) -> None:
        _between("ray.actors", self.actors, 1, 10**5, "2 is the default")
        _between("ray.cpus", self.cpus, 0, 10**4, "1 is the default")
        _between("ray.gpus", self.gpus, 0, 64, "1 for a GPU each, 0.5 for two workers on one")
        _between("ray.batches", self.batches, 1, 10**5, "4 is the default")


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how it runs. Of these `precision` changes results and is part of keys; `seed` draws the intervals."""

    outputs: str = "outputs"
    device: str = "auto"
    precision: str = "auto"
    batch_size: int = 8
    seed: int = 42
    workers: int = 0
    verify: bool = False
    engine: Literal["local", "ray"] = "local"
    shard: ShardConfig = field(default_factory=ShardConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        _between("batch_size", self.batch_size, 1, 4096, "8 is the default")
        _between("workers", self.workers, 0, 256, "0 takes one a core, 4 at most")
        if self.engine == "ray" and self.shard.count > 1:
            raise ValueError(
                f"engine: got ray with shard.count={self.shard.count}, expected 1, as Ray spreads the batches itself; "
                "leave runtime.shard out"
            )


_SPREAD = ("workers", "verify", "engine", "shard", "ray")
"""What of `runtime` says how the work is spread, and so is no part of what is recorded with a result."""


@dataclass(frozen=True)
class Config:
    """The whole configuration; the groups of backends stay mappings, checked when the backend is built.

    `predictions` is a folder of label maps made elsewhere, to be scored or packed in place of a run's own.
    `train_proposer`, where given, takes the place of `proposer` on the training images, for ablations of the queries'
    proposals alone.
    """

    dataset: Mapping[str, Any]
    proposer: Mapping[str, Any]
    backbone: Mapping[str, Any]
    pseudo_masks: PseudoMasksConfig
    bank: BankConfig
    retrieval: RetrievalConfig
    evaluation: EvaluationConfig
    runtime: RuntimeConfig
    predictions: str | None = None
    train_proposer: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values of what a result may depend on: how its work was spread is left out."""
        values: dict[str, Any] = _plain(self)
        values["runtime"] = {key: value for key, value in values["runtime"].items() if key not in _SPREAD}
        return values


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
