"""StableMax: a softmax that cannot saturate, since its weights grow linearly with the logits and not exponentially.

arXiv:2501.04697. With s(z) = z + 1 for z >= 0 and 1 / (1 - z) below, p_k = s(z_k) / sum_j s(z_j). Since
log s(z) = sign(z) log(1 + |z|), which is symlog(z), this is the softmax of symlog(z): logits are shaped, and log-probs,
entropy, KL and the sampled tokens follow. The order is z -> symlog(z) -> / temperature -> log-softmax on every side.

With softmax, logits that keep growing make the largest absorb all others: the log-prob is exactly 0, and so is the
gradient. `saturation` counts such tokens under any policy.

What differs from GRPO: (1) the policy's distribution, everywhere it is evaluated; nothing in the loss or the advantage.
(ours: all use in RL, the guard, the temperature; the authors train small classifiers from scratch, in float64.)

Degenerate cases: a vocabulary of one token has probability 1; a logit of -inf, a banned token, is given probability 0
by a finite number, so that entropies stay finite. Not invariant to a constant added to all logits, as softmax is.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from verl_plugins import Batch, CompositionError, Plugin, Run, hookimpl, setting
from verl_plugins.services import Actor

BANNED = -1e4
"""Where symlog(-inf) ends: no finite number has one below -710, and exp of it is 0."""


class Symlog(torch.autograd.Function):
    """With the derivative 1 / (1 + |z|), which is 1 at 0: that of sign and |z| would be 0 there."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.abs().log1p_().copysign_(logits)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return upstream / (1 + logits.abs())


def symlog(logits: Tensor) -> Tensor:
    """sign(z) log(1 + |z|), of any shape, and `BANNED` of -inf."""
    return Symlog.apply(logits).clamp(min=BANNED)


class StableMax(Plugin):
    """Shapes logits by symlog."""

    name = "stablemax"
    paper = "arXiv:2501.04697"

    @dataclass
    class Config:
        allow_pretrained: bool = setting(False, "shape the logits of a model that somebody else has trained")
        dtype: str = setting(
            "float32", "what symlog is computed in, at least", authors="float64", choices=("float32", "float64")
        )

    def check(self, config: DictConfig) -> None:
        model = config.actor_rollout_ref.model
        from_scratch = config.get("cpu") is not None and OmegaConf.is_missing(model, "path")
        if not (from_scratch or self.config.allow_pretrained):
            named = "the preset's model" if OmegaConf.is_missing(model, "path") else model.path
            raise CompositionError(
                f"plugins.stablemax would leave next to nothing of what {named} has learnt with softmax "
                "(actor_rollout_ref.model.path): train on the preset cpu, whose model is made from scratch with it, or "
                "set plugins.stablemax.allow_pretrained=true for weights that are random or were trained with StableMax"
            )

    @hookimpl
    def shape_logits(self, logits: Tensor) -> Tensor:
        return symlog(logits.to(torch.promote_types(logits.dtype, getattr(torch, self.config.dtype))))


class Saturation(Plugin):
    """Counts response tokens whose log-prob is exactly 0: no gradient comes from them."""

    name = "saturation"
    paper = "arXiv:2501.04697"
    needs = frozenset({"old_log_probs"})

    @dataclass
    class Config:
        probe_tokens: int = setting(512, "response tokens of a step whose logits are looked at; 0: none", ge=0)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.probe_tokens:
            self.needs = self.needs | {"logits"}

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        if batch.response_mask.any():
            run.log({"sc_token_share": float((batch.old_log_probs[batch.response_mask] == 0).double().mean())})

    @hookimpl(wrapper=True)
    def optimizer_step(self, actor: Actor) -> Generator[None, Any, Any]:
        if self.config.probe_tokens and actor.mini_batch == 0:
            sizes = actor.logits(self.config.probe_tokens).abs()
            largest, mean = actor.gather(sizes.amax(-1)), actor.gather(sizes.mean(-1))
            if len(largest):
                actor.log({"logit_abs_max": float(largest.max()), "logit_abs_mean": float(mean.mean())})
        return (yield)
