"""Profiles: the file, and stage figures out of spans."""

import json
from pathlib import Path

import pytest

from moco_scale.errors import ConfigError
from moco_scale.profiles import (
    DECODE,
    STEP,
    STORE,
    Alone,
    Profile,
    Quantiles,
    in_run,
    read_profile,
    write_profile,
)
from pipelines.spans import Span

pytestmark = pytest.mark.timeout(30)

PROFILE = Profile(
    about={"date": "2026-11-25"},
    settings={"data": {"shards": ["set"]}},
    world_size=1,
    batch_size=2,
    cores=2,
    alone=(
        Alone(
            stage=STORE,
            workers=4,
            samples_per_s=10.0,
            low=9.0,
            high=11.0,
            bytes_per_s=None,
            cpu_s_per_1000=0.5,
            call=Quantiles.of([0.1, 0.2]),
        ),
    ),
    rates={"step_pairs_per_s": 10.0, "decode_per_gpu": None},
)


def test_a_profile_comes_back_as_it_was_written(tmp_path: Path) -> None:
    write_profile(PROFILE, tmp_path / "deep" / "profile.json")

    assert read_profile(tmp_path / "deep" / "profile.json") == PROFILE
    assert [one.name for one in (tmp_path / "deep").iterdir()] == ["profile.json"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "is of version 2, and this moco-scale reads version 1"),
        ({"format": "moco-scale rates"}, "is not a profile"),
        ({"alnoe": []}, "unknown option alnoe; did you mean alone?"),
        ({"cores": "two"}, "cores takes a whole number, not 'two'"),
    ],
)
def test_another_file_is_refused_by_name(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "profile.json"
    write_profile(PROFILE, path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    with pytest.raises(ConfigError, match=r"profile\.json") as caught:
        read_profile(path)

    assert said in str(caught.value)


def test_a_stage_is_as_busy_as_its_threads_are_together() -> None:
    spans = [
        Span("read", "a", 0.0, 1.0, 0.1, 4, 400),
        Span("read", "b", 0.5, 1.5, 0.1, 4, 400),  # half of it lies behind the end
        Span("decode", "c", 0.2, 0.4, 0.2, 1, 0),
        Span("wait for stream", "c", 0.4, 0.9, 0.0, 0, 0),
        Span("step", "main", 2.0, 3.0, 1.0, 8, 0),  # after it
    ]

    found = {one.stage: one for one in in_run(spans, start_s=0.0, end_s=1.0)}

    assert STEP not in found
    assert found[STORE].workers == 2
    assert found[STORE].busy_frac == pytest.approx(0.75)
    assert found[STORE].samples_per_s == pytest.approx(6.0)
    assert found[STORE].bytes_per_s == pytest.approx(600.0)
    assert found[DECODE].cpu_s_per_1000 == pytest.approx(200.0)
    wait = found[DECODE].wait_to_get
    assert wait is not None
    assert wait.p50_s == pytest.approx(0.5)
