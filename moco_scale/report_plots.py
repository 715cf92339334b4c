"""Curves of a run, or of several laid over one another."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from moco_scale.drawing import COLOURS, GREY, draw_svg, short_label
from moco_scale.figures import figure

STROKES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
MOST_CURVES = len(STROKES)
"""That can be told apart."""
_MOST_POINTS = 400


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """One run's values of a figure."""

    name: str
    points: Sequence[tuple[float, float]]
    """Steps or images, and values; at least one."""
    filled_at: float | None = None
    """Where the queue holds real keys only."""
    guessing: float | None = None
    """The value of a guess."""


def curves_plot(
    title: str, curves: Sequence[Curve], *, across: str, from_zero: bool = False
) -> Markup | None:
    """The curves in one plot; None of none.

    Args:
        across: what the horizontal axis counts.
    """
    if not curves:
        return None

    def draw(axes: Axes) -> None:
        for curve, colour, stroke in zip(curves, COLOURS, STROKES, strict=False):
            steps, values = _thinned(curve.points)
            axes.plot(
                steps, values, color=colour, linewidth=1.5, linestyle=stroke,
                marker="o" if len(steps) == 1 else None, label=short_label(curve.name),
            )  # fmt: skip
            if curve.filled_at is not None:
                alone = len(curves) == 1
                axes.axvline(
                    curve.filled_at, color=GREY if alone else colour, linewidth=1, linestyle="--"
                )
        for level in dict.fromkeys(one.guessing for one in curves if one.guessing is not None):
            axes.axhline(level, color=GREY, linewidth=1, linestyle=":")
            axes.annotate(
                "guessing", (1, level), xycoords=("axes fraction", "data"),
                ha="right", va="bottom", color="#566473", fontsize=9,
            )  # fmt: skip
        _zoom(axes, curves)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", nbins=6, integer=True)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel(across)

    said = "; ".join(
        f"{one.name} {figure(one.points[0][1])} to {figure(one.points[-1][1])}".strip()
        for one in curves
    )
    legend = min(3, len(curves)) if len(curves) > 1 else 0
    return draw_svg(title, draw, height=2.7 + 0.2 * (legend > 0), said=said, legend=legend)


def _zoom(axes: Axes, curves: Sequence[Curve]) -> None:
    """To what comes behind the lines: against random keys everything looks easy."""
    shown: list[float] = []
    for curve in curves:
        before = [0.0, *(step for step, _ in curve.points)]
        shown += [
            value
            for start, (_, value) in zip(before, curve.points, strict=False)
            if start >= (curve.filled_at or 0.0)
        ]
    if shown and any(curve.filled_at is not None for curve in curves):
        shown += [curve.guessing for curve in curves if curve.guessing is not None]
        room = 0.05 * (max(shown) - min(shown)) or 1.0
        axes.set_ylim(min(shown) - room, max(shown) + room)


def _thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Means of neighbouring points, so that a long run's page stays small."""
    parts = np.array_split(np.array(points), min(len(points), _MOST_POINTS))
    steps, values = zip(*(part.mean(axis=0).tolist() for part in parts), strict=True)
    return list(steps), list(values)
