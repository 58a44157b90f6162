"""Overrides for class tokens so small that a fit takes a second."""

from __future__ import annotations

TINY_CLASS_TOKENS = (
    "pseudo_masks=token_masking_voc",
    "pseudo_masks.generator.model=vit_tiny_patch16_224",
    "pseudo_masks.generator.weights=random",
    "pseudo_masks.generator.model_kwargs={img_size: 64, patch_size: 16, embed_dim: 16, depth: 2, num_heads: 2}",
    "pseudo_masks.generator.augmentation.side=64",
    "pseudo_masks.generator.training.steps=4",
    "pseudo_masks.generator.training.batch=4",
    "pseudo_masks.generator.training.warmup=1",
    "pseudo_masks.generator.training.workers=0",
    "pseudo_masks.generator.short_side=null",
)
