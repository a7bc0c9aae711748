"""DRPO: prefer short answers among the correct ones only, so that a long correct answer is never pushed down.

arXiv:2510.04474, as the authors' code computes it (Optimization-AI/DRPO). Per prompt with correct responses P and wrong
ones N, n_i generated tokens, s_i the mean log-prob of response i, C the configured response budget:

    w_i = softmax over P of (1 - n_i / C) / Lambda
    J   = sum_P w_i s_i - tau log( (1/|N|) sum_N exp(s_j / tau) ),   averaged over prompts; 0 if P or N is empty
    loss = -J + beta/2 max(K - delta, 0)^2,   K = token mean of log pi_old - log pi

The gradient of J by s is w_i for correct responses and minus the softmax of s_j / tau for wrong ones. The driver writes
these, over n_i, as advantages; a step's loss is -A log pi. Against GRPO: no group mean, no ratio, no clipping.

That softmax depends on the policy as it moves (`negatives`). `current`: s_j of the policy being trained, divided by the
driver's sum over the group under the old policy, so that neither micro-batches nor ranks matter. `exact`: divided by
the sum over the rows of the group in the micro-batch, the others of the group as they were: the authors' numbers where
groups are whole. `old`: as the driver wrote it. All three agree until the first update of a step.

Degenerate cases. A prompt without P or without N, a single response among them, has advantage 0 and counts in the
average. A response without tokens belongs to neither. K is the mean of one micro-batch, as in the authors' code (theirs
spans the ranks), may be negative, and is 0 in the first update.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from verl_plugins import Batch, CompositionError, DataError, Groups, Plugin, Run, Tokens, hookimpl, setting
from verl_plugins.advantage.copo import binary_scores

GROUP, WEIGHT = "drpo_group", "drpo_weight"
"""Fields of `negatives: exact`: the number of each row's group, and its weight as the driver wrote it."""


def softmax_within(logits: Tensor, parts: Tensor, count: int) -> Tensor:
    """Softmax over the rows of each part, [rows] float64. logits [rows], parts [rows] with numbers below `count`."""
    logits = logits.double()
    highest = logits.new_full((count,), -torch.inf).scatter_reduce_(0, parts, logits, "amax")
    shares = (logits - highest.index_select(0, parts)).exp()
    return shares / shares.new_zeros(count).index_add_(0, parts, shares).index_select(0, parts)


def signed_weights(
    right: Tensor, lengths: Tensor, scores: Tensor, groups: Groups, tau: float, length_temperature: float, budget: int
) -> Tensor:
    """dJ/ds of each response, [B] float64: w of a correct one, minus the softmax of a wrong one, 0 in unmixed groups.

    Args:
        right: [B] bool.
        lengths: [B] generated tokens; responses without any take no part.
        scores: [B] mean log-prob of each response.
        budget: C, the tokens a response may have.
    """
    mixed = groups.any(right & (lengths > 0)) & groups.any(~right & (lengths > 0))
    rows = (mixed & (lengths > 0)).nonzero()[:, 0]
    right, lengths = right[rows], lengths[rows].double()
    logits = torch.where(right, (1 - lengths / budget) / length_temperature, scores[rows].double() / tau)
    shares = softmax_within(logits, 2 * groups.index[rows] + right, 2 * len(groups))
    return shares.new_zeros(len(scores)).index_copy_(0, rows, torch.where(right, shares, -shares))


