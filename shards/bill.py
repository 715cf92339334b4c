"""What a packing will ask for, take and cost, said before any of it begins."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from shards.catalog import Catalog
from shards.plan import Plan
from shards.tar import BLOCK

_PUTS_PER_SHARD = 3  # tar, index, marker
_READS_PER_SHARD = 2  # its rows in the plan, and the footer that says where they are
_SET_PUTS = 4  # the manifest, its version, the rejections, the list of tars
_KEYS_PER_LIST = 1000
TAR_BYTES_PER_OBJECT = BLOCK + BLOCK // 2
"""That a tar adds to an image, on average: a header, and half a block of padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prices:
    """In US dollars, each to be overridden.

    The defaults are the list prices of S3 Standard in us-east-1 (aws.amazon.com/s3/pricing, as of
    November 2026; first tier where there are tiers; transfer to another AWS region). Taxes,
    discounts and the machines are not in them.
    """

    gets_per_1000: float = 0.0004
    puts_per_1000: float = 0.005
    """PUT and LIST."""
    gib_month: float = 0.023
    egress_gib: float = 0.02
    """Out of a region, to another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bill:
    """Figures of one packing; None where something that it takes is not known."""

    listed: int
    objects: int
    """To be fetched: listed without what the plan drops and what is packed already."""
    dropped: int
    already: int
    known_bytes: int
    """Of the objects whose size is known."""
    unknown_sizes: int
    """Objects whose size is not known."""
    download_bytes: float | None
    """Known bytes; objects of unknown size count as the mean of the others."""
    result_bytes: float | None
    """Of the tars. Not known before images were resized."""
    shards: int
    list_requests: int
    get_requests: int
    """Without retries."""
    put_requests: int
    hours_by_cores: float | None
    hours_by_network: float | None
    """The larger of what comes in and what goes out, which do not disturb each other."""
    requests_usd: float
    egress_usd: float | None
    """As if all were in another region, where any is; none where no region is known to differ."""
    storage_usd_per_month: float | None
    warnings: tuple[str, ...]

    @property
    def hours(self) -> float | None:
        """The longer of the two, if both are known; else the one that is, as the least it takes."""
        known = [h for h in (self.hours_by_cores, self.hours_by_network) if h is not None]
        return max(known) if known else None

    @property
    def usd(self) -> float | None:
        """Requests and transfer, once."""
        return None if self.egress_usd is None else self.requests_usd + self.egress_usd

    def rows(self) -> Iterator[tuple[str, str]]:
        """Name and value, in the order to show them, within 80 columns together."""
        yield "listed", f"{self.listed:,} objects"
        yield "left out", f"{self.dropped:,} rejected unseen, {self.already:,} known already"
        yield "to fetch", f"{self.objects:,} objects, {self._sizes()}"
        yield "to write", f"{self.shards:,} shards, {_size(self.result_bytes)}"
        yield (
            "requests",
            f"{self.get_requests:,} GET, {self.put_requests:,} PUT, {self.list_requests:,} LIST",
        )
        yield "time", self._time()
        yield "cost", f"{money(self.usd)} (requests {money(self.requests_usd)}{self._egress()})"
        yield "storage", f"{money(self.storage_usd_per_month)} a month"
        for warning in self.warnings:
            yield "warning", warning

    def _sizes(self) -> str:
        if not self.unknown_sizes:
            return _size(self.known_bytes)
        if self.unknown_sizes == self.objects:
            return "of unknown size"
        return f"{_size(self.known_bytes)} and {self.unknown_sizes:,} of unknown size"

    def _time(self) -> str:
        both = (("cores", self.hours_by_cores), ("network", self.hours_by_network))
        known = [f"{name} {_hours(hours)}" for name, hours in both if hours is not None]
        return f"{_hours(self.hours)} ({', '.join(known)})" if known else "not known"

    def _egress(self) -> str:
        return "" if self.egress_usd == 0 else f", transfer {money(self.egress_usd)}"


def estimate(
    plan: Plan,
    catalog: Catalog,
    *,
    workers: int,
    images_per_core_s: float | None,
    network_bytes_per_s: float | None,
    prices: Prices,
    source_regions: Mapping[str, str | None],
    machine_region: str | None,
) -> Bill:
    """The bill of packing a plan.

    Args:
        workers: processes in all, a core each.
        images_per_core_s: what one core packs, measured or given; None if that is not known.
        network_bytes_per_s: of all machines together, each way; None if that is not known.
        source_regions: region of each bucket that is read, None where it is not known or has none.
        machine_region: where the packing runs; None if that is not known.
    """
    sized = plan.planned - plan.unknown_sizes
    download: float | None = float(plan.known_bytes)
    if plan.unknown_sizes:
        mean = plan.known_bytes / sized if sized else None
        download = None if mean is None else plan.known_bytes + mean * plan.unknown_sizes
    result = None
    if download is not None and not plan.settings.resize_side:
        result = download + plan.planned * TAR_BYTES_PER_OBJECT + plan.num_shards * 2 * BLOCK
    files = len(plan.parts) + len(plan.dropped_files) + len(plan.superseded_files) + 1
    puts = _PUTS_PER_SHARD * plan.num_shards + files + _SET_PUTS
    lists = catalog.list_requests + 1 + plan.num_shards // _KEYS_PER_LIST
    gets = plan.planned + _READS_PER_SHARD * plan.num_shards
    elsewhere = {
        source: region
        for source, region in sorted(source_regions.items())
        if region is not None and machine_region is not None and region != machine_region
    }
    if elsewhere:
        egress = None if download is None else download / 2**30 * prices.egress_gib
    else:
        egress = 0.0
    by_cores = by_network = None
    if images_per_core_s is not None:
        by_cores = plan.planned / (images_per_core_s * workers) / 3600
    if network_bytes_per_s is not None and download is not None:
        by_network = max(download, result or 0.0) / network_bytes_per_s / 3600
    return Bill(
        listed=plan.listed,
        objects=plan.planned,
        dropped=plan.dropped,
        already=plan.already,
        known_bytes=plan.known_bytes,
        unknown_sizes=plan.unknown_sizes,
        download_bytes=download,
        result_bytes=result,
        shards=plan.num_shards,
        list_requests=lists,
        get_requests=gets,
        put_requests=puts,
        hours_by_cores=by_cores,
        hours_by_network=by_network,
        requests_usd=(gets * prices.gets_per_1000 + (puts + lists) * prices.puts_per_1000) / 1000,
        egress_usd=egress,
        storage_usd_per_month=None if result is None else result / 2**30 * prices.gib_month,
        warnings=tuple(
            f"{source} is in {region}, this machine in {machine_region}"
            for source, region in elsewhere.items()
        ),
    )


def _size(count: float | None) -> str:
    if count is None:
        return "size not known"
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 2**10:,.1f} KiB"


def _hours(hours: float | None) -> str:
    if hours is None:
        return "not known"
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours * 60 >= 1 else f"{hours * 3600:.0f} s"


def money(usd: float | None) -> str:
    """For people; None is not known."""
    if usd is None:
        return "not known"
    return f"${usd:,.2f}" if usd >= 0.01 or usd == 0 else "below $0.01"
