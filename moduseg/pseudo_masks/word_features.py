"""Features of words: each the normalised mean over its prompts, in the order of labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from moduseg.backbones.clip_model import ClipSource


def encode_words(
    source: ClipSource,
    templates: Sequence[str],
    words_by_label: Sequence[Sequence[str]],
    *,
    merge_classes: bool = False,
) -> tuple[Tensor, list[int]]:
    """Return the features of all words and the label that each stands for.

    Args:
        source: the CLIP.
        templates: sentences with `{}`; a word's feature is the normalised mean over them.
        words_by_label: the words of the background first, then those of each class; some may have none.
        merge_classes: one feature for each class, the normalised mean of its words.

    Returns:
        `[Q, D]` float32 on the device, L2-normalised, and `Q` labels, ascending.
    """
    rows: list[Tensor] = []
    label_of_text: list[int] = []
    for label, words in enumerate(words_by_label):
        if not words:
            continue
        prompts = [template.format(word) for word in words for template in templates]
        features = source.text_features(prompts).unflatten(0, (len(words), -1))
        features = F.normalize(features.mean(1), dim=-1)
        if label and merge_classes:
            features = F.normalize(features.mean(0, keepdim=True), dim=-1)
        rows.append(features)
        label_of_text += [label] * len(features)
    return torch.cat(rows), label_of_text
