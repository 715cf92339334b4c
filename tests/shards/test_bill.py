"""What a packing will cost."""

from dataclasses import asdict, replace
from typing import Any

import pytest

from shards.bill import Bill, Prices, estimate
from shards.catalog import CATALOG, Catalog
from shards.plan import Plan, PlanFile, PlanSettings

GIB = 2**30
FILE = PlanFile(path="plan/g0000/part-00000-0.parquet", footer=0, bytes=0)
CATALOG_OF_A_BILLION = Catalog(
    files=(), schema=CATALOG, listed=10**9, bytes=0, list_requests=10**6, sources=("s3://raw",)
)
SETTINGS = PlanSettings(
    sources=("s3://raw",),
    seed=0,
    shard_bytes=256 * 2**20,
    max_shard_samples=16384,
    max_object_bytes=2**30,
    max_pixels=1,
    min_side=1,
    resize_side=0,
    columns=None,
)
PLAN = Plan(
    settings=SETTINGS,
    plan_id="0",
    generation=0,
    first_shard=0,
    num_shards=400_000,
    listed=10**9,
    dropped=30_000_000,
    already=0,
    known_bytes=97_000_000 * 2**20,
    unknown_sizes=0,
    unhashed=0,
    parts=(FILE,) * 6250,
    dropped_files=(FILE,) * 29,
    superseded_files=(),
)


def bill(plan: Plan = PLAN, **changes: Any) -> Bill:
    known: dict[str, Any] = {
        "workers": 64,
        "images_per_core_s": 800.0,
        "network_bytes_per_s": 5e9,
        "prices": Prices(),
        "source_regions": {"s3://raw": "eu-west-1"},
        "machine_region": "eu-west-1",
    }
    return estimate(plan, CATALOG_OF_A_BILLION, **{**known, **changes})


def test_requests_are_counted_by_kind() -> None:
    found = bill()

    assert found.objects == 970_000_000
    assert found.get_requests == 970_000_000 + 2 * 400_000
    assert found.put_requests == 3 * 400_000 + 6250 + 29 + 1 + 4
    assert found.list_requests == 10**6 + 1 + 400


def test_money_is_requests_at_their_prices_and_storage_of_the_result() -> None:
    found = bill(prices=Prices(gets_per_1000=1, puts_per_1000=10, gib_month=2, egress_gib=100))

    puts_and_lists = found.put_requests + found.list_requests
    assert found.requests_usd == pytest.approx((found.get_requests + 10 * puts_and_lists) / 1000)
    assert found.egress_usd == 0
    assert found.result_bytes is not None
    assert found.result_bytes > PLAN.known_bytes
    assert found.storage_usd_per_month == pytest.approx(found.result_bytes / GIB * 2)


def test_time_is_the_slower_of_cores_and_network() -> None:
    by_cores = 970_000_000 / 800 / 64 / 3600

    assert bill(network_bytes_per_s=None).hours == pytest.approx(by_cores)
    assert bill().hours == pytest.approx(max(by_cores, bill().hours_by_network or 0))
    assert bill(network_bytes_per_s=1e8).hours == bill(network_bytes_per_s=1e8).hours_by_network
    nothing = bill(images_per_core_s=None, network_bytes_per_s=None)
    assert nothing.hours is None
    assert dict(nothing.rows())["time"] == "not known"


def test_objects_of_unknown_size_are_said_apart_and_count_as_the_mean() -> None:
    half = replace(PLAN, unknown_sizes=485_000_000)
    none = replace(PLAN, unknown_sizes=PLAN.planned, known_bytes=0)

    found = bill(half)

    assert found.download_bytes == 2 * PLAN.known_bytes
    assert dict(found.rows())["to fetch"].endswith("92.5 TiB and 485,000,000 of unknown size")
    unknown = bill(none, source_regions={"s3://raw": "us-east-1"})
    assert (unknown.download_bytes, unknown.result_bytes, unknown.egress_usd) == (None, None, None)
    assert dict(unknown.rows())["to fetch"] == "970,000,000 objects, of unknown size"
    assert dict(unknown.rows())["storage"] == "not known a month"


def test_the_size_of_resized_images_is_not_guessed() -> None:
    found = bill(replace(PLAN, settings=replace(SETTINGS, resize_side=256)))

    assert (found.result_bytes, found.storage_usd_per_month) == (None, None)
    assert found.download_bytes == PLAN.known_bytes


def test_another_region_costs_transfer_and_is_warned_of_only_when_known() -> None:
    regions = {"s3://raw": "us-east-1", "s3://more": "eu-west-1", "/folder": None}

    found = bill(source_regions=regions)

    assert found.egress_usd == pytest.approx(PLAN.known_bytes / GIB * 0.02)
    assert found.usd == pytest.approx(found.requests_usd + found.egress_usd)
    assert found.warnings == ("s3://raw is in us-east-1, this machine in eu-west-1",)
    for machine in ("us-east-1", None):
        quiet = bill(source_regions={"s3://raw": "us-east-1"}, machine_region=machine)
        assert (quiet.egress_usd, quiet.warnings) == (0, ())


def test_people_see_it_within_80_columns_and_machines_as_plain_fields() -> None:
    plans = [
        PLAN,
        replace(PLAN, already=123_456_789, unknown_sizes=123_456_789),
        replace(PLAN, listed=3, dropped=1, num_shards=1, known_bytes=5, parts=(FILE,)),
    ]
    for plan in plans:
        found = bill(plan, source_regions={"s3://raw": "us-east-1"})

        assert max(len(name) for name, _ in found.rows()) <= 10
        assert all(len(value) <= 68 for _, value in found.rows()), list(found.rows())
    assert asdict(bill())["objects"] == 970_000_000
    tiny = bill(plans[2], prices=Prices(puts_per_1000=0))
    assert dict(tiny.rows())["cost"] == "below $0.01 (requests below $0.01)"
