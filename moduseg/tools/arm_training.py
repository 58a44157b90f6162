"""What the training of an ARM is made of: windows of images in the features of a host, the loss, the measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.backbones.arm import Arm
from moduseg.datasets.base import Dataset
from moduseg.errors import DataError
from moduseg.evaluation.confusion import ConfusionMatrix, label_counts
from moduseg.evaluation.measures import mean_iou
from moduseg.pseudo_masks.clip_words import ClipWordsGenerator
from moduseg.structures import IGNORE_INDEX, Proposals, Sample
from moduseg.training.data import BatchDraw, derive_seed

FindProposals = Callable[[Sample], Proposals]


@dataclass(frozen=True)
class HostWindows:
    """Training data of an ARM: a window of each drawn image, all in the features of one host.

    Attributes:
        dataset: the split, with masks.
        hosts: generators by the host's name.
        find_proposals: returns those of an image, for hosts that look at them.
        flip: whether half of the windows are mirrored.
        seed: of the hosts' order.
    """

    dataset: Dataset
    hosts: Mapping[str, ClipWordsGenerator]
    find_proposals: FindProposals
    flip: bool = True
    seed: int = 0

    def __len__(self) -> int:
        return len(self.dataset.ids)

    def name_of(self, item: int) -> str:
        """Return the id of an image."""
        return self.dataset.ids[item]

    def load(self, draw: BatchDraw) -> dict[str, Any]:
        """Return `host`, `windows` (`[h, w, 3]` uint8 arrays), `labels` (`[h, w]` int64) and `regions` or `None`.

        Raises:
            DataError: an image cannot be used, or has no mask.
        """
        names = list(self.hosts)
        host = names[derive_seed(self.seed, 3, draw.step) % len(names)]
        drawn = [self._cut(self.hosts[host], item, seed) for item, seed in zip(draw.items, draw.seeds, strict=True)]
        windows, labels, regions = zip(*drawn, strict=True)
        has_regions = regions[0] is not None
        return {"host": host, "windows": windows, "labels": labels, "regions": regions if has_regions else None}

    def _cut(self, host: ClipWordsGenerator, item: int, seed: int) -> tuple[np.ndarray, Tensor, Tensor | None]:
        """Return one window of an image."""
        sample = self.dataset.load(self.dataset.ids[item], truth=True, labels=False)
        if sample.semantic is None:
            raise DataError(f"{sample.id}: got no mask, expected one of each training image; take it out of the list")
        proposals = self.find_proposals(sample) if host.needs_proposals else None
        windows = list(host.cut_windows(sample, sample.semantic, proposals))
        window, semantic, regions = windows[(seed >> 1) % len(windows)]
        labels = torch.from_numpy(semantic.astype(np.int64))
        if self.flip and seed & 1:
            window, labels = np.ascontiguousarray(window[:, ::-1]), labels.flip(1)
            regions = None if regions is None else regions.flip(1)
        return window, labels, None if regions is None else regions.cpu()


def compute_arm_loss(
    arm: Arm, batch: Mapping[str, Any], hosts: Mapping[str, ClipWordsGenerator], label_stride: int
) -> dict[str, Tensor]:
    """Return the cross-entropy of the windows' pixels over the labels of the words, as `loss`.

    A label has its best word's similarity, as it has when labels are read. Pixels of no label, and those of a label
    without words, do not count.

    Args:
        arm: the module; gradients reach nothing else.
        batch: what `HostWindows` loads, tensors on the device.
        hosts: generators by the host's name.
        label_stride: every so-manyth row and column of pixels counts.
    """
    host = hosts[batch["host"]]
    host.use_arm(arm)
    label_of_word = host.words.labels
    labels = sorted(set(label_of_word))
    targets = torch.full((IGNORE_INDEX + 1,), -100, dtype=torch.int64)
    targets[labels] = torch.arange(len(labels))
    regions = None if batch["regions"] is None else list(batch["regions"])
    total = num_pixels = torch.zeros((), device=host.source.device.torch_device)
    first = label_stride // 2
    for cosines, truth in zip(host.compare_windows(list(batch["windows"]), regions), batch["labels"], strict=True):
        seen = cosines[:, first::label_stride, first::label_stride]
        best = _take_best_words(seen, label_of_word, labels)
        target = targets.to(truth.device)[truth[first::label_stride, first::label_stride]]
        logits = host.base_logit_scale * arm.scale_factor * best.flatten(1).T
        total = total + F.cross_entropy(logits, target.flatten(), ignore_index=-100, reduction="sum")
        num_pixels = num_pixels + (target >= 0).sum()
    return {"loss": total / num_pixels.clamp(min=1)}


def _take_best_words(similarities: Tensor, label_of_word: tuple[int, ...], labels: list[int]) -> Tensor:
    """Return the largest of `[Q, ...]` over the words of each label, which lie side by side, `[S, ...]`."""
    sizes = [label_of_word.count(label) for label in labels]
    if max(sizes) == 1:
        return similarities
    return torch.stack([part.amax(0) for part in similarities.split(sizes)])


class HostCheck:
    """Measures pseudo masks of the first images of a split, by each host with and without an ARM.

    Args:
        dataset: the split, with masks.
        hosts: generators by the host's name.
        find_proposals: returns those of an image, for hosts that look at them.
        num_images: how many images are labelled.
    """

    def __init__(
        self,
        dataset: Dataset,
        hosts: Mapping[str, ClipWordsGenerator],
        find_proposals: FindProposals,
        num_images: int,
    ) -> None:
        self._dataset, self._hosts, self._find_proposals = dataset, hosts, find_proposals
        self._ids = dataset.ids[:num_images]
        self._before: dict[str, float] = {}

    def __call__(self, arm: Arm) -> dict[str, float]:
        """Return mIoU in percent, tags given, of each host; `words`, their mean where all words compete; and how much
        the host gained that gained least, tags given.
        """
        if not self._before:
            self._before = {name: self._measure(host, None)[0] for name, host in self._hosts.items()}
        after = {name: self._measure(host, arm) for name, host in self._hosts.items()}
        gains = [tags - self._before[name] for name, (tags, _) in after.items()]
        words = sum(words for _, words in after.values()) / len(after)
        return {**{name: tags for name, (tags, _) in after.items()}, "words": words, "smallest_gain": min(gains)}

    @property
    def before(self) -> dict[str, float]:
        """mIoU in percent, tags given, of each host without an ARM, once that was measured."""
        return dict(self._before)

    def _measure(self, host: ClipWordsGenerator, arm: Arm | None) -> tuple[float, float]:
        """Return mIoU with the tags of the masks, and where all words compete."""
        host.use_arm(arm)
        num_labels = self._dataset.num_classes + 1
        with_tags, with_words = ConfusionMatrix(num_labels), ConfusionMatrix(num_labels)
        for image_id in self._ids:
            sample = self._dataset.load(image_id, truth=True, labels=False)
            if sample.semantic is None:
                continue
            maps = host.generate(
                sample,
                tuple(range(1, num_labels)),
                self._find_proposals(sample) if host.needs_proposals else None,
            )
            scores = torch.cat([torch.zeros_like(maps.scores[:1]), maps.scores]).cpu()
            if maps.background is not None:
                scores[0] = maps.background
            with_words.update(sample.semantic, scores.argmax(0).numpy(), image_id)
            # Dropping words before the softmax leaves the order of the others.
            is_absent = torch.ones(num_labels, dtype=torch.bool)
            is_absent[np.unique(sample.semantic[sample.semantic != IGNORE_INDEX]).tolist()] = False
            is_absent[0] = maps.background is None
            scores[is_absent] = -1
            with_tags.update(sample.semantic, scores.argmax(0).numpy(), image_id)
        host.use_arm(None)
        has_background = self._dataset.has_background
        figures = (mean_iou(label_counts(m.matrix, has_background)) for m in (with_tags, with_words))
        return tuple(round(float(value), 2) for value in figures)  # type: ignore[return-value]
