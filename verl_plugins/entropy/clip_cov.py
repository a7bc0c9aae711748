"""Clip-Cov: entropy collapses through a few tokens, so leave a random few of those out of the gradient.

arXiv:2505.22617. The entropy of a softmax policy falls with the covariance of log-probability and advantage. Per loss
call, over its N response tokens with mean advantage Ā and mean log-prob L:

    cov_t = (A_t - Ā) (log pi_t - L)
    candidates: lb < cov_t < ub, not already clipped by PPO
    max(int(clip_cov_ratio N), 1) candidates, chosen at random, get loss 0
    all others: max(-A r, -A clip(r, 1-eps_low, 1+eps_high)),   r = exp(log pi - log pi_old)

Zeroed tokens stay in the denominators. Against GRPO's loss: those zeros, no dual clip, no clamp on log r. The authors
set clip_ratio_low = clip_ratio_high = 1 (almost no PPO clip), as the recipe does; with 0.2 most candidates are
clipped before they can be chosen, and the method is another one.

Degenerate cases. Equal advantages: cov is 0 and nothing is chosen (unless lb < 0). Small advantages or a small model:
no cov may reach lb, and the loss silently is plain PPO; watch `num_candidates`. Means, counts and the "at least 1" are
per micro-batch, as in the authors' code, so the result depends on the split: with one response per micro-batch, all of
whose advantages are equal, nothing is ever chosen. `scope: batch`, the paper's reading, chooses once per step from the
old log-probs and does not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from verl_plugins import Batch, CompositionError, Plugin, Run, Tokens, hookimpl, setting

CHOSEN = "clip_cov_chosen"
"""Field of the tokens chosen for the whole batch (`scope: batch`)."""
SAMPLE = 8192
"""Tokens, evenly spaced, that `cov_p999` is estimated from: sorting all would cost more than the loss."""


def covariance(advantages: Tensor, log_probs: Tensor, mask: Tensor) -> Tensor:
    """[rows,T] each, mask 0/1 and floating -> [rows,T]: cov_t with means over the mask, 0 outside it."""
    count = mask.sum() + 1e-8
    centred = (advantages - (advantages * mask).sum() / count) * mask
    return centred.mul_(log_probs - (log_probs * mask).sum() / count)


def candidates(cov: Tensor, mask: Tensor, lb: float, ub: float, clipped: Tensor | None = None) -> Tensor:
    """cov, mask, clipped [rows,T], the latter two bool -> flat positions of the tokens with lb < cov < ub."""
    # Few tokens pass the first test: the others are made on those only.
    places = (cov > lb).flatten().nonzero()[:, 0]
    passed = (cov.flatten()[places] < ub) & mask.flatten()[places]
    if clipped is not None:
        passed &= ~clipped.flatten()[places]
    return places[passed]


def choose(places: Tensor, tokens: int, ratio: float, rng: torch.Generator) -> Tensor:
    """max(int(ratio · tokens), 1) of the places at random, or all of them where there are fewer."""
    order = torch.randperm(len(places), generator=rng)[: max(int(ratio * tokens), 1)]
    return places[order.to(places.device)]


class Surrogate(torch.autograd.Function):
    """Known losses with their known gradient by the log-probs: no graph of [rows,T] buffers is kept."""

    @staticmethod
    def forward(ctx, log_probs: Tensor, losses: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream * ctx.saved_tensors[0], None, None


class ClipCov(Plugin):
    """Leaves a random few of the tokens that drive entropy down out of the policy gradient."""

    name = "clip_cov"
    paper = "arXiv:2505.22617"

    @dataclass
    class Config:
        clip_cov_ratio: float = setting(2e-4, "share of all tokens to leave out", authors=2e-4, gt=0, le=1)
        clip_cov_lb: float = setting(1.0, "candidates have a larger covariance", authors=1.0)
        clip_cov_ub: float = setting(5.0, "candidates have a smaller covariance", authors=5.0)
        scope: str = setting(
            "micro_batch", "choose in every loss call, or once per train batch", choices=("micro_batch", "batch")
        )

    def check(self, config: DictConfig) -> None:
        if self.config.clip_cov_lb >= self.config.clip_cov_ub:
            raise CompositionError(
                f"plugins.clip_cov.clip_cov_lb={self.config.clip_cov_lb} leaves no token below "
                f"clip_cov_ub={self.config.clip_cov_ub}; the lower bound must be the smaller one"
            )

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        if self.config.scope != "batch":
            return
        mask = batch.response_mask
        cov = covariance(batch.advantages, batch.old_log_probs, floating(mask, batch.old_log_probs))
        rng = torch.Generator().manual_seed(int(run.rng("choose").integers(2**63)))
        chosen, found = self._choose(cov, mask, None, rng)
        run.log({"num_candidates": found, "num_selected": len(chosen)})
        batch.put(CHOSEN, torch.zeros_like(mask).flatten().index_fill_(0, chosen, True).view_as(mask))

    @hookimpl
    @torch.no_grad()
    def policy_loss(self, tokens: Tokens) -> Tensor:
        log_ratio = tokens.log_probs - tokens.old_log_probs
        weight, ratio = -tokens.advantages, log_ratio.exp()
        unclipped = weight * ratio  # also its own derivative by the log-prob
        bounded = ratio.clamp_(*_clip_range(tokens.config)).mul_(weight)
        losses, clipped = torch.maximum(unclipped, bounded), bounded > unclipped

        mask = floating(tokens.response_mask, log_ratio)
        cov = covariance(tokens.advantages, tokens.log_probs, mask)
        if self.config.scope == "batch":
            chosen, found = tokens.extra(CHOSEN).to(mask.device).flatten().nonzero()[:, 0], None
        else:
            chosen, found = self._choose(cov, tokens.response_mask, clipped, tokens.rng())
        _log(tokens, mask, log_ratio, cov, clipped, chosen, found)
        losses.view(-1)[chosen] = 0
        gradient = unclipped.masked_fill_(clipped, 0)
        gradient.view(-1)[chosen] = 0
        with torch.enable_grad():
            return Surrogate.apply(tokens.log_probs, losses, gradient)

    def _choose(self, cov: Tensor, mask: Tensor, clipped: Tensor | None, rng: torch.Generator) -> tuple[Tensor, int]:
        """Flat positions of the chosen tokens, and the number of candidates."""
        places = candidates(cov, mask, self.config.clip_cov_lb, self.config.clip_cov_ub, clipped)
        tokens = int(torch.count_nonzero(mask))
        return choose(places, tokens, self.config.clip_cov_ratio, rng), len(places)


def _clip_range(config: Any) -> tuple[float, float]:
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    return 1 - low, 1 + high


def floating(mask: Tensor, like: Tensor) -> Tensor:
    """The bool mask as 0 and 1 of the other's dtype."""
    # Bytes become floats several times as fast as bools do.
    return mask.view(torch.uint8).to(like.dtype)


