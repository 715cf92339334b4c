"""A profile in the terminal and as a page, two compared, and the schema of the file."""

import dataclasses
import functools
import html
import io
import json
import re
from pathlib import Path

import jsonschema
import pytest
from rich.console import Console

from moco_scale.errors import ConfigError
from moco_scale.figures import rate
from moco_scale.forecast import ASSUMPTIONS
from moco_scale.phases import PHASES
from moco_scale.profile_changes import compare
from moco_scale.profile_plots import _PHASES, moment_plots
from moco_scale.profile_report import build_page
from moco_scale.profile_rows import alone_in_use
from moco_scale.profile_scaling import scaling_of
from moco_scale.profile_schema import SCHEMA_PATH, as_text, schema
from moco_scale.profile_table import print_comparison, print_profile
from moco_scale.profiles import (
    DECODE,
    STAGES,
    STEP,
    STORE,
    Profile,
    Quantiles,
    read_profile,
    write_profile,
)
from tests.support import browser
from tests.support.made_profile import (
    HOSTILE,
    cpu_bound_profile,
    minimal_profile,
    store_bound_profile,
)

pytestmark = pytest.mark.timeout(240)

STORE_BOUND, MINIMAL = store_bound_profile(hostname=HOSTILE), minimal_profile()
FASTER = store_bound_profile(times=1.4)


def still_profile() -> Profile:
    """Everything was measured, and nothing moved."""
    zero = {"samples_per_s": 0.0, "low": 0.0, "high": 0.0}
    runs = [
        dataclasses.replace(
            run,
            samples_per_s=0.0,
            stages=tuple(dataclasses.replace(one, samples_per_s=0.0) for one in run.stages),
            ranks=tuple(dataclasses.replace(one, own_s=0.0, phases={}) for one in run.ranks),
        )
        for run in FASTER.runs
    ]
    assert FASTER.verdict is not None
    return dataclasses.replace(
        FASTER,
        alone=tuple(dataclasses.replace(one, **zero) for one in FASTER.alone),
        joined=tuple(dataclasses.replace(one, **zero) for one in FASTER.joined),
        runs=tuple(runs),
        verdict=dataclasses.replace(FASTER.verdict, samples_per_s=0.0),
    )


MADE = {
    "store-bound": STORE_BOUND,
    "minimal": MINIMAL,
    "still": still_profile(),
    "no runs": dataclasses.replace(STORE_BOUND, runs=()),
    "only runs": dataclasses.replace(STORE_BOUND, alone=(), joined=(), verdict=None),
    "faster": FASTER,
    "no GPU": cpu_bound_profile(),
}


@functools.cache
def page_of(name: str) -> str:
    return build_page(MADE[name], against=STORE_BOUND if name == "faster" else None)


def printed(profile: Profile, *, against: Profile | None = None) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=80, highlight=False)
    if against is None:
        print_profile(profile, console)
    else:
        print_comparison(against, profile, console)
    return out.getvalue().splitlines()


# In the terminal


@pytest.mark.parametrize("name", MADE)
def test_the_table_fits_80_columns_without_colours(name: str) -> None:
    for lines in (printed(MADE[name]), printed(MADE[name], against=STORE_BOUND)):
        assert max(map(len, lines)) <= 80
        assert all(char.isprintable() for line in lines for char in line)


def test_the_table_begins_with_the_verdict_and_has_a_row_for_every_stage() -> None:
    lines = printed(FASTER)

    assert lines[0] == "store bounds it at 8,288 samples/s: 3 of 3 repeats say so, spread 5 %"
    rows = {line.split()[0]: line.split() for line in reversed(lines) if line.strip()}
    assert set(STAGES) <= set(rows)
    assert rows[DECODE][1:7] == ["x8", "1,815", "200", "3.23", "2,072", "228"]


