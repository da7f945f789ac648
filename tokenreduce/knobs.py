"""Checking a knob's value against the type that its dataclass field declares."""

from __future__ import annotations

import dataclasses
import difflib
import types
from functools import lru_cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def nearest(name: str, known: list[str]) -> str:
    """A sentence that offers the known name nearest to ``name``, or all of them.

    >>> nearest("fopru_ro", ["fopru_row", "pool"])
    "did you mean 'fopru_row'?"
    """
    if match := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {match[0]!r}?"
    return f"known: {', '.join(sorted(known))}"


def check_knob_names(cls: type, knobs: dict[str, Any]) -> None:
    """Raise ``ValueError`` for a name that is no field of the dataclass ``cls``."""
    known = [field.name for field in dataclasses.fields(cls)]
    for name in knobs:
        if name not in known:
            raise ValueError(f"{cls.__name__} has no knob {name!r}: {nearest(name, known)}")


def with_tuples(cls: type, knobs: dict[str, Any]) -> dict[str, Any]:
    """The knobs, with lists (which is what configuration files hold) made tuples where the field declares one."""
    hints = _declared(cls)
    return {
        name: tuple(value) if isinstance(value, list) and get_origin(hints[name]) is tuple else value
        for name, value in knobs.items()
    }


def check_knobs(instance: Any) -> None:
    """Raise ``ValueError`` for a field of a dataclass instance whose value does not fit its declared type."""
    hints = _declared(instance.__class__)
    for field in dataclasses.fields(instance):
        value, declared = getattr(instance, field.name), hints[field.name]
        if not _fits(value, declared):
            raise ValueError(f"{type(instance).__name__}: {field.name}={value!r} is not {_describe(declared)}")


@lru_cache(maxsize=256)
def _declared(cls: type) -> dict[str, Any]:
    """The types of a class's fields, read once: reading them takes longer than all else in making an instance."""
    return get_type_hints(cls)


def _fits(value: Any, declared: Any) -> bool:
    origin, arguments = get_origin(declared), get_args(declared)
    if origin is Literal:
        return value in arguments
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin in (list, tuple):
        return isinstance(value, origin) and all(_fits(item, arguments[0]) for item in value if arguments)
    if declared is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if declared is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return declared is Any or not isinstance(declared, type) or isinstance(value, declared)


def _describe(declared: Any) -> str:
    origin, arguments = get_origin(declared), get_args(declared)
    if origin is Literal:
        return "one of " + ", ".join(repr(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(argument) for argument in arguments)
    if origin in (list, tuple):
        return "a list"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}.get(
        declared, str(declared)
    )