def _log(
    tokens: Tokens, mask: Tensor, log_ratio: Tensor, cov: Tensor, clipped: Tensor, chosen: Tensor, found: int | None
) -> None:
    count = mask.sum() + 1e-8
    spaced = slice(None, None, cov.numel() // SAMPLE | 1)
    sample = cov.flatten()[spaced][tokens.response_mask.flatten()[spaced]]
    values = {
        "ppo_kl": -(log_ratio * mask).sum() / count,
        "ppo_clipfrac": torch.count_nonzero(clipped & tokens.response_mask) / count,
        "pg_clipfrac": len(chosen) / count,
        "cov_mean": cov.sum() / count,
        "cov_p999": sample.quantile(0.999) if len(sample) else cov.amax(),
        "cov_max": cov.amax(),
    }
    if len(chosen):
        names = ("selected_cov", "selected_advantage", "selected_log_prob")
        fields = (cov, tokens.advantages, tokens.log_probs)
        values |= {name: field.flatten()[chosen].mean() for name, field in zip(names, fields, strict=True)}
    # One transfer from the device for all of them.
    numbers = dict(zip(values, torch.stack([value.double() for value in values.values()]).tolist(), strict=True))
    tokens.log({"cov_max": numbers.pop("cov_max")}, "max")
    tokens.log(numbers)
    if found is not None:
        tokens.log({"num_candidates": found, "num_selected": len(chosen)}, "sum")
        tokens.log({"selected_fraction": len(chosen) / found if found else 0.0})
