"""Stragglers: a slow rank is named, none of equal ones; as arithmetic, then in real runs."""

import random
import socket
import time
from pathlib import Path

import pytest
import torch

from moco_scale.distributed import Ranks
from moco_scale.optim import OptimConfig
from moco_scale.phases import COLLECTIVES, DATA_WAIT, FORWARD, MEASURE, PHASES
from moco_scale.profiles import read_profile
from moco_scale.stragglers import RankSeconds, Straggler, figures_of, find_straggler
from moco_scale.trainer import RunConfig, Trainer
from pipelines.config import DataConfig
from pipelines.loader import Batch
from tests.moco_scale.test_step import MODEL, small_encoder
from tests.support.distributed import run_distributed
from tests.support.fake_loader import FakeLoader

pytestmark = pytest.mark.timeout(240)


def told(own: list[list[float]], *, phase: str = FORWARD) -> list[RankSeconds]:
    """Ranks that spend so long in a phase, by rank and step, and then wait for the last of them."""
    ranks = []
    for rank, seconds in enumerate(own):
        steps = [
            {
                **dict.fromkeys(PHASES, 0.0),
                phase: one,
                COLLECTIVES: max(of[number] for of in own) - one,
            }
            for number, one in enumerate(seconds)
        ]
        ranks.append(RankSeconds.of(f"host-{rank // 2}", steps))
    return ranks


def found(own: list[list[float]], *, phase: str = FORWARD) -> Straggler | None:
    return find_straggler(figures_of(told(own, phase=phase)), steps=len(own[0]))


@pytest.mark.parametrize("slow", range(4))
def test_the_rank_whose_own_work_takes_longest_is_named(slow: int) -> None:
    straggler = found([[0.18 if rank == slow else 0.1] * 6 for rank in range(4)])

    assert straggler is not None
    assert straggler.line == (
        f"rank {slow} on host-{slow // 2} holds the others up: 1.8 times the own seconds of the "
        "median rank, most of it in forward"
    )


def test_all_ranks_have_the_same_step_and_the_seconds_add_up() -> None:
    figures = figures_of(told([[0.1, 0.3], [0.2, 0.1]]))

    assert [one.step_s for one in figures] == pytest.approx([0.25, 0.25])
    assert [one.own_s for one in figures] == pytest.approx([0.2, 0.15])
    assert [one.last_frac for one in figures] == [0.5, 0.5]


@pytest.mark.parametrize(
    "own",
    [
        pytest.param([[0.1] * 100] * 4, id="the same to the nanosecond"),
        pytest.param([[0.11] * 100, [0.1] * 100], id="always behind, by nothing to speak of"),
        pytest.param([[0.1, 3.0, 0.1, 0.1] * 9, [0.11] * 36], id="late now and then, by a lot"),
        pytest.param([[0.3] * 5, *[[0.1] * 5] * 3], id="fewer steps than tell"),
        pytest.param([[0.3] * 50], id="one rank"),
    ],
)
def test_what_is_no_straggler_is_not_named(own: list[list[float]]) -> None:
    assert found(own) is None


def test_what_one_rank_does_for_all_is_not_held_against_it() -> None:
    assert found([[0.5] * 20, *[[0.1] * 20] * 3], phase=MEASURE) is None


@pytest.mark.parametrize("world_size", [2, 4, 8, 64])
def test_of_equal_ranks_with_heavy_tails_hardly_one_recording_names_any(world_size: int) -> None:
    """A step of 0.1 s, and as a preempted process has it, now and then three times that."""
    draw = random.Random(world_size)
    alarms = 0
    for _ in range(300):
        steps = draw.choice([1, 2, 5, 20, 50])
        own = [[0.1 * draw.paretovariate(3) for _ in range(steps)] for _ in range(world_size)]
        alarms += found(own) is not None

    assert alarms <= 1


class Slow(torch.nn.Module):
    """Takes a while, as a throttled accelerator does."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return views


class SlowLoader(FakeLoader):
    """Takes a while for each batch."""

    def __init__(self, ranks: Ranks, *, seconds: float) -> None:
        super().__init__(ranks, global_batch_size=16)
        self.seconds = seconds

    def __next__(self) -> Batch:
        time.sleep(self.seconds)
        return super().__next__()


STEPS, SLOW_S = 10, 0.12


def lines_of_runs(ranks: Ranks, folder: str, runs: list[tuple[int, str]]) -> list[list[str]]:
    """What rank 0 says of runs in each of which one rank is slow in a phase, or none (-1)."""
    torch.set_num_threads(1)
    said = []
    for number, (slow, phase) in enumerate(runs):
        seconds = {phase: SLOW_S if ranks.rank == slow else 0.0}
        # Twice a step, for the key encoder is its copy.
        slow_down = Slow(seconds.get(FORWARD, 0.0) / 2)
        lines: list[str] = []
        Trainer(
            data=DataConfig(global_batch_size=16),
            model=MODEL,
            optim=OptimConfig(lr=0.1, epochs=20),
            run=RunConfig(
                url=f"{folder}/{number}", max_steps=STEPS + 2, profile_steps=f"3:{STEPS + 2}"
            ),
            loader=SlowLoader(ranks, seconds=seconds.get(DATA_WAIT, 0.0)),
            ranks=ranks,
            say=lines.append,
            encoder=torch.nn.Sequential(slow_down, small_encoder()),
        ).run()
        said.append(lines)
    return said


def assert_named(lines: list[str], *, slow: int, phase: str) -> None:
    (named,) = [line for line in lines if "holds the others up" in line]
    assert named.startswith(f"rank {slow} on {socket.gethostname()} holds the others up: ")
    assert named.endswith(f"most of it in {phase}")
    (each,) = [line for line in lines if line.startswith("own ms of a step")]
    assert each.startswith(f"own ms of a step, the most first: rank {slow} ")
    assert each.count("rank ") == 4


def test_a_slow_rank_of_four_is_named_in_a_real_run_and_none_of_equal_ones(tmp_path: Path) -> None:
    """Other programs may take the cores: a rank that only they slow is slow at one step only."""
    runs = [(2, FORWARD), (-1, ""), (1, DATA_WAIT)]

    compute, equal, data = run_distributed(lines_of_runs, 4, str(tmp_path), runs)[0]

    assert_named(compute, slow=2, phase=FORWARD)
    assert_named(data, slow=1, phase=DATA_WAIT)
    assert not [line for line in equal if "holds the others up" in line]
    figures = read_profile(tmp_path / "0" / "profile" / "profile.json").runs[0].ranks
    assert [one.rank for one in figures] == [0, 1, 2, 3]
    assert figures[2].own_s > SLOW_S
    # The one that is slow waits least for the others.
    assert min(figures, key=lambda one: one.phases[COLLECTIVES]).rank == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("phase", [FORWARD, DATA_WAIT])
def test_the_slow_rank_is_named_in_ten_of_ten_runs(phase: str, tmp_path: Path) -> None:
    runs = [(number % 4, phase) for number in range(10)]

    said = run_distributed(lines_of_runs, 4, str(tmp_path), runs, timeout=300)[0]

    for (slow, _), lines in zip(runs, said, strict=True):
        assert_named(lines, slow=slow, phase=phase)
        print(next(line for line in lines if "holds the others up" in line))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_none_of_equal_ranks_is_named_in_thirty_runs(tmp_path: Path) -> None:
    said = run_distributed(lines_of_runs, 4, str(tmp_path), [(-1, "")] * 30, timeout=300)[0]

    alarms = [line for lines in said for line in lines if "holds the others up" in line]
    print(f"{len(alarms)} alarms in 30 runs")
    assert not alarms
