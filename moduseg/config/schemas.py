"""The groups of the configuration as dataclasses, which check the ranges of values.

A mistake raises a ValueError of one line that names the key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moduseg.errors import ConfigError


def _check_range(name: str, value: float, low: float, high: float, remedy: str) -> None:
    """Raise ValueError if a value is outside `[low, high]`."""
    if not low <= value <= high:
        raise ValueError(f"{name}: got {value}, expected {low} to {high}; {remedy}")


@dataclass(frozen=True)
class PurifyConfig:
    """Boundary purification of pseudo masks (docs/method.md, step 2).

    Attributes:
        enabled: whether it is done.
        kernel_size: side of the square kernel of the erosion in pixels, odd.
        iterations: how often the erosion is applied.
    """

    enabled: bool = True
    kernel_size: int = 3
    iterations: int = 20

    def __post_init__(self) -> None:
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(
                f"purify.kernel_size: got {self.kernel_size}, expected an odd number >= 1; the paper uses 3"
            )
        _check_range("purify.iterations", self.iterations, 0, 1000, "the paper uses 20 at 500 pixels")


@dataclass(frozen=True)
class OutliersConfig:
    """Prototype purification: outliers of each class leave the bank (docs/method.md, step 4).

    Attributes:
        enabled: whether it is done.
        drop_ratio: share of the vectors of each foreground class that is dropped, in [0, 1).
        drop_ratio_background: that share for the background.
    """

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
    """How the bank is made from pseudo masks and patch tokens.

    `purify`, `min_area`, `aggregation`, `flips`, `regions` and `parts` decide what is stored. The others are applied
    when the bank is read, so that changing them runs no model.

    Attributes:
        purify: boundary purification of the pseudo masks.
        min_area: smaller regions give no vector, in pixels.
        aggregation: weights of the patches: `soft` by coverage, `hard` patches covered by more than half.
        centre: subtract the bank's mean before vectors get length 1.
        images_per_class: keep the vectors of that many images of each class; see `moduseg.bank.subset`.
        images_seed: seed that chooses these images.
        shuffle_labels: seed of a permutation of the bank's labels, the control experiment of a table.
        outliers: prototype purification.
        classes: keep the vectors of these classes and of the background.
        prototypes: replace the vectors of each class by so many k-means centres; see `moduseg.bank.prototypes`.
        flips: store every training image's mirror image too.
        path: folder of a finished bank (of `scripts/bank.py`, say), used in place of one built from the training split.
        regions: of the training images: `pseudo_masks` gives one for each class of an image, `proposals` those of the
            proposer, which have no labels and need no tags; part of keys unless it is the default.
        parts: besides, of the first so many proposals of a training image, those that lie in one class of its pseudo
            mask are stored as regions of that class; see `moduseg.bank.parts`. Part of keys unless it is 0.
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
    regions: Literal["pseudo_masks", "proposals"] = "pseudo_masks"
    parts: int = 0

    def __post_init__(self) -> None:
        if self.prototypes is not None:
            _check_range("prototypes", self.prototypes, 1, 10**6, "null keeps every vector")
        _check_range("min_area", self.min_area, 0, 10**9, "the paper uses 300 pixels")
        _check_range("parts", self.parts, 0, 10**6, "0 stores one vector for each class of an image")
        if self.parts and self.regions == "proposals":
            raise ValueError(f"parts: got {self.parts} with regions=proposals, expected 0; parts have a label")
        if self.images_per_class is not None:
            _check_range("images_per_class", self.images_per_class, 1, 10**9, "null keeps every image")


