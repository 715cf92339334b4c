"""Settings are layered strictly: a typo is an error with the right name, never a silent default."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_type_hints

import pytest
from torch.distributed.run import get_args_parser

from moco_scale.config import TrainConfig, load_config, to_mapping
from moco_scale.errors import ConfigError
from moco_scale.settings import UsageError, from_mapping, read_preset


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    rate: float = 0.5
    names: tuple[int, ...] = (1, 2)
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"inner.rate must be at least 0, not {self.rate}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    count: int = 3
    flag: bool = True
    inner: Inner = field(default_factory=Inner)


def test_nested_values_are_read_with_their_types() -> None:
    found = from_mapping(Outer, {"count": 4, "inner": {"rate": 2, "names": [7], "kind": "b"}})

    assert found == Outer(count=4, inner=Inner(rate=2.0, names=(7,), kind="b"))
    assert isinstance(found.inner.rate, float)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"cuont": 1}, "unknown option cuont; did you mean count?"),
        ({"inner": {"rat": 1.0}}, "unknown option inner.rat; did you mean inner.rate?"),
        ({"count": "5"}, "count takes a whole number, not '5'"),
        ({"count": True}, "count takes a whole number, not True"),
        ({"count": 1.5}, "count takes a whole number, not 1.5"),
        ({"flag": 1}, "flag takes true or false, not 1"),
        ({"inner": 3}, "inner is a table of settings, not 3"),
        ({"inner": {"kind": "c"}}, "inner.kind 'c' is not one of 'a', 'b'"),
        ({"inner": {"names": 3}}, "inner.names takes a list, not 3"),
        ({"inner": {"rate": -1}}, "inner.rate must be at least 0, not -1"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(values: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        from_mapping(Outer, values)

    assert expected in str(refused.value)


def test_torchrun_passes_every_flag_of_ours_on() -> None:
    flags = ["--preset", "--data", "--out"]
    for section, table in get_type_hints(TrainConfig).items():
        names = [field.name for field in dataclasses.fields(table)]
        flags += [f"--{section}.{name.replace('_', '-')}" for name in names]

    for flag in flags:
        ours = ["moco_scale", "pretrain", flag, "x"]
        parsed = get_args_parser().parse_args(["--nproc-per-node", "2", "-m", *ours])
        assert [parsed.training_script, *parsed.training_script_args] == ours


def test_later_presets_and_flags_win(tmp_path: Path) -> None:
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text('[model]\nqueue_size = 10\nmomentum = 0.5\n[data]\nshards = "x"\n')
    second.write_text("[model]\nqueue_size = 20\n")

    config = load_config(
        ["--preset", str(first), "--preset", str(second), "--model.dim", "7", "--out", "there"]
    )

    assert config.model.queue_size == 20
    assert config.model.momentum == 0.5
    assert config.model.dim == 7
    assert config.data.shards == ("x",)
    assert config.run.url == "there"


def test_a_saved_run_is_a_preset(tmp_path: Path) -> None:
    import json

    config = load_config(["--preset", "smoke", "--data=s3://b/set", "--out", "s3://b/run"])
    saved = tmp_path / "config.json"
    saved.write_text(json.dumps(to_mapping(config)))

    assert load_config(["--preset", str(saved)]) == config


def test_every_shipped_preset_is_valid() -> None:
    folder = Path(__file__).parents[2] / "moco_scale" / "presets"
    names = sorted(path.stem for path in folder.glob("*.toml"))

    assert "smoke" in names
    for name in names:
        config = from_mapping(TrainConfig, read_preset(name) | {"run": {"url": "r"}})
        values = to_mapping(config)
        values["data"]["shards"] = "s"
        from_mapping(TrainConfig, values).validate(world_size=1)


def test_a_wrong_flag_is_a_usage_error_in_one_line() -> None:
    with pytest.raises(UsageError) as refused:
        load_config(["--model.quue-size", "3"])

    said = str(refused.value)
    assert "--model.queue-size" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--data", ""], "--data URL"),
        (["--out", ""], "--out URL"),
        (["--model.queue-size", "64"], "model.queue_size 64"),
        (["--model.shuffle-domain", "96"], "model.shuffle_domain 96"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_once_all_are_known(
    flags: list[str], expected: str
) -> None:
    config = load_config(["--preset", "smoke", "--data", "s", "--out", "r", *flags])

    with pytest.raises(ConfigError) as refused:
        config.validate(world_size=1)

    assert expected in str(refused.value)


def test_a_world_that_cuts_bn_groups_is_refused_with_the_allowed_ones() -> None:
    config = load_config(["--preset", "smoke", "--data", "s", "--out", "r"])

    with pytest.raises(ConfigError, match="1, 2, 4"):
        config.validate(world_size=3)
