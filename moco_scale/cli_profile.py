"""The command that measures the input pipeline and the step: profile."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from moco_scale import distributed
from moco_scale.config import TrainConfig, split_presets
from moco_scale.errors import ConfigError
from moco_scale.profile_report import build_page
from moco_scale.profile_table import print_comparison, print_profile
from moco_scale.profiler import ProfileConfig, profile
from moco_scale.profiles import Profile, read_profile, write_profile
from moco_scale.settings import parse_flags

console = Console(highlight=False)

_JSON, _HTML = "profile.json", "profile.html"
_NOWHERE = "not-written"


@dataclass(frozen=True, kw_only=True, slots=True)
class _ProfileArguments(TrainConfig):
    """Where the input pipeline's time goes: each stage alone, joined, and with the training step.

    Takes the settings of `pretrain`, presets included, and trains some steps of which nothing is
    kept. Says which stage is the limit, what would be next, and which flag to change. Under
    torchrun, too. Of profiles that are there already, `--compare A.json B.json` shows what has
    changed between two, and `--show FILE` prints one, such as that of `run.profile_steps`.
    """

    options: tyro.conf.OmitArgPrefixes[ProfileConfig] = field(default_factory=ProfileConfig)
    to: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("moco-scale-profile")
    """Local folder for profile.json and profile.html; what is there is replaced."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _ShowArguments:
    """A profile that is there already, such as RUN/profile/profile.json."""

    show: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """Path or URL of a profile.json."""
    html: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write its page to this file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _CompareArguments:
    """What has changed between two profiles."""

    compare: tuple[str, str]
    """Path or URL of the profile.json before, and of the one after."""
    html: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the second one's page, with the comparison on it, to this file."""


def run_profile(arguments: list[str]) -> int:
    """`moco-scale profile`."""
    flags = {one.partition("=")[0] for one in arguments}
    if "--compare" in flags:
        return _compare(arguments)
    if "--show" in flags:
        return _show(arguments)
    default, rest = split_presets(arguments)
    given = parse_flags(
        _ProfileArguments,
        rest,
        prog="moco-scale profile",
        default=_ProfileArguments(**_sections(default)),
    )
    config = TrainConfig(**_sections(given))
    if not config.run.url:  # nothing is written there
        config = replace(config, run=replace(config.run, url=_NOWHERE))
    ranks = distributed.start(config.run.device, timeout_s=config.run.collective_timeout_s)
    try:
        config.validate(world_size=ranks.world_size)
        if ranks.speaks:
            _check_writable(given.to)
        found = profile(
            config,
            given.options,
            ranks=ranks,
            say=_say,
            command=shlex.join(["moco-scale", "profile", *arguments]),
        )
    finally:
        distributed.shutdown()
    if ranks.speaks:
        _write(found, given.to)
        print_profile(found, console)
        console.print(f"\n{given.to / _HTML}  {given.to / _JSON}", soft_wrap=True)
    return 0


def _sections(config: TrainConfig) -> dict[str, Any]:
    return {one.name: getattr(config, one.name) for one in fields(TrainConfig)}


def _show(arguments: Sequence[str]) -> int:
    given = parse_flags(_ShowArguments, arguments, prog="moco-scale profile --show")
    found = read_profile(given.show)
    print_profile(found, console)
    if given.html is not None:
        given.html.write_text(build_page(found))
    return 0


def _compare(arguments: Sequence[str]) -> int:
    given = parse_flags(_CompareArguments, arguments, prog="moco-scale profile --compare")
    before, after = (read_profile(path) for path in given.compare)
    print_comparison(before, after, console)
    if given.html is not None:
        given.html.write_text(build_page(after, against=before))
    return 0


def _check_writable(folder: Path) -> None:
    """Before minutes of measuring.

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside = folder / f".{_JSON}.unfinished"
        beside.touch()
        beside.unlink()
    except OSError as err:
        raise ConfigError(
            f"{folder} cannot be written to: {err.strerror}; give another --to"
        ) from err


def _write(found: Profile, folder: Path) -> None:
    write_profile(found, folder / _JSON)
    (folder / _HTML).write_text(build_page(found))


def _say(line: str) -> None:
    """Progress, apart from what is printed in the end."""
    print(line, file=sys.stderr, flush=True)
