"""A full-size transformer with the class tokens of VOC and COCO: one training step on a CPU."""

from __future__ import annotations

import resource
import time

import pytest
import torch

from moduseg.devices import Device
from moduseg.pseudo_masks.class_token_model import MultiClassTokenViT
from moduseg.pseudo_masks.class_tokens import ClassTokenGenerator, ClassTokenOptions


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [pytest.param(20, id="VOC"), pytest.param(80, id="COCO")])
def test_one_step_of_a_vit_b(num_classes: int) -> None:
    """Prints seconds, and the peak memory of the process, of a step on two images of 224 pixels."""
    options = ClassTokenOptions(model="vit_base_patch16_224")
    generator = ClassTokenGenerator(options, Device(torch.device("cpu")), ["background", *map(str, range(num_classes))])
    model = generator.build_model(num_classes).train()
    assert isinstance(model, MultiClassTokenViT)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tags = torch.zeros(2, num_classes, dtype=torch.bool)
    tags[:, :2] = True
    batch = {"pixels": torch.randn(2, 3, 224, 224), "tags": tags, "keep": tags}
    start, cpu = time.perf_counter(), time.process_time()
    losses = generator.compute_losses(model, batch)
    losses["loss"].backward()
    optimiser.step()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(
        f"\nViT-B, {num_classes} class tokens, {size:.1f} M parameters: {seconds:.1f} s, {cpu_seconds:.1f} s of CPU, "
        f"{peak:.1f} GB"
    )
    assert losses["loss"].isfinite()
    assert all(parameter.grad is not None for parameter in model.parameters())
