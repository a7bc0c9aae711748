"""Entries of reasoning-gym as text: JSON that gives back the tuples, sets and keys that its scorers need."""

from __future__ import annotations

import json
from typing import Any

from verl_plugins.errors import DataError

TUPLE, SET, PAIRS = "__tuple__", "__set__", "__pairs__"


def to_text(entry: dict[str, Any]) -> str:
    """An entry as one line.

    Raises:
        DataError: if something in it is neither a number, a text nor made of them.
    """
    return json.dumps(_plain(entry), ensure_ascii=False, separators=(",", ":"))


def from_text(text: str) -> dict[str, Any]:
    """What `to_text` was given."""
    return _restored(json.loads(text))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "tolist"):  # numpy
        return _plain(value.tolist())
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, tuple):
        return {TUPLE: [_plain(one) for one in value]}
    if isinstance(value, (set, frozenset)):
        return {SET: [_plain(one) for one in sorted(value, key=repr)]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, dict):
        return {PAIRS: [[_plain(key), _plain(one)] for key, one in value.items()]}
    raise DataError(f"an entry holds a {type(value).__name__}, which cannot be kept as text")


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(one) for one in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {TUPLE}:
        return tuple(map(_restored, value[TUPLE]))
    if value.keys() == {SET}:
        return set(map(_restored, value[SET]))
    if value.keys() == {PAIRS}:
        return {_restored(key): _restored(one) for key, one in value[PAIRS]}
    return {key: _restored(one) for key, one in value.items()}