@dataclass(frozen=True)
class RetrievalConfig:
    """Search, vote and suppression (docs/method.md, steps 6 to 8).

    Options from `vote_temperature` to `selection` go beyond the paper.

    Attributes:
        top_k: neighbours that vote.
        nms_iou: a mask is suppressed if its IoU with a better one of its label is greater.
        min_area: smaller proposals are dropped, in pixels.
        min_predicted_iou: proposals of lower predicted IoU are dropped.
        vote_temperature: weight votes by a softmax over the neighbours at this temperature; `None` counts them equally.
        vote_balance: how classes with many vectors are held back; see `moduseg.retrieval.balance`.
        cap_top_k: let at most as many neighbours vote as the smallest class of the bank has vectors.
        selection: how masks are chosen; see `moduseg.retrieval.selection`, `moduseg.retrieval.majority`,
            `moduseg.retrieval.shares` and, for `learnt`, which labels them too, `moduseg.retrieval.ranking`.
        engine: search engine, part of keys unless it is the default.
        storage: number format of the bank's vectors, part of keys unless it is the default.
        min_object_area: smaller objects of a label map get the label around them, in pixels; 0 keeps them.
        max_hole_area: holes in objects of at most this size are closed, in pixels; 0 leaves them.
        smoothing_radius: outlines are smoothed by the label of most pixels in a disc of this radius; 0 leaves them.
            These three come last, see `moduseg.masks.tidy`; they are part of keys unless they are 0.
        confidence: whether a picture says how sure each pixel is, see `moduseg.retrieval.confidence`; part of keys
            where it is true.
        answer: `labels` lets the neighbours vote; `words` compares the words of all classes with the CLIP features of
            the neighbours and of the proposal itself, see `moduseg.retrieval.word_answer`. Part of keys, with
            `neighbour_share`, where it is `words`.
        neighbour_share: share of the neighbours where `answer` is `words`; 0 is CLIP alone.
    """

    top_k: int = 25
    nms_iou: float = 0.4
    min_area: int = 300
    min_predicted_iou: float = 0.0
    vote_temperature: float | None = None
    vote_balance: Literal["none", "cap", "distance"] = "none"
    cap_top_k: bool = False
    selection: Literal["nms", "nms_quality", "margin", "similarity", "majority", "shares", "learnt"] = "nms"
    engine: Literal["exact", "faiss"] = "exact"
    storage: Literal["float32", "float16"] = "float32"
    min_object_area: int = 0
    max_hole_area: int = 0
    smoothing_radius: int = 0
    confidence: bool = False
    answer: Literal["labels", "words"] = "labels"
    neighbour_share: float = 0.5

    def __post_init__(self) -> None:
        _check_range("top_k", self.top_k, 1, 10**6, "the paper uses 25")
        _check_range("nms_iou", self.nms_iou, 0, 1, "the paper uses 0.4")
        _check_range("min_area", self.min_area, 0, 10**9, "the paper uses 300 pixels")
        _check_range("min_predicted_iou", self.min_predicted_iou, 0, 1, "0 keeps every proposal")
        if self.vote_temperature is not None and self.vote_temperature <= 0:
            raise ValueError(
                f"vote_temperature: got {self.vote_temperature}, expected more than 0, or null for equal votes"
            )
        _check_range("min_object_area", self.min_object_area, 0, 10**9, "0 keeps every object")
        _check_range("max_hole_area", self.max_hole_area, 0, 10**9, "0 leaves holes open")
        _check_range("smoothing_radius", self.smoothing_radius, 0, 100, "0 leaves outlines as they are, 3 is a little")
        _check_range("neighbour_share", self.neighbour_share, 0, 1, "0.5 is half and half")
        if self.answer == "words":
            self._check_no_votes()

    def _check_no_votes(self) -> None:
        """Refuse settings that count the labels of neighbours, which words do not look at.

        Raises:
            ValueError: one of them is set.
        """
        without_votes = {
            "vote_temperature": (None,),
            "vote_balance": ("none",),
            "cap_top_k": (False,),
            "selection": ("nms", "nms_quality", "similarity", "majority"),
            "confidence": (False,),
        }
        for name, allowed in without_votes.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name}: got {value}, expected {' or '.join(map(str, allowed))} with answer=words, which does not "
                    "look at the labels of neighbours; leave it out"
                )

    @property
    def tidying(self) -> dict[str, int]:
        """The settings of `moduseg.masks.tidy.tidy_label_map`."""
        return {name: getattr(self, name) for name in ("min_object_area", "max_hole_area", "smoothing_radius")}

    def key_parts(self) -> dict[str, Any]:
        """Return the settings that decide a result; later additions are omitted while they have their default."""
        unchanged = {
            "vote_balance": "none",
            "cap_top_k": False,
            "selection": "nms",
            "engine": "exact",
            "storage": "float32",
            **dict.fromkeys(self.tidying, 0),
            "confidence": False,
            "answer": "labels",
            **({} if self.answer == "words" else {"neighbour_share": self.neighbour_share}),
        }
        return {name: value for name, value in _to_plain(self).items() if unchanged.get(name, ...) != value}


