"""VADE: ask, before generating anything, the prompts whose groups will probably be neither all right nor all wrong.

arXiv:2511.18902. Per prompt i of the dataset, a belief about its success rate from pseudo-counts alpha_i (right) and
beta_i (wrong), both 0 at the start. Every step:

    draw    theta_i ~ Beta(alpha_i + 1, beta_i + 1), all prompts, one draw per step
    score   I_i = theta_i (1 - theta_i)^2, largest at 1/3: hard but solvable
    select  the prompts with the largest I_i; equal scores: lower id first
    update  asked:     alpha_i <- lambda_selected alpha_i + right,  beta_i <- lambda_selected beta_i + wrong
            not asked: alpha_i <- lambda_unselected alpha_i,        beta_i <- lambda_unselected beta_i

Decay acts on the counts before the new ones are added, so a prompt nobody asks drifts back to the uniform belief.
Against GRPO only the choice of prompts differs; it takes no extra rollout, and advantage and loss are untouched.

Degenerate case: while few prompts have been seen the largest scores belong to unseen ones, and the choice is uniform.
Responses that never came back are no evidence. The settings are read off the worked example of the authors' figure;
`score: variance` and `mode: greedy` are their ablations.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from verl_plugins import Batch, CompositionError, DataError, Plugin, Run, StateError, hookimpl, setting


def information_gain(theta: np.ndarray, score: str = "infogain") -> np.ndarray:
    """Success rates in [0, 1] -> scores of the same shape: theta(1-theta)^2, or theta(1-theta) for "variance"."""
    rest = 1.0 - theta
    gain = theta * rest
    if score == "infogain":
        gain *= rest
    return gain


def posterior_mean(alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """E[theta] = (alpha+1) / (alpha+beta+2)."""
    return (alpha + 1) / (alpha + beta + 2)


def expected_gain(alpha: np.ndarray, beta: np.ndarray, score: str = "infogain") -> np.ndarray:
    """E of `information_gain` under Beta(p, q), p = alpha+1, q = beta+1: pq(q+1) / s(s+1)(s+2), s = p+q."""
    p, q = alpha + 1, beta + 1
    total = p + q
    gain = p * q / (total * (total + 1))
    return gain * (q + 1) / (total + 2) if score == "infogain" else gain


def draw(rng: np.random.Generator, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """One theta per prompt, [N]."""
    return rng.beta(alpha + 1, beta + 1)


def select(theta: np.ndarray, eligible: np.ndarray | None, count: int, score: str = "infogain") -> np.ndarray:
    """The `count` eligible ids with the largest scores, best first, equal scores by lower id.

    Args:
        theta: [N] success rates.
        eligible: [N] bool; None means all.

    Raises:
        DataError: if fewer than `count` prompts are eligible.
    """
    gain = information_gain(theta, score)
    available = len(gain)
    if eligible is not None:
        gain[~eligible] = -1.0
        available = int(np.count_nonzero(eligible))
    if available < count:
        raise DataError(f"vade: {count} prompts are to be selected, and only {available} of {len(gain)} are eligible")
    return largest(gain, count)


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """The places of the `count` largest of values [N], largest first, equal ones by lower place."""
    threshold = np.partition(values, len(values) - count)[len(values) - count] if count else np.inf
    better, equal = np.flatnonzero(values > threshold), np.flatnonzero(values == threshold)
    places = np.concatenate([better, equal[: count - len(better)]])
    return places[np.lexsort((places, -values[places]))]


def count_outcomes(
    prompt_id: np.ndarray, correct: np.ndarray, counted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows [B] -> prompt ids in ascending order, how many of their responses are right, how many there are.

    `counted` [B] bool marks the one row per session that speaks for it.
    """
    ids, place = np.unique(prompt_id[counted], return_inverse=True)
    right = np.bincount(place, correct[counted], minlength=len(ids))
    return ids, right, np.bincount(place, minlength=len(ids))


