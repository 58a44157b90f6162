"""Any printable name of a folder, an image or a mask is read, stored and found again."""

from __future__ import annotations

import csv
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from moduseg import datasets
from moduseg.cli.options import parse
from moduseg.config.command_keys import PredictOptions
from moduseg.datasets.image_files import find_images
from moduseg.files import write_atomic
from moduseg.pipeline.manifests import stored_name

NAMES = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="/\\"), min_size=1, max_size=12)

"""Without the two characters that separate folders, which ids may not hold; `tests/config` has the command line."""
FOLDER = {"name": "folder", "labels": "auto", "train_split": "train", "val_split": "val"}


@given(NAMES, NAMES)
@settings(max_examples=25, deadline=None)
@example("photos (1)", "it's")
@example("tag#1", "a&b,c")
@example("日本", 'say "a"')
@example("${x}", "x;y")
@example("[a]", "a=b")
@example("Größe", "50%")
@example("compatibility form", "\uf900")
def test_any_printable_name_is_read(folder: str, name: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / f"of {folder}"
        for part in ("images", "masks"):
            (root / part).mkdir(parents=True)
        # The file is named as drawn; its id is the NFC of that, whatever form lists and labels have.
        file_name = f"p{name}"
        image_id = unicodedata.normalize("NFC", file_name)
        Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(root / "images" / f"{file_name}.png")
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(root / "masks" / f"{file_name}.png")
        (root / "classes.txt").write_text("background\ndisc\n", encoding="utf-8")
        with (root / "labels.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("image", "labels"), (f"{file_name}.png", "disc")])
        dataset = datasets.build({**FOLDER, "root": str(root)}, "train")
        assert list(dataset.ids) == [image_id]
        sample = dataset.load(image_id, truth=True)
        assert sample.labels == (1,)
        assert sample.semantic is not None
        assert sample.semantic.diagonal().tolist() == [1] * 8
        # What a stage stores for the image.
        write_atomic(root / stored_name("label_map", image_id), b"x")
        assert (root / "labels" / f"{image_id}.png").read_bytes() == b"x"
        # The same image as `predict` is given it.
        for path in (root / "images", root / "images" / f"{file_name}.png"):
            options, _ = parse(["bank=b", f"images={path}"], PredictOptions, "predict")
            assert list(find_images([Path(text) for text in options.images])) == [image_id]