@dataclass(frozen=True)
class BackgroundConfig:
    """The score of the background among the classes; see `moduseg.pseudo_masks.labels.make_label_map`.

    Attributes:
        rule: how the score is made.
        value: the constant, exponent or threshold of the rule.
        low: second, lower threshold of rules that have one.
    """

    rule: Literal["constant", "power", "threshold", "given", "words", "probability", "margin"] = "constant"
    value: float = 0.5
    low: float | None = None


@dataclass(frozen=True)
class PseudoMasksConfig:
    """A generator, and how its scores become labels; settings after `generator` change without running a model.

    Attributes:
        generator: name and options of the generator, checked when it is built.
        background: the score of the background.
        refine: how labels are refined; see `moduseg.pseudo_masks.refine`.
        dilations: distances of the neighbours that `pamr` and `par` compare, in pixels.
        iterations: iterations of `pamr` and `par`.
        min_class_share: classes that win no more than this share of an image's foreground lose it; part of keys unless
            it is 0.
        vote_min_score: proposals of lower predicted IoU have no vote in `region_vote`.
        spill: pixels by which every class's scores spread over its border before they are compared; part of keys
            unless it is 0.
        score_bits: of a stored class score; part of keys unless it is the default.
        score_scale: side in pixels of the squares that one stored score stands for; part of keys unless it is 1.
    """

    generator: Mapping[str, Any]
    background: BackgroundConfig = field(default_factory=BackgroundConfig)
    refine: Literal["none", "region_vote", "pamr", "par"] = "none"
    dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    iterations: int = 10
    min_class_share: float = 0.0
    vote_min_score: float = 0.0
    spill: int = 0
    score_bits: Literal[8, 16] = 16
    score_scale: int = 1

    def __post_init__(self) -> None:
        _check_range("min_class_share", self.min_class_share, 0, 1, "0 drops none, SCLIP uses 0.1 on VOC")
        _check_range("vote_min_score", self.vote_min_score, 0, 1, "0 lets every proposal vote, the paper uses 0.5")
        _check_range("spill", self.spill, 0, 512, "0 leaves borders where they are")
        _check_range("score_scale", self.score_scale, 1, 8, "2 takes a quarter of the space")
        if not self.dilations or min(self.dilations) < 1:
            raise ValueError(f"dilations: got {list(self.dilations)}, expected pixels >= 1; the papers use 1 to 24")
        _check_range("iterations", self.iterations, 0, 1000, "the papers use 10")
        if self.generator.get("arm", ...) is None:
            # Without an ARM nothing says so: keys and results are those of a generator that has no such setting.
            object.__setattr__(self, "generator", {k: v for k, v in self.generator.items() if k != "arm"})


