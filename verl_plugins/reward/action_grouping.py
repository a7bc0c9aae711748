"""Action grouping: scores with noise are pooled over responses that are equivalent.

On the principle of arXiv:2306.12981: to treat similar actions as one adds an error of approximation and takes away one
of estimation, so neither the finest nor the coarsest grouping is always best. The paper's bound was not read: what
follows is ours. Per prompt, responses i = 1..n with scores r_i whose noise has the variance sigma^2, classes of
equivalent ones with means rbar:

    shrink:  r_i <- (1 - a) r_i + a rbar,    a = sigma^2 / (sigma^2 + tau^2),   tau^2 = max(0, s^2 - sigma^2)
    select:  r_i <- mean over i's part of the partition with the least J,
             J(G) = sum over i of (r_i - rbar_i)^2 + 2 sigma^2 |G| - n sigma^2

with s^2 the unbiased variance within the class, and singletons, classes and the whole group as partitions, of which the
finest is taken where several have the least J (Mallows' Cp, without bias for the squared error of the means).

What differs from GRPO: (1) the reward alone, before advantages are computed; it stays on the last token.

Degenerate cases: a class of one is left as it is (a = 0), and so is everything at sigma = 0. A response without an
answer is a class of its own, unless `group_missing`. Equal scores stay what they are. With `select` groups can become
all equal, which have no advantage. Over a verifier without noise `shrink` changes nothing, and says so.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from verl_plugins import Batch, DataError, Groups, Plugin, Run, hookimpl, setting
from verl_plugins.reward.equivalence import chained, given_answers, tool_calls

DECIMALS = 12
"""Risks that differ by less are equal."""


def risk(scores: Tensor, parts: Groups, prompts: Groups, variance: float) -> Tensor:
    """[B] scores -> [B] J of the partition of each row's prompt into `parts`."""
    error = prompts.sum((scores - parts.mean(scores)).square())
    return error + variance * (2 * _count(parts, prompts) - prompts.count())


def select(scores: Tensor, levels: Sequence[Groups], prompts: Groups, variance: float) -> tuple[Tensor, Tensor]:
    """[B] scores -> [B] means over the parts of the least risk, [B] int64 the level they are of.

    Args:
        scores: float64.
        levels: partitions of the rows, each within prompts, the finest first.
        prompts: which rows belong to a prompt.
        variance: sigma^2.
    """
    risks = torch.stack([risk(scores, parts, prompts, variance) for parts in levels])
    level = torch.from_numpy(risks.numpy().round(DECIMALS).argmin(0))  # the first of equal ones
    means = torch.stack([parts.mean(scores) for parts in levels])
    return means.gather(0, level[None])[0], level


def shrinkage(scores: Tensor, classes: Groups, variance: float) -> Tensor:
    """[B] scores, float64 -> [B] a: how far each goes to the mean of its class."""
    spread = (classes.std(scores).square() - variance).clamp(min=0)
    share = variance / (variance + spread).clamp(min=torch.finfo(torch.float64).tiny)
    return torch.where(classes.count() > 1, share, 0.0)


def shrink(scores: Tensor, classes: Groups, variance: float) -> tuple[Tensor, Tensor]:
    """[B] scores, float64 -> [B] shrunk ones, [B] a."""
    share = shrinkage(scores, classes, variance)
    return (1 - share) * scores + share * classes.mean(scores), share


def _count(parts: Groups, prompts: Groups) -> Tensor:
    """[B] how many parts each row's prompt has."""
    return prompts.sum(parts.first(torch.ones(len(parts.index))).long())