def evidence(batch: Batch, metric: str | None, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a batch says of its prompts, see `count_outcomes`: one verdict per session, from its last output."""
    correct = batch.correct if metric is None else batch.numbers(metric) >= threshold
    return count_outcomes(batch.prompt_id.numpy(), correct.numpy(), batch.is_last.numpy())


def refuse_unknown(who: str, ids: np.ndarray, prompts: int) -> None:
    """DataError unless ids, in ascending order, are all below the number of prompts."""
    if len(ids) and not 0 <= ids[0] <= ids[-1] < prompts:
        raise DataError(f"{who}: prompt ids {ids[0]} to {ids[-1]} are not all among the {prompts} of the dataset")


def log_outcomes(run: Run, predicted: np.ndarray, correct: np.ndarray, n: np.ndarray, mass: np.ndarray) -> None:
    """Log what a step has shown of its prompts.

    Args:
        run: where to log.
        predicted: [k] success rates believed before; their correlation with the outcome is logged where both vary.
        correct: [k] right responses.
        n: [k] all responses.
        mass: [N] evidence about every prompt, after the step.
    """
    none, every, observed = correct == 0, correct == n, correct / n
    run.log(
        {
            "effective_ratio": float((~none & ~every).mean()),
            "solve_none": float(none.mean()),
            "solve_all": float(every.mean()),
            "seen_fraction": np.count_nonzero(mass) / len(mass),
            "evidence_mass_mean": float(mass.mean()),
        }
    )
    if predicted.std() > 0 and observed.std() > 0:
        run.log({"predicted_vs_observed_corr": float(np.corrcoef(predicted, observed)[0, 1])})


def read_outcomes(who: str, path: str, prompts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompt ids, right and all responses [k] of a JSON file {prompt id: [correct, total]}; DataError if impossible."""
    problem = DataError(
        f"{who}: init_from {path!r} must map different prompt ids below {prompts} to [correct, total] with "
        "0 <= correct <= total"
    )
    try:
        known = json.loads(Path(path).read_text(encoding="utf-8"))
        ids, outcomes = np.array(list(known), dtype=np.int64), np.array(list(known.values()), dtype=np.float64)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise problem from error
    if outcomes.shape != (len(ids), 2) or len(np.unique(ids)) < len(ids) or not np.isfinite(outcomes).all():
        raise problem
    correct, total = outcomes.T
    if not ((ids >= 0) & (ids < prompts) & (correct >= 0) & (correct <= total)).all():
        raise problem
    return ids, correct, total


def sized(who: str, settings: Any, right: np.ndarray, wrong: np.ndarray, prompts: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts [N] of right and wrong, empty ones at their start: zeros, or `init_weight` times what `init_from` knows.

    Raises:
        StateError: if the counts are of another number of prompts.
    """
    if not len(right):
        right, wrong = np.zeros(prompts), np.zeros(prompts)
        if settings.init_from:
            ids, correct, total = read_outcomes(who, settings.init_from, prompts)
            right[ids], wrong[ids] = settings.init_weight * correct, settings.init_weight * (total - correct)
    if len(right) != prompts:
        raise StateError(f"{who}: the saved state has {len(right)} prompts, the dataset {prompts}")
    return right, wrong


def check_evidence(who: str, settings: Any, config: DictConfig) -> None:
    """CompositionError where outcomes would not reach the belief, or its settings `metric`, `init_from` are wrong."""
    if OmegaConf.select(config, "algorithm.filter_groups.enable"):
        raise CompositionError(
            f"plugins.{who} learns from the groups that algorithm.filter_groups throws away before they reach it; "
            "set algorithm.filter_groups.enable=false"
        )
    if settings.metric is None and settings.correct_threshold != 0.5:
        raise CompositionError(
            f"plugins.{who}.correct_threshold={settings.correct_threshold} needs a value to compare with; "
            f"set plugins.{who}.metric to a part of the reward"
        )
    if settings.init_from and not Path(settings.init_from).is_file():
        raise CompositionError(f"plugins.{who}.init_from={settings.init_from!r} is not a file")


def decay_and_add(
    alpha: np.ndarray,
    beta: np.ndarray,
    ids: np.ndarray,
    correct: np.ndarray,
    n_rollouts: np.ndarray,
    lambda_selected: float,
    lambda_unselected: float,
) -> None:
    """One step's update of alpha, beta [N] in place; ids, correct and n_rollouts [k], ids distinct."""
    for counts, new in ((alpha, correct), (beta, n_rollouts - correct)):
        observed = lambda_selected * counts[ids] + new
        if lambda_unselected != 1:
            counts *= lambda_unselected
        counts[ids] = observed


class Selections:
    """Which prompts were selected in this step so far, and in the one before; a step may select several times."""

    def __init__(self) -> None:
        self.step = 0
        self.now = self.before = np.zeros(0, dtype=np.int64)

    def add(self, step: int, ids: np.ndarray) -> float:
        """Note a selection; the share of it that was also selected in the step before."""
        if step != self.step:
            self.step, self.before, self.now = step, self.now, np.zeros(0, dtype=np.int64)
        self.now = np.concatenate([self.now, ids])
        return float(np.isin(ids, self.before).mean())

    def state_dict(self) -> dict[str, Any]:
        return {"selected": self.now, "selected_before": self.before, "selected_step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.now, self.before = (np.array(state[name], np.int64) for name in ("selected", "selected_before"))
        self.step = int(state["selected_step"])


class Vade(Plugin):
    """Thompson sampling of prompts by the information their groups promise."""

    name = "vade"
    paper = "arXiv:2511.18902"

    @dataclass
    class Config:
        lambda_selected: float = setting(
            0.2, "share of the old counts kept by prompts just asked", authors=0.2, ge=0, le=1
        )
        lambda_unselected: float = setting(0.999, "share kept by all others", authors=0.999, ge=0, le=1)
        score: str = setting("infogain", "theta(1-theta)^2 or theta(1-theta)", choices=("infogain", "variance"))
        mode: str = setting("thompson", "draw theta or take the posterior's mean", choices=("thompson", "greedy"))
        metric: str | None = setting(None, "part of the reward that says right or wrong; default: batch.correct")
        correct_threshold: float = setting(0.5, "right from this value of `metric` on")
        init_from: str | None = setting(None, "JSON file {prompt id: [correct, total]} of known outcomes")
        init_weight: float = setting(1.0, "evidence that one known outcome counts for", ge=0)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.alpha = self.beta = np.zeros(0)
        """[N] pseudo-counts, float64; sized on first use."""
        self.selections = Selections()
        self.step = 0

    def check(self, config: DictConfig) -> None:
        check_evidence(self.name, self.config, config)

    @hookimpl
    def select_prompts(self, run: Run, count: int) -> np.ndarray:
        self._prepare(len(run.dataset))
        greedy = self.config.mode == "greedy"
        theta = posterior_mean(self.alpha, self.beta) if greedy else draw(run.rng("theta"), self.alpha, self.beta)
        ids = select(theta, self._eligible(run), count, self.config.score)
        gain = information_gain(theta[ids], self.config.score)
        run.log(
            {
                "theta_selected_mean": float(theta[ids].mean()),
                "theta_selected_std": float(theta[ids].std()),
                "infogain_selected_mean": float(gain.mean()),
                "infogain_selected_min": float(gain.min()),
                "infogain_expected_mean": float(
                    expected_gain(self.alpha[ids], self.beta[ids], self.config.score).mean()
                ),
                "reselected_fraction": self.selections.add(run.step, ids),
            }
        )
        return ids

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        self._prepare(len(run.dataset))
        ids, correct, n = self.evidence(batch.full)
        refuse_unknown(self.name, ids, len(self.alpha))
        predicted = posterior_mean(self.alpha[ids], self.beta[ids])
        decay_and_add(
            self.alpha, self.beta, ids, correct, n, self.config.lambda_selected, self.config.lambda_unselected
        )
        self.step = run.step
        log_outcomes(run, predicted, correct, n, self.alpha + self.beta)

    def evidence(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See the function of this name."""
        return evidence(batch, self.config.metric, self.config.correct_threshold)

    def _eligible(self, run: Run) -> np.ndarray | None:
        in_flight = run.in_flight()
        if not len(in_flight):
            return None
        eligible = np.ones(len(self.alpha), dtype=bool)
        eligible[in_flight] = False
        return eligible

    def _prepare(self, prompts: int) -> None:
        self.alpha, self.beta = sized(self.name, self.config, self.alpha, self.beta, prompts)

    def state_dict(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "beta": self.beta, "step": self.step, **self.selections.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.alpha, self.beta = np.array(state["alpha"], np.float64), np.array(state["beta"], np.float64)
        self.step = int(state["step"])
        self.selections.load_state_dict(state)
