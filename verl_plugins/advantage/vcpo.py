"""VCPO: shorter steps when stale rollouts weigh unevenly, and the baseline of least variance for weighted gradients.

arXiv:2602.17616. Of trajectory i: w_i = exp(sum_t (log pi(y_t) - log mu(y_t))), how much likelier the learner finds it
than the weights mu that generated it; R_i its reward, L_i its tokens. Stale rollouts make w heavy-tailed, a few
trajectories decide the gradient, and runs collapse.

What differs from GRPO:
1. The step: lr is multiplied by sqrt(min(1, rho / base)) (or without the root) for one optimiser step, where
   rho = ESS / B, ESS = (sum w)^2 / sum w^2 over the mini-batch of all ranks (section on effective sample size).
2. The baseline ("OPOB"): b = sum W_i R_i / sum W_i over the group, W_i = w_i^2 |grad log pi(tau_i)|^2, instead of the
   mean; the advantage is (R_i - b) over the group's population std.
3. The loss is REINFORCE with truncated weights min(w_i, c), which verl applies (`algorithm.rollout_correction`).

The score's norm is not known before the backward pass: `logit_proxy` (ours) takes its part in the logits,
sum_t (1 - 2 pi_t + sum_v pi_v^2), `length` takes L_i. The authors' code has the truncated weight inside the norm, too
(`grad_norm_includes_is`), which their formula has not.

Degenerate cases: log w is added up in float64 and held within +-80, so that no weight is infinite; an ESS that is no
number makes the step 0 long and is counted. Where no trajectory of a group weighs anything, b is the group's mean. A
lone response has nothing to compare with: 0. A response without tokens weighs nothing.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator
from dataclasses import dataclass

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from verl_plugins import Actor, Batch, CompositionError, Plugin, Run, Tokens, hookimpl, setting
from verl_plugins.advantage.grpo import grpo_advantage
from verl_plugins.advantage.weighted import EPSILON, average, total

logger = logging.getLogger(__name__)
LIMIT = 80.0
"""Of log w: its square's exponential is still a float64 many times over."""
NOTHING, FLAT = 1e-12, 1e-8
"""Weights that add up to less weigh nothing; a std below it does not divide."""
LOG_WEIGHT, COUNTED = "vcpo_log_weight", "vcpo_counted"
CORRECTION = "algorithm.rollout_correction"


def log_weights(log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor) -> Tensor:
    """[rows,T] each -> [rows] float64 log w of the row's tokens, not yet held within bounds."""
    return ((log_probs.double() - rollout_log_probs.double()) * mask).sum(1)


def effective_sample_size(weights: Tensor) -> float:
    """Weights [n] -> (sum w)^2 / (sum w^2 + 1e-8); 0 of none."""
    weights = weights.double()
    return float(weights.sum() ** 2 / (weights.square().sum() + EPSILON))


def step_multiplier(ratio: float, base: float = 1.0, rule: str = "sqrt") -> float:
    """What the learning rate is multiplied by at ESS / B = `ratio`; 0 where that is no number."""
    if not math.isfinite(ratio):
        return 0.0
    share = min(1.0, ratio / max(base, EPSILON))
    return math.sqrt(share) if rule == "sqrt" else share


def logit_proxy(log_probs: Tensor, sum_pi_squared: Tensor, mask: Tensor) -> Tensor:
    """[rows,T] each -> [rows] sum over tokens of |1_y - pi|^2 = 1 - 2 pi_y + sum_v pi_v^2, the score in the logits."""
    return ((1 - 2 * log_probs.double().exp() + sum_pi_squared.double()).clamp(min=0) * mask).sum(1)


