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
import torch
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
    threshold = np.partition(gain, len(gain) - count)[len(gain) - count] if count else np.inf
    better, equal = np.flatnonzero(gain > threshold), np.flatnonzero(gain == threshold)
    ids = np.concatenate([better, equal[: count - len(better)]])
    return ids[np.lexsort((ids, -gain[ids]))]


def count_outcomes(
    prompt_id: np.ndarray, correct: np.ndarray, counted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows [B] -> prompt ids in ascending order, how many of their responses are right, how many there are.

    `counted` [B] bool marks the one row per session that speaks for it.
    """
    ids, place = np.unique(prompt_id[counted], return_inverse=True)
    right = np.bincount(place, correct[counted], minlength=len(ids))
    return ids, right, np.bincount(place, minlength=len(ids))


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
        counts *= lambda_unselected
        counts[ids] = observed


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
        self.selected = np.zeros(0, dtype=np.int64)
        """Prompts of the latest selection."""
        self.step = 0

    def check(self, config: DictConfig) -> None:
        if OmegaConf.select(config, "algorithm.filter_groups.enable"):
            raise CompositionError(
                "plugins.vade learns from the groups that algorithm.filter_groups throws away before they reach it; "
                "set algorithm.filter_groups.enable=false"
            )
        if self.config.metric is None and self.config.correct_threshold != 0.5:
            raise CompositionError(
                f"plugins.vade.correct_threshold={self.config.correct_threshold} needs a value to compare with; "
                "set plugins.vade.metric to a part of the reward"
            )
        if self.config.init_from and not Path(self.config.init_from).is_file():
            raise CompositionError(f"plugins.vade.init_from={self.config.init_from!r} is not a file")

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
                "reselected_fraction": float(np.isin(ids, self.selected).mean()),
            }
        )
        self.selected = ids
        return ids

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        self._prepare(len(run.dataset))
        ids, correct, n = self.evidence(batch.full)
        if len(ids) and not 0 <= ids[0] <= ids[-1] < len(self.alpha):
            raise DataError(
                f"vade: prompt ids {ids[0]} to {ids[-1]} are not all among the {len(self.alpha)} of the dataset"
            )
        predicted, observed = posterior_mean(self.alpha[ids], self.beta[ids]), correct / n
        decay_and_add(
            self.alpha, self.beta, ids, correct, n, self.config.lambda_selected, self.config.lambda_unselected
        )
        self.step = run.step
        mass = self.alpha + self.beta
        run.log(
            {
                "effective_ratio": float(((correct > 0) & (correct < n)).mean()),
                "solve_none": float((correct == 0).mean()),
                "solve_all": float((correct == n).mean()),
                "seen_fraction": np.count_nonzero(mass) / len(mass),
                "evidence_mass_mean": float(mass.mean()),
            }
        )
        if predicted.std() > 0 and observed.std() > 0:
            run.log({"predicted_vs_observed_corr": float(np.corrcoef(predicted, observed)[0, 1])})

    def evidence(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a batch says of its prompts, see `count_outcomes`: one verdict per session, from its last output."""
        correct = batch.correct
        if self.config.metric is not None:
            correct = torch.as_tensor(batch.extra(self.config.metric)) >= self.config.correct_threshold
        return count_outcomes(batch.prompt_id.numpy(), correct.numpy(), batch.is_last.numpy())

    def _eligible(self, run: Run) -> np.ndarray | None:
        in_flight = run.in_flight()
        if not len(in_flight):
            return None
        eligible = np.ones(len(self.alpha), dtype=bool)
        eligible[in_flight] = False
        return eligible

    def _prepare(self, prompts: int) -> None:
        if not len(self.alpha):
            self.alpha, self.beta = np.zeros(prompts), np.zeros(prompts)
            if self.config.init_from:
                self._add_known(self.config.init_from)
        if len(self.alpha) != prompts:
            raise StateError(f"vade: the saved state has {len(self.alpha)} prompts, the dataset {prompts}")

    def _add_known(self, path: str) -> None:
        known = json.loads(Path(path).read_text(encoding="utf-8"))
        ids = np.array(list(known), dtype=np.int64)
        correct, total = np.array(list(known.values()), dtype=np.float64).reshape(-1, 2).T
        if ((ids < 0) | (ids >= len(self.alpha)) | (correct < 0) | (correct > total)).any():
            raise DataError(
                f"vade: init_from {path!r} must map prompt ids below {len(self.alpha)} to [correct, total] "
                "with 0 <= correct <= total"
            )
        self.alpha[ids] = self.config.init_weight * correct
        self.beta[ids] = self.config.init_weight * (total - correct)

    def state_dict(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "beta": self.beta, "selected": self.selected, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.alpha, self.beta = np.array(state["alpha"], np.float64), np.array(state["beta"], np.float64)
        self.selected, self.step = np.array(state["selected"], np.int64), int(state["step"])
