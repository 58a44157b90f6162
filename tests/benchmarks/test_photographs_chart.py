"""The chart of what folders of photographs cost."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import photographs_chart
from benchmarks.photographs_chart import draw_chart

ROWS = [
    {"photographs": 24, "cpu_seconds": 90.0, "megabytes": 1600.0},
    {"photographs": 6, "cpu_seconds": 25.0, "megabytes": 1400.0},
]


def test_a_chart_is_a_picture_of_its_rows() -> None:
    """In any order; other figures give another picture."""
    picture = draw_chart(ROWS)
    assert picture == draw_chart(ROWS[::-1])
    assert np.asarray(Image.open(io.BytesIO(picture))).shape[:2] == (384, 960)
    assert picture != draw_chart([{**ROWS[0], "megabytes": 900.0}, ROWS[1]])
    with pytest.raises(ValueError, match="got no measured folder"):
        draw_chart([])


def test_a_chart_is_drawn_of_a_benchmarks_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of other figures, and those that were not measured, have no point."""
    rows = [{"details": details} for details in ({"ratio": 2.0}, {}, *ROWS)]
    (tmp_path / "benchmark.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(sys, "argv", ["chart", str(tmp_path / "benchmark.json"), str(tmp_path / "chart.png")])
    photographs_chart.main()
    assert (tmp_path / "chart.png").read_bytes() == draw_chart(ROWS)
