"""The plots of a profile's page, each an SVG element with a description."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullFormatter

from moco_scale.drawing import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    INK,
    MARKERS,
    ORANGE,
    PINK,
    RED,
    SKY,
    YELLOW,
    draw_svg,
    short_label,
)
from moco_scale.figures import figure, rate
from moco_scale.forecast import Scale
from moco_scale.profile_rows import StageRow, own_times
from moco_scale.profiles import (
    HISTOGRAM_EDGES_S,
    STAGES,
    Alone,
    Joined,
    Moment,
    Profile,
    Quantiles,
    RankFigures,
)

_PHASES = {
    "data_wait": (RED, ""),
    "transfer": (YELLOW, ""),
    "forward": (BLUE, ""),
    "bn_shuffle": (BLUE, "////"),
    "backward": (SKY, ""),
    "all_reduce": (ORANGE, ""),
    "optimizer": (GREEN, ""),
    "key_update": (PINK, ""),
    "enqueue": (PINK, "////"),
    "measure": (YELLOW, "////"),
    "checkpoint": (GREEN, "////"),
    "collectives": (ORANGE, "////"),
    "other": (GREY, ""),
}
"""In the order of a step."""
_MOST_RANKS = 16


def step_plot(profile: Profile) -> Markup | None:
    """The mean step of every rank as a bar of its phases; of many ranks, the slowest."""
    ranks = sorted(own_times(profile)[:_MOST_RANKS], key=lambda one: one.rank)
    shown = [_phases(one) for one in ranks]
    names = [name for name in (*_PHASES, *_others(ranks)) if any(name in one for one in shown)]
    if not names:
        return None

    def draw(axes: Axes) -> None:
        lefts = [0.0] * len(ranks)
        for name in names:
            lengths = [1e3 * one.get(name, 0.0) for one in shown]
            colour, hatch = _PHASES.get(name, (GREY, "...."))
            axes.barh(
                range(len(ranks)), lengths, 0.7, lefts,
                label=short_label(name), color=colour, hatch=hatch, edgecolor="white",
                linewidth=0.4,
            )  # fmt: skip
            lefts = [left + length for left, length in zip(lefts, lengths, strict=True)]
        _rows(axes, [f"rank {one.rank}" for one in ranks])
        axes.set_xlabel("ms of a step")

    rows = 0.25 * len(ranks) + 0.2 * -(-len(names) // 3)
    said = f"{len(ranks)} ranks, phases {', '.join(names)}"
    return draw_svg("the step by phase", draw, height=1.2 + rows, said=said, legend=3)


def rate_plot(rows: Sequence[StageRow], *, whole: float | None) -> Markup | None:
    """Each stage's samples/s alone and in the run, with the ranges of the repeats.

    Args:
        whole: samples/s of a rank with everything together.
    """
    alone = [(n, row.alone) for n, row in enumerate(rows) if row.alone is not None]
    in_run = [(n, row.in_run, row.run_rates) for n, row in enumerate(rows) if row.in_run]
    alone = [(n, one) for n, one in alone if one.samples_per_s > 0]
    in_run = [(n, one, all_of) for n, one, all_of in in_run if one.samples_per_s > 0]
    if not alone and not in_run:
        return None

    def draw(axes: Axes) -> None:
        _ranges(
            axes,
            [(n - 0.15, one.low, one.samples_per_s, one.high) for n, one in alone],
            color=BLUE, marker="o", label="alone",
        )  # fmt: skip
        _ranges(
            axes,
            [(n + 0.15, min(of), one.samples_per_s, max(of)) for n, one, of in in_run],
            color=RED, marker="s", label="in the run",
        )  # fmt: skip
        if whole:
            axes.axvline(whole, color=INK, linewidth=1, linestyle="--", label="the whole")
        axes.set_xscale("log")
        _powers(axes.xaxis, rate)
        _rows(axes, [f"{row.stage} x{row.workers}" for row in rows])
        axes.set_xlabel("samples/s of a rank")

    said = "; ".join(f"{rows[n].stage} {rate(one.samples_per_s)}" for n, one in alone)
    return draw_svg(
        "stages, samples/s", draw, height=1.3 + 0.3 * len(rows), said=f"alone: {said}", legend=3
    )


def workers_plot(alone: Sequence[Alone]) -> Markup | None:
    """Samples/s by threads, of the stages that were tried with several numbers."""
    lines: dict[str, list[Alone]] = {}
    for stage in STAGES:
        tried = {one.workers: one for one in alone if one.stage == stage and not one.note}
        found = [tried[count] for count in sorted(tried) if tried[count].samples_per_s > 0]
        if len(found) > 1:
            lines[stage] = found
    if not lines:
        return None

    def draw(axes: Axes) -> None:
        for (stage, found), colour, marker in zip(lines.items(), COLOURS, MARKERS, strict=False):
            axes.plot(
                [one.workers for one in found], [one.samples_per_s for one in found],
                color=colour, marker=marker, markersize=5, linewidth=1.4, label=stage,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        _powers(axes.yaxis, rate)
        counts = sorted({one.workers for found in lines.values() for one in found})
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("threads")

    said = "; ".join(
        f"{stage} {rate(found[0].samples_per_s)} to {rate(found[-1].samples_per_s)}"
        for stage, found in lines.items()
    )
    return draw_svg("alone, samples/s by threads", draw, height=2.9, said=said, legend=4)


def ladder_plot(joined: Sequence[Joined]) -> Markup | None:
    """Seconds that 1,000 samples take, as the stages are joined one after the other."""
    known = [one for one in joined if one.samples_per_s > 0]
    if not known:
        return None

    def draw(axes: Axes) -> None:
        middle = [1e3 / one.samples_per_s for one in known]
        rates = [(one.low or one.samples_per_s, one.samples_per_s, one.high) for one in known]
        fast = [max(0.0, 1e3 / mid - 1e3 / max(high, mid)) for _, mid, high in rates]
        slow = [max(0.0, 1e3 / low - 1e3 / mid) for low, mid, _ in rates]
        axes.barh(range(len(known)), middle, 0.6, color=SKY)
        axes.errorbar(
            middle, range(len(known)), xerr=[fast, slow],
            fmt="none", ecolor=INK, elinewidth=1, capsize=3,
        )  # fmt: skip
        _rows(axes, [f"... {one.upto}" if n else one.upto for n, one in enumerate(known)])
        axes.set_xlabel("seconds for 1,000 samples of a rank")

    said = "; ".join(f"up to {one.upto} {rate(one.samples_per_s)} samples/s" for one in known)
    return draw_svg("stages joined, up to", draw, height=1.0 + 0.3 * len(known), said=said)


def waits_plot(rows: Sequence[StageRow]) -> Markup | None:
    """Waits to get and to put of every stage: histograms, p50, p90 and p99."""
    found: list[tuple[str, Quantiles, str, str]] = []
    for row in rows:
        if row.in_run is None:
            continue
        for name, waits, colour, marker in (
            ("get", row.in_run.wait_to_get, RED, "s"),
            ("put", row.in_run.wait_to_put, BLUE, "o"),
        ):
            if waits is not None:
                found.append((f"{row.stage}, {name}", waits, colour, marker))
    if not found:
        return None

    edges_ms = [1e3 * edge for edge in HISTOGRAM_EDGES_S]
    bins_ms = list(itertools.pairwise(edges_ms))

    def draw(axes: Axes) -> None:
        for n, (_, waits, colour, marker) in enumerate(found):
            foot = n + 0.3
            counts = waits.histogram if len(waits.histogram) == len(bins_ms) else ()
            for (left, right), count in zip(bins_ms, counts, strict=False):
                if count:  # an empty bar would widen the axis
                    axes.bar(
                        left, -0.7 * count / max(counts), right - left, foot, align="edge",
                        color=colour, alpha=0.35, edgecolor="white", linewidth=0.4,
                    )  # fmt: skip
            # A log axis has no 0: what is below 1 us is drawn there.
            p50, p90, p99 = (
                max(edges_ms[0], 1e3 * s) for s in (waits.p50_s, waits.p90_s, waits.p99_s)
            )
            axes.plot([p50, p99], [foot, foot], color=colour, linewidth=2)
            axes.plot([p50], [foot], color=colour, marker=marker, markersize=5)
            axes.plot([p90, p99], [foot, foot], color=colour, marker="|", markersize=9, linewidth=0)
        axes.set_xscale("log")
        _powers(axes.xaxis, "{:g}".format)
        _rows(axes, [name for name, *_ in found])
        axes.set_xlabel("ms a wait: mark p50, ticks p90 and p99")

    said = "; ".join(f"{name} p50 {figure(1e3 * waits.p50_s)} ms" for name, waits, *_ in found)
    return draw_svg("waits in the run", draw, height=1.0 + 0.36 * len(found), said=said)


def moment_plots(profile: Profile) -> list[Markup]:
    """CPU and GPU, network, held bytes and ready batches over time, one repeat after another."""
    repeats: list[list[tuple[float, Moment]]] = []
    began_s, borders = 0.0, []
    for run in profile.runs:
        repeats.append([(began_s + one.second, one) for one in run.moments])
        # The sampler may look once more after the last step.
        last_s = max((one.second for one in run.moments), default=0.0)
        began_s += max(run.steps * run.step.mean_s, last_s)
        borders.append(began_s)
    moments = list(itertools.chain.from_iterable(repeats))
    if not moments:
        return []

    def over_time(
        title: str, unit: str, *curves: tuple[str, Callable[[Moment], float | None]]
    ) -> Markup | None:
        known: list[tuple[str, list[list[tuple[float, float]]]]] = []
        for name, of in curves:
            lines = [[(s, v) for s, m in one for v in [of(m)] if v is not None] for one in repeats]
            if any(lines):
                known.append((name, [line for line in lines if line]))
        if not known:
            return None

        def draw(axes: Axes) -> None:
            for (name, lines), colour, style in zip(known, (BLUE, RED), ("-", "--"), strict=False):
                for n, line in enumerate(lines):
                    axes.plot(
                        *zip(*line, strict=True), style,
                        color=colour, linewidth=1.5, label=None if n else name,
                    )  # fmt: skip
            for border in borders[:-1]:
                axes.axvline(border, color=GREY, linewidth=0.7, linestyle=":")
            axes.set_ylim(bottom=0)
            axes.locator_params(axis="y", integer=unit == "batches")
            axes.set_xlabel("seconds")
            axes.set_ylabel(unit)

        means = [(name, np.mean([v for line in lines for _, v in line])) for name, lines in known]
        said = "; ".join(f"{name} mean {figure(float(mean))} {unit}" for name, mean in means)
        return draw_svg(
            title, draw, height=2.3, said=said, legend=len(known) if len(known) > 1 else 0
        )

    plots = [
        over_time(
            "CPU and GPU" if any(one.gpu_frac is not None for _, one in moments) else "CPU",
            "% busy",
            ("CPU", lambda one: 100 * one.cpu_frac),
            ("GPU", lambda one: None if one.gpu_frac is None else 100 * one.gpu_frac),
        ),
        over_time("network", "MB/s", ("received", _received)),
        over_time("encoded bytes in memory", "MB", ("held", lambda one: one.held_bytes / 1e6)),
        over_time(
            "batches that are ready",
            "batches",
            ("encoded", lambda one: float(one.stream_ready)),
            ("views", lambda one: float(one.views_ready)),
        ),
    ]
    return [plot for plot in plots if plot is not None]


def forecast_plot(scales: Sequence[Scale], *, step_per_s: float) -> Markup:
    """Samples/s over all GPUs, and what they would be if no GPU waited."""

    def draw(axes: Axes) -> None:
        gpus = [one.gpus for one in scales]
        axes.plot(
            gpus, [step_per_s * count for count in gpus],
            color=INK, linestyle="--", linewidth=1, label="no GPU waits",
        )  # fmt: skip
        axes.plot(
            gpus, [one.samples_per_s for one in scales],
            color=BLUE, marker="o", linewidth=1.5, label="forecast",
        )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        _powers(axes.yaxis, rate)
        axes.set_xticks(gpus, [f"{count:,}" for count in gpus])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("GPUs")

    said = "; ".join(f"{one.gpus} GPUs {rate(one.samples_per_s)}" for one in scales)
    return draw_svg("samples/s by GPUs", draw, height=2.7, said=said, legend=2)


def _received(one: Moment) -> float | None:
    return None if one.received_bytes_per_s is None else one.received_bytes_per_s / 1e6


def _phases(one: RankFigures) -> dict[str, float]:
    return {name: seconds for name, seconds in one.phases.items() if seconds > 0}


def _others(ranks: Sequence[RankFigures]) -> list[str]:
    return sorted({name for one in ranks for name in one.phases} - _PHASES.keys())


def _ranges(
    axes: Axes,
    rows: Sequence[tuple[float, float, float, float]],
    *,
    color: str,
    marker: str,
    label: str,
) -> None:
    """Points with whiskers: height, least, middle, most."""
    if not rows:
        return
    heights, lows, middles, highs = zip(*rows, strict=True)
    below = [max(0.0, middle - low) for middle, low in zip(middles, lows, strict=True)]
    above = [max(0.0, high - middle) for middle, high in zip(middles, highs, strict=True)]
    axes.errorbar(
        middles, heights, xerr=[below, above],
        fmt=marker, color=color, markersize=6, elinewidth=1.2, capsize=3, label=label,
    )  # fmt: skip


def _powers(axis: Axis, shown: Callable[[float], str]) -> None:
    """Powers of 10 written out, as few as fit a phone."""
    low, high = axis.get_view_interval()
    subs = (1, 2, 5) if high < 30 * low else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=6))
    axis.set_major_formatter(lambda value, _: shown(value))
    axis.set_minor_formatter(NullFormatter())


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """The first at the top."""
    axes.set_yticks(range(len(names)), [short_label(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
