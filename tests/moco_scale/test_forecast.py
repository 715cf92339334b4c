"""`moco-scale forecast`: what a run on a cluster needs, and what runs out first."""

import itertools
import json
import math
import random
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from moco_scale import forecast as model
from moco_scale.cli import main
from moco_scale.cli_forecast import read_rates, to_mapping
from moco_scale.dictionary import KeyQueue, MemoryBank
from moco_scale.distributed import one_rank
from moco_scale.errors import ConfigError
from moco_scale.forecast import (
    BANDWIDTH,
    CORES,
    DECODE,
    IN_FLIGHT,
    NETWORK,
    REQUESTS,
    RESOURCES,
    STEP,
    TAIL,
    Cluster,
    Inputs,
    Knee,
    Rates,
    Reading,
    Run,
    at_gpus,
    forecast,
)
from moco_scale.model import ModelConfig
from moco_scale.settings import from_mapping
from pipelines import stream
from pipelines.config import DataConfig
from shards.bill import TAR_BYTES_PER_OBJECT, Prices
from tests.support import simulated_ranks
from tests.support.command import moco_scale
from tests.support.simulated_ranks import Ranks

# 10,000 samples/s in all; a sample is 100 kB in its tar, lanes are so long that 64 samples cost a
# GET and nothing is read twice.
RUN = Run(images=1e12, images_seen=3.6e9, gpus=16, global_batch_size=1024)
SAMPLE_BYTES = 100_000.0
RATES = Rates(step_pairs_per_s=625, image_bytes=SAMPLE_BYTES - TAR_BYTES_PER_OBJECT)
AMPLE = Inputs(
    run=RUN,
    rates=replace(
        RATES,
        decode_per_core=1000,
        node_gb_per_s=100,
        store_gb_per_s=10_000,
        get_latency_s=0.01,
        get_latency_p99_s=0.02,
    ),
    cluster=Cluster(cores_per_node=100, prefixes=1000),
)


def inputs_with(inputs: Inputs = AMPLE, **changes: Any) -> Inputs:
    """The inputs with some fields changed, in whichever section they are."""
    for part in ("run", "rates", "cluster", "reading", "prices"):
        section = getattr(inputs, part)
        mine = {k: changes.pop(k) for k in list(changes) if hasattr(section, k)}
        inputs = replace(inputs, **{part: replace(section, **mine)})
    assert not changes
    return inputs


def test_hours_and_needs_of_a_run_that_never_waits() -> None:
    found = forecast(AMPLE)
    asked = found.asked

    assert asked.bound_by == STEP
    assert asked.samples_per_s == pytest.approx(10_000)
    assert asked.hours == pytest.approx(100)
    assert asked.gpu_hours_per_million == pytest.approx(16 * 100 / 3600)
    assert (asked.wait_frac, asked.tail_wait_frac) == (0, 0)
    assert asked.nodes == 2
    assert asked.store_gb_per_s_needed == pytest.approx(1)
    assert asked.node_gb_per_s_needed == pytest.approx(0.5)
    assert asked.gets_per_s_needed == pytest.approx(10_000 / 64)
    assert asked.gets_needed_frac == pytest.approx(10_000 / 64 / 5.5e6)
    assert asked.cores_per_gpu_needed == pytest.approx(625 / 1000 + 625 / 27_000)
    assert asked.p99_latency_s_needed == pytest.approx(13 * 64 / 625)
    assert found.not_known == ()
    assert [scale.gpus for scale in found.scales] == [8, 16, 64, 512]
    assert [scale.global_batch_size for scale in found.scales] == [512, 1024, 4096, 32_768]


# What each allows a GPU when there are 16 of them on 2 nodes, by hand; none is a round part of 625.
BOUND = [
    (CORES, {"cores_per_node": 2}, 2 / 8 / (1 / 1000 + 1 / 27_000)),
    (DECODE, {"decode_per_core": None, "decode_per_gpu": 300}, 300),
    (NETWORK, {"node_gb_per_s": 0.2}, 0.2e9 / 8 / SAMPLE_BYTES),
    (BANDWIDTH, {"store_gb_per_s": 0.5}, 0.5e9 / 16 / SAMPLE_BYTES),
    (REQUESTS, {"prefixes": 2, "gets_per_s_per_prefix": 30}, 2 * 30 * 64 / 16),
    (
        IN_FLIGHT,
        {"reads_in_flight": 4, "get_latency_s": 0.8, "get_latency_p99_s": None},
        4 * 64 / 0.8,
    ),
    # All 16 reads of a step, one in a hundred late: q = 0.1485.
    (TAIL, {"get_latency_p99_s": 5.0}, 64 * (12 + 1 / (1 - 0.99**16)) / 5),
]