@pytest.mark.parametrize("seconds", [5.66e-5, 9.99e-4, 9.9994])
def test_no_name_is_cut_where_waits_are_wide(seconds: float) -> None:
    waits = Quantiles.of([seconds])
    (run, *_) = FASTER.runs
    stages = tuple(
        dataclasses.replace(one, call=waits, wait_to_get=waits, wait_to_put=waits)
        for one in run.stages
    )

    lines = printed(dataclasses.replace(FASTER, runs=(dataclasses.replace(run, stages=stages),)))

    assert not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)
    assert all(sum(line.startswith(stage) for line in lines) >= 3 for stage in STAGES)


def test_the_table_says_what_advice_was_predicted_and_measured_to_gain() -> None:
    text = " ".join(" ".join(printed(FASTER)).split())

    assert "1. data.read_threads: 16 -> 32: predicted 10,774 samples/s, +30 %" in text
    assert "measured 10,277 samples/s, +24 %" in text
    assert "moco-scale pack --resize-side 256: gain not predicted" in text


def test_the_straggler_is_named_by_rank_and_host() -> None:
    text = " ".join(" ".join(printed(FASTER)).split())

    assert "straggler: rank 3 on node-b has 118 ms of its own a step, 1.1 times" in text


def test_a_profile_of_nothing_says_so() -> None:
    assert printed(MINIMAL)[0] == "no verdict"


@pytest.mark.parametrize(
    ("value", "said"),
    [(0.0, "0"), (99_999.0, "99,999"), (99_999.9, "100k"), (999_499.0, "999k"),
     (999_600.0, "1M"), (1.52e6, "1.52M"), (None, "-")],
)  # fmt: skip
def test_rates_are_short(value: float | None, said: str) -> None:
    assert rate(value) == said


@pytest.mark.parametrize(("read_threads", "workers"), [(1, 1), (4, 4), (16, 16), (8, 16)])
def test_alone_is_shown_with_the_threads_in_use(read_threads: int, workers: int) -> None:
    settings = {"data": {"read_threads": read_threads}}
    profile = dataclasses.replace(STORE_BOUND, settings=settings)

    shown = alone_in_use(profile, STORE)

    assert shown is not None
    assert (shown.workers, shown.note) == (workers, "")


# As a page


@pytest.mark.parametrize("name", MADE)
def test_the_page_needs_no_network_and_runs_nothing(name: str) -> None:
    page = page_of(name)

    assert "<script" not in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert not re.search(r"url\((?!#)|@import", page)


def test_what_a_profile_says_is_escaped_wherever_it_says_it() -> None:
    profile = dataclasses.replace(
        STORE_BOUND,
        about=dict.fromkeys(("host", "machine", "date", HOSTILE), HOSTILE),
        settings={HOSTILE: {HOSTILE: [HOSTILE]}},
        alone=tuple(dataclasses.replace(one, note=HOSTILE) for one in STORE_BOUND.alone),
        joined=tuple(dataclasses.replace(one, upto=HOSTILE) for one in STORE_BOUND.joined),
        runs=tuple(
            dataclasses.replace(
                run,
                ranks=tuple(dataclasses.replace(r, phases={HOSTILE: 1.0}) for r in run.ranks),
            )
            for run in STORE_BOUND.runs
        ),
        notes=(HOSTILE,),
    )

    page = build_page(profile, against=MINIMAL)

    assert "<script" not in page
    assert "&lt;script&gt;document.title=&#39;caught&#39;&lt;/script&gt;&amp;&#34;" in page
    assert all(char.isprintable() for line in printed(profile) for char in line)


def test_every_plot_is_described() -> None:
    page = page_of("faster")

    drawings = re.findall(r"<svg ([^>]*)>", page)
    assert len(drawings) == 10
    assert all(re.match(r'role="img" aria-label="[^"]{20,}"', one) for one in drawings)
    # An id that two drawings have would give the one the other's clip.
    ids = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_page_of_nothing_says_what_is_missing() -> None:
    page = page_of("minimal")

    for said in (
        "no verdict: nothing of the whole was measured",
        "No stage was measured.",
        "The phases of the step were not measured.",
        "Nothing was sampled over time.",
        "No forecast: step_pairs_per_s is not known",
    ):
        assert said in page
    assert "<svg" not in page


