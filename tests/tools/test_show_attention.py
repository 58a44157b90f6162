"""The figure of a text-to-image model's attention, from the command line."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from moduseg.cli.options import parse
from moduseg.datasets.io import write_rgb_png
from moduseg.errors import ConfigError, DataError, MissingError
from moduseg.report.overlay import overlay_heat
from moduseg.report.panel import draw_panel, stack_panels
from moduseg.tools import show_attention
from moduseg.tools.show_attention import ShowAttentionOptions
from tests.support.tiny_diffusion import save_tiny_diffusion

Words = tuple[Path, int, int]
LEVELS = "pseudo_masks.generator.cross=[{weight: 1.0, side: 8}]"


@pytest.fixture(scope="module")
def weights(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_diffusion(words, tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    file = tmp_path / "a photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    file.write_bytes(write_rgb_png(pixels))
    return file


def run(image: Path, *arguments: str) -> Path:
    return show_attention.run(
        *parse([f"image={image}", "runtime.device=cpu", *arguments], ShowAttentionOptions, "show_attention")
    )


@pytest.mark.parametrize("generator", [
    pytest.param(["pseudo_masks=iseg_voc", LEVELS, "pseudo_masks.generator.self_places=[up3.1]",
                  "pseudo_masks.generator.self_heads=null", "pseudo_masks.generator.background_words=none"], id="iSeg"),
    pytest.param(["pseudo_masks=diffsegmenter_voc", LEVELS, "pseudo_masks.generator.completion=[16]",
                  "pseudo_masks.generator.captioner.name=none"], id="DiffSegmenter"),
])  # fmt: skip
def test_every_word_has_a_row(generator: list[str], image: Path, weights: Path, tmp_path: Path) -> None:
    settings = [*generator, f"pseudo_masks.generator.weights={weights}", "pseudo_masks.generator.image_side=128"]
    figures = {}
    for words in ("red disc", "red disc;ring"):
        out = run(image, f"words={words}", f"out={tmp_path / 'made' / 'figure.png'}", *settings)
        figures[words] = cv2.imread(str(out))
    one, two = figures["red disc"], figures["red disc;ring"]
    assert two.shape == (2 * one.shape[0], one.shape[1], 3)
    # Columns: the photograph, then two maps of it, which differ.
    left, middle, right = np.split(two[: one.shape[0], 8 : 8 + 3 * (one.shape[1] - 8) // 3 // 3 * 3], 3, 1)
    assert not np.array_equal(left, middle)
    assert not np.array_equal(middle, right)
    assert not np.array_equal(two[: one.shape[0]], two[one.shape[0] :])


def test_a_generator_without_a_diffusion_model_is_refused(image: Path) -> None:
    with pytest.raises(ConfigError, match=r"generator\.name: got 'clip_dense', .*try pseudo_masks=iseg_voc"):
        run(image, "words=dog")


@pytest.mark.parametrize(("words", "message"), [
    pytest.param("", r"words: got", id="none"),
    pytest.param("dog;dog", r"words: got \['dog', 'dog'\], expected each once", id="twice"),
])  # fmt: skip
def test_words_are_checked(words: str, message: str, image: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        run(image, f"words={words}")


def test_an_image_is_one_file(image: Path, tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(image.read_bytes())
    with pytest.raises(MissingError, match=r"^image: got 2 images"):
        run(tmp_path, "words=dog", "pseudo_masks=iseg_voc")
    with pytest.raises((MissingError, DataError), match=r"nowhere"):
        run(tmp_path / "nowhere.png", "words=dog", "pseudo_masks=iseg_voc")


def test_heat_goes_from_dark_to_bright() -> None:
    picture = np.full((1, 3, 3), 100, np.uint8)
    painted = overlay_heat(picture, np.array([[0.0, 0.5, 1.0]])).astype(int)
    assert (np.diff(painted.sum(-1)) > 0).all()
    assert painted[0, 1, 0] > painted[0, 1, 2] + 50  # red in the middle
    with pytest.raises(ValueError, match=r"got \(2, 3\), expected the image's \(1, 3\)"):
        overlay_heat(picture, np.zeros((2, 3)))


def test_stacked_panels_are_panels() -> None:
    rows = [[("a", np.zeros((20, 30, 3), np.uint8))], [("a long title of a row", np.full((200, 10, 3), 9, np.uint8))]]
    stacked, *singles = (
        cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
        for png in (stack_panels(rows), *map(draw_panel, rows))
    )
    assert stacked.shape[0] == sum(single.shape[0] for single in singles)
    top = 0
    for single in singles:
        assert np.array_equal(stacked[top : top + len(single), : single.shape[1]], single)
        top += len(single)
    with pytest.raises(ValueError, match="got no row"):
        stack_panels([])