@pytest.mark.parametrize(("resource", "changes", "allowed"), BOUND, ids=[one[0] for one in BOUND])
def test_each_resource_bounds_when_it_is_the_scarce_one(
    resource: str, changes: dict[str, Any], allowed: float
) -> None:
    asked = forecast(inputs_with(**changes)).asked

    assert asked.bound_by == resource
    assert asked.limits[0].resource == resource
    assert asked.limits[0].samples_per_s_per_gpu == pytest.approx(allowed, rel=1e-6)
    if resource != TAIL:
        assert asked.limits[0].used_frac == pytest.approx(1)
        assert asked.samples_per_s == pytest.approx(16 * allowed, rel=1e-6)
        assert asked.wait_frac == pytest.approx(1 - allowed / 625, rel=1e-6)
        assert asked.hours == pytest.approx(100 * 625 / allowed, rel=1e-6)


def test_late_reads_cost_what_reading_ahead_does_not_hide() -> None:
    step_s = 64 / 625  # 13 of them are hidden
    hidden = forecast(inputs_with(get_latency_p99_s=13 * step_s * 0.999)).asked
    late = forecast(inputs_with(get_latency_p99_s=13 * step_s + 1)).asked

    assert hidden.tail_wait_frac == 0
    stall_s = 1 / (12 + 1 / (1 - 0.99**16))
    assert late.tail_wait_frac == pytest.approx(stall_s / (step_s + stall_s), rel=1e-6)
    assert late.wait_frac == pytest.approx(late.tail_wait_frac)
    assert late.samples_per_s == pytest.approx(1024 / (step_s + stall_s), rel=1e-6)


def test_more_is_read_where_lanes_are_short() -> None:
    # Lanes of 64 samples: each touches 127.
    asked = forecast(inputs_with(images=64 * 1024, queue_size=1024)).asked

    assert asked.read_amplification == pytest.approx(127 / 64)
    assert asked.store_gb_per_s_needed == pytest.approx(127 / 64)
    assert asked.gets_per_s_needed == pytest.approx(10_000 * 127 / 64 / 64)


def test_blocks_that_do_not_fit_cost_a_request_a_sample() -> None:
    # 64 lanes of 64 samples of 100 kB are 410 MB; half of them and 8 batches fit.
    half = 64 * 64 * 100_000 // 2 + 8 * 64 * 100_000

    fits = forecast(AMPLE).asked
    asked = forecast(inputs_with(buffer_bytes=half)).asked

    assert fits.single_reads_frac == 0
    assert asked.single_reads_frac == pytest.approx(0.5)
    assert asked.gets_per_s_needed == pytest.approx(10_000 * (0.5 / 64 + 0.5))
    assert asked.store_gb_per_s_needed == pytest.approx(1)


def test_knees_are_where_the_step_begins_to_wait() -> None:
    scarce = inputs_with(store_gb_per_s=2.0001, gets_per_s_per_prefix=0.62501, cores_per_node=4)

    knees = {knee.resource: knee.gpus for knee in forecast(scarce).knees}

    # 62.5 MB/s, 9.77 GET/s and 0.648 cores a GPU: 32, 64 and, of a node, 6 of them have enough.
    assert knees[BANDWIDTH] == 33
    assert knees[REQUESTS] == 65
    assert knees[CORES] == 7
    assert knees[NETWORK] is None
    assert knees[IN_FLIGHT] is None
    assert [knee.resource for knee in forecast(scarce).knees][:3] == [CORES, BANDWIDTH, REQUESTS]


