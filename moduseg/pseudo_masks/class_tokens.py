"""Masks from the attention of class tokens, which are trained on the training images' tags alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moduseg.backbones.inputs import pad_and_stack, round_up, to_inputs
from moduseg.backbones.timm_model import build_model, get_patch_side, is_transformer, load_weights
from moduseg.backbones.timm_published import find_timm_weights
from moduseg.backbones.upsample import upsample
from moduseg.devices import Device, seed_weights
from moduseg.errors import ArtefactError, ConfigError
from moduseg.files import digest_of, file_digest, to_json_values
from moduseg.pseudo_masks.base import FitImages, PseudoMaskGenerator, check_fit_images, check_labels, get_fitted
from moduseg.pseudo_masks.class_token_data import Augmentation, TaggedImages, to_tags
from moduseg.pseudo_masks.class_token_model import (
    ClassTokenSettings,
    MultiClassTokenViT,
    compute_contrast,
    compute_diversity,
)
from moduseg.pseudo_masks.class_token_start import find_prototypes
from moduseg.pseudo_masks.labels import rank_labels
from moduseg.structures import Proposals, Sample, ScoreMaps, TokenMap
from moduseg.training.loop import Extras, fit
from moduseg.training.options import TrainingOptions

KEY = "pseudo_masks.generator"
_PREFIX = "model."


@dataclass(frozen=True, kw_only=True)
class ClassTokenOptions(ClassTokenSettings):
    """Settings of `ClassTokenGenerator`, beside those of its model.

    Attributes:
        model: timm's name of the ViT that the training starts from.
        weights: of it: a path, `miniature/<file>`, an address, `hub` or `random`
            (`moduseg.backbones.timm_backbone.TimmOptions`).
        model_kwargs: more arguments for `timm.create_model`.
        mean, std: of the RGB channels in [0, 1]; those of timm's model if omitted.
        seed: of the weights that start random.
        mask_rate: probability that the output of an absent class's token is masked in a training step.
        gate_weight: of the gates' penalty.
        gate_rate: factor on the learning rate of the gates' parameters.
        new_rate: factor on the learning rate of class tokens and register, which do not start from weights.
        head_rate: the same, of the classifier and of the convolution of `fused`.
        prototype_share: of `class_start=prototype`: share of an image's patches that stand for a class.
        diversity_weight: of the overlap of the classes' maps.
        contrast_weight: of the likeness of the class tokens in each block.
        augmentation: how training images are changed.
        training: settings of the training.
        short_side: images to be labelled are resized until their short side has so many pixels; native size if omitted.
        map_power: exponent of the maps before they are stretched to [0, 1]; 0.5 makes of `fused` a geometric mean.
        mirrored: whether the maps of the mirrored image are added.
        ranked: whether maps become labels as published: pixels above a map's own mean get its class, the more probable
            class where several do, and the rest the nearest label; there is no background then (rule `given`).

    Raises:
        ValueError: a number out of range.
    """

    model: str = "deit_small_patch16_224"
    weights: str = "random"
    model_kwargs: dict[str, Any] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    seed: int = 0
    mask_rate: float = 0.5
    gate_weight: float = 0.01
    gate_rate: float = 1.0
    new_rate: float = 1.0
    head_rate: float = 1.0
    prototype_share: float = 0.03
    diversity_weight: float = 0.1
    contrast_weight: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    short_side: int | None = None
    map_power: float = 1.0
    mirrored: bool = False
    ranked: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mask_rate <= 1:
            raise ValueError(f"mask_rate: got {self.mask_rate}, expected 0 to 1; try 0.5")
        for name in ("gate_weight", "diversity_weight", "contrast_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 or more; try 0.01")
        for name in ("gate_rate", "new_rate", "head_rate", "map_power"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a number above 0; try 1")
        if not 0 < self.prototype_share <= 1:
            raise ValueError(f"prototype_share: got {self.prototype_share}, expected above 0 and up to 1; try 0.03")
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"short_side: got {self.short_side}, expected 1 or more pixels, or null; try 448")


class ClassTokenGenerator(PseudoMaskGenerator):
    """Token masking and MCTformer+: class tokens of a transformer that is fitted to tags show where classes are.

    `fit` trains a `MultiClassTokenViT` on the classification of the images, with the losses

        cross-entropy of the tags, of class tokens and (`maps=fused`) of patches
        + gate_weight * sum of the probabilities that a head is open
        + diversity_weight * overlap of the classes' maps + contrast_weight * likeness of the class tokens

    and `generate` reads the maps of the classes that an image has, stretched to [0, 1] one by one.

    Args:
        options: model, losses and training.
        device: where the model runs.
        classes: class names, background first.
    """

    is_fitted = True
    fits_together = True
    is_classifier = True

    def __init__(self, options: ClassTokenOptions, device: Device, classes: Sequence[str]) -> None:
        self._options, self._device, self._num_classes = options, device, len(classes) - 1
        self._model: MultiClassTokenViT | None = None
        self._fit_seconds = 0.0

    @property
    def num_fit_passes(self) -> int:
        """None: images are taken by index."""
        return 0

    @property
    def fit_seconds(self) -> float:
        """Seconds of all processes that trained."""
        return self._fit_seconds

    @cached_property
    def digest(self) -> str:
        """Digest of the weights that the training starts from."""
        if self._options.weights == "random":
            return f"random-{self._options.seed}"
        return file_digest(self._weights_path)

    def fit(
        self,
        samples: Callable[[], Iterable[Sample]],
        num_classes: int,
        proposals: Callable[[Sample], Proposals] | None = None,
    ) -> dict[str, Tensor]:
        """Train the model on the images' tags; a training that was killed goes on.

        Args:
            samples: the training images: `FitImages`, which are loaded as they are needed and whose folder keeps the
                checkpoints; or a function that starts a pass, whose images are all held in memory.
            num_classes: foreground classes, ids 1..num_classes.
            proposals: not used.

        Returns:
            The tensors of the model, float32.

        Raises:
            DataError: no image, or one without image-level labels.
            ConfigError, ArtefactError, TrainingError, StorageError: as `moduseg.training.loop.fit`.
        """
        if isinstance(samples, FitImages):
            folder = samples.folder / f"training-{digest_of(self._describe_settings())[:8]}"
            return self._train(samples.ids, samples.load, num_classes, folder)
        held = {str(index): sample for index, sample in enumerate(samples())}
        with tempfile.TemporaryDirectory() as folder_name:
            return self._train(tuple(held), held.__getitem__, num_classes, Path(folder_name))

    def _train(
        self, ids: Sequence[str], load: Callable[[str], Sample], num_classes: int, folder: Path
    ) -> dict[str, Tensor]:
        options = self._options
        check_fit_images(len(ids))
        model = self.build_model(num_classes)
        patch = get_patch_side(model)
        if options.augmentation.side % patch:
            raise ConfigError(
                f"{KEY}.augmentation.side: got {options.augmentation.side}, expected a multiple of the "
                f"patch of {patch} pixels; try {-(-options.augmentation.side // patch) * patch}"
            )
        images = TaggedImages(
            ids,
            load,
            num_classes,
            options.augmentation,
            mask_rate=options.mask_rate,
            statistics=self._statistics(torch.device("cpu")),
        )
        if options.class_start == "prototype":
            self._start_from_prototypes(model, ids, load)
        factors = {
            **dict.fromkeys(("class_", "register_"), options.new_rate),
            **dict.fromkeys(("classifier", "patch_head"), options.head_rate),
            "gates": options.gate_rate,
        }
        extras = Extras(
            identity={"images": digest_of(list(ids)), "settings": self._describe_settings()},
            measure=self._measure_gates,
            rate_factors=factors,
            undecayed=("class_", "register_", "patch_positions", "gates"),
            title="fit of class tokens",
        )
        result = fit(model, self.compute_losses, images, options.training, folder, device=self._device, extras=extras)
        self._fit_seconds = result.seconds
        return {f"{_PREFIX}{name}": tensor.float() for name, tensor in model.state_dict().items()}

    def _start_from_prototypes(
        self, model: MultiClassTokenViT, ids: Sequence[str], load: Callable[[str], Sample]
    ) -> None:
        """Give a model class tokens that look like patches of their classes."""
        model.to(self._device.torch_device).eval()

        def images() -> Iterator[tuple[Tensor, Tensor]]:
            for sample in map(load, ids):
                yield self._prepare(sample, model)[0], to_tags(sample, model.num_classes)

        model.class_tokens.data.copy_(find_prototypes(model, images, self._options.prototype_share))
        model.train()

    def compute_losses(self, model: MultiClassTokenViT, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `loss`, the weighted sum, and the single losses of a batch of `TaggedImages`."""
        options, tags = self._options, batch["tags"].float()
        output = model(batch["pixels"], batch["keep"])
        losses = {"class_loss": F.binary_cross_entropy_with_logits(output.logits, tags)}
        total = losses["class_loss"]
        if output.patch_logits is not None:
            losses["patch_loss"] = F.binary_cross_entropy_with_logits(output.patch_logits, tags)
            total = total + losses["patch_loss"]
        if options.diversity_weight:
            losses["diversity_loss"] = compute_diversity(output.attention)
            total = total + options.diversity_weight * losses["diversity_loss"]
        if options.contrast_weight:
            losses["contrast_loss"] = compute_contrast(output.tokens, tags)
            total = total + options.contrast_weight * losses["contrast_loss"]
        if model.gates is not None:
            losses["gate_loss"] = model.gates.compute_penalty()
            total = total + options.gate_weight * losses["gate_loss"]
        return {"loss": total, **losses}

    @staticmethod
    def _measure_gates(model: MultiClassTokenViT) -> dict[str, float]:
        """Return the share of the heads that are open."""
        return {"open_heads": 1.0 if model.gates is None else float(model.gates.is_open.float().mean())}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take what `fit` returned.

        Raises:
            ArtefactError: it is of another class list or model, or incomplete.
        """
        model = self.build_model(self._num_classes)
        tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ArtefactError(
                f"class tokens: got tensors that do not fit the model of {self._num_classes} classes "
                f"({str(error).splitlines()[-1].strip()}); remove the fit's folder and run again"
            ) from error
        self._model = model.to(self._device.torch_device).requires_grad_(False).eval()

    @property
    def fitted_model(self) -> MultiClassTokenViT:
        """The model that `load_state` took, in evaluation mode.

        Raises:
            ArtefactError: there is none.
        """
        return get_fitted(self._model, "class tokens")

    def count_learnt(self, state: dict[str, Tensor]) -> int:
        """Return the number of the model's parameters that a training changes."""
        parameters = self.build_model(self._num_classes).named_parameters()
        return sum(p.numel() for name, p in parameters if p.requires_grad and f"{_PREFIX}{name}" in state)

    def describe_fit(self) -> dict[str, float]:
        """Return the percentage of the heads that are open."""
        return {"open_heads": 100 * self._measure_gates(self.fitted_model)["open_heads"]}

    def classify(self, sample: Sample) -> Tensor:
        """Return the probability of each foreground class, `[num_classes]` float32.

        Of `fused` it is what the patches say.
        """
        return self._observe(sample)[1]

    def generate(self, sample: Sample, labels: tuple[int, ...], proposals: Proposals | None = None) -> ScoreMaps:
        """Return the maps of the classes in `labels`, each stretched to [0, 1].

        Raises:
            DataError: a label that is no class.
            ArtefactError: nothing was fitted.
        """
        check_labels(sample.id, labels, self._num_classes)
        maps, probabilities, grid = self._observe(sample)
        rows = torch.tensor([label - 1 for label in labels], dtype=torch.long, device=maps.device)
        chosen = maps[rows] ** self._options.map_power
        if self._options.ranked:
            owners = rank_labels(chosen, probabilities[rows]) if labels else chosen.new_zeros(chosen.shape[1:])
            levels = torch.arange(len(labels), device=maps.device)[:, None, None]
            scores = upsample((owners == levels).float(), grid)
            return ScoreMaps(tuple(labels), scores, maps.new_zeros(sample.size))
        lowest, highest = chosen.amin((1, 2), keepdim=True), chosen.amax((1, 2), keepdim=True)
        stretched = (chosen - lowest) / (highest - lowest).clamp(min=1e-12)
        return ScoreMaps(tuple(labels), upsample(stretched, grid).clamp(0, 1))

    @torch.inference_mode()
    def observe_heads(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Return the attention of each head before its gate, `[L, H, C, h, w]`, and which are open, `[L, H]` bool.

        Raises:
            ArtefactError: nothing was fitted.
        """
        model = self.fitted_model
        batch, grid = self._prepare(sample, model)
        with self._device.autocast():
            heads = model(batch, keeps_heads=True).heads
        is_open = heads.new_ones(heads.shape[1:3], dtype=torch.bool) if model.gates is None else model.gates.is_open
        height, width = grid.tokens.shape[:2]
        return heads[0].float()[..., :height, :width].clone(), is_open.clone()

    def _observe(self, sample: Sample) -> tuple[Tensor, Tensor, TokenMap]:
        """Return the maps `[C, h, w]` and probabilities `[C]` of all classes, and the grid of the maps."""
        model = self.fitted_model
        batch, grid = self._prepare(sample, model)
        with torch.inference_mode():
            with self._device.autocast():
                output = model(batch)
            maps, probabilities = output.maps[0].float(), output.probabilities[0]
            if self._options.mirrored:
                with self._device.autocast():
                    output = model(batch.flip(3))
                maps = maps + output.maps[0].float().flip(2)
                probabilities = (probabilities + output.probabilities[0]) / 2
        height, width = grid.tokens.shape[:2]
        # Cloned outside inference mode: an ordinary tensor.
        return maps[:, :height, :width].clone(), probabilities.clone(), grid

    def _prepare(self, sample: Sample, model: MultiClassTokenViT) -> tuple[Tensor, TokenMap]:
        """Return an image as a batch, and the grid of its patches."""
        device = self._device.torch_device
        patch = get_patch_side(model)
        pixels = to_inputs([sample.image], self._options.short_side, device, stride=patch)[0]
        size = (pixels.shape[1], pixels.shape[2])
        padded = round_up(size, patch)
        mean, deviation = self._statistics(device)
        batch = (pad_and_stack([pixels], padded) - mean) / deviation
        cells = torch.empty(padded[0] // patch, padded[1] // patch, 0)
        return batch, TokenMap(cells, patch, sample.size, size)

    def _describe_settings(self) -> dict[str, Any]:
        """Return what decides the fitted model beside the images, as JSON values."""
        settings = asdict(self._options) | {"training": self._options.training.key_parts(), "start": self.digest}
        return dict(to_json_values(settings))

    @cached_property
    def _weights_path(self) -> Path:
        return find_timm_weights(self._options.model, self._options.weights, None, f"{KEY}.weights")

    def build_model(self, num_classes: int) -> MultiClassTokenViT:
        """Return the model as a training starts."""
        options = self._options
        vit = build_model(options.model, options.model_kwargs or {}, None, options.seed)
        if not is_transformer(vit):
            raise ConfigError(
                f"{KEY}.model: got {options.model!r} ({type(vit).__name__}), expected a vision transformer; try "
                "deit_small_patch16_224"
            )
        if options.weights != "random":
            load_weights(vit, self._weights_path)
        with seed_weights(options.seed):
            return MultiClassTokenViT(vit, num_classes, options)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of inputs in [0, 1], `[3, 1, 1]` each."""
        import timm

        published = timm.get_pretrained_cfg(self._options.model)
        default = (0.5, 0.5, 0.5)
        values = (
            self._options.mean or getattr(published, "mean", None) or default,
            self._options.std or getattr(published, "std", None) or default,
        )
        mean, deviation = (torch.tensor(value, dtype=torch.float32, device=device).view(3, 1, 1) for value in values)
        return mean, deviation