class Vcpo(Plugin):
    """OPOB on the driver; each optimiser step scaled by the effective sample size of its mini-batch."""

    name = "vcpo"
    paper = "arXiv:2602.17616"
    needs = frozenset({"old_log_probs", "rollout_log_probs", "sum_pi_squared"})

    @dataclass
    class Config:
        scaling_rule: str = setting(
            "sqrt", "what of the effective share scales the step", choices=("sqrt", "linear", "none")
        )
        base_ess_ratio: float = setting(1.0, "ESS / B of healthy training; from there on steps are whole", gt=0, le=1)
        use_clipped: bool = setting(False, "ESS of truncated weights")
        rollout_is_threshold: float = setting(8.0, "c, that of algorithm.rollout_correction", gt=0)
        score_norm: str = setting(
            "logit_proxy", "what stands for the norm of the score", choices=("logit_proxy", "length")
        )
        scope: str = setting(
            "group", "one baseline per prompt, or per update on GRPO's advantages", choices=("group", "minibatch")
        )
        agg_mode: str = setting("mean", "how rewards become a baseline", choices=("mean", "median", "winsorized_mean"))
        norm_by_std: bool = setting(True, "divide by the group's population std")
        use_is_weights: bool = setting(True, "w^2 in W")
        use_clipped_is_ratios: bool = setting(False, "min(w, c)^2 in its place")
        normalize_by_length: bool = setting(False, "W over L^2, as the loss divides by L")
        grad_norm_includes_is: bool = setting(False, "the authors' code: min(w, c)^2 in W once more")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._log_weights: list[Tensor] = []

    def check(self, config: DictConfig) -> None:
        c = self.config.rollout_is_threshold
        wanted = {"rollout_is": "sequence", "rollout_is_threshold": c, "bypass_mode": False}
        for key, value in wanted.items():
            found = OmegaConf.select(config, f"{CORRECTION}.{key}")
            if found != value:
                raise CompositionError(
                    f"{CORRECTION}.{key} is {found}: plugins.vcpo leaves the truncated sequence weights to verl, set "
                    f"{CORRECTION}.{key}={value}"
                )

    @hookimpl
    def estimate_advantage(self, run: Run, batch: Batch) -> Tensor:
        log_weight = self.of_sessions(
            batch, log_weights(batch.old_log_probs, batch.rollout_log_probs, batch.response_mask)
        )
        score = self.score_squared(batch)
        weights = self.weights(log_weight, score, self.of_sessions(batch, batch.response_mask.sum(1).double()))
        found, level = self.advantage(batch, weights * batch.is_last)
        batch.put(LOG_WEIGHT, log_weight.clamp(-LIMIT, LIMIT))
        batch.put(COUNTED, batch.is_last.double())
        self._log(run, batch, log_weight[batch.is_last], score[batch.is_last], weights[batch.is_last], level)
        return batch.to_tokens(found)

    def weights(self, log_weight: Tensor, score_squared: Tensor, lengths: Tensor) -> Tensor:
        """[rows] W of each trajectory; log w, squared norm of the score and length in tokens are [rows] each."""
        w = log_weight.double().clamp(-LIMIT, LIMIT).exp()
        truncated, found = w.clamp(max=self.config.rollout_is_threshold), score_squared.double()
        if self.config.use_clipped_is_ratios:
            found = found * truncated.square()
        elif self.config.use_is_weights:
            found = found * w.square()
        if self.config.grad_norm_includes_is:
            found = found * truncated.square()
        if self.config.normalize_by_length:
            found = found / lengths.clamp(min=1).square()
        return torch.where(lengths > 0, found, 0.0)

    def advantage(self, batch: Batch, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [rows] -> the rows' advantages and baselines, [rows] each."""
        groups, by_group = batch.groups, self.config.scope == "group"
        values = (batch.scores if by_group else grpo_advantage(batch.scores, groups)).double()
        return self.against_baseline(
            values, weights, groups.index if by_group else torch.zeros_like(groups.index), batch
        )

    def against_baseline(self, values: Tensor, weights: Tensor, index: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Values [rows] less the baseline of their scope, over the group's std where that is asked for."""
        counted = batch.is_last.double()
        mean = total(values * counted, index) / total(counted, index).clamp(min=1)
        level = torch.where(
            total(weights, index) < NOTHING, mean, average(values, weights, index, self.config.agg_mode)
        )
        found = values - level
        if self.config.scope == "group":
            if self.config.norm_by_std:
                std = batch.groups.std(values, unbiased=False)
                found = torch.where(std > FLAT, found / std.clamp(min=FLAT), found)
            found = torch.where(batch.groups.count() > 1, found, 0.0)
        return found, level

    def score_squared(self, batch: Batch) -> Tensor:
        mask = batch.response_mask
        if self.config.score_norm == "length":
            return self.of_sessions(batch, mask.sum(1).double())
        return self.of_sessions(batch, logit_proxy(batch.old_log_probs, batch.sum_pi_squared, mask))

    @staticmethod
    def of_sessions(batch: Batch, values: Tensor) -> Tensor:
        """[rows] sum over the outputs of the row's response: a trajectory may have several."""
        return batch.sessions.sum(values)

    def _log(self, run: Run, batch: Batch, log_weight: Tensor, score: Tensor, weights: Tensor, level: Tensor) -> None:
        w, mean = log_weight.clamp(-LIMIT, LIMIT).exp(), batch.groups.mean(batch.scores)
        apart = (batch.old_log_probs - batch.rollout_log_probs)[batch.response_mask].double()
        metrics = {
            "seq_is_mean": float(w.mean()),
            "seq_is_max": float(w.max()),
            "seq_is_min": float(w.min()),
            "baseline_mean": float(level.mean()),
            "score_norm_mean": float(score.sqrt().mean()),
            "score_norm_max": float(score.sqrt().max()),
            "kl_k3": float((apart.exp() - 1 - apart).mean()),
        }
        if self.config.scope == "group":
            metrics["baseline_minus_group_mean"] = float((level - mean).mean())
        if weights.sum() > 0:
            metrics["weight_top1_share"] = float(weights.max() / weights.sum())
        run.log(metrics)

    @hookimpl
    def loss_terms(self, tokens: Tokens) -> None:
        """Adds nothing: notes the weights of the micro-batch for the step."""
        counted = tokens.extra(COUNTED) > 0
        self._log_weights.append(tokens.extra(LOG_WEIGHT)[counted].double())

    @hookimpl(wrapper=True)
    def optimizer_step(self, actor: Actor) -> Generator[None, float, float]:
        noted, self._log_weights = self._log_weights, []
        own = torch.cat(noted) if noted else torch.zeros(0, dtype=torch.float64)
        ratios, multiplier = self.of_step(actor.gather(own).exp())
        rates = [group["lr"] for group in actor.optimizer.param_groups]
        try:
            for group, rate in zip(actor.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * multiplier
            norm = yield
        finally:
            for group, rate in zip(actor.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        actor.log(ratios)
        actor.log({"lr_multiplier": multiplier, "effective_lr": rates[0] * multiplier})
        return norm

    def of_step(self, weights: Tensor) -> tuple[dict[str, float], float]:
        """Weights w [n] of a mini-batch of all ranks -> ESS and its ratios, and the learning rate's multiplier."""
        count = max(len(weights), 1)
        ess = effective_sample_size(weights)
        clipped = effective_sample_size(weights.clamp(max=self.config.rollout_is_threshold))
        finite = math.isfinite(ess) and math.isfinite(clipped)
        told = {"ess": ess, "ess_ratio": ess / count, "ess_ratio_clipped": clipped / count} if finite else {}
        if self.config.scaling_rule == "none" or not len(weights):
            return {**told, "skipped": 0.0}, 1.0
        ratio = (clipped if self.config.use_clipped else ess) / count
        multiplier = step_multiplier(ratio, self.config.base_ess_ratio, self.config.scaling_rule)
        if not math.isfinite(ratio):
            logger.warning("plugins.vcpo: the effective sample size is %s, this optimiser step is left out", ratio)
        return {**told, "skipped": float(not math.isfinite(ratio))}, multiplier
