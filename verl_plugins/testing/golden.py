"""Recorded cases: inputs and outputs of the authors' own functions, or of the formula, replayed through a plugin.

A file is JSON: `id`, `produced_by`, and `cases`, each with `name`, `inputs`, `params`, `expected`, `rtol`, `atol`. A
replay turns one case into a dict of what the plugin computes. What no replay reads or computes is a failure, so that
nothing in a file is overlooked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

MISSING = object()


class Case:
    """Inputs and params of a case; `unread` names what the replay did not ask for."""

    def __init__(self, inputs: Mapping[str, Any], params: Mapping[str, Any]) -> None:
        self._parts = {"input": inputs, "parameter": params}
        self._read: dict[str, set[str]] = {"input": set(), "parameter": set()}

    def input(self, key: str, default: Any = MISSING) -> Any:
        return self._get("input", key, default)

    def param(self, key: str, default: Any = MISSING) -> Any:
        return self._get("parameter", key, default)

    def tensor(self, key: str) -> torch.Tensor:
        """An input as a float64 tensor."""
        return torch.tensor(self.input(key), dtype=torch.float64)

    def has(self, key: str) -> bool:
        return key in self._parts["input"]

    def _get(self, part: str, key: str, default: Any) -> Any:
        self._read[part].add(key)
        if key not in self._parts[part]:
            assert default is not MISSING, f"the case has no {part} {key!r}"
            return default
        return self._parts[part][key]

    def unread(self) -> list[str]:
        """`input 'uid'`, … for all that was not read."""
        return [
            f"{part} {key!r}" for part, fields in self._parts.items() for key in sorted(set(fields) - self._read[part])
        ]


Replay = Callable[[Case, Mapping[str, Any]], Mapping[str, Any]]
"""(case, expected) -> what our code computes, by the names used in `expected`."""


def read_cases(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The method's id and its cases."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return data["id"], data["cases"]


def differences(case: Mapping[str, Any], replay: Replay) -> list[str]:
    """What a replay gets wrong, overlooks or does not know, a sentence each; empty when all is well."""
    read, expected = Case(case["inputs"], case["params"]), case["expected"]
    found = replay(read, expected)
    wrong = [f"the replay does not read {name}" for name in read.unread()]
    wrong += [f"the replay computes nothing called {key!r}" for key in sorted(set(expected) - set(found))]
    for key in sorted(set(expected) & set(found)):
        wrong += _difference(key, found[key], expected[key], case["rtol"], case["atol"])
    return wrong


def _difference(key: str, found: Any, expected: Any, rtol: float, atol: float) -> list[str]:
    parts = _parts(expected)
    if parts or isinstance(expected, Mapping):
        ours = found if isinstance(found, Mapping) else dict(enumerate(found))
        wrong = [f"{key} has no entry {name!r}" for name in parts if name not in ours]
        if isinstance(expected, list) or not parts:
            wrong += [f"{key} has an entry {name!r} too many" for name in ours if name not in parts]
        pairs = [(f"{key}.{name}", ours[name], parts[name]) for name in parts if name in ours]
        return wrong + [text for pair in pairs for text in _difference(*pair, rtol, atol)]
    if np.asarray(expected).dtype.kind == "U" or expected is None or found is None:
        return [] if np.array_equal(found, expected) else [f"{key} is {found!r} instead of {expected!r}"]
    ours, theirs = (np.asarray(value, dtype=np.float64) for value in (found, expected))
    if ours.shape != theirs.shape:
        return [f"{key} has shape {ours.shape} instead of {theirs.shape}"]
    far = ~np.isclose(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)
    if not far.any():
        return []
    place = tuple(int(index) for index in np.argwhere(far)[0])
    where = f"{key}{list(place) if place else ''}"
    count = f" ({int(far.sum())} of {far.size} values differ)" if far.size > 1 else ""
    return [f"{where} is {ours[place]:.10g} instead of {theirs[place]:.10g}{count}"]


def _parts(value: Any) -> Mapping[Any, Any]:
    """A mapping, or the rows of a list that differ in shape or are mappings, by number; empty for one array."""
    if isinstance(value, Mapping):
        return value
    rows = value if isinstance(value, list) else []
    ragged = len({_shape(row) for row in rows}) > 1 or any(_shape(row) is None for row in rows)
    return dict(enumerate(rows)) if ragged or any(isinstance(row, Mapping) for row in rows) else {}


def _shape(value: Any) -> tuple[int, ...] | None:
    """Of a list that is one array; None of one that is not."""
    if not isinstance(value, list):
        return ()
    shapes = {_shape(row) for row in value}
    return (len(value), *shapes.pop()) if len(shapes) == 1 and None not in shapes else None if shapes else (0,)