class Drpo(Plugin):
    """Length preference among correct answers, softmax over wrong ones, and a trust region for clipping."""

    name = "drpo"
    paper = "arXiv:2510.04474"
    needs = frozenset({"old_log_probs"})

    @dataclass
    class Config:
        length_temperature: float = setting(
            0.1, "Lambda: the smaller, the more the shortest correct answer counts", authors=0.1, gt=0
        )
        tau: float = setting(10.0, "temperature of the softmax over wrong answers", authors=10.0, gt=0)
        beta: float = setting(1e3, "weight of the trust region; 0 leaves it out", authors=1e3, ge=0)
        delta: float = setting(1e-4, "mean change of the log-prob that costs nothing", authors=1e-4, ge=0)
        kl_type: str = setting("kl", "estimator of the change", authors="kl", choices=("kl", "low_var_kl"))
        correct_threshold: float | None = setting(
            None, "a score above it is right, any other wrong, as for scores of ±1; default: scores must be 0 or 1"
        )
        negatives: str = setting(
            "current",
            "weights of wrong answers: of the current policy over the driver's sum, over the micro-batch's, or the "
            "driver's own",
            authors="exact",
            choices=("current", "exact", "old"),
        )

    def check(self, config: DictConfig) -> None:
        actor = config.actor_rollout_ref.actor
        if actor.loss_agg_mode != "seq-mean-token-sum":
            raise CompositionError(
                f"actor_rollout_ref.actor.loss_agg_mode={actor.loss_agg_mode} would divide by lengths again, which "
                "plugins.drpo does itself; set it to seq-mean-token-sum"
            )
        if OmegaConf.select(config, "algorithm.use_kl_in_reward"):
            raise CompositionError(
                "algorithm.use_kl_in_reward=true changes the scores that plugins.drpo goes by; set it "
                "to false, the trust region holds the policy"
            )
        if config.actor_rollout_ref.rollout.n < 2:
            raise CompositionError(
                f"plugins.drpo compares the responses of a prompt, and actor_rollout_ref.rollout.n="
                f"{config.actor_rollout_ref.rollout.n} leaves none to compare with; set it to 2 or more"
            )
        several = config.data.train_batch_size > actor.ppo_mini_batch_size or actor.ppo_epochs > 1
        if self.config.negatives == "old" and self.config.tau < 1 and several:
            raise CompositionError(
                f"plugins.drpo.negatives=old with tau={self.config.tau} goes stale within the updates of a step; set "
                "negatives=current, or tau to 1 or more"
            )

    @hookimpl
    def estimate_advantage(self, run: Run, batch: Batch) -> Tensor:
        config, groups = self.config, batch.groups
        right = self._right(batch)
        for row in (~batch.is_last).nonzero()[:1, 0].tolist():
            raise DataError(
                f"drpo: row {batch.keys[row]} is not the only output of its session, and a response needs one length; "
                "use an agent loop with one output per session"
            )
        mask = batch.response_mask.view(torch.uint8).float()
        lengths = mask.sum(1)
        totals = torch.from_numpy(np.einsum("bt,bt->b", batch.old_log_probs.numpy(), mask.numpy()))
        budget = run.config.data.max_response_length
        weights = signed_weights(
            right, lengths, totals / lengths, groups, config.tau, config.length_temperature, budget
        )
        if config.negatives == "exact":
            batch.put(GROUP, groups.index)
            batch.put(WEIGHT, weights.float())

        prompts = int(groups.per_group(groups.any(lengths > 0)).sum())
        run.log(_metrics(weights, groups))
        # The aggregation divides by rows, the objective by prompts.
        share = len(batch) / max(prompts, 1) / lengths.clamp(min=1)
        return mask.mul_((weights * share).float()[:, None])

    def _right(self, batch: Batch) -> Tensor:
        """[B] bool"""
        threshold = self.config.correct_threshold
        if threshold is not None:
            return batch.scores > threshold
        return binary_scores(batch, self.name, ", or set plugins.drpo.correct_threshold") == 1

    @hookimpl
    def policy_loss(self, tokens: Tokens) -> Tensor:
        config, mask, info = self.config, tokens.response_mask, tokens.config.global_batch_info
        drift = torch.where(mask, tokens.log_probs - tokens.old_log_probs, 0.0)
        kl = -drift if config.kl_type == "kl" else drift.expm1() - drift
        with torch.no_grad():
            mean_kl = kl.sum() / mask.sum().clamp(min=1)
            coefficient = config.beta * (mean_kl - config.delta).clamp(min=0)
            growth = (drift.sum(1) / mask.sum(1).clamp(min=1) / config.tau).exp()
            weights = self._weights(tokens, growth)
            tokens.log({"ppo_kl": float(mean_kl), "constraint_coef": float(coefficient)})
            tokens.log({"constraint_active": float(coefficient > 0)})
        # The trust region is a mean over the mini-batch's tokens, and the aggregation divides by its rows.
        return coefficient * info["global_batch_size"] / info["batch_num_tokens"] * kl - weights * tokens.log_probs

    def _weights(self, tokens: Tokens, growth: Tensor) -> Tensor:
        """Advantages [rows,T], those of wrong answers times the growth [rows] of exp(s / tau) since the old policy."""
        if self.config.negatives == "old":
            return tokens.advantages
        if self.config.negatives == "exact":
            group, weight = (tokens.extra(name).to(growth.device) for name in (GROUP, WEIGHT))
            names, place = group.unique(return_inverse=True)
            added = weight.clamp(max=0).neg() * (growth - 1)
            growth = growth / (1 + growth.new_zeros(len(names)).index_add_(0, place, added.to(growth)))[place]
        return torch.where(tokens.advantages < 0, tokens.advantages * growth[:, None], tokens.advantages)


def _metrics(weights: Tensor, groups: Groups) -> dict[str, float]:
    squares = groups.per_group(groups.sum(weights.clamp(min=0) ** 2))
    metrics = {"weight_max": float(weights.max()), "negative_weight_max": -float(weights.min())}
    if bool((squares > 0).any()):
        metrics["effective_positives"] = float((1 / squares[squares > 0]).mean())
    return metrics