def test_what_takes_over_as_gpus_are_added_is_named_with_their_number() -> None:
    def takes_over(**changes: Any) -> Knee | None:
        return forecast(inputs_with(**changes)).takes_over

    assert takes_over(store_gb_per_s=2.0001) == Knee(resource=BANDWIDTH, gpus=33)
    # Three cores for eight GPUs allow each 361.6 samples/s, so the store has enough for 55.
    by_cores = takes_over(store_gb_per_s=2.0001, cores_per_node=3)
    assert by_cores == Knee(resource=BANDWIDTH, gpus=56)
    assert takes_over(store_gb_per_s=0.5) is None


def test_costs_are_of_the_bills_prices() -> None:
    prices = Prices(gets_per_1000=2.0, gib_month=3.0)

    found = forecast(replace(AMPLE, prices=prices))

    assert found.asked.requests_usd == pytest.approx(3.6e9 / 64 / 1000 * 2)
    month = 1e12 * SAMPLE_BYTES / 2**30 * 3
    assert found.storage_usd_per_month == pytest.approx(month)
    assert found.asked.storage_usd == pytest.approx(month * 100 / 730)


def test_memory_is_that_of_the_queue_and_of_the_bank() -> None:
    found = forecast(inputs_with(images=5000, images_seen=None, epochs=1, queue_size=1024, dim=16))

    bank = MemoryBank(dim=16, num_rows=5000, num_negatives=8, seed=0, ranks=one_rank()).bank
    assert found.queue_bytes == KeyQueue(dim=16, queue_size=1024, seed=0).queue.nbytes
    assert found.bank_bytes == bank.nbytes


def test_defaults_are_those_of_the_stream_and_of_pretraining() -> None:
    data, ours = DataConfig(), Reading()

    for name in ("block_samples", "lanes_per_slot", "buffer_bytes", "prefetch_batches"):
        assert getattr(ours, name) == getattr(data, name)
    assert ours.reads_in_flight == stream.READ_THREADS
    ahead = (stream._PLANNED_AHEAD, stream._PLANNED_AT_MOST)
    assert ahead == (model.PLANNED_AHEAD, model.PLANNED_AT_MOST)
    assert ahead == (simulated_ranks.PLANNED_AHEAD, simulated_ranks.PLANNED_AT_MOST)
    assert (RUN.queue_size, RUN.dim) == (ModelConfig().queue_size, ModelConfig().dim)


