"""A plot as an SVG element with a description, in colours that colour-blind people tell apart."""

import io
from collections.abc import Callable

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's; markers, hatches and strokes say the same.
BLUE, ORANGE, GREEN, RED = "#0072b2", "#e69f00", "#009e73", "#d55e00"
PINK, SKY, YELLOW, GREY, INK = "#cc79a7", "#56b4e9", "#f0e442", "#9aa5b1", "#1d2733"
COLOURS = (BLUE, ORANGE, GREEN, RED, PINK, SKY, YELLOW)
MARKERS = "os^Dvp*"

_WIDTH = 4.4  # inches: 9 pt and more stay legible on a phone


def draw_svg(
    title: str, draw: Callable[[Axes], None], *, height: float, said: str, legend: int = 0
) -> Markup:
    """
    Args:
        height: in inches.
        said: what the plot shows, for who cannot see it.
        legend: columns of it, below; 0 for none.
    """
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.size": 10,
        "hatch.linewidth": 0.6,
        "text.parse_math": False,
    }
    with matplotlib.rc_context(style):
        drawing = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = drawing.add_subplot()
        draw(axes)
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if legend:
            drawing.legend(loc="outside lower left", ncols=legend, frameon=False, fontsize=9)
        drawn = io.StringIO()
        drawing.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    # The text is matplotlib's, which escapes labels; the description is escaped here.
    return Markup('<svg role="img" aria-label="{}" ').format(f"{title}: {said}") + Markup(
        text[text.index("<svg") + len("<svg ") :]
    )


def short_label(name: str) -> str:
    """Short, and of letters that every font has."""
    plain = "".join(c if c.isascii() and c.isprintable() else "?" for c in name)
    return plain if len(plain) <= 24 else f"{plain[:21]}..."
