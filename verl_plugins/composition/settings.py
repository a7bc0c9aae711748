"""Settings of a plugin or lab: from a plain mapping to its typed Config, or one sentence on what is wrong."""

from __future__ import annotations

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from verl_plugins.errors import CompositionError, nearest

_BOUNDS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "greater than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
}


def typed(config_class: type, values: Mapping[str, Any] | None, where: str, of: str = "plugin") -> Any:
    """An instance of the Config dataclass of a plugin or lab; `where` is the section's key, as in `plugins.vade`."""
    if not isinstance(values or {}, Mapping):
        raise CompositionError(f"{where} is {_shown(values)}: it must be a mapping of settings")
    known = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    hints = _hints(config_class, where, of)
    given = {}
    for name, value in (values or {}).items():
        if name not in known:
            raise CompositionError(f"{where}.{name} is not a setting of the {of}{_hint(name, known)}")
        given[name] = _convert(value, hints[name], f"{where}.{name}")
        _within(given[name], known[name].metadata, f"{where}.{name}")
    _complete(known, given, where)
    try:
        return config_class(**given)
    except ValueError as error:
        raise CompositionError(f"{where}: {error}") from error


def _hint(name: str, known: Mapping[str, Any]) -> str:
    return nearest(str(name), known) if known else "; it has none"


def _hints(config_class: type, where: str, of: str) -> dict[str, Any]:
    try:
        return typing.get_type_hints(config_class)
    except NameError as error:
        raise CompositionError(
            f"{where}: a type in the {of}'s {config_class.__name__} cannot be resolved ({error})"
        ) from error


def _complete(known: Mapping[str, dataclasses.Field], given: Mapping[str, Any], where: str) -> None:
    for name, field in known.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise CompositionError(f"{where}.{name} has no value: set it, as in {where}.{name}=…")


def _convert(value: Any, hint: Any, key: str) -> Any:
    """The value as the annotated type; an int passes for a float, nothing else is changed."""
    for kind in _alternatives(hint):
        if _is(value, kind):
            return float(value) if kind is float else value
        if (get_origin(kind) or kind) in (list, tuple) and isinstance(value, (list, tuple)):
            return _sequence(value, kind, key)
    raise CompositionError(f"{key} is {_shown(value)}: it must be {_name(hint)}")


def _alternatives(hint: Any) -> list[Any]:
    """The types a union allows, exact ones before float, so that an int stays an int where ints are allowed."""
    kinds = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    return sorted(kinds, key=lambda kind: kind is float)


def _sequence(values: list | tuple, hint: Any, key: str) -> list | tuple:
    inner = [arg for arg in get_args(hint) if arg is not Ellipsis] or [Any]
    kind = get_origin(hint) or hint
    fixed = kind is tuple and Ellipsis not in get_args(hint) and get_args(hint)
    if fixed and len(values) != len(inner):
        raise CompositionError(f"{key} has {len(values)} values: it must have {len(inner)}")
    types_ = inner if fixed else inner[:1] * len(values)
    return kind(_convert(value, of, f"{key}[{i}]") for i, (value, of) in enumerate(zip(values, types_, strict=True)))


def _is(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if hint is Any:
        return True
    if hint in (None, type(None)):
        return value is None
    if origin is Literal:
        return value in get_args(hint)
    if hint is float:
        return type(value) in (int, float) and not math.isnan(value)
    if hint is int:
        return type(value) is int
    if origin in (list, tuple) or hint in (list, tuple):
        return False
    return isinstance(value, origin or hint)


def _within(value: Any, metadata: Mapping[str, Any], key: str) -> None:
    for name, (holds, words) in _BOUNDS.items():
        if value is not None and metadata.get(name) is not None and not holds(value, metadata[name]):
            raise CompositionError(f"{key} is {_shown(value)}: it must be {words} {metadata[name]!r}")
    choices = metadata.get("choices")
    if choices and value not in choices:
        raise CompositionError(f"{key} is {_shown(value)}: it must be one of {', '.join(map(repr, choices))}")


def _shown(value: Any) -> str:
    """A value as YAML writes it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_name(arg) for arg in get_args(hint))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    return plain.get(hint) or str(hint).replace("typing.", "")
