"""What a stage does when no plugin answers it: verl's own behaviour, as the last implementation of each stage.

Wrappers then work on top of verl's estimators and loss as well.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from verl_plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from verl_plugins.batch import Batch, Tokens
    from verl_plugins.services import Actor, Rollout


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


class ActorDefaults:
    """verl's `vanilla` loss per token, and the engine's optimiser step."""

    def __init__(self, optimizer_step: Callable[[], float]) -> None:
        self._optimizer_step = optimizer_step

    @hookimpl(trylast=True)
    def policy_loss(self, tokens: Tokens) -> Tensor:
        return clipped_loss(tokens)

    @hookimpl(trylast=True)
    def optimizer_step(self, actor: Actor) -> float:
        return self._optimizer_step()


def clipped_loss(tokens: Tokens) -> Tensor:
    """[rows,T] PPO's dual-clipped loss per token, as verl's `vanilla` before aggregation."""
    config, advantages = tokens.config, tokens.advantages
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    bound = config.get("clip_ratio_c", 3.0)
    log_ratio = (tokens.log_probs - tokens.old_log_probs).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    loss = torch.maximum(plain, clipped)
    dual = torch.minimum(-advantages * bound, loss)
    with torch.no_grad():
        count = tokens.response_mask.sum().clamp(min=1)
        share = lambda flags: float((flags & tokens.response_mask).sum() / count)  # noqa: E731
        tokens.scoped("policy_loss").log(
            {
                "clip_fraction": share(clipped > plain),
                "dual_clip_fraction": share((loss > -advantages * bound) & (advantages < 0)),
                "kl": float((-log_ratio * tokens.response_mask).sum() / count),
            }
        )
    return torch.where(advantages < 0, dual, loss)
