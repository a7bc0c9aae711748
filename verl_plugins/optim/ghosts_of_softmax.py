"""Ghosts of softmax: no step of the optimiser goes further than the Taylor model of log-softmax reaches.

arXiv:2603.13552. Off the real axis the partition function has zeros, and they bound how far along an update log-softmax
is what its derivatives say (Definition 4.7). With p the change the optimiser made, of all parameters, and a = J_z p its
effect on the logits z of a token, to first order (Definition 5.1, Proposition 5.2):

    r = max over tokens of (max_k a_k - min_k a_k) / pi;   s = min(1, target_r / r);   theta <- theta + s p

top2 is the less careful radius of the two likeliest tokens (Equation 13): r = max of |a_1 - a_2| / sqrt(delta^2 + pi^2)
with delta = z_1 - z_2. The derivative is a finite difference: logits at theta and at theta + kappa p.

What differs from GRPO: (1) how long the optimiser's step is; its direction and the moments are as they were, as if the
full step had been made; no state of its own. (ours: tokens of the responses as samples, logits over the sampling
temperature, kappa relative to the weights, the quantile; the author has no language model.)

Degenerate cases: no response token, or no effect on logits, never caps; a step that was left out, of length 0, is not
probed; a constant added to all logits of a token has no effect; where r is no number the step is taken back (s = 0).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from verl_plugins import CompositionError, Plugin, hookimpl, setting
from verl_plugins.optim.perp_grad import over_shards
from verl_plugins.services import Actor

FLOOR = 1e-12
"""Of the spread of logits along the unit step; below this length a step is none."""


def spread(change: Tensor) -> Tensor:
    """[...,V] change of a token's logits -> [...] distance between the largest and the smallest."""
    return change.amax(-1) - change.amin(-1)


def top2(logits: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """[...,V] logits and their change -> [...] margin of the two largest, and |difference| of their changes."""
    values, places = logits.topk(2)
    changes = change.gather(-1, places)
    return values[..., 0] - values[..., 1], (changes[..., 0] - changes[..., 1]).abs()


def inverse_radius(delta: Tensor, margin: Tensor | float = 0.0, quantile: float = 1.0, floor: float = FLOOR) -> float:
    """One over the distance that log-softmax reaches along a unit step.

    Args:
        delta: [n] `spread` of the logits' derivative along it, or for the two largest the difference of theirs.
        margin: [n] of the two largest logits; 0 where all are looked at.
        quantile: over the n tokens; 1 is the maximum.
        floor: the least delta, also where there are no tokens.
    """
    if not len(delta):
        return floor / math.pi
    bound = torch.as_tensor(margin, dtype=delta.dtype, device=delta.device).square().add(math.pi**2).sqrt()
    return float(torch.quantile(delta.clamp(min=floor) / bound, quantile))


def scale(ratio: float, target: float = 1.0) -> float:
    """What a step that has `ratio` is multiplied by; 0 where it is no number."""
    if not math.isfinite(ratio):
        return 0.0
    return 1.0 if ratio <= target else target / ratio


class GhostsOfSoftmax(Plugin):
    """Caps the optimiser's step."""

    name = "ghosts_of_softmax"
    paper = "arXiv:2603.13552"
    needs = frozenset({"logits"})

    @dataclass
    class Config:
        mode: str = setting("cap", "shorten steps, or only measure them", authors="cap", choices=("cap", "diagnose"))
        target_r: float = setting(1.0, "how far a step may go, in radii", authors=1.0, gt=0)
        radius: str = setting(
            "output", "of all logits, or of the two largest", authors="output", choices=("output", "top2")
        )
        quantile: float = setting(1.0, "over tokens; 1: their maximum", authors=1.0, gt=0, le=1)
        probe_tokens: int = setting(512, "response tokens of a mini-batch that are looked at", authors=256, ge=1)
        displacement: float = setting(1e-2, "length of the probe's step over that of the weights", gt=0)
        every: int = setting(1, "steps from one probe to the next; those between are not capped", authors=1, ge=1)

    def check(self, config: DictConfig) -> None:
        actor = config.actor_rollout_ref.actor
        if actor.strategy != "fsdp2":
            raise CompositionError(
                "plugins.ghosts_of_softmax takes the length of a step over all parts of the parameters, which only "
                f"actor_rollout_ref.actor.strategy=fsdp2 names, and it is {actor.strategy}: set it to fsdp2"
            )
        mixed = actor.fsdp_config.get("mixed_precision") or {}
        if mixed.get("param_dtype") in ("fp16", "float16"):
            raise CompositionError(
                "plugins.ghosts_of_softmax does not know the steps that verl's loss scaling leaves out: set "
                "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype to bf16 or fp32"
            )

    @hookimpl(wrapper=True)
    def optimizer_step(self, actor: Actor) -> Generator[None, Any, Any]:
        if (actor.step - 1) % self.config.every:
            return (yield)
        before = [parameter.clone() for parameter in actor.parameters()]
        norm = yield
        self._look(actor, before)
        return norm

    @torch.no_grad()
    def _look(self, actor: Actor, before: list[Tensor]) -> None:
        """Measure the step from `before` to the parameters as they are, and shorten it if need be."""
        after = actor.parameters()
        norms = torch.stack([torch.stack([_norm(b - a), _norm(a)]) for b, a in zip(after, before, strict=True)])
        total = over_shards(next(part for part in actor.module.parameters() if part.requires_grad))
        length, size = total(norms.square().sum(0)).sqrt().tolist()
        ratio, metrics = 0.0, {}
        if not math.isfinite(length):
            ratio = math.nan
        elif length >= FLOOR:
            ratio, metrics = self._measured(actor, before, length, self.config.displacement * size or length)
        by = scale(ratio, self.config.target_r)
        capped = self.config.mode == "cap" and by < 1
        if capped:
            for b, a in zip(after, before, strict=True):
                b.copy_(a + by * (b - a) if by else a)
        actor.log({"scale": by, "capped": float(capped)})
        if not math.isfinite(ratio):
            logging.getLogger(__name__).warning("step %d: the update's effect on logits is no number", actor.step)
            return
        applied = ratio * by if capped else ratio
        actor.log(metrics | {"r_proposed": ratio, "r_applied": applied, "update_norm": length})

    def _measured(
        self, actor: Actor, before: list[Tensor], length: float, distance: float
    ) -> tuple[float, dict[str, float]]:
        """r of a step of this length, from logits where it began and at a distance along it, and what r is made of."""
        tokens, share = self.config.probe_tokens, distance / length
        here, again = actor.logits(tokens, at=before), actor.logits(tokens, at=before)
        there = actor.logits(tokens, at=(a + share * (b - a) for b, a in zip(actor.parameters(), before, strict=True)))
        change = (there - here) / distance
        spreads, margin = actor.gather(spread(change)), 0.0
        delta = spreads
        if self.config.radius == "top2":
            margin, delta = map(actor.gather, top2(here, change))
        inverse = inverse_radius(delta, margin, self.config.quantile)
        noise = inverse_radius(actor.gather(spread((again - here) / distance)), floor=0.0)
        metrics = {"rho_a": 1 / inverse, "probe_noise": length * noise}
        if len(spreads):
            metrics |= {"delta_a": float(spreads.max()), "delta_a_p99": float(torch.quantile(spreads, 0.99))}
        return length * inverse, metrics


def _norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.promote_types(values.dtype, torch.float32))