@dataclass(frozen=True)
class EvaluationConfig:
    """Measures beside mIoU, and pictures.

    All but `workers` and the `report` settings decide scores: they are part of the keys of `evaluate`, and where label
    maps are made (`infer`, `pseudo_masks`) the scores beside them are written again, in place, when they change.

    Attributes:
        bootstrap: resamples of the confidence interval; 0 omits it.
        boundary_width: distance from a contour that boundary IoU looks at, as a share of the image's diagonal; 0 omits
            the measure.
        uncovered: for data sets without background: pixels predicted 0 are `wrong`, or left out (`ignore`).
        object_min_area: smaller objects do not count for the recall of proposals, in pixels.
        panels: images that are drawn side by side with their truth.
        workers: threads that score; 0 takes one a core, 4 at most.
        report: whether an HTML report is written.
        report_images: images in the report at most, evenly spaced over the split.
        report_size: longer side of its pictures, in pixels; smaller images are not enlarged.
        report_regions: bank regions with a picture, those that matter most first; 0 makes none.
        report_map: how the bank is laid out on a plane.
        report_colours: in which colours classes are shown, in panels and overlays too
            (`moduseg.masks.palette.choose_class_colours`); label files have VOC's palette in any case.
    """

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
    report_colours: Literal["auto", "voc", "distinct", "colour_blind"] = "auto"

    def __post_init__(self) -> None:
        _check_range("bootstrap", self.bootstrap, 0, 10**6, "0 leaves the interval out")
        _check_range("boundary_width", self.boundary_width, 0, 0.5, "0.02 of the diagonal is usual, 0 leaves it out")
        _check_range("object_min_area", self.object_min_area, 1, 10**9, "100 pixels is usual")
        _check_range("panels", self.panels, 0, 10**6, "0 makes none")
        _check_range("workers", self.workers, 0, 256, "0 takes one a core, 4 at most")
        _check_range("report_images", self.report_images, 1, 10**6, "2000 images take about 100 MB")
        _check_range("report_size", self.report_size, 32, 4096, "384 pixels are enough for a screen")
        _check_range("report_regions", self.report_regions, 0, 10**6, "0 makes no pictures of bank regions")


@dataclass(frozen=True)
class ShardConfig:
    """One of several processes that share the batches of every stage (a job array).

    Attributes:
        index: number of this process, from 0.
        count: number of processes.
        wait: seconds to wait for the other shards; 0 ends the run if they have work left.
    """

    index: int = 0
    count: int = 1
    wait: float = 0.0

    def __post_init__(self) -> None:
        _check_range("shard.count", self.count, 1, 10**6, "1 is a run of its own")
        remedy = "shards count from 0, runtime.shard.count says to where"
        _check_range("shard.index", self.index, 0, self.count - 1, remedy)
        _check_range("shard.wait", self.wait, 0, 10**7, "seconds, 0 ends when the other shards have work left")


@dataclass(frozen=True)
class RayConfig:
    """The workers of `runtime.engine=ray`.

    Attributes:
        address: address of a running cluster; `None` starts one on this machine.
        actors: number of workers.
        cpus: cores of each worker.
        gpus: GPUs of each worker, or a share of one.
        batches: batches given to a worker at once.
    """

    address: str | None = None
    actors: int = 2
    cpus: float = 1.0
    gpus: float = 0.0
    batches: int = 4

    def __post_init__(self) -> None:
        _check_range("ray.actors", self.actors, 1, 10**5, "2 is the default")
        _check_range("ray.cpus", self.cpus, 0, 10**4, "1 is the default")
        _check_range("ray.gpus", self.gpus, 0, 64, "1 for a GPU each, 0.5 for two workers on one")
        _check_range("ray.batches", self.batches, 1, 10**5, "4 is the default")


