"""Probability mask: only tokens that the policy was unsure of have a part in the loss.

SPO, arXiv:2505.23564, section 5.3 (the indicator I(p_t < rho) of its loss), on its own. With p_t the probability the
old policy gave to the token it sampled, at the sampling temperature:

    M_t = 1 if p_t < rho else 0;   loss = sum of M_t l_t / sum of M_t over the mini-batch

What differs from GRPO: (1) tokens the policy was sure of are not trained on, neither by the policy loss nor by a KL
term or entropy bonus; (2) they are not counted in the mean either.

Degenerate cases: p_t equal to rho is masked out; a response, or a whole mini-batch, without any other token gives 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig

from verl_plugins import Batch, CompositionError, Plugin, Run, hookimpl, setting

ROUNDING = 1e-6
"""A probability that is nearer to rho than this is rho, whatever its logarithm was rounded to."""


class ProbMask(Plugin):
    """Takes tokens out of the loss that were likelier than `rho`."""

    name = "prob_mask"
    paper = "arXiv:2505.23564"
    needs = frozenset({"old_log_probs"})

    @dataclass
    class Config:
        rho: float = setting(0.9, "tokens from this probability on are not trained on", authors=0.9, gt=0, lt=1)

    def check(self, config: DictConfig) -> None:
        if config.algorithm.adv_estimator == "gae":
            raise CompositionError(
                "plugins.prob_mask with algorithm.adv_estimator=gae: verl divides the loss of the critic "
                "by the tokens of the mask, too; take another, as in algorithm.adv_estimator=grpo"
            )

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        unsure = batch.response_mask & (batch.old_log_probs.double().exp() < self.config.rho - ROUNDING)
        batch.put("loss_mask", unsure)
        tokens = int(batch.response_mask.sum())
        run.log(
            {
                "masked_out": 1 - int(unsure.sum()) / max(tokens, 1),
                "rows_without": float((~unsure.any(1)).double().mean()),
            }
        )
