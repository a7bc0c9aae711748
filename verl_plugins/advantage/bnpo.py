"""BNPO: how far a response lies from its prompt's success rate, divided by a Beta density that follows the batch.

arXiv:2506.02864, as the authors' code computes it. With scores s in [0, 1], p the success rate of a prompt, and mu, v
the mean and the unbiased variance of p over the prompts of the batch:

    c = mu (1 - mu) / v - 1,   a = c mu,   b = c (1 - mu)         the Beta distribution of the success rates
    alpha = max(1, 1 + a/3),   beta = max(1, 1 + b/3)             the density of least gradient variance
    A_i = min(1e6, 1 / f(p; alpha, beta)) (s_i - p)

With several rewards (`components`) this is done for each alone, and A is the mean of the results.

Against GRPO: that divides by sqrt(p(1-p)), which is f at alpha = beta = 3/2, whatever the success rates of the batch;
alpha = beta = 1 is REINFORCE with the prompt's mean as baseline.

Degenerate cases, where the authors' code fails or gives NaN: all prompts at one rate, or fewer than two prompts with
two or more responses, give alpha = beta = 1. Equal scores within a prompt: exactly 0; so it is for a response without
siblings (the authors: A = s, times up to 1e6), which does not count in mu and v.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from verl_plugins import Batch, CompositionError, DataError, Groups, Plugin, Run, hookimpl, setting

MAX_WEIGHT = 1e6
ROUNDING = 1e-6
"""Scores may leave [0, 1], and equal success rates differ, by this much: sums of float32 are not exact."""


class Fit(NamedTuple):
    """The density that a batch is divided by, and the success rates it comes from."""

    alpha: float
    beta: float
    mean: float
    variance: float
    fallback: bool
    """Whether there was no spread to fit, so that alpha = beta = 1."""


def fit(rates: Tensor) -> Fit:
    """Success rates of prompts [prompts] -> the density, clamped to alpha, beta >= 1."""
    rates = rates.double()
    if len(rates) < 2 or float(rates.max() - rates.min()) <= ROUNDING:
        return Fit(1.0, 1.0, float(rates.sum()) / max(len(rates), 1), 0.0, True)
    mean, variance = float(rates.mean()), float(rates.var())
    concentration = mean * (1 - mean) / variance - 1
    alpha, beta = (max(1.0, 1 + concentration * share / 3) for share in (mean, 1 - mean))
    return Fit(alpha, beta, mean, variance, False)


def inverse_density(rates: Tensor, alpha: float, beta: float) -> Tensor:
    """1 / Beta density of success rates [G] in [0, 1], at most 1e6, [G] float64."""
    rates = rates.double()
    log_norm = math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)
    log_density = torch.xlogy(alpha - 1, rates) + torch.xlogy(beta - 1, 1 - rates) - log_norm
    return (-log_density).clamp(max=math.log(MAX_WEIGHT)).exp()


class Normalised(NamedTuple):
    """What `normalise` finds."""

    advantage: Tensor
    """[rows]"""
    rate: Tensor
    """[G] success rate of each prompt, in the order of the groups."""
    weight: Tensor
    """[G] what the distance to it is multiplied by."""
    several: Tensor
    """[G] bool: the prompts with two or more responses."""
    fit: Fit


def normalise(scores: Tensor, groups: Groups) -> Normalised:
    """Scores [rows] in [0, 1] -> advantage; 0 where all scores of a group are equal, and in groups of one."""
    rate, several = groups.per_group(groups.mean(scores)), groups.per_group(groups.count() > 1)
    found = fit(rate[several])
    weight = inverse_density(rate, found.alpha, found.beta).to(scores.dtype)
    advantage = weight.index_select(0, groups.index) * (scores - rate.index_select(0, groups.index))
    return Normalised(advantage, rate, weight, several, found)


def to_unit(values: Tensor, low: float, high: float, what: str) -> Tensor:
    """Rewards [rows] in [low, high] -> [0, 1].

    Raises:
        DataError: a reward lies outside that range.
    """
    least, most = float(values.min()), float(values.max())
    slack = ROUNDING * (high - low)
    if not (least >= low - slack and most <= high + slack):
        raise DataError(
            f"bnpo: {what} goes from {least:g} to {most:g}, outside [{low:g}, {high:g}]; set plugins.bnpo.reward_min "
            "and plugins.bnpo.reward_max to the range it has"
        )
    return ((values - low) / (high - low)).clamp(0, 1)


class Bnpo(Plugin):
    """Advantages divided by a Beta density fitted to the success rates of the batch."""

    name = "bnpo"
    paper = "arXiv:2506.02864"

    @dataclass
    class Config:
        components: list[str] | None = setting(
            None, "parts of the reward to normalise each alone and average; none: the score", authors=None
        )
        reward_min: float = setting(0.0, "least possible score, or value of a component", authors=0.0)
        reward_max: float = setting(1.0, "largest possible score, or value of a component", authors=1.0)

    def check(self, config: DictConfig) -> None:
        if self.config.reward_min >= self.config.reward_max:
            raise CompositionError(
                f"plugins.bnpo.reward_min={self.config.reward_min} must be less than "
                f"plugins.bnpo.reward_max={self.config.reward_max}"
            )
        n = OmegaConf.select(config, "actor_rollout_ref.rollout.n")
        if n is not None and n < 2:
            raise CompositionError(
                f"plugins.bnpo compares the responses of a prompt, and actor_rollout_ref.rollout.n={n} leaves none to "
                "compare with; set actor_rollout_ref.rollout.n to 2 or more"
            )
        if OmegaConf.select(config, "algorithm.use_kl_in_reward"):
            raise CompositionError(
                "algorithm.use_kl_in_reward=true takes scores out of the range that plugins.bnpo needs; "
                "set actor_rollout_ref.actor.use_kl_loss=true instead"
            )
        if OmegaConf.select(config, "algorithm.filter_groups.enable"):
            logging.getLogger(__name__).warning(
                "plugins.bnpo: algorithm.filter_groups takes away the prompts with success rates 0 and 1, so that "
                "alpha and beta are larger than the paper's"
            )

    @hookimpl
    def estimate_advantage(self, run: Run, batch: Batch) -> Tensor:
        advantage, names = torch.zeros_like(batch.scores), self.config.components or []
        parts = [(f"the component {name!r}", f"/{name}", self._component(batch, name)) for name in names]
        for what, suffix, values in parts or [("the score", "", batch.scores)]:
            found = normalise(to_unit(values, self.config.reward_min, self.config.reward_max, what), batch.groups)
            advantage += found.advantage / max(len(names), 1)
            run.log({f"{key}{suffix}": value for key, value in summary(found).items()})
        run.log({"advantage_var": float(advantage[batch.is_last].var(unbiased=False))})
        return batch.to_tokens(advantage)

    def _component(self, batch: Batch, name: str) -> Tensor:
        values = batch.extra(name)
        if not (isinstance(values, Tensor) and values.dim() == 1):
            raise DataError(f"bnpo: plugins.bnpo.components names {name!r}, which is not a number per response")
        return batch.of_session(values)


def summary(found: Normalised) -> dict[str, float]:
    """The metrics of one normalisation; each prompt with two or more responses counts once."""
    rates, weights = found.rate[found.several], found.weight[found.several]
    metrics = {"alpha": found.fit.alpha, "beta": found.fit.beta, "fallback": float(found.fit.fallback)}
    if not len(rates):
        return metrics
    metrics |= {"p_mean": found.fit.mean, "p_var": found.fit.variance}
    metrics |= {"frac_p0": float((rates == 0).float().mean()), "frac_p1": float((rates == 1).float().mean())}
    mixed = weights[(rates > 0) & (rates < 1)]
    if len(mixed):
        metrics |= {"weight_min": float(mixed.min()), "weight_mean": float(mixed.mean())}
        metrics |= {"weight_max": float(mixed.max())}
    return metrics
