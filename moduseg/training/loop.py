"""The training loop: optimiser steps, checkpoints, log, measurements, one process or several."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moduseg.devices import PRECISIONS, Device
from moduseg.errors import ConfigError, TrainingError
from moduseg.files import digest_of, remove_leftovers, write_atomic
from moduseg.progress import Progress
from moduseg.training.average import WeightAverage
from moduseg.training.books import (
    CURVE,
    LOG,
    MEASURES,
    EventLog,
    TableLog,
    draw_training,
    read_checkpoint,
    read_table,
    write_checkpoint,
)
from moduseg.training.data import BatchDraw, ItemOrder, TrainingData, derive_seed, load_ahead, move_batch, plan_step
from moduseg.training.options import TrainingOptions
from moduseg.training.processes import TrainingGroup, join_processes, share_tensors
from moduseg.training.schedule import compute_rate

log = logging.getLogger("moduseg")

ComputeLoss = Callable[[Any, Any], Mapping[str, Tensor]]
"""Model and batch -> scalars: `loss` descends, which is a mean over the batch's items; the others are logged."""
_MAX_NAMED = 16


@dataclass(frozen=True)
class Extras:
    """What a training may have beside its model, loss and data.

    Attributes:
        identity: JSON values that stand for data and start weights; a checkpoint of another identity is refused.
        measure: called with the model in evaluation mode (with averaged weights if there are any) every
            `measure_every` steps and at the end, on rank 0; returns the same names each time.
        rate_factors: beginnings of parameter names and factors on their learning rate; the longest that fits counts.
        undecayed: beginnings of names of parameters that do not decay, beside all vectors and scalars.
        title: what progress and curve are called.
    """

    identity: Any = None
    measure: Callable[[Any], Mapping[str, float]] | None = None
    rate_factors: Mapping[str, float] = field(default_factory=dict)
    undecayed: Sequence[str] = ()
    title: str = "training"


@dataclass(frozen=True)
class TrainingResult:
    """What a finished training reports.

    Attributes:
        steps: optimiser steps.
        seconds: of all its processes' lives, on rank 0.
        measures: the last measurement.
    """

    steps: int
    seconds: float
    measures: Mapping[str, float]


def fit(
    model: nn.Module,
    compute_loss: ComputeLoss,
    data: TrainingData,
    options: TrainingOptions,
    folder: Path,
    *,
    device: Device,
    extras: Extras | None = None,
) -> TrainingResult:
    """Train a model, or go on where an earlier process stopped.

    Everything random is a function of the seed, the step and the item: PyTorch's generators are seeded before each
    forward pass, and each item comes with a seed of its own. So on a CPU a training that is killed, as often as you
    like, ends with the bits of one that is not. Processes of torchrun share each batch and end with equal weights.

    Args:
        model: trained in place, moved to the device; parameters without `requires_grad` stay as they are.
        compute_loss: returns `loss` and further scalars of one batch.
        data: items to train on.
        options: settings.
        folder: of checkpoint, log and curve. A finished training found there is only read.
        device: where the model runs; its precision counts if `options.precision` is `auto`.
        extras: measurements, learning rates by name.

    Returns:
        Steps, seconds and the last measurement; `model` is in evaluation mode and holds the result: the averaged
        weights if `options.ema` is set.

    Raises:
        ConfigError: a batch that processes and passes cannot share, or a precision that the device has not.
        ArtefactError: the folder holds another training.
        TrainingError: the loss or its gradient is not a number; it names step and items.
        StorageError: the folder cannot be written.
    """
    extras = extras or Extras()
    trainer = _Trainer(model, compute_loss, data, options, folder, device=device, extras=extras)
    # One process may look at a finished training alone, although torchrun started several.
    if not trainer.is_finished:
        with join_processes(device.torch_device) as group, _keep_random_state(device.torch_device):
            trainer.train(group)
    return trainer.finish()


class _LossModule(nn.Module):
    """Model and loss as one module, so that a loss may use any part of the model when processes share a batch."""

    def __init__(self, model: nn.Module, compute_loss: ComputeLoss) -> None:
        super().__init__()
        self.model, self._compute_loss = model, compute_loss

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return dict(self._compute_loss(self.model, batch))


