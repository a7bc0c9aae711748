"""The columns of a study: a number of each run, None where the run has not what it is made of.

A column is written as one of

    {metric: actor/entropy, steps: last 5, of: mean}     steps: all (default), last N, first N, A-B or one number
    {held_out: first | last | budget}                    accuracy of sampled answers to held-out prompts
    {reaches: 0.55}                                      the step at which it gets there
    {python: FILE.py:FUNCTION, key: value…}              of your own: FUNCTION(run, key=value…) -> number or None
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from verl_plugins.commands.curves import Run
from verl_plugins.composition.look.words import short
from verl_plugins.errors import CompositionError, nearest

OF: Mapping[str, Callable[[pd.Series], float]] = {
    "mean": lambda values: values.mean(),
    "variance": lambda values: values.var(ddof=0),
    "min": lambda values: values.min(),
    "max": lambda values: values.max(),
}
KEYS = {"metric": {"steps", "of"}, "held_out": set(), "reaches": set()}
BUDGET = "budget"
HELD_OUT = ("first", "last", BUDGET)
WINDOW = re.compile(r"(?P<end>first|last) (?P<count>\d+)|(?P<low>\d+)(-(?P<high>\d+))?|all")


@dataclass(frozen=True)
class Column:
    """A title and what is measured; of `budget` columns, which need all runs of the study, the latter is None."""

    title: str
    measure: Callable[[Run], float | None] | None


def column(title: str, what: Any, folder: Path) -> Column:
    """A column as a study file says it; Python files lie in `folder`.

    Raises:
        CompositionError: it says something else.
    """
    where = f"study.columns.{title}"
    if isinstance(what, str):
        what = {"metric": what}
    if not isinstance(what, Mapping) or not what:
        raise CompositionError(f"{where} is {what!r}: write a metric, as in {{metric: actor/entropy, steps: last 5}}")
    if "python" in what:
        own = function(what["python"], folder)
        options = {key: value for key, value in what.items() if key != "python"}
        return Column(title, lambda run: own(run, **options))
    kind = next((key for key in KEYS if key in what), None)
    if kind is None:
        raise CompositionError(f"{where} says neither metric, held_out, reaches nor python")
    if unknown := [key for key in what if key not in {kind, *KEYS[kind]}]:
        raise CompositionError(f"{where}.{unknown[0]} is not known{nearest(str(unknown[0]), KEYS[kind])}")
    return {"metric": _metric, "held_out": _held_out, "reaches": _reaches}[kind](title, what, where)


def _metric(title: str, what: Mapping[str, Any], where: str) -> Column:
    key, window, of = str(what["metric"]), str(what.get("steps", "all")), str(what.get("of", "mean"))
    found = WINDOW.fullmatch(window)
    if found is None:
        raise CompositionError(f"{where}.steps is {window!r}: write all, first N, last N, A-B or a number")
    if of not in OF:
        raise CompositionError(f"{where}.of is {of!r}{nearest(of, OF)}")
    return Column(title, lambda run: _number(OF[of](_within(run, key, found))))


def _within(run: Run, key: str, window: re.Match) -> pd.Series:
    """The metric in the steps asked for, where the run has it."""
    values = pd.to_numeric(run.steps[key], errors="coerce") if key in run.steps else pd.Series(dtype=float)
    values = values[values.index > 0]
    if count := window["count"]:
        low, high = (1, int(count)) if window["end"] == "first" else (run.last_step - int(count) + 1, run.last_step)
        values = values[(values.index >= low) & (values.index <= high)]
    elif window["low"]:
        values = values[(values.index >= int(window["low"])) & (values.index <= int(window["high"] or window["low"]))]
    return values.dropna()


def _number(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _held_out(title: str, what: Mapping[str, Any], where: str) -> Column:
    which = what["held_out"]
    if which not in HELD_OUT:
        raise CompositionError(f"{where}.held_out is {which!r}{nearest(str(which), HELD_OUT)}")
    place = 0 if which == "first" else -1
    return Column(title, None if which == BUDGET else lambda run: _validated(run, place))


def validations(run: Run) -> pd.Series:
    """Held-out accuracy by step, where it was measured."""
    return run.steps["validation"].dropna() if "validation" in run.steps else pd.Series(dtype=float)


def _validated(run: Run, place: int) -> float | None:
    found = validations(run)
    return float(found.iloc[place]) if len(found) else None


def _reaches(title: str, what: Mapping[str, Any], where: str) -> Column:
    asked = what["reaches"]
    if isinstance(asked, bool) or not isinstance(asked, (int, float)):
        raise CompositionError(f"{where}.reaches is {asked!r}: it must be an accuracy, as in 0.5")
    return Column(title, lambda run: first_reached(validations(run), asked))


def first_reached(values: pd.Series, level: float) -> float | None:
    """Where values first rise to the level, on the straight line between two of them; None if nowhere."""
    for (before, low), (after, high) in itertools.pairwise(values.items()):
        if low < level <= high:
            return float(before + (after - before) * (level - low) / (high - low))
    return None


def at_budget(curve: list[tuple[float, float]], budget: float) -> float | None:
    """Accuracy at a cost, on the straight line between two validations; None where the run did not get there.

    `curve` has cost and accuracy of each validation, in order.
    """
    if not curve or not curve[0][0] <= budget <= curve[-1][0]:
        return None
    return float(np.interp(budget, *zip(*curve, strict=True)))


def function(said: Any, folder: Path) -> Callable[..., Any]:
    """`file.py:name` beside the study file.

    Raises:
        CompositionError: there is no such file, or no such function in it.
    """
    file, _, name = str(said).partition(":")
    path = (folder / file).absolute()
    if not path.is_file() or not name:
        raise CompositionError(f"{said}: write FILE.py:FUNCTION, with a file in {folder}")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules.get(path.stem)
    if module is None or getattr(module, "__file__", None) != str(path):
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[path.stem]
            raise CompositionError(f"{said}: {path} cannot be run ({type(error).__name__}: {short(error)})") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise CompositionError(f"{said}: {path} has no function {name}")
    return found
