"""What a stage does when no plugin answers it: verl's own behaviour, as the last implementation of each stage.

Wrappers then work on top of verl's estimators and loss as well.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from verl_plugins.distilled import Distilled, forward_kl, of_teacher
from verl_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from verl_plugins.batch import Batch
    from verl_plugins.services import Actor, Rollout
    from verl_plugins.tokens import Tokens
    from verl_plugins.values import Values


class DriverDefaults:
    """verl's estimator, handed over by the trainer before each call."""

    def __init__(self) -> None:
        self.estimator: Callable[[], Tensor] | None = None

    @hookimpl(trylast=True)
    def estimate_advantage(self, batch: Batch) -> Tensor:
        return self.estimator()


class WorkerDefaults:
    """A group generated as verl does, for wrappers of `rollout_group`."""

    @hookimpl(trylast=True)
    async def rollout_group(self, sample: Callable[..., Awaitable[list[Rollout]]]) -> list[Rollout]:
        return await sample()


class LogitsDefaults:
    """Logits as the model gives them, for wrappers of `shape_logits`."""

    @hookimpl(trylast=True)
    def shape_logits(self, logits: Tensor) -> Tensor:
        return logits


class ActorDefaults:
    """verl's `vanilla` loss per token, its forward KL from a teacher, and the engine's optimiser step."""

    def __init__(self, optimizer_step: Callable[[], float]) -> None:
        self._optimizer_step = optimizer_step

    @hookimpl(trylast=True)
    def distillation_loss(self, distilled: Distilled) -> Tensor:
        log_probs = of_teacher(distilled.logits(), distilled.teacher_ids)
        return forward_kl(log_probs, distilled.teacher_log_probs, distilled.config.log_prob_min_clamp)

    @hookimpl(trylast=True)
    def policy_loss(self, tokens: Tokens) -> Tensor:
        return clipped_loss(tokens)

    @hookimpl(trylast=True)
    def optimizer_step(self, actor: Actor) -> float:
        return self._optimizer_step()


class CriticDefaults:
    """verl's clipped loss of values, summed over the heads."""

    @hookimpl(trylast=True)
    def value_loss(self, values: Values) -> Tensor:
        return clipped_value_losses(values)[0].sum(-1)


def clipped_value_losses(values: Values) -> tuple[Tensor, Tensor]:
    """[rows,T,N] PPO's clipped loss of each head, as verl's before aggregation, and whether it is the clipped one."""
    predicted, old, returns = values.values, values.old_values, values.returns[..., None]
    reach = values.config.cliprange_value
    near = torch.max(torch.min(predicted, old + reach), old - reach)
    plain, clipped = (predicted - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.max(plain, clipped), (clipped > plain).detach()


LOG_RATIO_LIMIT = 20.0
"""verl clamps the log of pi / pi_old to this range, outside of which there is no gradient."""


DEFAULT_LOSS = "policy_loss"
"""Whose metrics those of `clipped_loss` are."""


class RatioLoss(torch.autograd.Function):
    """Losses whose gradient by the log-probs is `weight` times pi / pi_old: no graph of [rows,T] buffers is kept."""

    @staticmethod
    def forward(ctx, log_probs: Tensor, losses: Tensor, weight: Tensor, ratio: Tensor) -> Tensor:
        ctx.save_for_backward(weight, ratio)
        return losses

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        weight, ratio = ctx.saved_tensors
        return (upstream * weight).mul_(ratio), None, None, None  # in this order, verl's to the last bit


@torch.no_grad()
def clipped_loss(tokens: Tokens) -> Tensor:
    """[rows,T] PPO's dual-clipped loss per token, as verl's `vanilla` before aggregation."""
    config, weight = tokens.config, -tokens.advantages
    low, high = _clip_range(config)
    log_ratio = (tokens.log_probs - tokens.old_log_probs).clamp_(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = log_ratio.exp()
    plain = weight * ratio
    losses = torch.maximum(plain, ratio.clamp(1 - low, 1 + high).mul_(weight))
    # Where the advantage is not negative the loss is not positive, and a bound of 0 does nothing.
    losses = torch.minimum(losses, torch.relu(weight).mul_(config.get("clip_ratio_c", 3.0)))

    # In floating point throughout: on the CPU operations on bools take several times as long.
    changed = (losses - plain).sign_()  # 1 where clipped, -1 where the dual clip holds
    weight = weight.mul_(1 - changed.abs())
    mask = tokens.response_mask.view(torch.uint8).to(log_ratio.dtype)
    changed, distance, count = changed.mul_(mask), log_ratio.abs().amax(), mask.sum().clamp(min=1)
    up, both, kl = changed.sum(), changed.abs_().sum(), -(log_ratio * mask).sum()
    # One transfer from the device for all of them.
    up, both, kl, distance = torch.stack([up / count, both / count, kl / count, distance]).tolist()
    tokens.scoped(DEFAULT_LOSS).log({"clip_fraction": (both + up) / 2, "dual_clip_fraction": (both - up) / 2, "kl": kl})
    if distance >= LOG_RATIO_LIMIT:
        weight *= log_ratio.abs() < LOG_RATIO_LIMIT
    with torch.enable_grad():
        return RatioLoss.apply(tokens.log_probs, losses, weight, ratio)


@torch.no_grad()
def clip_metrics(tokens: Tokens) -> dict[str, float]:
    """What `clipped_loss` would log of these tokens: where another loss is in its place, how far the policy is."""
    config, mask, advantages = tokens.config, tokens.response_mask, tokens.advantages
    low, high = _clip_range(config)
    log_ratio = (tokens.log_probs - tokens.old_log_probs).clamp_(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio, count = log_ratio.exp(), mask.sum().clamp(min=1)
    beyond = torch.where(advantages > 0, ratio > 1 + high, (ratio < 1 - low) & (advantages < 0))
    dual = (advantages < 0) & (ratio.clamp(min=1 - low) > config.get("clip_ratio_c", 3.0))
    shares = [(beyond & mask).sum(), (dual & mask).sum(), -(log_ratio * mask).sum()]
    clipped, dual, kl = (torch.stack([share.double() for share in shares]) / count).tolist()
    return {"clip_fraction": clipped, "dual_clip_fraction": dual, "kl": kl}


def _clip_range(config: Any) -> tuple[float, float]:
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    return low, high
