"""The page of a profile: self-contained HTML that needs no network to look at."""

import statistics
from importlib import resources
from typing import Any

import jinja2

from moco_scale import profile_changes, profile_plots, profile_rows
from moco_scale.figures import cpu, figure, gain, megabytes, percent, rate
from moco_scale.profile_changes import compare
from moco_scale.profile_rows import (
    on_dali,
    on_stragglers,
    on_use,
    own_times,
    quantiles,
    setup,
    stage_rows,
)
from moco_scale.profile_scaling import Scaling, scaling_of
from moco_scale.profiles import STAGES, Profile


def build_page(profile: Profile, *, against: Profile | None = None) -> str:
    """The page as HTML. All that the profile says is escaped.

    Args:
        against: the profile before; the page then begins with what has changed since.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        cpu=cpu, figure=figure, gain=gain, megabytes=megabytes, percent=percent,
        quantiles=quantiles, rate=rate,
    )  # fmt: skip
    scaling = scaling_of(profile)
    template = (resources.files("moco_scale") / "templates" / "profile.html").read_text()
    return environment.from_string(template).render(
        profile=profile,
        verdict=profile.verdict,
        setup=setup(profile),
        tiles=_tiles(profile),
        meanings=STAGES,
        tried=[one for one in profile.alone if one.note],
        ranks=own_times(profile),
        median_own_s=statistics.median([one.own_s for one in own_times(profile)] or [0.0]),
        said={
            "dali": on_dali(profile),
            "stragglers": on_stragglers(profile),
            "use": on_use(profile),
        },
        what_to_change=profile_rows.what_to_change,
        what_it_gives=profile_rows.what_it_gives,
        settings=list(profile_changes.flat(profile.settings)),
        scaling=scaling,
        changes=compare(against, profile) if against is not None else None,
        on_comparison=profile_changes.on_comparison,
        ratio_cells=profile_changes.ratio_cells,
        threads=profile_changes.threads,
        mark_means=profile_changes.MARK_MEANS,
        **_plots(profile, scaling),
    )


def _tiles(profile: Profile) -> list[tuple[str, str]]:
    verdict = profile.verdict
    if verdict is None:
        return []
    tiles = [
        (rate(verdict.samples_per_s), "samples/s, all together"),
        (verdict.bound_by, "bounds it"),
        (f"{verdict.agreeing} of {verdict.repeats}", "repeats say so"),
        (percent(verdict.spread_frac), "spread of the repeats"),
    ]
    predicted = [one.gain_frac for one in verdict.advice if one.gain_frac is not None]
    if predicted:
        tiles.append((gain(max(predicted)), "predicted of the best advice"))
    return tiles


def _plots(profile: Profile, scaling: Scaling) -> dict[str, Any]:
    rows, verdict = stage_rows(profile), profile.verdict
    found = scaling.found
    return {
        "rows": rows,
        "step_plot": profile_plots.step_plot(profile),
        "rate_plot": profile_plots.rate_plot(
            rows, whole=verdict.samples_per_s / profile.world_size if verdict else None
        ),
        "workers_plot": profile_plots.workers_plot(profile.alone),
        "ladder_plot": profile_plots.ladder_plot(profile.joined),
        "waits_plot": profile_plots.waits_plot(rows),
        "moment_plots": profile_plots.moment_plots(profile),
        "forecast_plot": None
        if found is None or len(found.scales) < 2  # no line of one point
        else profile_plots.forecast_plot(found.scales, step_per_s=scaling.step_per_s),
    }