class _Trainer:
    """One training in one process; see `fit` for the arguments."""

    def __init__(
        self,
        model: nn.Module,
        compute_loss: ComputeLoss,
        data: TrainingData,
        options: TrainingOptions,
        folder: Path,
        *,
        device: Device,
        extras: Extras,
    ) -> None:
        self._model, self._data, self._options, self._folder = model, data, options, folder
        self._device, self._extras, self._group = _choose_precision(device, options), extras, TrainingGroup()
        model.to(self._device.torch_device).train()
        self._optimiser = build_optimiser(model, options, extras)
        self._average = None if options.ema is None else WeightAverage(model, options.ema)
        is_scaled = self._device.precision == "float16"
        self._scaler = torch.amp.GradScaler(self._device.torch_device.type, enabled=is_scaled)
        self._shared: nn.Module = _LossModule(model, compute_loss)
        self._step, self._seconds, self._measures = 0, 0.0, dict[str, float]()
        shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        parts = {"options": options.key_parts(), "identity": extras.identity, "model": shapes, "items": len(data)}
        self._identity = digest_of(parts)
        self._load()

    @property
    def is_finished(self) -> bool:
        """Whether no step is missing."""
        return self._step == self._options.steps

    def train(self, group: TrainingGroup) -> None:
        """Make the steps that are missing, with the other processes of the group."""
        options, self._group = self._options, group
        if options.batch % (options.accumulation * group.num_ranks):
            raise ConfigError(
                f"training.batch: got {options.batch} for {group.num_ranks} processes with {options.accumulation} "
                f"passes each, expected a multiple of {options.accumulation * group.num_ranks}"
            )
        if group.is_leader:
            remove_leftovers(self._folder)
        self._share_model()
        try:
            self._train()
        finally:
            self._leave_group()

    def finish(self) -> TrainingResult:
        """Give the model the weights that are the result."""
        if self._average is not None:
            self._model.load_state_dict(self._average.tensors)
        self._model.eval()
        return TrainingResult(self._options.steps, self._seconds, self._measures)

    def _train(self) -> None:
        options, group = self._options, self._group
        started, saved = time.monotonic() - self._seconds, time.monotonic()
        first = self._step
        table = TableLog(self._folder / LOG, first, group.is_leader)
        measured = TableLog(self._folder / MEASURES, first + 1, group.is_leader)
        events = EventLog(self._folder, options.tensorboard and group.is_leader)
        watch = _Watch(self._data, self._device.torch_device, group.num_ranks)
        progress = Progress(
            options.steps, self._extras.title, unit="step", num_done=first, is_quiet=not group.is_leader
        )
        with progress:
            for passes in load_ahead(self._data, self._plan(first), options.workers):
                rate = compute_rate(self._step, options)
                parts, norm = self._make_step(passes, rate)
                watch.add([draw for draw, _ in passes], parts["loss"], norm if not self._scaler.is_enabled() else None)
                self._step += 1
                is_last = self._step == options.steps
                self._seconds = time.monotonic() - started
                if (self._step - 1) % options.log_every == 0 or is_last:
                    watch.check()
                    row = self._describe_step(parts, norm, rate)
                    table.write(row)
                    events.write(row)
                    progress.rename(f"{self._extras.title}, loss {row['loss']:.4g}")
                if is_last or (options.measure_every and self._step % options.measure_every == 0):
                    self._measure(measured, events)
                if group.is_leader and (is_last or time.monotonic() - saved >= 60 * options.save_minutes):
                    watch.check()
                    self._save(is_last)
                    saved = time.monotonic()
                progress.update()
        events.close()
        tensors = list(self._model.state_dict().values())
        share_tensors([*tensors, *(self._average.tensors.values() if self._average is not None else ())], group)
        if group.is_leader:
            self._draw()

    def _make_step(self, passes: Sequence[tuple[BatchDraw, Any]], rate: float) -> tuple[dict[str, Tensor], Tensor]:
        """Make one optimiser step; return the means of the scalars over its passes, and the norm of the gradient."""
        options, device = self._options, self._device.torch_device
        for each in self._optimiser.param_groups:
            each["lr"] = options.learning_rate * rate * each["factor"]
        sums: dict[str, Tensor] = {}
        for index, (draw, batch) in enumerate(passes):
            _seed_generators(derive_seed(options.seed, 2, draw.step, index, self._group.rank))
            is_last = index == len(passes) - 1
            # Gradients are exchanged once a step, in the last pass.
            waits = nullcontext() if is_last or self._group.num_ranks == 1 else self._shared.no_sync()  # type: ignore[operator]
            with waits:
                with _cast(self._device):
                    parts = self._shared(move_batch(batch, device))
                with self._device.hold_tf32():
                    self._scaler.scale(parts["loss"] / len(passes)).backward()
            for name, value in parts.items():
                share = value.detach().float() / len(passes)
                sums[name] = sums[name] + share if name in sums else share
        self._scaler.unscale_(self._optimiser)
        parameters = [p for each in self._optimiser.param_groups for p in each["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, options.clip_norm or float("inf"))
        self._scaler.step(self._optimiser)
        self._scaler.update()
        self._optimiser.zero_grad(set_to_none=True)
        if self._average is not None:
            self._average.update(self._model, self._step)
        return sums, norm

    def _plan(self, first: int) -> Iterator[list[BatchDraw]]:
        options, group = self._options, self._group
        order = ItemOrder(len(self._data), options.seed)
        for step in range(first, options.steps):
            yield plan_step(
                order,
                step,
                steps=options.steps,
                batch=options.batch,
                passes=options.accumulation,
                rank=group.rank,
                num_ranks=group.num_ranks,
            )

    def _share_model(self) -> None:
        if self._group.num_ranks > 1:
            device = self._device.torch_device
            ids = [device.index or 0] if device.type == "cuda" else None
            self._shared = nn.parallel.DistributedDataParallel(self._shared, device_ids=ids)

    def _leave_group(self) -> None:
        """Let go of what exchanges gradients while the group still stands.

        If it were the last to hold the group, it would end the group's threads while it holds Python's lock, for which
        one of these may be waiting: neither would go on.
        """
        if isinstance(self._shared, nn.parallel.DistributedDataParallel):
            self._shared = self._shared.module
            gc.collect()  # it refers to itself

    def _describe_step(self, parts: Mapping[str, Tensor], norm: Tensor, rate: float) -> dict[str, float]:
        options = self._options
        return {
            "step": self._step - 1,
            "epoch": (self._step - 1) * options.batch / len(self._data),
            **{name: float(value) for name, value in parts.items()},
            "gradient": float(norm),
            "learning_rate": options.learning_rate * rate,
            "seconds": self._seconds,
        }

    def _measure(self, table: TableLog, events: EventLog) -> None:
        if self._extras.measure is None or not self._group.is_leader:
            return
        self._model.eval()
        swapped = nullcontext() if self._average is None else self._average.swap_in(self._model)
        with swapped, torch.no_grad():
            self._measures = {name: float(value) for name, value in self._extras.measure(self._model).items()}
        self._model.train()
        row = {"step": self._step, **self._measures}
        table.write(row)
        events.write(row)

    def _load(self) -> None:
        state = read_checkpoint(self._folder, self._identity)
        if state is None:
            return
        self._step, self._seconds, self._measures = state["step"], state["seconds"], state["measures"]
        self._model.load_state_dict(state["model"])
        if self._average is not None:
            for name, tensor in state["average"].items():
                self._average.tensors[name].copy_(tensor)
        if self._step < self._options.steps:
            self._optimiser.load_state_dict(state["optimiser"])
            self._scaler.load_state_dict(state["scaler"])
            log.info("%s: goes on at step %d of %d", self._extras.title, self._step, self._options.steps)

    def _save(self, is_last: bool) -> None:
        state: dict[str, Any] = {
            "identity": self._identity,
            "step": self._step,
            "seconds": self._seconds,
            "measures": self._measures,
            "model": self._model.state_dict(),
        }
        if self._average is not None:
            state["average"] = self._average.tensors
        # What only further steps need makes up two thirds of the file.
        if not is_last:
            state |= {"optimiser": self._optimiser.state_dict(), "scaler": self._scaler.state_dict()}
        write_checkpoint(self._folder, state)

    def _draw(self) -> None:
        rows, measures = read_table(self._folder / LOG), read_table(self._folder / MEASURES)
        write_atomic(self._folder / CURVE, draw_training(rows, measures, self._extras.title))


class _Watch:
    """Ends a training whose loss or gradient is not a number, naming the batch.

    A CUDA device is not waited for: the values of a step are looked at when those of the next are under way.
    """

    def __init__(self, data: TrainingData, device: torch.device, num_ranks: int = 1) -> None:
        self._data, self._device, self._is_cuda = data, device, device.type == "cuda"
        self._num_others = num_ranks - 1
        self._waiting: tuple[list[BatchDraw], Tensor, Any] | None = None

    def add(self, draws: list[BatchDraw], loss: Tensor, norm: Tensor | None) -> None:
        """Take the loss and, unless it was scaled, the length of the gradient of a step; check the step before."""
        values = torch.stack([loss.detach().float(), (loss if norm is None else norm).detach().float()])
        event = None
        if self._is_cuda:
            values = values.to("cpu", non_blocking=True)
            # The device of the training may not be the process's current one, whose stream knows nothing of the copy.
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._device))
        self.check()
        self._waiting = draws, values, event
        if not self._is_cuda:
            self.check()

    def check(self) -> None:
        """Look at the values that wait.

        Raises:
            TrainingError: one is not finite.
        """
        if self._waiting is None:
            return
        (draws, values, event), self._waiting = self._waiting, None
        if event is not None:
            event.synchronize()
        loss, norm = values.tolist()
        if values.isfinite().all():
            return
        names = [self._data.name_of(item) for draw in draws for item in draw.items]
        more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
        # A gradient is the mean of all processes', each of which names its own items.
        more += f", or on those of {self._num_others} other processes" if self._num_others else ""
        raise TrainingError(
            f"training, step {draws[0].step}: got loss {loss:g} and a gradient of length {norm:g} on "
            f"{', '.join(names[:_MAX_NAMED])}{more}, expected finite numbers; look at these, or try a lower "
            "learning_rate or precision=float32"
        )


