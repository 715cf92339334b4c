"""The command that says what a run on a cluster needs: forecast."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moco_scale.errors import ConfigError
from moco_scale.figures import figure, percent
from moco_scale.forecast import (
    ASSUMPTIONS,
    RESOURCES,
    STEP,
    Cluster,
    Forecast,
    Inputs,
    Rates,
    Reading,
    Run,
    Scale,
    forecast,
)
from moco_scale.profiles import PROFILE_FORMAT, read_profile
from moco_scale.settings import from_mapping, parse_flags
from shards.bill import Prices, money

console = Console(highlight=False)

RATES_FORMAT, FORECAST_FORMAT = "moco-scale rates", "moco-scale forecast"
VERSION = 1
"""Of both files. A reader refuses another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _ForecastArguments:
    """What a run of so many images on so many GPUs needs, and which resource runs out first.

    Arithmetic on rates that you state or measured; nothing is read. What is not stated is never
    found to be the limit, and is listed. The model: moco_scale/forecast.py.
    """

    run: tyro.conf.OmitArgPrefixes[Run]
    rates_file: Annotated[Path | None, tyro.conf.arg(name="rates", metavar="FILE")] = None
    """Measured rates: the JSON of moco-scale profile, or of your own; flags override them."""
    rates: tyro.conf.OmitArgPrefixes[Rates] = field(default_factory=Rates)
    cluster: tyro.conf.OmitArgPrefixes[Cluster] = field(default_factory=Cluster)
    reading: tyro.conf.OmitArgPrefixes[Reading] = field(default_factory=Reading)
    prices: Prices = field(default_factory=Prices)
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write inputs, figures and assumptions to this file as JSON, too."""


def run_forecast(arguments: list[str]) -> int:
    """`moco-scale forecast`."""
    given = parse_flags(_ForecastArguments, arguments, prog="moco-scale forecast")
    rates = given.rates
    if given.rates_file is not None:
        rates = _override(read_rates(given.rates_file), rates)
    inputs = Inputs(
        run=given.run,
        rates=rates,
        cluster=given.cluster,
        reading=given.reading,
        prices=given.prices,
    )
    found = forecast(inputs)
    if given.json is not None:
        given.json.write_text(json.dumps(to_mapping(inputs, found), indent=1) + "\n")
    _print_forecast(inputs, found)
    return 0


def read_rates(path: Path) -> Rates:
    """Measured rates out of a profile, or of a file of their own: {"format": "moco-scale rates",
    "version": 1, "rates": {...}}.

    "rates" holds fields of `Rates`, as numbers; what was not measured is left out or null. "about",
    free text or any table (hardware, date, command), is for people.

    Raises:
        ConfigError: the file is missing, of another format or version, or has an unknown key.
    """
    try:
        saved = json.loads(path.read_text())
    except FileNotFoundError as err:
        raise ConfigError(f"no file of rates at {path}") from err
    except (OSError, ValueError) as err:
        raise ConfigError(f"{path} cannot be read as JSON: {err}") from err
    if isinstance(saved, dict) and saved.get("format") == PROFILE_FORMAT:
        return from_mapping(Rates, read_profile(path).rates, path="rates.")
    if not isinstance(saved, dict) or saved.get("format") != RATES_FORMAT:
        raise ConfigError(
            f'{path} is neither a profile nor a file of rates: its "format" is not '
            f'"{PROFILE_FORMAT}" or "{RATES_FORMAT}"'
        )
    version = saved.get("version")
    if version != VERSION or isinstance(version, bool):
        raise ConfigError(
            f"{path} is of version {version!r}, and this moco-scale reads version "
            f"{VERSION}; measure again, or use the moco-scale that wrote it"
        )
    unknown = saved.keys() - {"format", "version", "about", "rates"}
    if unknown:
        raise ConfigError(f"{path}: unknown key {min(unknown)!r}; known: about, rates")
    if not isinstance(saved.get("rates"), dict):
        raise ConfigError(f'{path} has no table "rates"')
    try:
        return from_mapping(Rates, saved["rates"], path="rates.")
    except ConfigError as err:
        raise ConfigError(f"{path}: {err}") from err


def to_mapping(inputs: Inputs, found: Forecast) -> dict[str, Any]:
    """A forecast for machines; "inputs" makes the same `Inputs` again (`from_mapping`)."""
    return {
        "format": FORECAST_FORMAT,
        "version": VERSION,
        "inputs": dataclasses.asdict(inputs),
        "forecast": dataclasses.asdict(found),
        "assumptions": list(ASSUMPTIONS),
    }


def _override(rates: Rates, stated: Rates) -> Rates:
    changes = {k: v for k, v in dataclasses.asdict(stated).items() if v is not None}
    # Who decodes is one choice: stating the one puts the other's measured rate aside.
    if "decode_per_core" in changes:
        changes["decode_per_gpu"] = None
    elif "decode_per_gpu" in changes:
        changes["decode_per_core"] = None
    return dataclasses.replace(rates, **changes)


def _print_forecast(inputs: Inputs, found: Forecast) -> None:
    run = inputs.run
    console.print(
        f"{run.images:,.0f} images, {_short(run.seen)} seen; {run.batch_size:,} samples a GPU; "
        f"* as asked"
    )
    console.print(_scales(inputs, found))
    console.print(f"\nAt {_gpus(run.gpus)}, samples/s a GPU")
    console.print(_resources(found))
    console.print()
    lines = [*_verdict(found), *(f"assumed: {one}" for one in ASSUMPTIONS)]
    for line in lines:
        console.print(Text(line))


_ROWS: tuple[tuple[str, Callable[[Scale], str] | None], ...] = (
    ("nodes", lambda s: f"{s.nodes:,}"),
    ("global batch", lambda s: f"{s.global_batch_size:,}"),
    ("Forecast", None),
    ("images/s", lambda s: f"{s.samples_per_s:,.0f}"),
    ("hours", lambda s: _figure(s.hours)),
    ("GPU-hours per million images", lambda s: _figure(s.gpu_hours_per_million)),
    ("bound by", lambda s: s.bound_by),
    ("GPUs wait", lambda s: percent(s.wait_frac)),
    ("  of it for late reads", lambda s: percent(s.tail_wait_frac)),
    ("requests", lambda s: money(s.requests_usd)),
    ("storage for these hours", lambda s: money(s.storage_usd)),
    ("Needs, so that no GPU waits", None),
    ("GB/s a node", lambda s: _figure(s.node_gb_per_s_needed)),
    ("GB/s from the store", lambda s: _figure(s.store_gb_per_s_needed)),
    ("  bytes read for one used", lambda s: f"{s.read_amplification:.2f}"),
    ("GET/s", lambda s: _figure(s.gets_per_s_needed)),
    ("  of what the prefixes give", lambda s: percent(s.gets_needed_frac)),
    ("p99 latency at most, s", lambda s: _figure(s.p99_latency_s_needed)),
    ("host cores a GPU", lambda s: _figure(s.cores_per_gpu_needed)),
)


def _scales(inputs: Inputs, found: Forecast) -> Table:
    # Fits 80 columns.
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for scale in found.scales:
        mark = "*" if scale.gpus == inputs.run.gpus else ""
        table.add_column(f"{_gpus(scale.gpus)}{mark}", justify="right", no_wrap=True)
    for name, shown in _ROWS:
        if shown is None:
            table.add_row(f"\n{name}")
        else:
            table.add_row(name, *[shown(scale) for scale in found.scales])
    table.add_row("\nMemory of each GPU")
    for name, size in (
        (f"queue of {inputs.run.queue_size:,} keys", found.queue_bytes),
        ("a memory bank instead", found.bank_bytes),
    ):
        table.add_row(name, *[_bytes(size) for _ in found.scales])
    return table


def _resources(found: Forecast) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("resource", "allows", "used", "short from"):
        table.add_column(name, justify="left" if name == "resource" else "right")
    knees = {knee.resource: knee.gpus for knee in found.knees}
    for limit in sorted(found.asked.limits, key=lambda one: RESOURCES.index(one.resource)):
        short = knees.get(limit.resource)
        table.add_row(
            limit.resource,
            _figure(limit.samples_per_s_per_gpu),
            percent(limit.used_frac),
            "" if limit.resource == STEP else "never" if short is None else _gpus(short),
        )
    return table


def _verdict(found: Forecast) -> Iterator[str]:
    asked = found.asked
    limit, *others = asked.limits
    yield f"{_gpus(asked.gpus)}: {limit.resource} runs out first"
    if others:
        allowed = _figure(others[0].samples_per_s_per_gpu)
        yield f"behind it: {others[0].resource}, {allowed} samples/s a GPU"
    after = found.takes_over
    if after is None:
        yield f"more GPUs: {limit.resource} stays the limit"
    else:
        yield f"more GPUs: {after.resource} runs out first from {after.gpus:,} on"
    if asked.single_reads_frac:
        yield (
            f"{percent(asked.single_reads_frac)} of the samples cost a GET each: the lanes' "
            "blocks exceed buffer_bytes"
        )
    yield f"storage: {money(found.storage_usd_per_month)} a month"
    if found.not_known:
        yield f"not stated, so not looked at: {', '.join(found.not_known)}"
    yield from found.notes


def _gpus(count: int | None) -> str:
    return f"{count:,} GPU" if count == 1 else f"{count:,} GPUs"


def _figure(value: float | None) -> str:
    return figure(value, unknown="not known")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value < 1e9 else f"{value:.4g}".replace("e+0", "e").replace("e+", "e")


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{_figure(count / size)} {unit}"
    return f"{count / 1e3:.1f} kB"
