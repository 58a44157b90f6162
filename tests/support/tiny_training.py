"""A training that takes a second: a small network, numbered items, and processes that can be killed in it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moduseg.devices import Device
from moduseg.training.data import BatchDraw
from moduseg.training.loop import Extras, TrainingResult, fit
from moduseg.training.options import TrainingOptions


class Points:
    """Random points in the plane with two classes; each is moved a little, differently each time that it comes.

    Args:
        count: number of points.
        broken: the point that is not a number.
    """

    def __init__(self, count: int = 50, broken: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.points = torch.randn(count, 2, generator=generator)
        self.labels = (self.points[:, 0] * self.points[:, 1] > 0).long()
        if broken is not None:
            self.points[broken] = float("nan")

    def __len__(self) -> int:
        return len(self.points)

    def load(self, draw: BatchDraw) -> dict[str, Tensor]:
        noise = [torch.randn(2, generator=torch.Generator().manual_seed(seed)) for seed in draw.seeds]
        items = list(draw.items)
        return {"points": self.points[items] + 0.1 * torch.stack(noise), "labels": self.labels[items]}

    def name_of(self, item: int) -> str:
        return f"point-{item}"


def make_network(dropout: float = 0.2) -> nn.Module:
    """Return a network whose weights are the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 2))


def compute_loss(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cross-entropy, and the accuracy beside it."""
    logits = model(batch["points"])
    accuracy = (logits.argmax(1) == batch["labels"]).float().mean()
    return {"loss": nn.functional.cross_entropy(logits.float(), batch["labels"]), "accuracy": accuracy}


def digest_weights(model: nn.Module) -> str:
    """Return the sha256 of all weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def measure_accuracy(model: Any) -> dict[str, float]:
    """Return the share of undisturbed points that are classified right."""
    points = Points()
    device = next(model.parameters()).device
    right = model(points.points.to(device)).argmax(1).cpu() == points.labels
    return {"accuracy": float(right.float().mean())}


def train(folder: Path, device: torch.device | None = None, **options: Any) -> tuple[nn.Module, TrainingResult]:
    """Train the network in a folder, or go on there."""
    torch.set_num_threads(1)
    model = make_network()
    settings = TrainingOptions(
        **{"steps": 60, "batch": 8, "warmup": 5, "ema": 0.9, "measure_every": 20, "learning_rate": 0.01} | options
    )
    result = fit(
        model,
        compute_loss,
        Points(),
        settings,
        folder,
        device=Device(device or torch.device("cpu")),
        extras=Extras(measure=measure_accuracy),
    )
    return model, result


def train_in_process(folder: str, options: dict[str, Any]) -> None:
    """Run `train` in a process of its own, and write the digest of the weights."""
    model, _ = train(Path(folder), **options)
    (Path(folder) / "digest.txt").write_text(digest_weights(model))


def train_as_rank(rank: int, num_ranks: int, folder: str, store: str, options: dict[str, Any]) -> None:
    """Run `fit` as one of several processes that share each batch; each writes its weights to `<rank>.pt`."""
    torch.set_num_threads(1)
    os.environ["USE_LIBUV"] = "0"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks)
    model = without_batch_statistics()
    fit(model, compute_loss, Points(), TrainingOptions(**options), Path(folder), device=Device(torch.device("cpu")))
    torch.save(model.state_dict(), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def without_batch_statistics() -> nn.Module:
    """Return a network whose output for an item does not depend on the batch, nor on chance."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(2, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 2))
