"""The miniature latent diffusion model: the parts of a `StableDiffusionPipeline`, small, and their folder.

The autoencoder turns 8 x 8 pixels into one cell of 8 channels, so that a scene of 128 pixels has latents of 16 x 16.
The text encoder is the miniature CLIP's without its last layers, as Stable Diffusion 2 uses its CLIP: CLIP's training
asks the last layer for the state of the end of the text and leaves those of the words to chance.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moduseg.errors import MissingError
from moduseg.miniature.models.weights import save_weights, weights_path

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

LATENT_CHANNELS = 8
"""Channels of the latents, of which a cell stands for 8 x 8 pixels."""
TEXT_LAYERS = 2
"""Layers of the miniature CLIP's text encoder that are kept."""


def _import_diffusers() -> Any:
    """Import diffusers, which only this model needs.

    Raises:
        MissingError: it is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise MissingError(
            "miniature latent diffusion: got no diffusers, expected it to be installed; "
            "try `pip install 'moduseg[diffusion]'`"
        ) from error
    return diffusers


def build_autoencoder() -> AutoencoderKL:
    """Build the autoencoder with random weights; `[B, 3, H, W]` in [-1, 1] to latents `[B, 8, H / 8, W / 8]`."""
    return _import_diffusers().AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=1,
        sample_size=128,
        mid_block_add_attention=False,
    )


def build_text_encoder() -> tuple[CLIPTextModel, CLIPTokenizer]:
    """Build the text encoder from the first layers of the miniature CLIP's, with its tokenizer."""
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

    path = weights_path("clip")
    clip = CLIPModel.from_pretrained(path).float()
    config = copy.deepcopy(clip.config.text_config)
    config.num_hidden_layers = TEXT_LAYERS
    encoder = CLIPTextModel(config)
    kept = encoder.state_dict().keys()
    stored = clip.text_model.state_dict()
    encoder.load_state_dict({name: stored[name] for name in kept})
    return encoder, CLIPTokenizer.from_pretrained(path)


def build_unet() -> UNet2DConditionModel:
    """Build the denoiser with random weights: attention to words and cells at 16 x 16, 8 x 8 and 4 x 4."""
    return _import_diffusers().UNet2DConditionModel(
        sample_size=16,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Build the scheduler: Stable Diffusion's betas, the velocity as what the denoiser predicts."""
    return _import_diffusers().DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


@dataclass(frozen=True)
class DiffusionParts:
    """The parts of the model without the denoiser: all that does not learn while it does."""

    autoencoder: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDIMScheduler


def save_diffusion(parts: DiffusionParts, unet: UNet2DConditionModel, directory: Path) -> None:
    """Write the folder of a `StableDiffusionPipeline`, its weights as float16 safetensors.

    The configurations name float32 as the type to load to: half precision is for storage, not for the CPU.

    Args:
        parts: all but the denoiser.
        unet: the denoiser.
        directory: made if absent.
    """
    pipeline = _import_diffusers().StableDiffusionPipeline(
        vae=parts.autoencoder,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=unet,
        scheduler=parts.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(directory, safe_serialization=True)
    for module, name in (
        (unet, "unet/diffusion_pytorch_model.safetensors"),
        (parts.autoencoder, "vae/diffusion_pytorch_model.safetensors"),
        (parts.text_encoder, "text_encoder/model.safetensors"),
    ):
        save_weights(module.state_dict(), directory / name, metadata={"format": "pt"})


def load_diffusion(directory: Path) -> StableDiffusionPipeline:
    """Load a folder that `save_diffusion` wrote, in float32 and without a progress bar."""
    pipeline = _import_diffusers().StableDiffusionPipeline.from_pretrained(
        directory, local_files_only=True, low_cpu_mem_usage=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
