"""MoPPS: of a random pool of prompts, ask those whose success rate is probably nearest to one half.

arXiv:2507.04632. A belief Beta(alpha_i, beta_i) about each prompt's success rate, at the start the prior (alpha_0,
beta_0). Every step:

    pool    the next `pool_ratio` times as many prompts as are asked, from a shuffled pass over the dataset
    draw    theta_i ~ Beta(alpha_i, beta_i) for the pool
    select  topk: the prompts with the smallest (theta_i - target)^2
            threshold: any of those with lower <= theta_i <= upper; if they are too few, the nearest to the interval
    update  asked: alpha_i <- decay alpha_i + (1 - decay) alpha_0 + right,  beta_i likewise with wrong
            others: unchanged

Against VADE, which scores the whole dataset, aims at 1/3 and forgets at two rates: the pool keeps coverage, the aim is
1/2, and only what is asked forgets. Counts are kept above the prior, where the update reads counts <- decay counts +
new. Degenerate cases: pool_ratio 1 is the plain shuffled pass; a dataset smaller than the pool is the pool. As in the
authors' loader, the rest of a pass that does not fill a pool is left out. Responses that never came back are no
evidence, and prompts still in flight are not asked (ours).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from omegaconf import DictConfig

from verl_plugins import Batch, CompositionError, DataError, Plugin, Run, hookimpl, setting
from verl_plugins.sampling.vade import (
    Selections,
    check_evidence,
    decay_and_add,
    evidence,
    largest,
    log_outcomes,
    refuse_unknown,
    sized,
)


def select_nearest(theta: np.ndarray, count: int, target: float) -> np.ndarray:
    """Places of the `count` smallest (theta - target)^2 of theta [pool], smallest first."""
    return largest(-((theta - target) ** 2), count)


def select_within(theta: np.ndarray, count: int, lower: float, upper: float, rng: np.random.Generator) -> np.ndarray:
    """Places of `count` of theta [pool] within [lower, upper], at random; if too few, of the nearest to it."""
    distance = np.maximum(np.maximum(lower - theta, theta - upper), 0.0)
    within = np.flatnonzero(distance == 0)
    return rng.choice(within, count, replace=False) if len(within) >= count else largest(-distance, count)


class Mopps(Plugin):
    """Thompson sampling of prompts of medium difficulty from a random pool."""

    name = "mopps"
    paper = "arXiv:2507.04632"

    @dataclass
    class Config:
        pool_ratio: int = setting(16, "prompts in the pool for each that is asked (their ts_ratio)", authors=16, ge=1)
        strategy: str = setting(
            "topk", "nearest to the target, or any in an interval", authors="topk", choices=("topk", "threshold")
        )
        target: float = setting(0.5, "success rate aimed at (topk)", authors=0.5, ge=0, le=1)
        lower: float = setting(0.3, "lower end of the interval (threshold)", authors=0.3, ge=0, le=1)
        upper: float = setting(0.7, "upper end of the interval (threshold)", authors=0.7, ge=0, le=1)
        decay: float = setting(1.0, "share of the old counts kept by prompts just asked", authors=1.0, ge=0, le=1)
        prior_alpha: float = setting(1.0, "alpha of a prompt never asked", authors=1.0, gt=0)
        prior_beta: float = setting(1.0, "beta of a prompt never asked", authors=1.0, gt=0)
        metric: str | None = setting(None, "part of the reward that says right or wrong; default: batch.correct")
        correct_threshold: float = setting(0.5, "right from this value of `metric` on")
        init_from: str | None = setting(None, "JSON file {prompt id: [correct, total]} of known outcomes")
        init_weight: float = setting(3.0, "evidence that one known outcome counts for", authors=3.0, ge=0)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.right = self.wrong = np.zeros(0)
        """[N] counts above the prior, float64; sized on first use."""
        self.selections = Selections()
        self.place, self.passes, self.shuffle_seed = 0, 0, 0
        """Where the current pass over the dataset stands, the passes begun, and the seed of this one's order."""
        self._order = np.zeros(0, dtype=np.int64)

    def check(self, config: DictConfig) -> None:
        check_evidence(self.name, self.config, config)
        if self.config.lower > self.config.upper:
            raise CompositionError(
                f"plugins.mopps.lower={self.config.lower} lies above plugins.mopps.upper={self.config.upper}; "
                "exchange them"
            )

    @hookimpl
    def select_prompts(self, run: Run, count: int) -> np.ndarray:
        self._prepare(len(run.dataset))
        pool = self._next_pool(run, count)
        alpha, beta = self._belief(pool)
        theta = run.rng("theta").beta(alpha, beta)
        if self.config.strategy == "topk":
            places = select_nearest(theta, count, self.config.target)
        else:
            places = select_within(theta, count, self.config.lower, self.config.upper, run.rng("within"))
        ids = pool[places]
        run.log(
            {
                "pool_size": len(pool),
                "passes": self.passes,
                "theta_pool_mean": float(theta.mean()),
                "theta_selected_mean": float(theta[places].mean()),
                "theta_selected_std": float(theta[places].std()),
                "reselected_fraction": self.selections.add(run.step, ids),
            }
        )
        return ids

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        self._prepare(len(run.dataset))
        ids, correct, n = evidence(batch.full, self.config.metric, self.config.correct_threshold)
        refuse_unknown(self.name, ids, len(self.right))
        alpha, beta = self._belief(ids)
        decay_and_add(self.right, self.wrong, ids, correct, n, self.config.decay, 1.0)
        log_outcomes(run, alpha / (alpha + beta), correct, n, self.right + self.wrong)

    def _belief(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """alpha, beta [k] of these prompts."""
        return self.right[ids] + self.config.prior_alpha, self.wrong[ids] + self.config.prior_beta

    def _next_pool(self, run: Run, count: int) -> np.ndarray:
        """The next prompts of the shuffled pass that are not in flight."""
        prompts, in_flight = len(self.right), run.in_flight()
        size = min(self.config.pool_ratio * count, prompts - len(in_flight))
        if size < count:
            raise DataError(
                f"mopps: {count} prompts are to be selected, and only {prompts - len(in_flight)} of {prompts} are not "
                "in flight"
            )
        found = self._ahead(size, in_flight)
        if len(found) < size:
            self.shuffle_seed = int(run.rng("order").integers(2**53))
            self._order, self.place, self.passes = self._shuffled(), 0, self.passes + 1
            found = self._ahead(size, in_flight)
        pool = self._order[self.place + found]
        self.place += int(found[-1]) + 1
        return pool

    def _ahead(self, size: int, in_flight: np.ndarray) -> np.ndarray:
        """How far ahead in the pass the next `size` prompts are that are not in flight; fewer at its end."""
        window = self._order[self.place : self.place + size + len(in_flight)]
        return np.flatnonzero(~np.isin(window, in_flight))[:size]

    def _shuffled(self) -> np.ndarray:
        return np.random.default_rng(self.shuffle_seed).permutation(len(self.right))

    def _prepare(self, prompts: int) -> None:
        self.right, self.wrong = sized(self.name, self.config, self.right, self.wrong, prompts)

    def state_dict(self) -> dict[str, Any]:
        of_pass = {"place": self.place, "passes": self.passes, "shuffle_seed": self.shuffle_seed}
        return {"right": self.right, "wrong": self.wrong, **of_pass, **self.selections.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.right, self.wrong = np.array(state["right"], np.float64), np.array(state["wrong"], np.float64)
        self.selections.load_state_dict(state)
        self.place, self.passes, self.shuffle_seed = (int(state[k]) for k in ("place", "passes", "shuffle_seed"))
        self._order = self._shuffled() if self.passes else np.zeros(0, dtype=np.int64)
