"""Proposals of Segment Anything's automatic mask generator: the miniature SAM, or ViT-B, ViT-L, ViT-H."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from moduseg.allocator import pause_collection
from moduseg.clock import count_passes
from moduseg.devices import Device, seed_weights
from moduseg.errors import ArtefactError, MissingError
from moduseg.files import file_digest
from moduseg.proposers.base import PromptBox, Proposer
from moduseg.proposers.drawn import prompt_model
from moduseg.proposers.grid_options import EncoderOptions
from moduseg.proposers.mask_generation import check_thickness, generate_batch
from moduseg.proposers.sam_decoder import PackagedSam
from moduseg.structures import Proposals, Sample
from moduseg.weights.download import fetch
from moduseg.weights.sources import ADDRESSES, find_weights
from moduseg.weights.tensors import load_state

if TYPE_CHECKING:
    from segment_anything import SamAutomaticMaskGenerator
    from segment_anything.modeling import Sam

KEY = "proposer.checkpoint"
PUBLISHED = {
    "vit_b": "sam_vit_b_01ec64.pth",
    "vit_l": "sam_vit_l_0b3195.pth",
    "vit_h": "sam_vit_h_4b8939.pth",
}
"""Names of the published weight files, by model; the digits are the beginning of the file's MD5."""
SHA256 = {
    "vit_b": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "vit_l": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "vit_h": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
}
"""Digests of these files, on which people who have them agree; the publisher names none."""
ADDRESS = "https://dl.fbaipublicfiles.com/segment_anything/"


@dataclass(frozen=True, kw_only=True)
class SamOptions(EncoderOptions):
    """Options of SAM's automatic mask generator and of the model under it.

    Attributes:
        model: `vit_b`, `vit_l`, `vit_h`, or `miniature` (moduseg/miniature/README.md).
        checkpoint: `published` (fetched from where the model's authors publish it), an address
            (`moduseg.weights.sources.find_weights`), a path (`~` allowed), `miniature/sam.safetensors`, or `random`.
        seed: seed of `random` weights.
        engine: the code that runs the model and filters: `packaged` is `SamAutomaticMaskGenerator` itself, `grid` gives
            the same masks in a third of the time on a CPU, and waits for a GPU once a batch of points
            (`moduseg.proposers.mask_generation`). `images_per_batch`, `compile` and `skip_certain` need `grid`.

    Raises:
        ValueError: a value out of range, or values that do not go together.
    """

    model: Literal["miniature", "vit_b", "vit_l", "vit_h"] = "miniature"
    checkpoint: str = "miniature/sam.safetensors"
    seed: int = 0
    engine: Literal["packaged", "grid"] = "packaged"

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ValueError("checkpoint: got an empty text, expected a path or random; try miniature/sam.safetensors")
        if self.checkpoint == "published" and self.model not in PUBLISHED:
            raise ValueError(
                f"checkpoint: got 'published', but the package carries model={self.model}; "
                "try miniature/sam.safetensors"
            )
        super().__post_init__()
        if self.engine == "packaged" and (self.images_per_batch != 1 or self.compile or self.skip_certain is not None):
            raise ValueError(
                f"engine: got 'packaged' with images_per_batch={self.images_per_batch}, compile={self.compile}, "
                f"skip_certain={self.skip_certain}, which are of engine=grid; leave them out or set engine=grid"
            )


