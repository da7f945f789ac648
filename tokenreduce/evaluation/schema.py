"""Dataclasses as the schema of what is written: JSON is their form, and comes back as the very same objects."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Kind = TypeVar("Kind")

Reader = Callable[[Any, str], Any]
"""Turns parsed JSON into a value; its second argument is the place within the whole, for messages."""


class SchemaError(ValueError):
    """Data of another version of a schema; the message names both versions and the remedy."""


def to_json(value: Any, version: int, indent: int | None = None) -> str:
    """A dataclass, and all that it holds, as JSON in the order of its fields, with the schema's version first."""
    separators = (",", ":") if indent is None else None
    content = {"schema": version, **vars(value)}
    return json.dumps(content, default=vars, indent=indent, separators=separators, ensure_ascii=False, allow_nan=False)


def from_json(kind: type[Kind], text: str, version: int) -> Kind:
    """The inverse of :func:`to_json`.

    Raises :class:`SchemaError` for another version, and ``ValueError`` for anything else that is no ``kind``: it names
    the first field that is missing, unknown or of another type.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or "schema" not in content:
        raise ValueError("its schema is missing")
    found = content.pop("schema")
    if found != version:
        newer = isinstance(found, int) and found > version
        remedy = "use the version that wrote it" if newer else "run the same command again for a new one"
        age = "a newer" if newer else "an older"
        raise SchemaError(f"schema {found} of {age} tokenreduce, while this one reads schema {version}: {remedy}")
    value: Kind = _reader(cast(Any, kind))(content, "")
    return value


@cache
def _reader(kind: Any) -> Reader:
    """The reader of a type: a dataclass, a scalar, ``Any``, or an optional, a sequence or a mapping of these."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return lambda content, place: content
    if is_dataclass(kind):
        return _dataclass_reader(kind)
    if origin in (Union, UnionType):
        (present,) = (each for each in arguments if each is not NoneType)
        read_present = _reader(present)
        return lambda content, place: None if content is None else read_present(content, place)
    if origin is Literal:
        return _scalar_reader(" or ".join(map(repr, arguments)), lambda content: content in arguments)
    if origin in (tuple, Sequence):
        return _sequence_reader(arguments[0])
    if origin is Mapping:
        return _mapping_reader(arguments[1])
    accepted = (int, float) if kind is float else (kind,)
    return _scalar_reader(kind.__name__, lambda content: type(content) in accepted)


def _dataclass_reader(kind: Any) -> Reader:
    hints = get_type_hints(kind)
    readers = {field.name: _reader(hints[field.name]) for field in fields(kind)}
    required = {field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING}

    def read(content: Any, place: str) -> Any:
        if not isinstance(content, dict):
            raise ValueError(f"{place} is {content!r} and no {kind.__name__}")
        if missing := required - content.keys():
            raise ValueError(f"{_within(place, min(missing))} is missing")
        if unknown := content.keys() - readers.keys():
            raise ValueError(f"{_within(place, min(unknown))} is unknown")
        return kind(**{name: readers[name](each, _within(place, name)) for name, each in content.items()})

    return read


def _sequence_reader(member: Any) -> Reader:
    read_member = _reader(member)

    def read(content: Any, place: str) -> tuple[Any, ...]:
        if not isinstance(content, list):
            raise ValueError(f"{place} is {content!r} and no list")
        if set(map(type, content)) <= {member}:  # thousands of indices at once
            return tuple(content)
        return tuple(read_member(each, f"{place}[{number}]") for number, each in enumerate(content))

    return read


def _mapping_reader(member: Any) -> Reader:
    read_member = _reader(member)

    def read(content: Any, place: str) -> dict[str, Any]:
        if not isinstance(content, dict):
            raise ValueError(f"{place} is {content!r} and no mapping")
        return {name: read_member(each, _within(place, name)) for name, each in content.items()}

    return read


def _scalar_reader(name: str, fits: Callable[[Any], bool]) -> Reader:
    def read(content: Any, place: str) -> Any:
        if not fits(content):
            raise ValueError(f"{place} is {content!r} and no {name}")
        return content

    return read


def _within(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name