def test_every_phase_has_a_look_of_its_own() -> None:
    assert tuple(_PHASES) == PHASES
    assert len(set(_PHASES.values())) == len(PHASES)


def test_over_time_one_repeat_is_drawn_behind_the_other() -> None:
    (run, *_) = FASTER.runs
    late = dataclasses.replace(run.moments[-1], second=2 * run.steps * run.step.mean_s)
    run = dataclasses.replace(run, moments=(*run.moments, late))

    _, network, *_ = moment_plots(dataclasses.replace(FASTER, runs=(run, run, run)))

    lines = re.findall(r'<path d="([^"]*)"[^>]*style="fill: none; stroke: #0072b2', network)
    assert len(lines) == 3
    across = [float(x) for line in lines for x in re.findall(r"[ML] ([\d.]+) ", line)]
    assert across == sorted(across)


def test_a_forecast_of_one_number_of_gpus_is_not_drawn() -> None:
    model = {**FASTER.settings["model"], "queue_size": FASTER.batch_size}
    profile = dataclasses.replace(FASTER, settings={**FASTER.settings, "model": model})

    page = build_page(profile)

    assert "samples/s by GPUs" not in page
    assert "A forecast, not a measurement" in page


def test_without_a_gpu_the_page_shows_what_there_is() -> None:
    page = page_of("no GPU")

    titles = re.findall(r'aria-label="([^":]*):', page)
    assert "CPU" in titles
    assert "CPU and GPU" not in titles
    assert "network" not in titles
    assert "no GPU: transfer was not measured" in page
    assert "No forecast: step_pairs_per_s is not known" in page


def test_the_forecast_is_of_1_8_64_and_512_gpus_and_says_what_it_assumes() -> None:
    settings = {**FASTER.settings, "model": {**FASTER.settings["model"], "queue_size": 131_072}}
    profile = dataclasses.replace(FASTER, settings=settings)

    scaling = scaling_of(profile)

    assert scaling.found is not None
    assert [one.gpus for one in scaling.found.scales] == [1, 8, 64, 512]
    page = html.unescape(page_of("faster"))
    assert set(ASSUMPTIONS) < set(scaling.assumptions)
    assert all(one in page for one in scaling_of(FASTER).assumptions)


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium here")
def test_pages_are_readable_in_a_browser_at_a_desk_and_on_a_phone(tmp_path: Path) -> None:
    pages = [page_of(name) for name in ("faster", "store-bound", "minimal")]

    seen, console = browser.look(
        [(page, width) for page in pages for width in (1280, 390)], tmp_path, timeout_s=50
    )

    assert console == []
    assert [one.drawings for one in seen] == [10, 10, 10, 10, 0, 0]
    for one in seen:
        assert one.title == "Profile of the input pipeline"
        assert one.needed <= one.width
        assert one.smallest >= 9.5
        assert one.scripts == 0


# Two compared


def test_a_comparison_names_what_differs() -> None:
    before = dataclasses.replace(
        FASTER,
        settings={"data": {"read_threads": 16, "shards": ["s3://a"], "weights": []}},
        about={"machine": "2 cores", "host": "a", "torch": "2.14", "date": "1", "command": "x"},
    )
    after = dataclasses.replace(
        FASTER,
        settings={"data": {"read_threads": 32, "shards": ["s3://a"]}},
        about={"machine": "4 cores", "host": "a", "torch": "2.15", "date": "2", "command": "y"},
        batch_size=128,
    )

    found = compare(before, after)

    assert [(one.path, one.before, one.after) for one in found.settings] == [
        ("data.read_threads", "16", "32"),
        ("data.weights", "[]", ""),
        ("batch size", "256", "128"),
    ]
    assert [one.path for one in found.machine] == ["machine"]
    assert [one.path for one in found.versions] == ["torch"]
    assert printed(after, against=before)[0].startswith("not the same hardware")