def _drawn(draw: random.Random) -> Inputs:
    """Inputs over several orders of magnitude."""

    def spread(low: float, high: float) -> float:
        return math.exp(draw.uniform(math.log(low), math.log(high)))

    gpus, batch = draw.choice([1, 3, 8, 20]), draw.choice([1, 16, 64, 256])
    mean = spread(0.001, 1)
    return Inputs(
        run=Run(images=float(int(spread(1e7, 1e10))), epochs=2, gpus=gpus,
                global_batch_size=gpus * batch, queue_size=1 << 20),
        rates=Rates(
            step_pairs_per_s=spread(10, 5000), image_bytes=spread(1e3, 1e6),
            decode_per_core=spread(50, 2000), node_gb_per_s=spread(0.1, 50),
            store_gb_per_s=spread(0.5, 500), get_latency_s=mean,
            get_latency_p99_s=mean * spread(1, 30),
        ),
        cluster=Cluster(cores_per_node=draw.choice([2, 32, 192]), prefixes=draw.choice([1, 16])),
        reading=Reading(buffer_bytes=int(spread(1e7, 1e10))),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_more_gpus_never_need_less_nor_get_more_each(seed: int) -> None:
    inputs = _drawn(random.Random(seed))
    scales = [at_gpus(inputs, gpus) for gpus in (*range(1, 30), 64, 100, 512, 1000, 4000)]

    needs = (
        "nodes", "node_gb_per_s_needed", "store_gb_per_s_needed", "gets_per_s_needed",
        "gets_needed_frac", "cores_per_gpu_needed", "read_amplification", "gpu_hours_per_million",
        "wait_frac", "requests_usd",
    )  # fmt: skip
    for fewer, more in itertools.pairwise(scales):
        for name in needs:
            assert getattr(more, name) >= getattr(fewer, name) * (1 - 1e-9) - 1e-9, name
        before = {limit.resource: limit.samples_per_s_per_gpu for limit in fewer.limits}
        for limit in more.limits:
            assert limit.samples_per_s_per_gpu <= before[limit.resource] * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_knees_are_the_first_of_all_numbers_of_gpus(seed: int) -> None:
    inputs = _drawn(random.Random(seed))
    found = forecast(inputs)
    most = 300

    def allowed(gpus: int) -> dict[str, float]:
        scale = at_gpus(inputs, gpus)
        return {limit.resource: limit.samples_per_s_per_gpu for limit in scale.limits}

    by_gpus = {gpus: allowed(gpus) for gpus in range(1, most)}
    for knee in found.knees:
        short = [g for g, rates in by_gpus.items() if rates[knee.resource] < rates[STEP]]
        assert (knee.gpus if knee.gpus and knee.gpus < most else None) == (min(short, default=None))
    now = found.asked.bound_by
    after = [
        g
        for g, rates in by_gpus.items()
        if g > inputs.run.gpus and min(rates.values()) < rates[now] * (1 - 1e-12)
    ]
    if found.takes_over is not None and (found.takes_over.gpus or most) < most:
        assert found.takes_over.gpus == min(after)
        rates = by_gpus[min(after)]
        assert rates[found.takes_over.resource] == min(rates.values())
    else:
        assert not after


def test_what_is_not_stated_is_no_limit_and_is_listed() -> None:
    found = forecast(Inputs(run=RUN, rates=RATES))

    assert [limit.resource for limit in found.asked.limits] == [STEP, REQUESTS]
    assert found.not_known == (CORES, NETWORK, BANDWIDTH, IN_FLIGHT, TAIL)
    assert found.asked.cores_per_gpu_needed is None


def test_numbers_of_gpus_that_cannot_train_are_left_out_with_the_reason() -> None:
    found = forecast(inputs_with(images=10_000, queue_size=4096))

    assert [scale.gpus for scale in found.scales] == [8, 16, 64]
    assert found.notes == ("not 512 GPUs: the 10,000 images are fewer than the 32,768 lanes",)


# The step takes 20 ms and 16 samples: 800 samples/s a rank, of which two reads bring a batch.
TWO_RANKS = Ranks(ranks=2, reads_per_batch=16 / 8, step_s=0.02, reads_in_flight=4)
SIMULATED = [
    ("nothing is short", STEP, {}, {}),
    ("store requests, half", REQUESTS, {"get_s": 0.010}, {"gets_per_s_per_prefix": 100}),
    ("store requests, enough", STEP, {"get_s": 0.004}, {"gets_per_s_per_prefix": 250}),
    (
        "store bandwidth, 0.7",
        BANDWIDTH,
        {"get_s": 0.007},
        {"store_gb_per_s": 8 * 1e5 / 0.007 / 1e9},
    ),
    (
        "store bandwidth, enough",
        STEP,
        {"get_s": 0.0035},
        {"store_gb_per_s": 8 * 1e5 / 0.0035 / 1e9},
    ),
    ("reads in flight, half", IN_FLIGHT, {"latency_s": 0.08}, {"get_latency_s": 0.08}),
    ("reads in flight, enough", STEP, {"latency_s": 0.025}, {"get_latency_s": 0.025}),
    (
        "cores, half",
        CORES,
        {"core_s": 0.02, "cores": 1},
        {"cores_per_node": 1, "decode_per_core": 800},
    ),
    (
        "cores, enough",
        STEP,
        {"core_s": 0.014, "cores": 2},
        {"cores_per_node": 2, "decode_per_core": 16 / 0.014},
    ),
]


@pytest.mark.parametrize(
    ("bound_by", "slow", "stated"),
    [one[1:] for one in SIMULATED],
    ids=[one[0] for one in SIMULATED],
)
def test_simulated_ranks_run_as_fast_as_forecast(
    bound_by: str, slow: dict[str, Any], stated: dict[str, Any]
) -> None:
    inputs = Inputs(
        run=Run(images=1e9, epochs=1, gpus=2, global_batch_size=32),
        rates=replace(RATES, step_pairs_per_s=800, read_per_core=1e9),
        cluster=Cluster(prefixes=1),
        reading=Reading(reads_in_flight=4, block_samples=8),
    )
    predicted = forecast(inputs_with(inputs, **stated)).asked

    simulated = 2 * 16 / replace(TWO_RANKS, **slow).mean_step_s(steps=1000, seed=0)

    assert predicted.bound_by == bound_by
    print(f"forecast {predicted.samples_per_s:,.0f}, simulated {simulated:,.0f} samples/s")
    assert simulated == pytest.approx(predicted.samples_per_s, rel=0.02)


@pytest.mark.parametrize(
    ("ranks", "latency_s", "late_s"),
    [(1, 0.03, 0.6), (8, 0.03, 0.2), (8, 0.03, 0.6), (64, 0.03, 0.2), (64, 0.03, 0.6)],
)
def test_late_reads_stall_simulated_ranks_as_forecast(
    ranks: int, latency_s: float, late_s: float
) -> None:
    inputs = Inputs(
        run=Run(images=1e9, epochs=1, gpus=ranks, global_batch_size=16 * ranks),
        rates=replace(
            RATES, step_pairs_per_s=16 / 0.012, get_latency_s=latency_s, get_latency_p99_s=late_s
        ),
        cluster=Cluster(prefixes=1000),
    )

    step_s = Ranks(
        ranks=ranks,
        reads_per_batch=16 / 64,
        step_s=0.012,
        latency_s=latency_s,
        late_s=late_s,
        late_frac=0.01,
    ).mean_step_s(steps=4000, seed=0)

    predicted_s = 16 * ranks / forecast(inputs).asked.samples_per_s
    print(f"forecast {1e3 * predicted_s:.1f} ms, simulated {1e3 * step_s:.1f} ms")
    assert step_s == pytest.approx(predicted_s, rel=0.06)


FLAGS = (
    *("--images", "1e9", "--epochs", "1.28", "--gpus", "64", "--global-batch-size", "4096"),
    *("--step-pairs-per-s", "1300", "--image-bytes", "42600"),
)
ALL_FLAGS = (
    *(*FLAGS, "--decode-per-core", "596", "--cores-per-node", "32", "--node-gb-per-s", "5"),
    *("--store-gb-per-s", "20", "--get-latency-s", "0.15", "--get-latency-p99-s", "0.6"),
)


@pytest.mark.parametrize(
    "flags",
    [
        ALL_FLAGS,
        FLAGS,
        (*ALL_FLAGS, "--gpus", "100000", "--global-batch-size", "100000", "--queue-size", "100000"),
    ],
)
def test_the_table_fits_a_terminal(flags: tuple[str, ...]) -> None:
    done = moco_scale("forecast", *flags, env={"COLUMNS": "80"})

    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\u2026" not in done.stdout
    lines = done.stdout.splitlines()
    assert sum(line.startswith("bound by") for line in lines) == 1
    assert all(line.startswith("assumed: ") for line in lines[-len(model.ASSUMPTIONS) :])


def test_the_command_says_what_runs_out_first_and_what_then() -> None:
    done = moco_scale("forecast", *ALL_FLAGS)

    assert "64 GPUs: GPU step runs out first" in done.stdout
    assert "more GPUs: store requests runs out first from 271 on" in done.stdout


def test_json_holds_what_makes_the_same_forecast_again(tmp_path: Path) -> None:
    file = tmp_path / "forecast.json"

    done = moco_scale("forecast", *ALL_FLAGS, "--prices.gib-month", "0.01", "--json", str(file))

    assert done.returncode == 0, done.stderr
    saved = json.loads(file.read_text())
    inputs = from_mapping(Inputs, saved["inputs"])
    assert inputs.prices.gib_month == 0.01
    assert json.loads(json.dumps(to_mapping(inputs, forecast(inputs)))) == saved
    assert saved["forecast"]["asked"]["bound_by"] == STEP
    assert saved["assumptions"]


def test_measured_rates_are_taken_from_a_file_and_flags_override_them(tmp_path: Path) -> None:
    rates = Rates(step_pairs_per_s=400, image_bytes=5e4, decode_per_gpu=3000, get_latency_s=0.1)
    file, out = tmp_path / "rates.json", tmp_path / "forecast.json"
    file.write_text(
        json.dumps(
            {"format": "moco-scale rates", "version": 1, "about": "a test", "rates": asdict(rates)}
        )
    )

    done = moco_scale(
        *("forecast", "--images", "1e6", "--epochs", "1", "--gpus", "8"),
        *("--global-batch-size", "256", "--rates", str(file), "--json", str(out)),
        *("--get-latency-s", "0.2", "--decode-per-core", "500"),
    )

    assert read_rates(file) == rates
    assert done.returncode == 0, done.stderr
    found = from_mapping(Inputs, json.loads(out.read_text())["inputs"]).rates
    assert found == replace(rates, get_latency_s=0.2, decode_per_gpu=None, decode_per_core=500)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--gpus", "0"), "gpus must be above 0, not 0"),
        (("--gpus", "-8"), "gpus must be above 0, not -8"),
        (("--step-pairs-per-s", "-1"), "step_pairs_per_s must be above 0, not -1"),
        (("--image-bytes", "nan"), "image_bytes must be above 0, not nan"),
        (("--store-gb-per-s", "inf"), "store_gb_per_s must be finite, not inf"),
        (("--images", "2.5"), "images must be a whole number, not 2.5"),
        (("--global-batch-size", "100"), "global_batch_size 100 is not a multiple of gpus 64"),
        (("--images-seen", "5"), "give either epochs or images_seen"),
        (("--decode-per-core", "5", "--decode-per-gpu", "5"), "decode_per_core or decode_per_gpu"),
        (("--get-latency-s", "2", "--get-latency-p99-s", "1"), "is below the mean get_latency_s 2"),
        (("--images", "1000"), "the 1,000 images are fewer than the 4,096 lanes"),
        (("--queue-size", "64"), "the global batch 4,096 is above queue_size 64"),
        (("--prices.gib-month", "-1"), "gib_month must be at least 0, not -1"),
        (("--block-sample", "64"), "--block-samples"),
        (("--rates", "/no/such.json"), "no file of rates at /no/such.json"),
    ],
)
def test_what_cannot_be_forecast_is_refused_in_one_line(
    flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["forecast", *FLAGS, *flags])

    printed = capsys.readouterr()
    assert code in (1, 2)
    assert said in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not printed.out


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"version": 2}, "is of version 2, and this moco-scale reads version 1"),
        ({"version": True}, "is of version True"),
        ({"version": None}, "is of version None"),
        ({"format": "moco-scale forecast"}, 'its "format" is not "moco-scale profile" or'),
        (
            {"rates": {"decode_per_cor": 5}},
            "rates.decode_per_cor; did you mean rates.decode_per_core?",
        ),
        ({"rates": {"image_bytes": "5"}}, "rates.image_bytes takes a number, not '5'"),
        ({"rates": {"image_bytes": -5}}, "image_bytes must be above 0, not -5"),
        ({"rates": [5]}, 'has no table "rates"'),
        ({"rate": {}}, "unknown key 'rate'; known: about, rates"),
        ("{", "cannot be read as JSON"),
        ("[]", "is neither a profile nor a file of rates"),
    ],
)
def test_a_file_that_is_not_of_rates_is_refused(tmp_path: Path, saved: Any, said: str) -> None:
    file = tmp_path / "rates.json"
    good = {"format": "moco-scale rates", "version": 1, "rates": {}}
    file.write_text(saved if isinstance(saved, str) else json.dumps(good | saved))

    with pytest.raises(ConfigError) as refused:
        read_rates(file)

    assert said in str(refused.value)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_rates_that_are_nowhere_are_named() -> None:
    done = moco_scale(
        *("forecast", "--images", "1e9", "--epochs", "1", "--gpus", "8"),
        *("--global-batch-size", "256"),
    )

    assert done.returncode == 1
    assert "step_pairs_per_s is not known" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_it_needs_no_torch() -> None:
    program = (
        "import sys; from moco_scale.cli import main; "
        f"code = main(['forecast', *{FLAGS!r}]); sys.exit(code or 'torch' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)

    assert done.returncode == 0, done.stderr


def test_all_resources_are_tried_here() -> None:
    assert {STEP, *(one[0] for one in BOUND)} == set(RESOURCES)
