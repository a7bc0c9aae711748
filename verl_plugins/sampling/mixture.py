"""Weights from accumulated wealth: Cover's universal mixture, exponentiated gradient, buy and hold, in two levels.

The formulas are in `verl_plugins.sampling.portfolio_mixture`, which uses them. Wealths are logarithms in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from verl_plugins import StateError


def lattice(components: int, q: int) -> np.ndarray:
    """[C(q+K-1, K-1), K] float64: all points of the simplex whose coordinates are multiples of 1/q."""
    bars = np.array(list(itertools.combinations(range(q + components - 1), components - 1)), dtype=np.int64)
    ends = np.full((len(bars), 1), q + components - 1)
    return (np.diff(np.hstack([np.full_like(ends, -1), bars, ends]), axis=1) - 1) / q


def lattice_prior(points: np.ndarray, q: int, prior: str) -> np.ndarray:
    """[L] mu of the points [L,K], not normalised: 1, or prod (g_k + 0.5/q)^-0.5."""
    return np.ones(len(points)) if prior == "uniform" else ((points + 0.5 / q) ** -0.5).prod(1)


def log_relatives(utility: np.ndarray, observed: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """[K] log x of utilities [K], 0 where `observed` [K] is false."""
    if not observed.any():
        return np.zeros(len(utility))
    return np.where(observed, scale * (utility - utility[observed].mean()), 0.0)


def log_growth(weights: np.ndarray, log_x: np.ndarray) -> np.ndarray:
    """log(w . x) of weights [...,K] and log relatives [K]."""
    top = log_x.max()
    with np.errstate(divide="ignore"):
        return np.log(weights @ np.exp(log_x - top)) + top


def largest_remainder(shares: np.ndarray, count: int) -> np.ndarray:
    """[K] whole numbers with the sum `count`, near shares [K] times count; equal remainders: lower index first."""
    exact = np.round(shares * count, 9)
    given = np.floor(exact).astype(np.int64)
    remainder = np.round(exact - given, 9)  # equal ones may differ in their last digits
    given[np.argsort(-remainder, kind="stable")[: count - given.sum()]] += 1
    return given


def within(owed: np.ndarray, available: np.ndarray, count: int) -> np.ndarray:
    """[K] prompts of each source by largest remainder of what is owed, at most `available` [K], which has `count`."""
    given = np.zeros(len(owed), dtype=np.int64)
    while left := count - given.sum():
        free = given < available
        shares = np.where(free, np.maximum(owed, 0), 0.0)
        shares = shares if shares.sum() else free.astype(float)
        given += np.minimum(largest_remainder(shares / shares.sum(), left), available - given)
    return given


class Level:
    """A mixture of experts [E,K], each a fixed allocation over K components; with `eta`, exponentiated gradient."""

    def __init__(self, experts: np.ndarray, prior: np.ndarray, eta: float | None = None) -> None:
        self.experts, self.log_prior, self.eta = experts, np.log(prior), eta
        self.log_wealth = np.zeros(len(experts))

    def weights(self) -> np.ndarray:
        """[K] sum 1."""
        score = self.log_prior + self.log_wealth
        mass = np.exp(score - score.max())
        return mass / mass.sum() @ self.experts

    def add(self, log_x: np.ndarray, kept: float) -> None:
        """One step's log relatives [K]; `kept` is the share of the old log-wealth that remains."""
        growth = log_growth(self.experts, log_x)
        if self.eta is not None:
            growth = self.eta * np.exp(growth - log_growth(self.weights(), log_x))
        self.log_wealth = kept * self.log_wealth + growth


class Mixture:
    """Weights and wealth of K sources in groups; a single group is the mixture of its members alone."""

    def __init__(self, groups: Sequence[np.ndarray], level: Callable[[int], Level], floor: float, kept: float) -> None:
        self.groups, self.floor, self.kept = groups, floor, kept
        self.levels = [*(level(len(group)) for group in groups), level(len(groups))]
        self.log_wealth = np.zeros(sum(map(len, groups)))
        """[K] of each source alone."""
        self.combined = 0.0
        """log S."""

    def weights(self) -> np.ndarray:
        """[K] sum 1, at least the floor."""
        weights, above = np.empty(len(self.log_wealth)), self.levels[-1].weights()
        for group, level, share in zip(self.groups, self.levels[:-1], above, strict=True):
            weights[group] = share * level.weights()
        return (1 - len(weights) * self.floor) * weights + self.floor

    def add(self, log_x: np.ndarray) -> None:
        """One step's log relatives [K]."""
        self.combined = self.kept * self.combined + float(log_growth(self.weights(), log_x))
        self.log_wealth = self.kept * self.log_wealth + log_x
        growth = np.zeros(len(self.groups))
        for place, (group, level) in enumerate(zip(self.groups, self.levels[:-1], strict=True)):
            growth[place] = log_growth(level.weights(), log_x[group])
            level.add(log_x[group], self.kept)
        self.levels[-1].add(growth, self.kept)

    def state_dict(self) -> dict[str, np.ndarray]:
        of_experts = np.concatenate([level.log_wealth for level in self.levels])
        return {"log_wealth": self.log_wealth, "of_experts": of_experts, "combined": np.array([self.combined])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        ends = np.cumsum([len(level.log_wealth) for level in self.levels])
        if len(state["of_experts"]) != ends[-1]:
            raise StateError(
                f"portfolio_mixture: the saved state has wealths of {len(state['of_experts'])} allocations, these "
                f"settings {ends[-1]}; resume with the mode, groups and q of the checkpoint"
            )
        for level, part in zip(self.levels, np.split(np.array(state["of_experts"]), ends[:-1]), strict=True):
            level.log_wealth = part
        self.log_wealth, self.combined = np.array(state["log_wealth"]), float(state["combined"][0])


def make_level(
    method: str, q: int = 10, prior: str = "uniform", eta: float = 0.1, start: Sequence[float] | None = None
) -> Callable[[int], Level]:
    """What builds a level of so many components; `start` [K] are the first weights of wealth and eg, not normalised."""

    def level(components: int) -> Level:
        if method == "universal":
            points = lattice(components, q)
            return Level(points, lattice_prior(points, q, prior))
        # Above a single group stands one component, whatever `start` says of the group's.
        first = np.ones(components) if start is None or len(start) != components else np.array(start)
        return Level(np.eye(components), first, eta if method == "eg" else None)

    return level
