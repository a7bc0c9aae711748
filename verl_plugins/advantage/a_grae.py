"""A-GRAE: hold back right answers while the policy is weak; move weight from easy to hard prompts as it gets better.

arXiv:2602.05548v3, eq. 11 to 13. With A the advantage of GRPO (or Dr.GRPO), p the mean reward of the prompt's group and
omega the mean reward of the batch, a proxy for proficiency, in this order:

    sample level   A <- omega/2 A / sqrt(p) + (1 - omega)/2 A / sqrt(1 - p)       unless p is 0 or 1
    group level    A <- min(1, omega / alpha) A                                    where A > 0

Against GRPO: right and wrong answers of a prompt no longer weigh the same, and p = 1/2 no longer weighs most.

`variant: code` is what the released function computes: 1 - sqrt(p) in place of sqrt(1 - p), which weighs prompts near
p = 1 several times as much and loses the identity the paper builds on, and omega as the mean over prompts, where a
response without siblings counts 0. The released trainer never reaches that function.

Degenerate cases. Equal rewards and a response without siblings: exactly 0. Omega 0: all 0.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from verl_plugins import Batch, CompositionError, DataError, Groups, Plugin, Run, hookimpl, setting

ROUNDING = 1e-6
"""Scores may leave [0, 1] by this much: sums of float32 are not exact."""
DOMINANT = 10.0
"""What the paper's controlled experiments multiply or divide the advantages of right answers by."""


def proficiency(accuracy: Tensor, groups: Groups, variant: str = "paper") -> float:
    """Omega (eq. 11) from the accuracies [rows]: their mean, each session once; in the code the mean over prompts."""
    if variant == "code":
        accuracy = groups.per_group(torch.where(groups.count() > 1, groups.mean(accuracy), 0.0))
    elif groups.counted is not None:
        accuracy = accuracy[groups.counted]
    return float(accuracy.double().mean())


def attention_shift(rate: Tensor, omega: float, level: str = "dynamic", variant: str = "paper") -> Tensor:
    """Eq. 12: the factor of each prompt [G] by its mean reward [G]; 1 where that is 0 or 1."""
    if level == "none":
        return torch.ones_like(rate)
    hard_weight, easy_weight = {"dynamic": (omega, 1 - omega), "hard": (1.0, 0.0), "easy": (0.0, 1.0)}[level]
    epsilon = 1e-6 if variant == "code" else 0.0
    rate = rate.clamp(0, 1)
    root = rate.sqrt()
    easy = 1 - root if variant == "code" else (1 - rate).sqrt()
    factor = 0.5 * hard_weight / (root + epsilon) + 0.5 * easy_weight / (easy + epsilon)
    return torch.where((rate > 0) & (rate < 1), factor, 1.0)


def positive_scale(omega: float, alpha: float, level: str = "dynamic") -> float:
    """Eq. 13: the factor of positive advantages."""
    return {"dynamic": min(1.0, omega / alpha), "positive": DOMINANT, "negative": 1 / DOMINANT, "none": 1.0}[level]


def asymmetric_advantage(
    scores: Tensor, accuracy: Tensor, groups: Groups, config: AGrae.Config
) -> tuple[Tensor, Tensor, float]:
    """Scores and accuracies in [0, 1], both [rows] -> advantage [rows], mean accuracy of each prompt [G], omega."""
    omega = proficiency(accuracy, groups, config.variant)
    mean, std = (groups.per_group(values) for values in groups.moments(scores))
    rate = groups.per_group(groups.mean(accuracy))
    factor = attention_shift(rate, omega, config.sample_level, config.variant)
    if config.scale == "std":
        factor = factor / (std + config.epsilon)
    advantage = (scores - mean.index_select(0, groups.index)) * factor.index_select(0, groups.index)
    positive = positive_scale(omega, config.alpha, config.group_level)
    return torch.where(advantage > 0, positive * advantage, advantage), rate, omega


