"""Best times of several functions, measured in turns so that all of them see the same state of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable

BURST = 5
"""Calls in a row, so that a function finds its own data in the caches, not another's."""


def best_times(functions: dict[str, Callable[[], object]], rounds: int = 20) -> dict[str, float]:
    """Seconds of the fastest call of each function."""
    best = dict.fromkeys(functions, float("inf"))
    for _ in range(rounds):
        for name, function in functions.items():
            for _ in range(BURST):
                start = time.perf_counter()
                function()
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def report(title: str, best: dict[str, float], unit: str) -> None:
    """One line per function: milliseconds, and how many times the function `unit` fits into it."""
    print(title)
    for name, seconds in best.items():
        print(f"  {name:44s}{seconds * 1e3:10.3f} ms{seconds / best[unit]:10.2f} x {unit}")