@dataclass(frozen=True)
class RuntimeConfig:
    """Where and how the stages run.

    `precision` decides what models compute and is part of keys. `seed` decides intervals alone: scores are written
    again in place, and it is part of the keys of `compare` and of predictions made elsewhere. The others are in no key.

    Attributes:
        outputs: folder of all artefacts.
        device: `auto`, `cpu`, `mps`, `cuda` or `cuda:N`.
        precision: `auto`, `float32`, `tf32`, `bfloat16` or `float16`, of the forward passes of models whose
            options name no `precision` of their own.
        batch_size: images that pass through a stage's models at once on a GPU, fewer where its memory ends; on the CPU
            all of a record do. It changes neither keys nor what is done again.
        record_size: images that are recorded together, the unit of resume and of sharding; a folder that was begun
            keeps the size that it was begun with.
        seed: seed of the confidence intervals in `results.json` and of `compare`.
        workers: threads that load images; 0 takes one a core, 4 at most.
        verify: compare files of earlier runs and their inputs with their digests, not only with sizes and times.
        engine: `local` or `ray`.
        shard: the share of this process.
        ray: the workers of `ray`.
        token_cache: gigabytes of disk for the backbone's tokens, which then passes each image once; 0 for none. Tokens
            are rounded to half precision with it, so that its being there, not its size, is part of keys.
    """

    outputs: str = "outputs"
    device: str = "auto"
    precision: str = "auto"
    batch_size: int = 8
    record_size: int = 8
    seed: int = 42
    workers: int = 0
    verify: bool = False
    engine: Literal["local", "ray"] = "local"
    shard: ShardConfig = field(default_factory=ShardConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    token_cache: float = 0.0

    def __post_init__(self) -> None:
        _check_range("token_cache", self.token_cache, 0, 10**6, "gigabytes, 0 stores no tokens")
        _check_range("batch_size", self.batch_size, 1, 4096, "8 is the default")
        _check_range("record_size", self.record_size, 1, 4096, "8 is the default")
        _check_range("workers", self.workers, 0, 256, "0 takes one a core, 4 at most")
        if self.engine == "ray" and self.shard.count > 1:
            raise ValueError(
                f"engine: got ray with shard.count={self.shard.count}, expected 1, as Ray spreads the batches itself; "
                "leave runtime.shard out"
            )


@dataclass(frozen=True)
class StudentConfig:
    """A network that is trained on label maps, and how it is trained and asked (docs/students.md).

    Attributes:
        model: name and options of the network, checked when it is built.
        training: settings of the training loop, checked when it starts.
        labels: which label maps it learns: `pseudo_masks`, those of the training images; `predictions`, what the bank
            says of the training images; `ground_truth`, an upper bound; `files`, those of a folder.
        folder: of `files`, with `<id>.png`; weights of pixels are read from `<folder>/../scores` with `confidence`.
        filter_tags: pixels of classes that the image-level labels do not name are not learnt from.
        held_out: of `predictions`: whether the regions of an image do not vote on the image itself.
        confidence: whether pixels count by how sure their label is, where the label maps come with that.
        min_confidence: pixels whose label is less sure are not learnt from; in [0, 1].
        scales: sizes at which an image is looked at in the end, as factors of its own.
        mirror: whether its mirror image is looked at as well.
    """

    model: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)
    labels: Literal["pseudo_masks", "predictions", "ground_truth", "files"] = "pseudo_masks"
    folder: str | None = None
    filter_tags: bool = True
    held_out: bool = True
    confidence: bool = False
    min_confidence: float = 0.0
    scales: tuple[float, ...] = (1.0,)
    mirror: bool = False

    def __post_init__(self) -> None:
        if (self.labels == "files") != (self.folder is not None):
            raise ValueError(
                f"folder: got {self.folder!r} with labels={self.labels}, expected a folder with labels=files and none "
                "without; set both, or neither"
            )
        _check_range("min_confidence", self.min_confidence, 0, 1, "0 learns from every pixel")
        if not self.scales or not all(0.1 <= scale <= 8 for scale in self.scales):
            raise ValueError(
                f"scales: got {list(self.scales)}, expected one or more factors from 0.1 to 8; [1.0] is the image's "
                "own size"
            )
        if len(set(self.scales)) < len(self.scales):
            raise ValueError(f"scales: got {list(self.scales)}, expected each once")

    @property
    def views(self) -> str:
        """What the network looks at in the end, for results; empty if it is the image as it is."""
        parts = []
        if self.scales != (1.0,):
            parts.append("scales " + ", ".join(f"{scale:g}" for scale in self.scales))
        if self.mirror:
            parts.append("mirror image")
        return " and ".join(parts)