class AGrae(Plugin):
    """GRPO with asymmetric weights for right and wrong answers, easy and hard prompts."""

    name = "a_grae"
    paper = "arXiv:2602.05548"

    @dataclass
    class Config:
        variant: str = setting("paper", "eq. 11 to 13, or the authors' released function", choices=("paper", "code"))
        alpha: float = setting(
            1.0, "mean reward from which right answers have their full weight; authors: 0.5 on Geo3K", authors=1.0, gt=0
        )
        sample_level: str = setting(
            "dynamic",
            "weight by the prompt's difficulty: hard or easy are the paper's static controls",
            authors="dynamic",
            choices=("dynamic", "hard", "easy", "none"),
        )
        group_level: str = setting(
            "dynamic",
            "weight of right answers: positive (times 10) or negative (by 10) are the paper's controls",
            authors="dynamic",
            choices=("dynamic", "positive", "negative", "none"),
        )
        scale: str = setting(
            "std", "divide GRPO's advantage by the group's std, or by nothing (Dr.GRPO)", choices=("std", "none")
        )
        epsilon: float = setting(1e-6, "added to the std", authors=1e-6, gt=0)
        correctness_key: str | None = setting(
            None, "part of the reward, in [0, 1], that p and omega are taken from; default: the score"
        )

    def check(self, config: DictConfig) -> None:
        n = OmegaConf.select(config, "actor_rollout_ref.rollout.n")
        if n is not None and n < 2:
            raise CompositionError(
                f"plugins.a_grae compares the responses of a prompt, and actor_rollout_ref.rollout.n={n} leaves none "
                "to compare with; set actor_rollout_ref.rollout.n to 2 or more"
            )
        if self.config.scale == "std" and OmegaConf.select(config, "algorithm.norm_adv_by_std_in_grpo") is False:
            raise CompositionError(
                "algorithm.norm_adv_by_std_in_grpo=false asks for advantages that are not divided by the std, "
                "plugins.a_grae.scale=std for the opposite; set plugins.a_grae.scale=none"
            )
        if self.config.correctness_key is None and OmegaConf.select(config, "algorithm.use_kl_in_reward"):
            raise CompositionError(
                "algorithm.use_kl_in_reward=true takes scores out of [0, 1], where plugins.a_grae needs them; "
                "set plugins.a_grae.correctness_key to a part of the reward"
            )
        if OmegaConf.select(config, "algorithm.filter_groups.enable"):
            logging.getLogger(__name__).warning(
                "plugins.a_grae: algorithm.filter_groups takes away the prompts with mean rewards 0 and 1, so that "
                "omega stays near 1/2 and no longer measures proficiency"
            )

    @hookimpl
    def estimate_advantage(self, run: Run, batch: Batch) -> Tensor:
        accuracy = self._accuracy(batch)
        advantage, rate, omega = asymmetric_advantage(batch.scores, accuracy, batch.groups, self.config)
        run.log({"omega": omega, "pos_scale": positive_scale(omega, self.config.alpha, self.config.group_level)})
        run.log(symmetry(advantage, rate, batch))
        return batch.to_tokens(advantage)

    def _accuracy(self, batch: Batch) -> Tensor:
        key = self.config.correctness_key
        values, what = (batch.scores, "the score") if key is None else (batch.extra(key), f"{key!r}")
        if not (isinstance(values, Tensor) and values.dim() == 1):
            raise DataError(f"a_grae: plugins.a_grae.correctness_key={key!r} is not a number per response")
        values = batch.of_session(values)
        least, most = float(values.min()), float(values.max())
        if not -ROUNDING <= least <= most <= 1 + ROUNDING:
            raise DataError(
                f"a_grae: {what} goes from {least:g} to {most:g} and must lie in [0, 1]; set "
                "plugins.a_grae.correctness_key to a part of the reward that does"
            )
        return values


def symmetry(advantage: Tensor, rate: Tensor, batch: Batch) -> dict[str, float]:
    """How the weight |A| [rows] is shared between right and wrong, hard and easy prompts [G]; each session once."""
    last = slice(None) if batch.groups.counted is None else batch.groups.counted
    given, rate_of = advantage[last], rate[batch.groups.index[last]]
    weight = given.abs()
    positive, total = float(given.clamp(min=0).sum()), float(weight.sum())
    metrics = {
        "positive_weight": positive,
        "negative_weight": total - positive,
        "frac_solved_all": float((rate == 1).float().mean()),
        "frac_solved_none": float((rate == 0).float().mean()),
    }
    if total > 0:
        metrics["positive_share"] = positive / total
    bins = torch.bucketize(rate_of, torch.tensor([1 / 3, 2 / 3]), right=True)
    sums, counts = torch.bincount(bins, weight.double(), minlength=3), torch.bincount(bins, minlength=3)
    by_bin = zip(("weight_hard", "weight_medium", "weight_easy"), sums.tolist(), counts.tolist(), strict=True)
    return metrics | {name: total / count for name, total, count in by_bin if count}
