"""STEER: estimate how far each token's update moves the entropy, and weigh down the tokens that move it most.

arXiv:2510.10150, on top of any policy loss. With p and q the token's probability under the policy being trained and
under the old one, H the old policy's entropy there (first order, one sample, softmax):

    Omega = (A / q) p (1 - p) (log p + H)        Omega > 0: the update lowers the entropy, < 0: raises it
    exp:    weight = token_weight_min ^ (|Omega| / max(M, floor))                     in [token_weight_min, 1]
    linear: weight falls from token_weight_max at m to token_weight_min at M
    loss    = weight times the policy loss of the run;   M, m = max, min of |Omega| over the loss call's tokens

Against GRPO's loss: that factor, without gradient. Weights are not renormalised, so their mean scales the step. This
follows the authors' code; the paper's Omega has PPO's clip indicator too, and no floor.

Degenerate cases. No advantage, no weighing: 1 (exp) or the middle (linear, wherever M = m). Omega that is not finite
counts as 0. One token of tiny q makes M an outlier and switches the method off in its micro-batch: watch
`abs_omega_max`. An empty mask gives loss 0. M and m depend on the split into micro-batches, as in the authors' code;
`scope: batch` takes them once per step from the old policy (p = q) and does not.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from verl_plugins import Batch, CompositionError, Plugin, Run, Tokens, hookimpl, setting

SMALLEST = 1e-8
"""Probabilities are kept this far from 0, and p from 1."""
LOW_WEIGHT = 0.9
SAMPLE = 8192
"""Tokens, evenly spaced, that `abs_omega_p99` is estimated from: sorting all would cost more than the loss."""
MOST, LEAST = "steer_most", "steer_least"
"""Fields with M and m of the whole batch (`scope: batch`)."""


def entropy_change(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, entropy: Tensor) -> Tensor:
    """Omega, [rows,T] like its arguments; 0 where it is not finite."""
    log_p = log_probs.clamp(math.log(SMALLEST), math.log1p(-SMALLEST))
    omega = (log_p - old_log_probs.clamp(math.log(SMALLEST), 0)).exp_().mul_(advantages)
    omega.mul_(torch.expm1(log_p).neg_()).mul_(log_p.add_(entropy))
    return omega.nan_to_num_(0, 0, 0)


def extremes(size: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """M and m of |Omega| [rows,T], 0 outside the mask (0/1, floating); both 0 for an empty mask."""
    most = size.amax()
    return most, (size + (1 - mask) * most).amin()


class Steer(Plugin):
    """Multiplies the policy loss of the run by a weight that is small where a token would move the entropy far."""

    name = "steer"
    paper = "arXiv:2510.10150"
    needs = frozenset({"entropy"})

    @dataclass
    class Config:
        map: str = setting("exp", "from |Omega| to the weight", authors="exp", choices=("exp", "linear"))
        token_weight_min: float = setting(0.8, "weight of the token of largest |Omega|", authors=0.8, gt=0, le=1)
        token_weight_max: float = setting(
            1.2, "weight of the token of smallest |Omega| (linear; exp has 1)", authors=1.2, ge=1
        )
        floor: float = setting(0.02, "smallest scale of |Omega| (exp); 0 is the paper's form", authors=0.02, ge=0)
        scope: str = setting(
            "micro_batch", "M and m of every loss call, or of the train batch", choices=("micro_batch", "batch")
        )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._entropy: float | None = None

    def check(self, config: DictConfig) -> None:
        if self.config.map == "linear" and self.config.token_weight_min == self.config.token_weight_max:
            raise CompositionError(
                "plugins.steer.token_weight_min and token_weight_max are both "
                f"{self.config.token_weight_max}, which gives every token the same weight; set a smaller minimum"
            )

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        if self.config.scope != "batch":
            return
        mask = batch.response_mask.view(torch.uint8).to(batch.old_log_probs.dtype)
        omega = entropy_change(batch.old_log_probs, batch.old_log_probs, batch.advantages, batch.entropy)
        for name, value in zip((MOST, LEAST), extremes(omega.abs_().mul_(mask), mask), strict=True):
            batch.put(name, value.expand(len(batch)).clone())

    @hookimpl(wrapper=True)
    def policy_loss(self, tokens: Tokens) -> Generator[None, Tensor, Tensor]:
        losses = yield
        return losses * self.weights(tokens)

    @torch.no_grad()
    def weights(self, tokens: Tokens) -> Tensor:
        """[rows,T], 0 outside the mask."""
        mask = tokens.response_mask.view(torch.uint8).to(tokens.log_probs.dtype)
        entropy = tokens.extra("entropy")
        omega = entropy_change(tokens.log_probs, tokens.old_log_probs, tokens.advantages, entropy).mul_(mask)
        size = omega.abs()
        if self.config.scope == "batch":
            # The largest, because the rows that verl adds as padding have 0.
            scale = tuple(tokens.extra(name).max() for name in (MOST, LEAST))
        else:
            scale = extremes(size, mask)
        weights = self.of_size(size, *scale).mul_(mask)
        self._log(tokens, omega, size, weights, mask, self.of_size(size.amax(), *scale))
        return weights

    def of_size(self, size: Tensor, most: Tensor, least: Tensor) -> Tensor:
        """The weight of any |Omega|, given M and m."""
        low, high = self.config.token_weight_min, self.config.token_weight_max
        if self.config.map == "exp":
            scale = most.clamp(min=max(self.config.floor, torch.finfo(size.dtype).tiny))
            return (size * (math.log(low) / scale)).exp_().clamp_(min=low)
        span = most - least
        slope = torch.where(span > 0, (high - low) / span, 0.0)
        top = torch.where(span > 0, high, (low + high) / 2).to(size.dtype)
        return (top - (size - least) * slope).clamp_(low, high)

    def _log(self, tokens: Tokens, omega: Tensor, size: Tensor, weights: Tensor, mask: Tensor, lowest: Tensor) -> None:
        spaced = slice(None, None, size.numel() // SAMPLE | 1)
        sample = size.flatten()[spaced][tokens.response_mask.flatten()[spaced]]
        values = {
            "count": mask.sum(),
            "token_weight_mean": weights.sum(),
            "low_weight_share": torch.count_nonzero(weights < LOW_WEIGHT) - (mask.numel() - mask.sum()),
            "abs_omega_mean": size.sum(),
            "positive_share": torch.count_nonzero(omega > 0),
            "predicted_entropy_change": -torch.dot(omega.flatten(), weights.flatten()),
            "token_weight_min": lowest,
            "token_weight_max": weights.amax(),
            "abs_omega_max": size.amax(),
            "abs_omega_p99": sample.quantile(0.99) if len(sample) else size.amax(),
        }
        # One transfer from the device for all of them.
        found = dict(zip(values, torch.stack([value.double() for value in values.values()]).tolist(), strict=True))
        count = found.pop("count")
        if not count:
            return
        tokens.log({"token_weight_min": found.pop("token_weight_min")}, "min")
        tokens.log({name: found.pop(name) for name in ("token_weight_max", "abs_omega_max")}, "max")
        p99 = found.pop("abs_omega_p99")
        tokens.log({name: value / count for name, value in found.items()} | {"abs_omega_p99": p99})

    @hookimpl
    def on_step_end(self, run: Run, metrics: Mapping[str, Any]) -> None:
        entropy = float(metrics["actor/entropy"])
        if self._entropy is not None:
            run.log({"entropy_change": entropy - self._entropy})
        self._entropy = entropy

    def state_dict(self) -> dict[str, Any]:
        return {"entropy": self._entropy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._entropy = state["entropy"]
