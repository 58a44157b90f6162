"""DiffSegmenter: cross-attention of a prompt for each class, completed by self-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from moduseg.devices import Device
from moduseg.diffusion.captions import CaptionerOptions, build_captioner
from moduseg.diffusion.layers import MapRequest
from moduseg.diffusion.model import Latent
from moduseg.diffusion.prompts import Prompt, TokenizedPrompt, write_prompt
from moduseg.pseudo_masks.diffsegmenter_maps import complete, merge_sizes
from moduseg.pseudo_masks.diffusion_maps import renormalise_content, select_columns
from moduseg.pseudo_masks.diffusion_words import KEY, DiffusionWordsGenerator, DiffusionWordsOptions, WordMaps
from moduseg.structures import Sample

ColumnTokens = Literal["all", "last"]


@dataclass(frozen=True, kw_only=True)
class DiffSegmenterOptions(DiffusionWordsOptions):
    """Settings of `DiffSegmenterGenerator`; `cross` and `completion` have to fit the model.

    Attributes:
        num_pluses: `+` signs behind the words of the class; each multiplies their weight by 1.1.
        captioner: what continues the prompt.
        column_tokens: which tokens of a class's words are read, the mean of `all` or the `last` one.
        size_weights: `False` lets all sizes of `cross` count the same.
        completion: sides of the self-attention that completes the maps, each the mean of all layers of this side; none
            leaves them as the cross-attention gives them.
        one_pass: one prompt with all present classes in place of one for each (no part of the paper).
        batch_size: prompts that share a pass.

    Raises:
        ValueError: a value out of range.
    """

    latent: Latent = "sample"
    num_pluses: int = 2
    captioner: CaptionerOptions = field(default_factory=CaptionerOptions)
    column_tokens: ColumnTokens = "all"
    size_weights: bool = True
    completion: tuple[int, ...] = (64,)
    one_pass: bool = False
    batch_size: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_pluses < 0:
            raise ValueError(f"num_pluses: got {self.num_pluses}, expected 0 or more; DiffSegmenter has 2")
        if self.column_tokens not in get_args(ColumnTokens):
            names = ", ".join(get_args(ColumnTokens))
            raise ValueError(f"column_tokens: got {self.column_tokens!r}, expected one of {names}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}, expected 1 or more")


class DiffSegmenterGenerator(DiffusionWordsGenerator):
    """Completes the cross-attention of each class's words by self-attention (DiffSegmenter; Wang et al., 2023).

    One pass for each present class, unless the options say otherwise. Proposals are not used. The published code runs
    an empty prompt beside each and does not read its attention; it is left out here.

    Args:
        options: model, words, sizes and completion.
        device: where everything runs.
        classes: class names, background first.

    Raises:
        ValueError: a value out of range, an unknown preset, or words that do not fit the classes.
    """

    _options: DiffSegmenterOptions

    def __init__(self, options: DiffSegmenterOptions, device: Device, classes: Sequence[str]) -> None:
        super().__init__(options, device, classes)
        self._captioner = build_captioner(options.captioner, device, f"{KEY}.captioner")

    @property
    def digest(self) -> str:
        """Digests of the diffusion model and of what decides the captions.

        Raises:
            MissingError: the weights are not there.
        """
        return "+".join(digest for digest in (self._source.digest, self._captioner.digest) if digest)

    def read_words(self, sample: Sample, words: Mapping[str, str]) -> WordMaps:
        """Return where the model sees words, before and after the completion (`DiffusionWordsGenerator`)."""
        groups = [dict(words)] if self._options.one_pass else [{name: word} for name, word in words.items()]
        size = self._options.batch_size
        with torch.inference_mode():
            prompts = [self._write(sample, group) for group in groups]
            batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
            return WordMaps.mean(
                [
                    _join([self._read(latents, batch, step, seed) for batch in batches])
                    for latents, step, seed in self._draw_latents(sample)
                ]
            )

    def _write(self, sample: Sample, words: Mapping[str, str]) -> Prompt:
        """Return the prompt for one class or more, continued by the captioner."""
        options = self._options
        prompt = write_prompt(
            words,
            template=options.template,
            separator=options.separator,
            head_words=self._head_words,
            num_pluses=options.num_pluses,
        )
        rest = self._captioner.caption(sample, options.separator.join(words), prompt.text)
        return Prompt(prompt.text + rest, prompt.names, prompt.ranges, prompt.weight)

    def _read(self, latents: Tensor, prompts: Sequence[Prompt], step: int, seed: int) -> WordMaps:
        """Return the maps of the classes of some prompts, from one pass."""
        options = self._options
        encoded = self._source.encode_prompts(prompts)
        requests = [
            *(level.request for level in options.cross),
            *(MapRequest(kind="self", side=side) for side in options.completion),
        ]
        attention = self._source.collect(
            latents, encoded.states, requests, steps=[step], noise_seeds=[seed], where=f"{KEY}.cross, completion"
        )
        maps = []
        for row, tokens in enumerate(encoded.tokens):
            of_prompt = [means[row] for means in attention.maps]
            levels, completion = of_prompt[: len(options.cross)], of_prompt[len(options.cross) :]
            seen = self._merge(levels, tokens)
            maps.append(WordMaps(seen, complete(seen, completion)))
        return _join(maps)

    def _merge(self, levels: Sequence[Tensor], tokens: TokenizedPrompt) -> Tensor:
        """Return the maps `[N, C]` of a prompt's classes from its cross-attention of all sizes."""
        options = self._options
        if options.renormalise:
            levels = [renormalise_content(level, tokens.content) for level in levels]
        spans = [span if options.column_tokens == "all" else span[-1:] for span in tokens.spans]
        weights = [level.weight if options.size_weights else 1.0 for level in options.cross]
        return merge_sizes([select_columns(level, spans) for level in levels], weights)


def _join(maps: Sequence[WordMaps]) -> WordMaps:
    """Return the maps of several groups of classes as one."""
    return WordMaps(torch.cat([each.seen for each in maps], 1), torch.cat([each.completed for each in maps], 1))
