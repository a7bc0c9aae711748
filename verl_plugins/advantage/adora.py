"""ADORA: rescale the advantages of a whole group by what its rollouts say of the prompt: are its successes long enough?

arXiv:2602.10019, as the authors' two released trainers compute it. S are the successes of a group, F the failures that
were not cut off, l the lengths. The group has a length advantage, LA, if

    max of l over S  >  mean of l over F          (strictly; without successes the left side is -inf)

and every advantage of the group, whatever estimator it comes from, is multiplied by w:

    llm         w = 1 if LA, else tds_weight; without F any success is LA                language models, default
    vlm         w = 1 if LA or without successes, else tds_weight; without F no LA       vision-language models
    paper_llm   w = tas_weight if LA and |S| <= success_rate_tau n, else 1; F as in llm  the paper, partly inferred

Against GRPO only this factor differs; it is computed anew in every step. A weight below 1 for groups whose right
answers are short lengthens chains of thought and punishes concise ones.

Degenerate cases. Where the estimator gives 0, 0 it stays; a group of one is weighed like any other. An empty response
has length 0 and, failing, counts in the mean.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from verl_plugins import Batch, CompositionError, DataError, Groups, Plugin, Run, hookimpl, setting


class Lengths(NamedTuple):
    """What the rollouts of each prompt say, all [G] in the order of the groups."""

    success: Tensor
    """Longest success; -inf without any."""
    failure: Tensor
    """Mean of the failures that were not cut off; NaN without any."""
    success_rate: Tensor
    """Share of successes among all responses, cut off ones too."""


def group_lengths(lengths: Tensor, success: Tensor, cut_off: Tensor, groups: Groups) -> Lengths:
    """Response lengths [rows], successes and responses cut off by the budget, both [rows] bool."""
    failed = ~success & ~cut_off
    longest = groups.max(torch.where(success, lengths, -torch.inf))
    mean = groups.sum(lengths * failed) / groups.sum(failed)
    rate = groups.sum(success) / groups.count()
    return Lengths(*(groups.per_group(values) for values in (longest, mean, rate)))


def is_advantageous(found: Lengths, variant: str = "llm", success_rate_tau: float = 0.5) -> Tensor:
    """Which prompts should weigh more than the others, [G] bool."""
    without = torch.inf if variant == "vlm" else -torch.inf
    longer = found.success > torch.where(found.failure.isnan(), without, found.failure)
    if variant == "paper_llm":
        return longer & (found.success_rate <= success_rate_tau)
    return longer | (found.success_rate == 0) if variant == "vlm" else longer


class Adora(Plugin):
    """Advantages of any estimator, weighed by whether the group's right answers are longer than its wrong ones."""

    name = "adora"
    paper = "arXiv:2602.10019"

    @dataclass
    class Config:
        variant: str = setting(
            "llm", "the rule, see the recipe's page", authors="llm", choices=("llm", "vlm", "paper_llm")
        )
        tds_weight: float = setting(0.1, "factor of disadvantageous groups (llm, vlm)", authors=0.1, ge=0)
        tas_weight: float = setting(2.0, "factor of advantageous groups (paper_llm)", authors=2.0, ge=0)
        success_rate_tau: float = setting(
            0.5, "largest share of successes of an advantageous group (paper_llm)", authors=0.5, ge=0, le=1
        )
        correct_score: float | None = setting(
            None, "a score above it is a success; default: the verifier's verdict", authors=1.01
        )
        max_length_threshold: int | None = setting(
            None, "failures of this length or more are left out; default: those cut off by their budget", ge=1
        )

    def check(self, config: DictConfig) -> None:
        threshold, budget = self.config.max_length_threshold, OmegaConf.select(config, "data.max_response_length")
        if threshold is not None and budget is not None and threshold > budget:
            raise CompositionError(
                f"plugins.adora.max_length_threshold={threshold} lies beyond data.max_response_length={budget}, so "
                f"that failures cut off at {budget} tokens would count; set it to {budget} or less, or leave it out"
            )
        if self.config.correct_score is not None and OmegaConf.select(config, "algorithm.use_kl_in_reward"):
            raise CompositionError(
                f"plugins.adora.correct_score={self.config.correct_score} cannot be compared with scores that "
                "algorithm.use_kl_in_reward=true lowers; leave plugins.adora.correct_score out"
            )

    @hookimpl(wrapper=True)
    def estimate_advantage(self, run: Run, batch: Batch) -> Generator[None, Tensor, Tensor]:
        advantages = yield
        full, config = batch.full, self.config
        success, cut_off = self._success(full), self._cut_off(full)
        found = group_lengths(generated(full), success, cut_off, full.groups)
        advantageous = is_advantageous(found, config.variant, config.success_rate_tau)
        of_prompts = torch.where(advantageous, *self.weights())
        weight = batch.from_full(of_prompts.index_select(0, full.groups.index))
        run.log(summary(found, advantageous) | {"weight_mean": float(of_prompts.mean())})
        moved = batch.groups.per_group(batch.groups.any(torch.linalg.vector_norm(advantages, dim=1) > 0))
        run.log(_mean("weight_mean_nonzero", batch.groups.per_group(weight)[moved]))
        run.log(_mean("truncated_failures", cut_off[~success & full.is_last].float()))
        return advantages * weight[:, None]

    def weights(self) -> tuple[float, float]:
        """The factors of advantageous groups and of the others."""
        if self.config.variant == "paper_llm":
            return self.config.tas_weight, 1.0
        return 1.0, self.config.tds_weight

    def _success(self, batch: Batch) -> Tensor:
        """[B] bool"""
        least = self.config.correct_score
        if least is None:
            return batch.correct
        success = batch.scores > least
        if not success.any() and batch.correct.any():
            raise DataError(
                f"adora: no score exceeds plugins.adora.correct_score={least}, the largest is "
                f"{float(batch.scores.max()):g}, although the verifier calls {int(batch.correct.sum())} responses "
                "right; set it below the score of a right answer, or leave it out"
            )
        return success

    def _cut_off(self, batch: Batch) -> Tensor:
        """[B] bool"""
        threshold = self.config.max_length_threshold
        if threshold is None:
            return batch.truncated
        least = int(batch.budgets.min())
        if threshold > least:
            raise DataError(
                f"adora: plugins.adora.max_length_threshold={threshold} lies beyond the budget of {least} tokens that "
                "a prompt of this batch has; leave it out, and failures cut off by their own budget are left out"
            )
        return generated(batch) >= threshold


def generated(batch: Batch) -> Tensor:
    """[B] tokens of the response that the policy generated; tool output is not among them."""
    # Bytes are summed several times as fast as bools, and faster as integers than as floats.
    return batch.response_mask.view(torch.uint8).sum(1, dtype=torch.int32).add(batch.offsets).float()


def summary(found: Lengths, advantageous: Tensor) -> dict[str, float]:
    """Metrics over prompts."""
    share, success, failure = float(advantageous.float().mean()), found.success, found.failure
    return {
        "frac_tas": share,
        "frac_tds": 1 - share,
        "frac_no_success": float((~success.isfinite()).float().mean()),
        "frac_no_failure": float(failure.isnan().float().mean()),
        **_mean("max_success_len_mean", success[success.isfinite()]),
        **_mean("mean_fail_len_mean", failure[failure.isfinite()]),
    }


def _mean(name: str, values: Tensor) -> dict[str, float]:
    """The mean by its name; nothing where there are no values."""
    return {name: float(values.mean())} if len(values) else {}
