"""Draw quality against time: a point for each form of each method."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@dataclass(frozen=True)
class Point:
    """A form of a method.

    Attributes:
        method, form: names; a colour for each method, a marker for each form.
        seconds: of one picture, above 0.
        miou: in percent.
        low, high: ends of its interval; `None` without.
        is_told_tags: whether the tags of the picture were given, which is an easier task: it is drawn hollow.
    """

    method: str
    form: str
    seconds: float
    miou: float
    low: float | None = None
    high: float | None = None
    is_told_tags: bool = False

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"point {self.method}, {self.form}: got {self.seconds} seconds, expected above 0")


def find_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other one beats in both time and quality, the fastest first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.seconds, -p.miou)):
        if not front or point.miou > front[-1].miou:
            front.append(point)
    return front


def draw_quality_time(points: Sequence[Point], title: str, time_label: str) -> dict[str, bytes]:
    """Return the figure as `png` and `svg`; equal points give equal bytes.

    Args:
        points: in the order of the legend; without any the axes are empty.
        title: above the figure.
        time_label: of the horizontal axis, which is logarithmic; the grey line joins the best points without tags.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(8.6, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    methods, forms = (list(dict.fromkeys(getattr(p, name) for p in points)) for name in ("method", "form"))
    colours = [matplotlib.colormaps["tab10"](index % 10) for index in range(len(methods))]
    front = find_front([point for point in points if not point.is_told_tags])
    if front:
        axes.step([p.seconds for p in front], [p.miou for p in front], where="post", color="0.7", linewidth=1, zorder=1)
    for point in points:
        colour, marker = colours[methods.index(point.method)], _MARKERS[forms.index(point.form) % len(_MARKERS)]
        if point.low is not None and point.high is not None:
            axes.vlines(point.seconds, point.low, point.high, color=colour, linewidth=1, alpha=0.45, zorder=2)
        face, edge = ("white", colour) if point.is_told_tags else (colour, "white")
        (mark,) = axes.plot(point.seconds, point.miou, marker=marker, markersize=7, linestyle="none", zorder=3)
        mark.set(markerfacecolor=face, markeredgecolor=edge)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(time_label)
    axes.set_ylabel("mIoU, percent")
    axes.set_title(title, fontsize=10)
    axes.grid(which="both", alpha=0.25)
    handles = [axes.plot([], [], "o", color=c, label=m)[0] for m, c in zip(methods, colours, strict=True)]
    shapes = [
        axes.plot([], [], _MARKERS[i % len(_MARKERS)], color="0.35", label=form)[0] for i, form in enumerate(forms)
    ]
    told = {form for form in forms if any(p.is_told_tags for p in points if p.form == form)}
    for shape, form in zip(shapes, forms, strict=True):
        if form in told:
            shape.set(markerfacecolor="white", markeredgecolor="0.35", label=f"{form}, tags given")
    lines = [axes.plot([], [], color="0.7", label="best for its time")[0]]
    figure.legend(handles=[*handles, *shapes, *lines], loc="outside right upper", fontsize=8, frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "moduseg", "svg.fonttype": "none"}):
        return {
            "png": _save(figure, "png", {"Software": None}),
            "svg": _save(figure, "svg", {"Date": None, "Creator": None}),
        }


def _save(figure: object, suffix: str, metadata: dict[str, None]) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix, dpi=130, metadata=metadata)  # type: ignore[attr-defined]
    return buffer.getvalue()
