"""Numbers as people read them, on terminals and pages. Loads nothing."""


def figure(value: float | None, *, unknown: str = "-") -> str:
    """Three digits, and never fewer than the whole part.

    Args:
        unknown: what None is shown as.
    """
    if value is None:
        return unknown
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"


def rate(value: float | None) -> str:
    """The same, short: at most six characters up to 1e9."""
    if value is None or value < 99_999.5:
        return figure(value)
    return f"{value / 1e3:.0f}k" if value < 999_500 else f"{figure(value / 1e6)}M"


def milliseconds(value_s: float) -> str:
    """Without a unit, at most five characters up to 9,999; what is too short has no digits."""
    if value_s < 1e-5:
        return "<0.01"
    return f"{1e3 * value_s:.2g}" if value_s < 1e-4 else figure(1e3 * value_s)


def seconds(value_s: float) -> str:
    """With the unit that fits."""
    return f"{figure(value_s)} s" if value_s >= 1 else f"{milliseconds(value_s)} ms"


def percent(frac: float) -> str:
    """Of a part, 0-1."""
    return f"{100 * frac:,.0f} %"


def gain(frac: float) -> str:
    """Of a change: with its sign."""
    return f"{100 * frac:+,.0f} %"


def cpu(cpu_s_per_1000: float) -> str:
    """CPU-seconds; a hyphen for exactly none, which nobody measured."""
    if not cpu_s_per_1000:
        return "-"
    return "<0.001" if cpu_s_per_1000 < 1e-3 else figure(cpu_s_per_1000)


def megabytes(bytes_per_s: float | None) -> str:
    """MB/s, without the unit."""
    return "-" if bytes_per_s is None else rate(bytes_per_s / 1e6)