def build_optimiser(model: nn.Module, options: TrainingOptions, extras: Extras) -> torch.optim.Optimizer:
    """Return the optimiser of the parameters that require a gradient; each group has the key `factor`.

    Raises:
        ConfigError: no parameter requires a gradient.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_decayed = parameter.ndim >= 2 and not any(name.startswith(start) for start in extras.undecayed)
        fitting = [start for start in extras.rate_factors if name.startswith(start)]
        factor = extras.rate_factors[max(fitting, key=len)] if fitting else 1.0
        groups.setdefault((options.weight_decay if is_decayed else 0.0, factor), []).append(parameter)
    if not groups:
        raise ConfigError("training: got a model whose parameters are all frozen, expected one or more to train")
    listed: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay, "factor": factor}
        for (decay, factor), parameters in groups.items()
    ]
    if options.optimiser == "sgd":
        return torch.optim.SGD(listed, lr=options.learning_rate, momentum=options.momentum)
    return torch.optim.AdamW(listed, lr=options.learning_rate, betas=options.betas)


def _choose_precision(device: Device, options: TrainingOptions) -> Device:
    """Return the device with the precision of the training.

    Raises:
        ConfigError: float16 anywhere but on CUDA.
    """
    chosen = device if options.precision == "auto" else replace(device, precision=options.precision)
    if chosen.precision == "float16" and chosen.torch_device.type != "cuda":
        raise ConfigError(
            f"training.precision: got float16 on {chosen.torch_device.type}, expected it on cuda only; try bfloat16"
        )
    return chosen


def _cast(device: Device) -> AbstractContextManager[None]:
    """Return the context of a forward pass in the device's precision.

    The backward pass keeps what a layer was cast to by itself, but not the switches for TF32. `Device.autocast` would
    wait for the device to measure the time.
    """
    dtype = PRECISIONS[device.precision]
    return device.hold_tf32() if dtype is None else torch.autocast(device.torch_device.type, dtype=dtype)


def _seed_generators(seed: int) -> None:
    """Seed PyTorch's generators of all devices."""
    torch.manual_seed(seed)


@contextmanager
def _keep_random_state(device: torch.device) -> Iterator[None]:
    """Leave the caller's random state as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
