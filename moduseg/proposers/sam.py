"""Proposals of Segment Anything's automatic mask generator: the miniature SAM, or ViT-B, ViT-L, ViT-H."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from moduseg.clock import count_passes
from moduseg.devices import Device
from moduseg.errors import ArtefactError, MissingError
from moduseg.files import file_digest
from moduseg.proposers.base import Proposer
from moduseg.proposers.grid_options import GridOptions, check_images_per_batch
from moduseg.proposers.mask_generation import check_thickness, generate_batch
from moduseg.proposers.sam_decoder import PackagedSam
from moduseg.structures import Proposals, Sample
from moduseg.weights.download import fetch
from moduseg.weights.sources import ADDRESSES, find_weights, load_state

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
"""Their digests, as those who have the files agree; the publisher names none."""
ADDRESS = "https://dl.fbaipublicfiles.com/segment_anything/"


class SamProposer(Proposer):
    """Masks of `segment_anything.SamAutomaticMaskGenerator`, best predicted IoU first; they overlap and nest.

    A grid of points is put over the image, each point gives three masks, and three filters follow: predicted IoU,
    stability, and NMS between boxes (Kirillov et al., Segment Anything, ICCV 2023, appendix B). The generator and its
    options are the published ones.

    Args:
        device: where the model runs. Precision holds for the image encoder; prompts and masks stay in float32.
        model: `vit_b`, `vit_l`, `vit_h`, or `miniature` (moduseg/miniature/README.md).
        checkpoint: `published` (fetched from where the model's authors publish it), an address
            (`moduseg.weights.sources.find_weights`), a path (`~` allowed), `miniature/sam.safetensors`, or `random`.
        points_per_side: points along each side of the image.
        points_per_batch: points that share a pass of the mask decoder; changes speed and memory only.
        pred_iou_thresh: least predicted IoU, in [0, 1].
        stability_score_thresh: least stability, in [0, 1]: IoU between the mask at a higher and at a lower cut-off.
        stability_score_offset: by how much the cut-off is moved for it.
        box_nms_thresh: of two masks whose boxes overlap more, the one with the lower predicted IoU goes.
        crop_n_layers: layers of crops that are segmented as well; layer `i` has `4 ** i` crops.
        crop_nms_thresh: the same as `box_nms_thresh`, between crops; masks of smaller crops win.
        crop_overlap_ratio: overlap of crops, as a fraction of the image.
        crop_n_points_downscale_factor: `points_per_side` is divided by this at each layer.
        min_mask_region_area: holes and islands smaller than this, in pixels, are removed; 0 leaves them.
        seed: of `random` weights.
        engine: who runs the model and filters: `packaged` is `SamAutomaticMaskGenerator` itself, `grid` gives the same
            masks in a third of the time on a CPU (`moduseg.proposers.mask_generation`).
        images_per_batch: of `grid`, images or crops that share a pass of the image encoder; speed and memory, and the
            last bits of the scores.
        compile: of `grid`, have `torch.compile` translate the image encoder: minutes at the first image, then faster.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        device: Device,
        model: Literal["miniature", "vit_b", "vit_l", "vit_h"] = "miniature",
        checkpoint: str = "miniature/sam.safetensors",
        points_per_side: int = 32,
        points_per_batch: int = 64,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        box_nms_thresh: float = 0.7,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        min_mask_region_area: int = 0,
        seed: int = 0,
        engine: Literal["packaged", "grid"] = "packaged",
        images_per_batch: int = 1,
        compile: bool = False,
    ) -> None:
        if not checkpoint:
            raise ValueError("checkpoint: got an empty text, expected a path or random; try miniature/sam.safetensors")
        if checkpoint == "published" and model not in PUBLISHED:
            raise ValueError(
                f"checkpoint: got 'published', but the package carries model={model}; try miniature/sam.safetensors"
            )
        self._options = GridOptions(
            points_per_side,
            points_per_batch,
            pred_iou_thresh,
            stability_score_thresh,
            stability_score_offset,
            box_nms_thresh,
            crop_n_layers,
            crop_nms_thresh,
            crop_overlap_ratio,
            crop_n_points_downscale_factor,
            min_mask_region_area,
        )
        self._device, self._name, self._checkpoint, self._seed = device, model, checkpoint, seed
        if engine == "packaged" and (images_per_batch != 1 or compile):
            raise ValueError(
                f"engine: got 'packaged' with images_per_batch={images_per_batch}, compile={compile}, which are of "
                "engine=grid; leave them out or set engine=grid"
            )
        self._engine, self._images_per_batch, self._compile = engine, check_images_per_batch(images_per_batch), compile

    @property
    def digest(self) -> str:
        """sha256 of the checkpoint, or `random-<seed>`.

        Raises:
            MissingError: there is no such file, and none can be fetched.
        """
        return f"random-{self._seed}" if self._checkpoint == "random" else file_digest(self._path())

    def propose(self, sample: Sample) -> Proposals:
        """Masks in descending predicted IoU (ties: in the generator's order); `[0, H, W]` where none survives.

        Raises:
            DataError: an image so thin that nothing of it is left at the model's input size.
            MissingError: the checkpoint is not there.
            ArtefactError: it is of another model, or damaged.
        """
        if self._engine == "grid":
            return self.propose_batch([sample])[0]
        check_thickness(sample, self.generator.predictor.transform.target_length)
        records = [r for r in self.generator.generate(np.ascontiguousarray(sample.image)) if r["segmentation"].any()]
        if not records:
            return Proposals(torch.zeros((0, *sample.size), dtype=torch.bool))
        records.sort(key=lambda record: -record["predicted_iou"])
        return Proposals(
            torch.from_numpy(np.stack([record["segmentation"] for record in records])),
            torch.tensor([record["predicted_iou"] for record in records], dtype=torch.float32),
            torch.tensor([record["stability_score"] for record in records], dtype=torch.float32),
        )

    def propose_batch(self, samples: Sequence[Sample]) -> list[Proposals]:
        """`propose` of several images, which `engine=grid` embeds together.

        Raises:
            DataError, MissingError, ArtefactError: see `propose`.
        """
        if self._engine == "packaged":
            return super().propose_batch(samples)
        for sample in samples:
            check_thickness(sample, self.promptable.side)
        images = [sample.image for sample in samples]
        return generate_batch(self.promptable, images, self._options, self._images_per_batch)

    @cached_property
    def promptable(self) -> PackagedSam:
        """The model of `engine=grid`; built on first use.

        Raises:
            MissingError, ArtefactError: see `propose`.
        """
        sam = self._build().to(self._device.torch_device).requires_grad_(False)
        return PackagedSam(sam, self._device, self._compile)

    @cached_property
    def generator(self) -> SamAutomaticMaskGenerator:
        """The automatic mask generator with its model; built on first use.

        Raises:
            MissingError, ArtefactError: see `propose`.
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
        sam = self._build().to(device).requires_grad_(False)
        if self._device.precision != "float32":
            sam.image_encoder = _Cast(sam.image_encoder, self._device)
        for part in (sam.image_encoder, sam.prompt_encoder, sam.mask_decoder):
            count_passes(part, device)
        generator = Generator(sam, **asdict(self._options))
        if device.type == "mps":
            generator.predictor.transform = single_precision_transform(sam.image_encoder.img_size)
        return generator

    def _build(self) -> Sam:
        """The model with its weights, on the CPU."""
        path = None if self._checkpoint == "random" else self._path()
        # Only the CPU's generator draws weights; seeding it alone leaves the others untouched.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._seed)
            sam = _registry()[self._name]()
        if path is not None:
            expected, state = sam.state_dict(), load_state(path)
            missing = [name for name in expected if name not in state]
            unexpected = [name for name in state if name not in expected]
            other = [n for n, tensor in state.items() if n in expected and tensor.shape != expected[n].shape]
            if missing or unexpected or other:
                raise ArtefactError(
                    f"{path}: not weights of SAM {self._name!r} ({len(missing)} tensors missing, {len(unexpected)} "
                    f"left over, {len(other)} of another shape, first {(missing + unexpected + other)[0]}); "
                    f"check {KEY} and proposer.model"
                )
            sam.load_state_dict(state)
        return sam.eval()

    def _path(self) -> Path:
        if self._checkpoint == "published":
            return fetch(ADDRESS + PUBLISHED[self._name], KEY, SHA256[self._name], "published")
        if self._checkpoint.startswith(ADDRESSES):
            return find_weights(self._checkpoint, KEY)
        try:
            return find_weights(self._checkpoint, KEY)
        except MissingError as error:
            file = PUBLISHED.get(self._name)
            if file is None:
                raise MissingError(
                    f"{KEY}: got {self._checkpoint!r}, no such file; install moduseg again, make it with "
                    f"`python scripts/train_miniature.py model=sam`, or set {KEY}=<path>"
                ) from error
            raise MissingError(
                f"{KEY}: got {self._checkpoint!r}, no such file; fetch {file} from {ADDRESS}{file} and set "
                f"{KEY}=<path of {file}>, or set {KEY}=published"
            ) from error


class _Cast(nn.Module):
    """SAM's image encoder in lower precision; its embedding leaves in float32, as NMS and filters want it."""

    def __init__(self, encoder: nn.Module, device: Device) -> None:
        super().__init__()
        self.encoder, self.device = encoder, device
        self.img_size = encoder.img_size

    def forward(self, pixels: Tensor) -> Tensor:
        with self.device.autocast():
            embedding: Tensor = self.encoder(pixels)
        return embedding.float()


def single_precision_transform(side: int) -> Any:
    """SAM's resizing, with point coordinates in float32: MPS has no float64."""
    from segment_anything.utils.transforms import ResizeLongestSide

    class SinglePrecision(ResizeLongestSide):
        def apply_coords(self, coords: np.ndarray, original_size: tuple[int, ...]) -> np.ndarray:
            return super().apply_coords(coords, original_size).astype(np.float32)

    return SinglePrecision(side)


def _registry() -> dict[str, Callable[[], Sam]]:
    """Builders of the published models, and of the miniature beside them."""
    from segment_anything import sam_model_registry

    from moduseg.miniature.models.sam import build_miniature_sam

    return {**{name: sam_model_registry[name] for name in PUBLISHED}, "miniature": build_miniature_sam}
