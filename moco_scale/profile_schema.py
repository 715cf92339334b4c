"""The JSON schema of a profile, made of the dataclasses that are written.

`python -m moco_scale.profile_schema` writes templates/profile.schema.json anew.
"""

import ast
import dataclasses
import inspect
import itertools
import json
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from moco_scale.profiles import PROFILE_FORMAT, VERSION, Profile

SCHEMA_PATH = Path(__file__).parent / "templates" / "profile.schema.json"
_SIMPLE = {str: "string", int: "integer", float: "number"}


def schema() -> dict[str, Any]:
    """JSON Schema, draft 2020-12; the text under each field is its description."""
    tables: dict[str, Any] = {}
    whole = _table(Profile, tables)
    whole["properties"] = {
        "format": {"const": PROFILE_FORMAT},
        "version": {"const": VERSION},
        **whole["properties"],
    }
    whole["required"] = ["format", "version", *whole["required"]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:moco-scale:profile:{VERSION}",
        "title": PROFILE_FORMAT,
        **whole,
        "$defs": tables,
    }


def as_text() -> str:
    """As the file has it."""
    return json.dumps(schema(), indent=1) + "\n"


def _table(cls: type, tables: dict[str, Any]) -> dict[str, Any]:
    hints, said = get_type_hints(cls), _said(cls)
    fields = dataclasses.fields(cls)
    return {
        "type": "object",
        "description": said[""],
        "properties": {
            one.name: {
                **_of(hints[one.name], tables),
                **({"description": said[one.name]} if one.name in said else {}),
            }
            for one in fields
        },
        "required": [
            one.name
            for one in fields
            if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        ],
        "additionalProperties": False,
    }


def _of(hint: Any, tables: dict[str, Any]) -> dict[str, Any]:
    if hint is Any:
        return {}
    if hint in _SIMPLE:
        return {"type": _SIMPLE[hint]}
    if dataclasses.is_dataclass(hint):
        name = hint.__name__  # type: ignore[union-attr]  # a dataclass type, not a value
        if name not in tables:
            tables[name] = {}  # so that it comes before what it holds
            tables[name] = _table(hint, tables)  # type: ignore[arg-type]  # the same
        return {"$ref": f"#/$defs/{name}"}
    origin, inside = get_origin(hint), get_args(hint)
    if origin is tuple:
        return {"type": "array", "items": _of(inside[0], tables)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(inside[1], tables)}
    assert origin in (Union, types.UnionType), f"no schema for {hint}"
    return {
        "anyOf": [{"type": "null"} if one is type(None) else _of(one, tables) for one in inside]
    }


def _said(cls: type) -> dict[str, str]:
    """By field, the text under its declaration; "" has the class's own."""
    (declared,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(declared, ast.ClassDef)
    said = {"": inspect.cleandoc(cls.__doc__ or "")}
    for field, text in itertools.pairwise(declared.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            assert isinstance(field.target, ast.Name)
            said[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return said


if __name__ == "__main__":
    SCHEMA_PATH.write_text(as_text())
