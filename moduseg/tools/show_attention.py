"""The command `show_attention` draws where a text-to-image model sees words in one image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moduseg import pseudo_masks
from moduseg.backbones.base import Backbone
from moduseg.config import Config, compose
from moduseg.config.command_keys import ShowAttentionOptions
from moduseg.datasets.image_files import find_images
from moduseg.datasets.io import read_image
from moduseg.devices import resolve_device
from moduseg.errors import ConfigError, MissingError
from moduseg.files import write_atomic
from moduseg.pipeline.workspace import log
from moduseg.pseudo_masks.diffusion_words import DiffusionWordsGenerator
from moduseg.report.overlay import overlay_heat, resize_image
from moduseg.report.panel import choose_display_size, stack_panels
from moduseg.structures import Sample


def main(options: ShowAttentionOptions, overrides: Sequence[str]) -> int:
    """Draw the figure, and return 0."""
    run(options, overrides)
    return 0


def run(options: ShowAttentionOptions, overrides: Sequence[str] = ()) -> Path:
    """Write a figure with a row for each word: the image, the word's map, and the map after completion.

    Args:
        options: the image, the words, and the file to write.
        overrides: of the configuration: `pseudo_masks=iseg_voc`, `runtime.device=cuda`.

    Returns:
        The PNG file.

    Raises:
        ConfigError: a generator that reads no diffusion model.
        MissingError, DataError: no such image, or one that cannot be read; no weights.
    """
    generator = build_generator(compose(overrides), options.words)
    files = find_images([options.image])
    if len(files) != 1:
        raise MissingError(f"image: got {len(files)} images in '{options.image}', expected one file; name one of them")
    ((image_id, file),) = files.items()
    sample = Sample(image_id, read_image(file))

    maps = generator.read_words(sample, {word: word for word in options.words})
    size = choose_display_size(sample.size)
    photograph = resize_image(sample.image, size)
    seen, completed = (generator.to_scores(each, size).cpu().numpy() for each in (maps.seen, maps.completed))
    panels = [
        [
            (word, photograph),
            ("cross-attention", overlay_heat(photograph, seen[row])),
            ("completed", overlay_heat(photograph, completed[row])),
        ]
        for row, word in enumerate(options.words)
    ]
    out = Path(options.out).expanduser()
    write_atomic(out, stack_panels(panels))
    log.info("show_attention: %d words -> %s", len(options.words), out)
    return out


def build_generator(cfg: Config, words: Sequence[str]) -> DiffusionWordsGenerator:
    """Return the generator of a configuration, with words in place of a data set's classes.

    Raises:
        ConfigError: a generator that reads no diffusion model.
    """
    settings = dict(cfg.pseudo_masks.generator)
    if "class_words" in settings:
        settings["class_words"] = None  # what is asked for is written as it is
    device = resolve_device(cfg.runtime.device, cfg.runtime.precision)
    generator = pseudo_masks.build(settings, device, _refuse_backbone, ("background", *words))
    if not isinstance(generator, DiffusionWordsGenerator):
        raise ConfigError(
            f"pseudo_masks.generator.name: got {settings.get('name')!r}, expected a generator that reads a diffusion "
            "model; try pseudo_masks=iseg_voc"
        )
    return generator


def _refuse_backbone() -> Backbone:
    raise ConfigError("show_attention: got a generator that needs a backbone, expected iseg or diffsegmenter")
