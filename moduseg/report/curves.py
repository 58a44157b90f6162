"""Draw the figures of a sweep: a small plot for each parameter."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Curve:
    """How a figure depends on one parameter.

    Attributes:
        name: of the parameter.
        values: as text, in the order of the axis.
        line: figure at each value, the other parameters held fixed.
        average, lowest, highest: of the figure over all settings with this value.
        default: index of the configuration's own value; `None` if it is not among them.
    """

    name: str
    values: Sequence[str]
    line: Sequence[float]
    average: Sequence[float]
    lowest: Sequence[float]
    highest: Sequence[float]
    default: int | None = None

    def __post_init__(self) -> None:
        counts = {len(s) for s in (self.values, self.line, self.average, self.lowest, self.highest)}
        if len(counts) != 1 or not self.values:
            raise ValueError(f"curve {self.name}: got {sorted(counts)} values, expected as many of each, one or more")


def draw_curves(parameters: Sequence[Curve], title: str, unit: str) -> bytes:
    """Return a PNG with a plot for each parameter, all on the same vertical axis.

    Values stand at equal distances, numbers or not. The band reaches from the lowest to the highest figure of all
    settings with a value; a star marks the configuration's own value.

    Raises:
        ValueError: no parameters.
    """
    if not parameters:
        raise ValueError("curves: got no parameter, expected one or more")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(parameters), 4)
    lines = -(-len(parameters) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.8 * lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    figure.suptitle(title, fontsize=10)
    for index, axes in enumerate(grid.flat):
        if index >= len(parameters):
            axes.set_visible(False)
            continue
        curve = parameters[index]
        positions = range(len(curve.values))
        axes.fill_between(positions, curve.lowest, curve.highest, alpha=0.2, label="lowest to highest")
        axes.plot(positions, curve.average, "--", label="mean over the others")
        axes.plot(positions, curve.line, "o-", label="others as they are")
        if curve.default is not None:
            axes.plot([curve.default], [curve.line[curve.default]], "*", markersize=13, color="black", label="as it is")
        axes.set_xticks(
            list(positions), curve.values, rotation=30 if max(map(len, curve.values)) > 5 else 0, fontsize=8
        )
        axes.set_xlabel(curve.name, fontsize=9)
        axes.grid(alpha=0.3)
        if index % columns == 0:
            axes.set_ylabel(unit, fontsize=9)
    grid.flat[0].legend(fontsize=6)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()