class SamProposer(Proposer):
    """Masks of `segment_anything.SamAutomaticMaskGenerator`, best predicted IoU first; they overlap and nest.

    A grid of points is put over the image, each point gives three masks, and three filters follow: predicted IoU,
    stability, and NMS between boxes (Kirillov et al., Segment Anything, ICCV 2023, appendix B). The generator and its
    options are the published ones.

    Args:
        options: model, weights, grid and filters.
        device: where the model runs. Precision holds for the image encoder; prompts and masks stay in float32.
    """

    def __init__(self, options: SamOptions, device: Device) -> None:
        self._options, self._device = options, device

    @property
    def digest(self) -> str:
        """The sha256 of the checkpoint, or `random-<seed>`.

        Raises:
            MissingError: there is no such file, and none can be fetched.
        """
        options = self._options
        return f"random-{options.seed}" if options.checkpoint == "random" else file_digest(self._find_checkpoint())

    def propose(self, sample: Sample) -> Proposals:
        """Return masks in descending predicted IoU (ties: in the generator's order); `[0, H, W]` if none survives.

        Raises:
            DataError: an image so thin that nothing of it is left at the model's input size.
            MissingError: the checkpoint is not there.
            ArtefactError: it is of another model, or damaged.
        """
        if self._options.engine == "grid":
            return self.propose_batch([sample])[0]
        check_thickness(sample, self.generator.predictor.transform.target_length)
        with self._device.hold_tf32():
            records = self.generator.generate(np.ascontiguousarray(sample.image))
        records = [record for record in records if record["segmentation"].any()]
        if not records:
            return Proposals(torch.zeros((0, *sample.size), dtype=torch.bool))
        records.sort(key=lambda record: -record["predicted_iou"])
        return Proposals(
            torch.from_numpy(np.stack([record["segmentation"] for record in records])),
            torch.tensor([record["predicted_iou"] for record in records], dtype=torch.float32),
            torch.tensor([record["stability_score"] for record in records], dtype=torch.float32),
        )

    def propose_batch(self, samples: Sequence[Sample]) -> list[Proposals]:
        """Return the masks of several images, which `engine=grid` embeds together.

        Raises:
            DataError, MissingError, ArtefactError: as `propose` does.
        """
        if self._options.engine == "packaged":
            return super().propose_batch(samples)
        for sample in samples:
            check_thickness(sample, self.promptable.side)
        images = [sample.image for sample in samples]
        options = self._options
        return generate_batch(
            self.promptable, images, options, options.images_per_batch, skip_certain=options.skip_certain
        )

    def find_region(self, sample: Sample, box: PromptBox) -> np.ndarray | None:
        """Ask the model with points, `[H, W]` bool; with `engine=packaged` a second copy of it is built.

        Raises:
            DataError, MissingError, ArtefactError: as `propose` does.
        """
        check_thickness(sample, self.promptable.side)
        with self._device.hold_tf32():
            return prompt_model(self.promptable, sample.image, box)

    @cached_property
    def promptable(self) -> PackagedSam:
        """The model of `engine=grid` and of `find_region`; built on first use.

        Raises:
            MissingError, ArtefactError: as `propose` does.
        """
        sam = self.build_model().to(self._device.torch_device).requires_grad_(False)
        return PackagedSam(sam, self._device, compiled=self._options.compile)

    @cached_property
    def generator(self) -> SamAutomaticMaskGenerator:
        """The automatic mask generator with its model; built on first use.

        Raises:
            MissingError, ArtefactError: as `propose` does.
        """
        from segment_anything import SamAutomaticMaskGenerator

        class Generator(SamAutomaticMaskGenerator):
            """The published one; an image or crop without masks gets a table of the right shape."""

            def _process_crop(self, *args: Any) -> Any:
                data = super()._process_crop(*args)
                if not data["rles"]:
                    data["crop_boxes"] = torch.zeros((0, 4), dtype=torch.long)
                return data

        device = self._device.torch_device
        sam = self.build_model().to(device).requires_grad_(False)
        if self._device.precision != "float32":
            sam.image_encoder = _Cast(sam.image_encoder, self._device)
        for part in (sam.image_encoder, sam.prompt_encoder, sam.mask_decoder):
            count_passes(part, device)
        generator = Generator(sam, **self._options.grid_arguments())
        if device.type == "mps":
            generator.predictor.transform = make_single_precision_transform(sam.image_encoder.img_size)
        return generator

    def build_model(self) -> Sam:
        """Build the model with its weights, on the CPU.

        Raises:
            MissingError, ArtefactError: as `propose` does.
        """
        options = self._options
        path = None if options.checkpoint == "random" else self._find_checkpoint()
        with pause_collection(), seed_weights(options.seed):
            sam = _get_builders()[options.model]()
        if path is not None:
            expected, state = sam.state_dict(), load_state(path)
            missing = [name for name in expected if name not in state]
            unexpected = [name for name in state if name not in expected]
            other = [n for n, tensor in state.items() if n in expected and tensor.shape != expected[n].shape]
            if missing or unexpected or other:
                raise ArtefactError(
                    f"{path}: not weights of SAM {options.model!r} ({len(missing)} tensors missing, {len(unexpected)} "
                    f"left over, {len(other)} of another shape, first {(missing + unexpected + other)[0]}); "
                    f"check {KEY} and proposer.model"
                )
            sam.load_state_dict(state)
        return sam.eval()

    def _find_checkpoint(self) -> Path:
        """Return the file of the weights, fetched if it has an address."""
        model, checkpoint = self._options.model, self._options.checkpoint
        if checkpoint == "published":
            return fetch(ADDRESS + PUBLISHED[model], KEY, SHA256[model], "published")
        try:
            return find_weights(checkpoint, KEY)
        except MissingError as error:
            if checkpoint.startswith(ADDRESSES):
                raise
            file = PUBLISHED.get(model)
            if file is None:
                raise MissingError(
                    f"{KEY}: got {checkpoint!r}, no such file; install moduseg again, make it with "
                    f"`python scripts/train_miniature.py model=sam`, or set {KEY}=<path>"
                ) from error
            raise MissingError(
                f"{KEY}: got {checkpoint!r}, no such file; fetch {file} from {ADDRESS}{file} and set "
                f"{KEY}=<path of {file}>, or set {KEY}=published"
            ) from error


class _Cast(nn.Module):
    """SAM's image encoder in lower precision; it returns its embedding in float32, which NMS and filters need."""

    def __init__(self, encoder: nn.Module, device: Device) -> None:
        super().__init__()
        self.encoder, self.device = encoder, device
        self.img_size = encoder.img_size

    def forward(self, pixels: Tensor) -> Tensor:
        with self.device.autocast():
            embedding: Tensor = self.encoder(pixels)
        return embedding.float()


def make_single_precision_transform(side: int) -> Any:
    """Make SAM's resizing with point coordinates in float32, because MPS has no float64."""
    from segment_anything.utils.transforms import ResizeLongestSide

    class SinglePrecision(ResizeLongestSide):
        def apply_coords(self, coords: np.ndarray, original_size: tuple[int, ...]) -> np.ndarray:
            return super().apply_coords(coords, original_size).astype(np.float32)

    return SinglePrecision(side)


def _get_builders() -> dict[str, Callable[[], Sam]]:
    """Return the functions that build the published models and the miniature, by name."""
    from segment_anything import sam_model_registry

    from moduseg.miniature.models.sam import build_miniature_sam

    return {**{name: sam_model_registry[name] for name in PUBLISHED}, "miniature": build_miniature_sam}
