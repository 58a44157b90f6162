"""What one correction changes in the app, as `docs/app.md` has it: `python -m benchmarks.corrections [bank=<folder>]`.

Regions of a picture are named one after the other; a line says the label of the region before and after, how many
other regions changed with it, and the seconds until the new picture is there. With a bank of the embedded world the
pictures are scenes of its validation split; without a bank, it begins as `demo_app bank=new` does, with two photographs
of scikit-image.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from skimage import data

from moduseg.api import Segmenter
from moduseg.app.session import Session
from moduseg.miniature.world.scenes import WorldConfig, render_scene

SCENES = (4, 5, 8)
NEW = "new shape"
"""The name that an object of each scene is given."""
PHOTOGRAPHS: dict[str, list[tuple[tuple[int, int], str]]] = {
    "coffee": [((300, 200), "cup"), ((60, 60), "background"), ((330, 350), "cup")],
    "chelsea": [((230, 110), "cat"), ((20, 30), "background"), ((430, 40), "background")],
}
"""Points `(x, y)`, and what is there, in the order in which they are named."""


def name_region(session: Session, title: str, point: tuple[int, int], label: str) -> None:
    """Name the region at a point, and print what changed; then take it back and do it again."""
    proposal = session.at(*point)
    if proposal is None:
        proposal = session.draw((*point, *point))
    start = time.perf_counter()
    change = session.correct(proposal, label)
    seconds = time.perf_counter() - start
    region = change.region
    if region is None:
        raise AssertionError("a correction names a region")
    before, after = region.before, session.prediction.label_map
    row = (title, str(point), before, region.after, change.num_others, f"{100 * change.share:.1f}", f"{seconds:.2f}")
    print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)
    session.undo()
    session.redo()
    if not np.array_equal(after, session.prediction.label_map):
        raise AssertionError("undo and redo give another label map")


def main(arguments: list[str]) -> None:
    """Print the table."""
    banks = [argument.removeprefix("bank=") for argument in arguments if argument.startswith("bank=")]
    print("| picture | at | region before | after | other regions that changed | % of the area | seconds |")
    print("|---|---|---|---|--:|--:|--:|")
    if banks:
        session = Session(Segmenter.from_bank(banks[0], "cpu"))
        for scene in SCENES:
            prediction = session.show(render_scene(0, "val", scene, WorldConfig()).image)
            rows, columns = np.nonzero(prediction.label_map)
            point = int(columns[len(columns) // 2]), int(rows[len(rows) // 2])
            for label in (NEW, "background"):
                name_region(session, f"scene {scene}", point, label)
        return
    session = Session(Segmenter.begin(device="cpu"))
    for name, clicks in PHOTOGRAPHS.items():
        session.show(getattr(data, name)())
        for point, label in clicks:
            name_region(session, name, point, label)


if __name__ == "__main__":
    main(sys.argv[1:])
