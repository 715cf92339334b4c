"""Settings from flags and files into frozen dataclasses: strictly, so that no typo trains."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import re
import tomllib
import types
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from moco_scale.errors import ConfigError
from shards.store import open_store

T = TypeVar("T")


class UsageError(ConfigError):
    """A command line that cannot be read: exit code 2."""


def parse_flags(
    cls: type[T], arguments: Sequence[str], *, prog: str, default: T | None = None
) -> T:
    """`cls` filled from flags; `--help` prints and exits.

    Raises:
        UsageError: an unknown flag or a wrong value, in one line.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found: T = tyro.cli(
                cls,
                args=list(arguments),
                prog=prog,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=(tyro.conf.AvoidSubcommands,),
            )
            return found
    except SystemExit as err:
        if not err.code:
            raise
        raise UsageError(f"{_one_line(said.getvalue())}; see {prog} --help") from err


def read_preset(name: str) -> dict[str, Any]:
    """A preset as nested dicts: a bare name of this package, a TOML file, or a saved run's JSON.

    Files may be URLs.

    Raises:
        UsageError: there is no such preset.
        ConfigError: it cannot be read.
    """
    folder = resources.files("moco_scale") / "presets"
    path = Path(name)
    try:
        if path.suffix == ".json":
            loaded = json.loads(_text(name))
        elif path.suffix == ".toml":
            loaded = tomllib.loads(_text(name))
        else:
            loaded = tomllib.loads((folder / f"{name}.toml").read_text())
    except FileNotFoundError as err:
        known = sorted(
            p.name.removesuffix(".toml") for p in folder.iterdir() if p.name.endswith(".toml")
        )
        raise UsageError(
            f"no preset {name!r}: give one of {', '.join(known)}, or a .toml or .json file"
        ) from err
    except (OSError, ValueError) as err:
        raise ConfigError(f"preset {name} cannot be read: {err}") from err
    if not isinstance(loaded, dict):
        raise ConfigError(f"preset {name} holds {type(loaded).__name__}, not tables of settings")
    return loaded


def _text(name: str) -> str:
    if "://" not in name:
        return Path(name).read_text()
    folder, _, file = name.rpartition("/")
    return bytes(open_store(folder).read(file)).decode()


def from_mapping(cls: type[T], values: Mapping[str, Any], *, path: str = "") -> T:
    """A settings dataclass from nested dicts, strictly: unknown keys and wrong types are refused.

    Raises:
        ConfigError: naming the key, with its path and the nearest right name.
    """
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # T is a dataclass
    unknown = [key for key in values if key not in fields]
    if unknown:
        near = difflib.get_close_matches(unknown[0], fields, n=1)
        hint = f"did you mean {path}{near[0]}?" if near else f"known: {', '.join(fields)}"
        raise ConfigError(f"unknown option {path}{unknown[0]}; {hint}")
    built = {key: _value(hints[key], value, path=f"{path}{key}") for key, value in values.items()}
    try:
        return cls(**built)
    except ValueError as err:
        raise ConfigError(str(err)) from err


def _value(hint: Any, value: Any, *, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} is a table of settings, not {value!r}")
        return from_mapping(hint, value, path=f"{path}.")  # type: ignore[arg-type]  # a dataclass type
    origin = get_origin(hint)
    if origin is Literal:
        if value not in get_args(hint):
            raise ConfigError(
                f"{path} {value!r} is not one of {', '.join(map(repr, get_args(hint)))}"
            )
        return value
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (other,) = (arg for arg in get_args(hint) if arg is not type(None))
        return _value(other, value, path=path)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} is a table, not {value!r}")
        inner = get_args(hint)[1]
        return {key: _value(inner, item, path=f"{path}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if origin is tuple:
        if isinstance(value, str) and get_args(hint)[0] is str:
            return (value,)  # one of what there may be several of
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path} takes a list, not {value!r}")
        return tuple(_value(get_args(hint)[0], item, path=path) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{path} takes {_KINDS[hint]}, not {value!r}")
    return value


_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def _one_line(box: str) -> str:
    """tyro's error box as one line: its first paragraph, and the first flag that it suggests."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()[1:]]
    first = " ".join(itertools.takewhile(lambda line: not line.startswith("──"), lines)).strip()
    near = re.search(r"Perhaps you meant:\s*(--[\w.-]+)", " ".join(lines))
    message = first or "the command line could not be read"
    return f"{message}; did you mean {near.group(1)}?" if near else message
