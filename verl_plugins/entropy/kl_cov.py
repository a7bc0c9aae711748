"""KL-Cov: entropy collapses through a few tokens, so hold just those near the rollout policy by a KL penalty.

arXiv:2505.22617, the sister of Clip-Cov. Per loss call, over its N response tokens:

    cov_t = (A_t - mean A) (log pi_t - mean log pi)
    penalised: the max(1, int(kl_cov_ratio N)) tokens of largest cov
    loss_t = -A r, and + ppo_kl_coef |log r| where penalised,   r = pi / pi_old

Against GRPO's loss: that penalty, and no clipping of any kind (clip_ratio and clip_ratio_c are ignored, log r is not
clamped). The paper writes a KL divergence, its code |log r|: a constant push of ppo_kl_coef towards the old policy.

Degenerate cases. While the policy is still the old one log r is 0, and so are penalty and push: with one update per
rollout batch, and in the first update of every one, this is unclipped policy gradient; a warning says so. Equal
advantages: cov is rounding noise and the penalty lands anywhere. Means, count and the "at least 1" are per
micro-batch, as in the authors' code, so the result depends on the split: with one response per micro-batch, all of
whose advantages are equal, chance chooses. `scope: batch`, the paper's reading, chooses once per step from the old
log-probs and does not depend on it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from verl_plugins import Batch, Plugin, Run, Tokens, hookimpl, setting
from verl_plugins.entropy.clip_cov import Surrogate, covariance, floating

PENALISED = "kl_cov_penalised"
"""Field of the tokens penalised in the whole batch (`scope: batch`)."""


def largest(cov: Tensor, mask: Tensor, ratio: float) -> Tensor:
    """cov and bool mask [rows,T] -> flat positions of the max(1, int(ratio · N)) valid tokens with the largest cov."""
    valid = int(torch.count_nonzero(mask))
    count = max(1, int(valid * ratio)) if valid else 0
    return cov.masked_fill(~mask, -torch.inf).flatten().topk(count, sorted=False).indices


class KlCov(Plugin):
    """Penalises the change of the few tokens that drive entropy down."""

    name = "kl_cov"
    paper = "arXiv:2505.22617"

    @dataclass
    class Config:
        kl_cov_ratio: float = setting(
            2e-3, "share of all tokens to penalise; authors: 2e-3 (7B), 2e-4 (32B)", authors=2e-3, gt=0, le=1
        )
        ppo_kl_coef: float = setting(1.0, "weight of the penalty", authors=1.0, ge=0)
        scope: str = setting(
            "micro_batch", "choose in every loss call, or once per train batch", choices=("micro_batch", "batch")
        )

    def check(self, config: DictConfig) -> None:
        actor, prompts = config.actor_rollout_ref.actor, config.data.train_batch_size
        bypass = OmegaConf.select(config, "algorithm.rollout_correction.bypass_mode")
        if prompts <= actor.ppo_mini_batch_size and actor.ppo_epochs == 1 and not bypass:
            logging.getLogger(__name__).warning(
                "the penalty of plugins.kl_cov has no effect with one update per batch: the policy has not moved yet "
                f"(data.train_batch_size={prompts}, actor_rollout_ref.actor.ppo_mini_batch_size="
                f"{actor.ppo_mini_batch_size}, ppo_epochs=1); set a smaller ppo_mini_batch_size"
            )

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        if self.config.scope != "batch":
            return
        mask = batch.response_mask
        cov = covariance(batch.advantages, batch.old_log_probs, floating(mask, batch.old_log_probs))
        chosen = largest(cov, mask, self.config.kl_cov_ratio)
        run.log({"num_selected": len(chosen)})
        batch.put(PENALISED, torch.zeros_like(mask).flatten().index_fill_(0, chosen, True).view_as(mask))

    @hookimpl
    @torch.no_grad()
    def policy_loss(self, tokens: Tokens) -> Tensor:
        log_ratio = tokens.log_probs - tokens.old_log_probs
        ratio = log_ratio.exp()
        losses = -tokens.advantages * ratio
        gradient = losses.clone()  # of -A r by the log-prob: itself

        mask = floating(tokens.response_mask, log_ratio)
        cov = covariance(tokens.advantages, tokens.log_probs, mask)
        if self.config.scope == "batch":
            chosen = tokens.extra(PENALISED).to(mask.device).flatten().nonzero()[:, 0]
        else:
            chosen = largest(cov, tokens.response_mask, self.config.kl_cov_ratio)
            tokens.log({"num_selected": len(chosen)}, "sum")
        moved = log_ratio.flatten()[chosen]
        losses.view(-1)[chosen] += self.config.ppo_kl_coef * moved.abs()
        gradient.view(-1)[chosen] += self.config.ppo_kl_coef * moved.sign()
        self._log(tokens, mask, log_ratio, ratio, cov, chosen)
        with torch.enable_grad():
            return Surrogate.apply(tokens.log_probs, losses, gradient)

    def _log(self, tokens: Tokens, mask: Tensor, log_ratio: Tensor, ratio: Tensor, cov: Tensor, chosen: Tensor) -> None:
        distance, count = log_ratio.abs_().mul_(mask), mask.sum() + 1e-8
        values = {"ppo_kl": distance.sum() / count, "ratio_max": ratio.mul_(mask).max()}
        if len(chosen):
            kl, picked = distance.flatten()[chosen], cov.flatten()[chosen]
            values |= {
                "penalty": self.config.ppo_kl_coef * kl.sum() / count,
                "selected_abs_kl": kl.mean(),
                "rest_abs_kl": (distance.sum() - kl.sum()) / (count - len(chosen)).clamp(min=1),
                "selected_cov": picked.mean(),
                "selected_cov_min": picked.min(),
                "selected_negative_share": (tokens.advantages.flatten()[chosen] < 0).double().mean(),
            }
        # One transfer from the device for all of them.
        numbers = torch.stack([value.double() for value in values.values()]).tolist()
        found = dict(zip(values, numbers, strict=True))
        tokens.log({"ratio_max": found.pop("ratio_max")}, "max")
        if len(chosen):
            tokens.log({"selected_cov_min": found.pop("selected_cov_min")}, "min")
        tokens.log(found)