def test_another_host_of_the_same_kind_is_the_same_hardware() -> None:
    after = dataclasses.replace(FASTER, about={**FASTER.about, "host": "node-z"})

    found = compare(FASTER, after)

    assert [one.path for one in found.machine] == ["host"]
    assert found.same_hardware


def test_a_comparison_gives_the_ratios_and_the_bound_before_and_after() -> None:
    assert FASTER.verdict is not None
    after = dataclasses.replace(
        FASTER, verdict=dataclasses.replace(FASTER.verdict, bound_by=DECODE)
    )

    found = compare(STORE_BOUND, after)
    lines = printed(after, against=STORE_BOUND)

    assert found.whole is not None
    assert found.whole.times == pytest.approx(1.4)
    assert lines[:2] == [
        "the whole: 5,920 -> 8,288 samples/s, 1.40 times *",
        "bound by decode; before, by store",
    ]
    (step,) = [one for one in found.stages if one.stage == STEP]
    assert step.alone is not None
    assert (step.alone.times, step.alone.apart) == (1.0, False)
    assert step.in_run is not None
    assert step.in_run.apart


@pytest.mark.parametrize(
    ("low", "high", "apart"),
    [(80.0, 95.0, True), (80.0, 100.0, False), (105.0, 120.0, False), (111.0, 120.0, True)],
)
def test_a_ratio_is_marked_only_where_the_ranges_do_not_overlap(
    low: float, high: float, apart: bool
) -> None:
    (step,) = [one for one in STORE_BOUND.alone if one.stage == STEP]
    before, after = [
        dataclasses.replace(
            STORE_BOUND,
            alone=(dataclasses.replace(step, low=a, samples_per_s=(a + b) / 2, high=b),),
        )
        for a, b in ((100.0, 110.0), (low, high))
    ]

    (found,) = [one for one in compare(before, after).stages if one.stage == STEP]

    assert found.alone is not None
    assert found.alone.apart is apart


def test_there_is_no_ratio_to_nothing() -> None:
    found = compare(MADE["still"], FASTER)

    assert found.whole is None
    assert {one.in_run for one in found.stages} == {None}


# The schema


def test_the_schema_is_that_of_the_dataclasses() -> None:
    said = "run `python -m moco_scale.profile_schema`"

    assert SCHEMA_PATH.read_text() == as_text(), said


@pytest.mark.parametrize("name", MADE)
def test_written_profiles_are_valid_by_the_schema(name: str, tmp_path: Path) -> None:
    validator = jsonschema.Draft202012Validator(schema())
    jsonschema.Draft202012Validator.check_schema(schema())
    write_profile(MADE[name], tmp_path / "profile.json")
    saved = json.loads((tmp_path / "profile.json").read_text())

    assert list(validator.iter_errors(saved)) == []
    for broken in ({"version": 2}, {"cores": "two"}, {"alnoe": []}, {"alone": [{}]}):
        assert list(validator.iter_errors({**saved, **broken}))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 2),
        (("cores",), "two"),
        (("cores",), True),
        (("alone", 0, "samples_per_s"), None),
        (("runs", 0, "stages", 0, "call"), [1.0]),
        (("verdict", "advice", 0, "gain"), 0.5),
        (("rates", "image_bytes"), "110 kB"),
    ],
)
def test_what_the_schema_refuses_the_reader_refuses_too(
    path: tuple[str | int, ...], value: object, tmp_path: Path
) -> None:
    file = tmp_path / "profile.json"
    write_profile(STORE_BOUND, file)
    saved = json.loads(file.read_text())
    *outer, last = path
    functools.reduce(lambda part, name: part[name], outer, saved)[last] = value
    file.write_text(json.dumps(saved))

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(saved, schema())
    with pytest.raises(ConfigError):
        read_profile(file)
