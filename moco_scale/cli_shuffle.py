"""The command that shows how well a shard set is shuffled: shuffle."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.compute as pc
import tyro
from rich.console import Console
from rich.table import Table

from moco_scale.errors import ConfigError
from moco_scale.settings import parse_flags
from pipelines.order import Order, rank_positions
from pipelines.shuffle_quality import (
    WHOLE_SAMPLES,
    Batches,
    ByOrder,
    Epochs,
    Integers,
    Mixing,
    Neighbours,
    Recorded,
    Sequential,
    Served,
    Uniform,
    mixing,
    over_epochs,
    webdataset_epoch,
)
from shards.manifest import ShardSet

console = Console(highlight=False)

_WEBDATASET_SAMPLES = 1 << 21  # its buffer is imitated sample by sample: a second a million
_PLOTTED_BATCHES, _PLOTTED_SAMPLES = 8, 20_000


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderSettings:
    """What the order depends on; see `moco-scale pretrain --help`."""

    global_batch_size: int = 256
    """Samples per step over all ranks."""
    lanes_per_slot: int = 1
    """Lanes A = lanes_per_slot x global_batch_size."""
    block_samples: int = 64
    """Consecutive samples of a shard that one range request reads."""

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            if getattr(self, setting.name) < 1:
                raise ConfigError(f"data.{setting.name} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class _ShuffleArguments:
    """How well a shard set is shuffled in training, beside a uniform permutation and none.

    Whether samples that lay side by side meet in a batch: side by side in a shard, and side by side
    in the bucket (in the order of their URIs), which packing's own shuffle breaks up. 1 is ideal.
    """

    shard_set: tyro.conf.Positional[str]
    """URL or path of the shard set."""
    data: OrderSettings = field(default_factory=OrderSettings)
    world_size: int = 1
    """Ranks that share the global batch."""
    queue_size: int = 65_536
    """Keys in MoCo's queue."""
    epochs: int = 2
    """How many are looked at."""
    seed: int = 0
    """Of the order."""
    row: int = 64
    """So many objects of the bucket, one after another, count as neighbours."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A picture of the first batches: a .png, .svg or .pdf file."""
    json: bool = False
    """The figures as JSON."""

    def __post_init__(self) -> None:
        for name in ("world_size", "queue_size", "epochs", "row"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One way to serve a set, measured."""

    shards: Mixing
    """Neighbours are in one shard."""
    rows: Mixing | None
    """Neighbours are in one row of the bucket."""
    epochs: Epochs | None


def run_shuffle(arguments: list[str]) -> int:
    """`moco-scale shuffle`."""
    given = parse_flags(_ShuffleArguments, arguments, prog="moco-scale shuffle")
    shard_set = ShardSet.open(given.shard_set)
    data = given.data
    rank_positions(
        0, global_batch_size=data.global_batch_size, rank=0, world_size=given.world_size
    )  # raises if they cannot share it
    batches = Batches(
        global_batch_size=data.global_batch_size,
        world_size=given.world_size,
        queue_size=given.queue_size,
    )
    order = Order(
        shard_set.samples,
        seed=given.seed,
        lanes=data.lanes_per_slot * data.global_batch_size,
        block=data.block_samples,
    )
    served = ways_to_serve(shard_set.samples, order, batches, seed=given.seed, epochs=given.epochs)
    places = bucket_places(shard_set) if shard_set.num_samples <= WHOLE_SAMPLES else None
    found = {
        name: measure(
            one,
            shard_set.samples,
            batches,
            places=places,
            row=given.row,
            block=data.block_samples,
            epochs=given.epochs,
        )
        for name, one in served.items()
    }
    if given.json:
        print(json.dumps({name: dataclasses.asdict(one) for name, one in found.items()}))
    else:
        console.print(
            f"{shard_set.num_samples:,} samples in {len(shard_set.names):,} shards; global batch "
            f"{batches.global_batch_size:,}, {batches.world_size:,} ranks, {given.epochs} epochs"
        )
        block_mib = data.block_samples * shard_set.total_bytes / shard_set.num_samples / 2**20
        console.print(_table(found, row=given.row, block_mib=block_mib))
        a_lane = order.epoch_length // order.lanes
        console.print(
            f"Read as training does, a block a lane: {order.lanes:,} lanes of {a_lane:,} samples, "
            f"some {(a_lane + data.block_samples - 1) / a_lane:.2f} times the bytes."
        )
        if places is None:
            console.print(f"only in windows, and shards alone: more than {WHOLE_SAMPLES:,} samples")
    if given.plot is not None:
        draw(given.plot, served, found, places, batches)
        if not given.json:
            console.print(f"picture  {given.plot}", soft_wrap=True)
    return 0


def ways_to_serve(
    shard_samples: Integers, order: Order, batches: Batches, *, seed: int, epochs: int
) -> dict[str, Served]:
    """Our order first, and what it is compared with."""
    count, length = int(shard_samples.sum()), order.epoch_length
    ways: dict[str, Served] = {
        "this set": ByOrder(order, shard_samples),
        "uniform": Uniform(count, epoch_length=length, seed=seed),
        "sequential": Sequential(count, epoch_length=length),
    }
    if count <= _WEBDATASET_SAMPLES:
        recorded = [
            webdataset_epoch(shard_samples, batches, seed=seed, epoch=epoch)
            for epoch in range(epochs)
        ]
        whole = [one for one in recorded if one is not None]
        if len(whole) == epochs:
            ways["webdataset"] = Recorded(whole, num_samples=count)
    return ways


def bucket_places(shard_set: ShardSet) -> Integers:
    """Where each sample, by its number, comes when all are sorted by the URI of their object."""
    in_order = pc.sort_indices(shard_set.table(["uri"]).column("uri")).to_numpy()
    places = np.empty(len(in_order), dtype=np.int64)
    places[in_order] = np.arange(len(in_order))
    return places


def measure(
    served: Served,
    shard_samples: Integers,
    batches: Batches,
    *,
    places: Integers | None,
    row: int,
    block: int,
    epochs: int,
) -> Measured:
    """All figures of one way to serve a set."""
    return Measured(
        shards=mixing(served, Neighbours.of_shards(shard_samples), batches, epochs=epochs),
        rows=None
        if places is None
        else mixing(served, Neighbours.in_rows_of(row, places), batches, epochs=epochs),
        epochs=over_epochs(served, shard_samples, batches, block=block, epochs=epochs),
    )


_MIXING_ROWS = {
    "pair excess, global batch": "pairs_global",
    "pair excess, a rank's batch": "pairs_rank",
    "pair excess, the queue's batches": "pairs_queue",
    "of the place: chi-square / dof": "chi_square",
    "of the place: lag-1 correlation": "lag_1",
}
_SHARD_ROWS = {
    "shards in a global batch": "groups_global",
    "shards in a rank's batch": "groups_rank",
}
_EPOCH_ROWS = {
    "mates meet again next epoch": "mates",
    "reach of a rank": "reach",
    "live shards": "live_shards",
    "read amplification": "read_amplification",
}


def rows_of(found: Mapping[str, Measured], *, row: int) -> list[tuple[str, list[str]]]:
    """Name and a figure for each way, in the order to show them; headings have no figures."""
    ways = list(found.values())
    rows: list[tuple[str, list[str]]] = [("NEIGHBOURS: IN THE SAME SHARD", [])]
    rows += _figures(_MIXING_ROWS | _SHARD_ROWS, [one.shards for one in ways])
    if all(one.rows is not None for one in ways):
        rows.append((f"NEIGHBOURS: {row} IN A ROW OF THE BUCKET", []))
        rows += _figures(_MIXING_ROWS, [one.rows for one in ways])
    if all(one.epochs is not None for one in ways):
        rows.append(("WHOLE EPOCHS", []))
        rows += _figures(_EPOCH_ROWS, [one.epochs for one in ways])
    return rows


def _figures(names: Mapping[str, str], ways: Sequence[Any]) -> list[tuple[str, list[str]]]:
    return [(shown, [_figure(getattr(one, name)) for one in ways]) for shown, name in names.items()]


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def _table(found: Mapping[str, Measured], *, row: int, block_mib: float) -> Table:
    # Fits 80 columns.
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in found:
        table.add_column(name, justify="right")
    for name, figures in rows_of(found, row=row):
        table.add_row(name if figures else f"\n{name.capitalize()}", *figures)
    if all(one.epochs is not None for one in found.values()):
        held = [one.epochs.live_blocks * block_mib for one in found.values() if one.epochs]
        table.add_row("a rank holds, MiB", *[f"{one:,.1f}" for one in held])
    return table


def draw(
    file: Path,
    served: Mapping[str, Served],
    found: Mapping[str, Measured],
    places: Integers | None,
    batches: Batches,
) -> None:
    """The first global batches of each way: where each sample lay, in the shards and the bucket."""
    from matplotlib.figure import Figure  # most calls need no picture

    size = batches.global_batch_size
    notions: list[tuple[str, Integers | None]] = [("place in the shards", None)]
    if places is not None:
        notions.append(("place in the bucket", places))
    figure = Figure(figsize=(3.1 * len(served), 3.1 * len(notions)), layout="constrained")
    panels = figure.subplots(len(notions), len(served), squeeze=False, sharex=True, sharey=True)
    for column, (name, one) in enumerate(served.items()):
        shown = min(_PLOTTED_BATCHES, one.epoch_length // size) * size
        numbers = one.numbers(0, 0, shown)
        kept = np.sort(np.random.default_rng(0).permutation(shown)[:_PLOTTED_SAMPLES])
        for line, (notion, place) in enumerate(notions):
            axes = panels[line][column]
            where = numbers if place is None else place[numbers]
            axes.scatter(
                kept / size,
                where[kept] / one.num_samples,
                s=1.5,
                alpha=0.5,
                linewidths=0,
                rasterized=True,
            )
            measured = found[name].shards if place is None else found[name].rows
            excess = measured.pairs_global if measured else None
            axes.set_title(f"{name}\nneighbours meet {_figure(excess)} x chance", fontsize=9)
            axes.set_ylim(0, 1)
            if column == 0:
                axes.set_ylabel(f"{notion} (0 to 1)")
            if line == len(notions) - 1:
                axes.set_xlabel("global batch of epoch 1")
    figure.savefig(file, dpi=130)
