"""Draw what folders of photographs cost, by their number.

`python -m benchmarks.photographs_chart outputs/benchmark/benchmark.json <picture>.png`

`scripts/benchmark.py only=photographs` draws it too, as `photographs.png` beside its table.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.photographs import PEAK_MB, SECONDS

_SECONDS_COLOUR, _MEMORY_COLOUR, _TARGET_COLOUR = "#2f6db5", "#2f6db5", "#9a9a9a"


def draw_chart(details: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a PNG of seconds and peak memory by number of photographs, with their targets.

    Args:
        details: `photographs`, `cpu_seconds` and `megabytes` of each measured folder; one or more.

    Raises:
        ValueError: nothing measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not details:
        raise ValueError("photographs: got no measured folder, expected one or more; run the benchmark first")
    measured = sorted(details, key=lambda row: int(row["photographs"]))
    counts = [row["photographs"] for row in measured]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    seconds, memory = figure.subplots(1, 2)
    seconds.plot(counts, [row["cpu_seconds"] for row in measured], "o-", color=_SECONDS_COLOUR, label="measured")
    seconds.plot([0, counts[-1]], [0, SECONDS * counts[-1]], "--", color=_TARGET_COLOUR, label=f"{SECONDS:g} s each")
    seconds.set_title("CPU seconds, everything", fontsize=10)
    memory.plot(counts, [row["megabytes"] for row in measured], "o-", color=_MEMORY_COLOUR, label="measured")
    memory.axhline(PEAK_MB, linestyle="--", color=_TARGET_COLOUR, label=f"{PEAK_MB:g} MB")
    memory.set_title("peak memory, MB", fontsize=10)
    for axes in (seconds, memory):
        axes.set_xlabel("photographs")
        axes.set_xticks(counts)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    # Without the version of matplotlib, equal figures give equal files.
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def main() -> None:
    """Draw the rows of a benchmark's JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("benchmark", type=Path, help="benchmark.json of scripts/benchmark.py")
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    rows = json.loads(arguments.benchmark.read_text(encoding="utf-8"))["rows"]
    picture = draw_chart([row["details"] for row in rows if "photographs" in row["details"]])
    arguments.picture.write_bytes(picture)


if __name__ == "__main__":
    main()