_DISTRIBUTION = ("record_size", "workers", "verify", "engine", "shard", "ray")
"""Settings of `runtime` that distribute the work; they are not recorded with a result."""


MAX_CLUSTERS = 254
"""Clusters of a set at most: label maps of 8 bits hold their numbers from 1."""


@dataclass(frozen=True)
class Config:
    """The whole configuration; the groups of backends stay mappings, checked when the backend is built.

    Attributes:
        dataset, proposer, backbone: name and options of a backend.
        pseudo_masks, bank, retrieval, evaluation, runtime: settings of the stages.
        predictions: folder of label maps made elsewhere, scored or packed in place of a run's own.
        train_proposer: proposer of the training images if it is not that of the evaluated ones (`proposer`), which then
            changes alone in an ablation; `None` for one proposer of both.
        tagger: what says which classes an image of `segment` shows; `None` lets all compete.
        discoverer: what finds the segments of `discover`; `None` is k-means of the backbone's tokens.
        num_clusters: clusters of the whole set that `discover` joins segments to; `None` for as many as classes.
        vocabulary: words in place of the data set's classes, of `segment` and `tag`: a file with one class a line, or a
            list (`a dog;grass`).
        student: a network that is trained in place of searching a bank; `None` if none is.
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
    tagger: Mapping[str, Any] | None = None
    discoverer: Mapping[str, Any] | None = None
    vocabulary: str | tuple[str, ...] = ()
    num_clusters: int | None = None
    student: StudentConfig | None = None

    def __post_init__(self) -> None:
        if self.bank.regions == "proposals" and self.retrieval.answer == "labels":
            raise ConfigError(
                "retrieval.answer: got labels, expected words with bank.regions=proposals, whose regions have no "
                "labels; set retrieval.answer=words"
            )
        if self.num_clusters is not None and not 1 <= self.num_clusters <= MAX_CLUSTERS:
            raise ConfigError(
                f"num_clusters: got {self.num_clusters}, expected 1 to {MAX_CLUSTERS}; leave it out for as many as "
                "classes"
            )
        if self.bank.prototypes is not None and self.uses_words:
            raise ConfigError(
                f"bank.prototypes: got {self.bank.prototypes}, expected null with retrieval.answer=words, as they "
                "have no word values; set bank.prototypes=null"
            )

    @property
    def uses_words(self) -> bool:
        """Whether proposals are labelled by words, so that bank and queries hold CLIP features beside their vectors."""
        return self.retrieval.answer == "words"

    @property
    def searched_bank(self) -> BankConfig:
        """How the stored bank is read; with `retrieval.answer=words` without the filter by label."""
        if not self.uses_words:
            return self.bank
        return dataclasses.replace(self.bank, outliers=dataclasses.replace(self.bank.outliers, enabled=False))

    def as_dict(self) -> dict[str, Any]:
        """Return the settings that a result may depend on as JSON values, without those that distribute the work."""
        values: dict[str, Any] = _to_plain(self)
        values["runtime"] = {key: value for key, value in values["runtime"].items() if key not in _DISTRIBUTION}
        if not values["runtime"]["token_cache"]:
            del values["runtime"]["token_cache"]
        # Results that were made without words, segments or a student look as they always did.
        for name in ("tagger", "discoverer", "vocabulary", "num_clusters", "student"):
            if not values[name]:
                del values[name]
        if not self.uses_words:
            del values["bank"]["regions"], values["retrieval"]["answer"], values["retrieval"]["neighbour_share"]
        return values


def _to_plain(value: Any) -> Any:
    """Turn dataclasses, mappings and sequences into the dicts and lists of JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _to_plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(v) for v in value]
    return value
