from __future__ import annotations

import io

import pytest
from PIL import Image

from moduseg.report.curves import Curve, draw_curves


def curve(name: str, default: int | None = None) -> Curve:
    return Curve(
        name, ["1", "cap", "null"], [3.0, 4.0, 5.0], [2.0, 3.0, 4.0], [1.0, 2.0, 3.0], [4.0, 5.0, 6.0], default
    )


@pytest.mark.parametrize(("count", "columns", "lines"), [(1, 1, 1), (4, 4, 1), (5, 4, 2)])
def test_a_panel_for_each_parameter(count: int, columns: int, lines: int) -> None:
    content = draw_curves([curve(f"p{i}", default=i % 3 or None) for i in range(count)], "title", "mIoU")
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.size == (round(120 * 3.2 * columns), round(120 * (2.8 * lines + 0.5)))
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50
    assert content == draw_curves([curve(f"p{i}", default=i % 3 or None) for i in range(count)], "title", "mIoU")


def test_bad_values() -> None:
    with pytest.raises(ValueError, match="got no parameter"):
        draw_curves([], "title", "mIoU")
    with pytest.raises(ValueError, match=r"curve k: got \[1, 2\] values"):
        Curve("k", ["1", "2"], [1.0], [1.0], [1.0], [1.0])
