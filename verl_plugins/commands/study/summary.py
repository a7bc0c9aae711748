"""The table of a study: means over seeds with 95 % intervals, and differences to the baseline paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from verl_plugins.commands.curves import t_975
from verl_plugins.commands.study.design import Study
from verl_plugins.commands.study.results import Result

ACCURACY = "held-out accuracy"
FIXED = ("tokens (thousands)", "seconds")


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its 95 % interval by Student's t, which one seed has not."""

    mean: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def says(self) -> str:
        """Of a difference, what it means."""
        if self.low is None:
            return "one seed cannot tell"
        if self.low > 0:
            return "higher than seeds explain"
        return "lower than seeds explain" if self.high < 0 else "inside noise"


@dataclass(frozen=True)
class Row:
    """One variant."""

    variant: str
    seeds: Sequence[int]
    cells: Mapping[str, Interval | None]
    differences: Mapping[str, Interval | None]
    """Column -> variant minus baseline over the seeds both have; empty for the baseline."""


@dataclass(frozen=True)
class Summary:
    """All variants that have results, the baseline first, then by the difference in accuracy."""

    study: Study
    budget: float | None
    """Where accuracies are compared, in tokens or steps: the cost of the cheapest run."""
    rows: Sequence[Row]
    missing: Mapping[str, Sequence[int]]
    """Variant -> seeds without a result."""

    @property
    def columns(self) -> list[str]:
        """In the order of the table."""
        return [ACCURACY, *(column.title for column in self.study.columns), *FIXED]


def interval(values: Sequence[float]) -> Interval | None:
    """None of no values."""
    if not values:
        return None
    mean, free = math.fsum(values) / len(values), len(values) - 1
    if not free:
        return Interval(mean, None, None, 1)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / free / len(values))
    return Interval(mean, mean - t_975(free) * spread, mean + t_975(free) * spread, len(values))


def summarise(study: Study, results: Sequence[Result]) -> Summary:
    """Compare at the cost of the cheapest run of the study."""
    costs = [cost for one in results if (cost := one.cost(study.budget)) is not None]
    budget = min(costs, default=None)
    numbers = {
        name: _numbers(study, budget, [one for one in results if one.variant == name]) for name in study.variants
    }
    base = numbers[study.baseline]
    rows = [_row(name, found, {} if name == study.baseline else base) for name, found in numbers.items() if found]
    rows.sort(key=lambda row: (row.variant != study.baseline, -_gain(row)))
    missing = {
        name: [seed for seed in study.seeds if seed not in found]
        for name, found in numbers.items()
        if any(seed not in found for seed in study.seeds)
    }
    return Summary(study, budget, rows, missing)


def _numbers(study: Study, budget: float | None, results: Sequence[Result]) -> dict[int, dict[str, float | None]]:
    """Seed -> column -> number."""
    found = {}
    for one in results:
        if one.seed not in study.seeds:
            continue
        accuracy = None if budget is None else one.accuracy(study.budget, budget)
        at = {column.title: accuracy for column in study.columns if column.measure is None}
        tokens = None if one.tokens is None else one.tokens / 1000
        found[one.seed] = {ACCURACY: accuracy, **one.values, **at, FIXED[0]: tokens, FIXED[1]: one.seconds}
    return found


def _row(
    name: str, found: Mapping[int, Mapping[str, float | None]], base: Mapping[int, Mapping[str, float | None]]
) -> Row:
    titles = dict.fromkeys(title for values in found.values() for title in values)
    cells = {
        title: interval([value for one in found.values() if (value := one.get(title)) is not None]) for title in titles
    }
    pairs = [(found[seed], base[seed]) for seed in sorted(found) if seed in base]
    differences = {
        title: interval([a[title] - b[title] for a, b in pairs if None not in (a.get(title), b.get(title))])
        for title in (titles if base else ())
    }
    return Row(name, sorted(found), cells, differences)


def _gain(row: Row) -> float:
    difference = row.differences.get(ACCURACY)
    return -math.inf if difference is None else difference.mean