class ActionGrouping(Plugin):
    """Pools scores over equivalent responses."""

    name = "action_grouping"
    paper = "arXiv:2306.12981"

    @dataclass
    class Config:
        mode: str = setting(
            "shrink", "towards the mean of the class, or means of the best partition", choices=("shrink", "select")
        )
        equivalence: str = setting(
            "answer", "what makes responses equivalent", choices=("answer", "tool_call", "jaccard")
        )
        sigma: float = setting(0.1, "standard deviation of a score's noise, in units of the score", ge=0)
        answer: str = setting("answer", "part of the reward that holds the extracted answer")
        similarity: float = setting(0.8, "share of tokens from which `jaccard` joins two responses", gt=0, le=1)
        group_missing: bool = setting(False, "responses without answer or call are a class, not one each")
        warn_after: int = setting(5, "say once that so many steps had no noise within classes; 0: never", ge=0)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._without_noise = 0
        self._warned = False
        self._no_answers = False

    @hookimpl
    def shape_rewards(self, run: Run, batch: Batch) -> None:
        scores, prompts, variance = batch.scores.double(), batch.groups, self.config.sigma**2
        classes = Groups(self.labels(batch), prompts.counted)
        run.log({"sigma": self.config.sigma, "n_groups_mean": _mean(prompts, _count(classes, prompts))})
        if self.config.mode == "shrink":
            pooled, share = shrink(scores, classes, variance)
            run.log({"alpha_mean": float(share[batch.is_last].mean())})
        else:
            alone = Groups(np.arange(len(batch)), prompts.counted)
            pooled, level = select(scores, (alone, classes, prompts), prompts, variance)
            kept, of_class, of_all = (_mean(prompts, level == number) for number in range(3))
            run.log({"level_singletons": kept, "level_classes": of_class, "level_all": of_all})
        spread = [((values - prompts.mean(values)).square() * batch.is_last).sum() for values in (scores, pooled)]
        if spread[0] > 0:
            run.log({"score_var_removed": float(1 - spread[1] / spread[0])})
        self._watch(run, scores, classes)
        pooled = batch.of_session(pooled).float()
        if (pooled != batch.scores).any():
            batch.rewards = pooled

    def labels(self, batch: Batch) -> np.ndarray:
        """[B] the number of the class of each response, within its prompt."""
        codes = self._codes(batch)
        alone = (codes < 0) & (not self.config.group_missing)
        own = np.where(alone, -2 - np.arange(len(batch)), codes)
        pairs = np.stack([batch.groups.index.numpy(), own], 1)
        return np.unique(pairs, axis=0, return_inverse=True)[1].ravel()

    def _codes(self, batch: Batch) -> np.ndarray:
        """[B] the number of each response's answer, call or chain; -1 for none."""
        if self.config.equivalence == "tool_call":
            return _numbered(tool_calls(batch.text))
        if self.config.equivalence == "answer":
            try:
                return _numbered(given_answers(batch, self.config.answer))
            except DataError:
                self._say_no_answers()
        counted = batch.response_mask & batch.is_last[:, None]
        return chained(batch.responses, counted, batch.groups, self.config.similarity).numpy()

    def _say_no_answers(self) -> None:
        if not self._no_answers:
            self._no_answers = True
            _say(
                f"plugins.action_grouping.answer={self.config.answer} is no part of the reward: responses are grouped "
                "by the tokens they share (equivalence=jaccard)"
            )

    def _watch(self, run: Run, scores: Tensor, classes: Groups) -> None:
        """Log how many classes of several have equal scores, and say once that there is no noise to pool."""
        several = classes.first(classes.count() > 1)
        if several.any():
            equal = float((classes.max(scores) == classes.min(scores))[several].double().mean())
            run.log({"equal_classes": equal})
            self._without_noise = self._without_noise + 1 if equal == 1 else 0
        patience = self.config.warn_after
        seen = 0 < patience <= self._without_noise
        if not self._warned and (self.config.sigma == 0 or seen):
            self._warned = True
            why = f"equivalent responses had equal scores in {patience} steps" if seen else "sigma is 0"
            _say(f"plugins.action_grouping has nothing to pool: {why}; it is for scores with noise, not for verifiers")

    def state_dict(self) -> dict[str, Any]:
        return {"without_noise": self._without_noise, "warned": self._warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._without_noise, self._warned = state["without_noise"], state["warned"]


def _numbered(keys: np.ndarray) -> np.ndarray:
    return pd.factorize(np.where(keys == "", None, keys))[0]


def _mean(prompts: Groups, values: Tensor) -> float:
    """Over prompts, of values that are the same over each."""
    return float(prompts.per_group(values).double().mean())


def _say(text: str) -> None:
    logging.getLogger(__name__).warning(text)
