"""Gradient coupling: do the roles that share a policy pull it in the same direction? It only measures.

arXiv:2601.05509 explains broken cooperation by updates of one player that overwrite what another has learnt. The
measure is ours. Every `every` steps, before the first optimiser step, the gradient of the actor's loss is computed once
more for each role alone, g_r of roles r = 1 … R in this mini-batch. They add up to the gradient that is applied:

    mean_cosine        mean over r < s of cos(g_r, g_s)
    conflict_fraction  share of the pairs with cos(g_r, g_s) < 0
    coherence          |sum_r g_r| / sum_r |g_r|: 1 if all pull together, near 0 if they cancel each other

What differs from GRPO: nothing, gradients and weights stay as they are.

Degenerate cases: a gradient that is 0 has the cosine 0 with every other; with less than two roles in the mini-batch
there is nothing to compare and no metric, with gradients that are all 0 no coherence.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from verl_plugins import Actor, Batch, CompositionError, DataError, Groups, Plugin, Run, hookimpl, setting
from verl_plugins.optim.perp_grad import over_shards

FIELD = "role_number"
"""Of each row: the number of its role, from 1."""
MOST_ROLES = 16
BLOCK, ADAPTER = re.compile(r"\.(\d+)\."), "lora_"
"""In names of parameters: the number of a block, and what those of LoRA have."""


class Coupling(NamedTuple):
    """How R gradients lie."""

    cosine: Tensor
    """[R,R], 0 where one is 0."""
    mean_cosine: float | None
    conflict_fraction: float | None
    coherence: float | None


def products(gradients: Sequence[Tensor]) -> Tensor:
    """R gradients of one shape -> [R,R] float64 of their products."""
    flat = torch.stack([gradient.reshape(-1).double() for gradient in gradients])
    return flat @ flat.T


def coupling(gram: Tensor) -> Coupling:
    """[R,R] products of gradients -> how they lie; None of what R gradients do not tell."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    scale = norms[:, None] * norms
    cosine = torch.where(scale > 0, gram / scale.clamp(min=torch.finfo(gram.dtype).tiny), 0.0).clamp(-1, 1)
    pairs = cosine[tuple(torch.triu_indices(len(gram), len(gram), 1))]
    total = float(norms.sum())
    coherence = float(gram.sum().clamp(min=0).sqrt()) / total if total > 0 else None
    if not len(pairs):
        return Coupling(cosine, None, None, coherence)
    return Coupling(cosine, float(pairs.mean()), float((pairs < 0).double().mean()), coherence)


class GradientCoupling(Plugin):
    """Compares the gradients of roles."""

    name = "gradient_coupling"
    paper = "arXiv:2601.05509"

    @dataclass
    class Config:
        role: str = setting("role", "column that names the role of a row")
        every: int = setting(50, "steps from one measurement to the next; the first is in step 1", ge=1)
        parameters: str = setting(
            "auto",
            "what is compared: LoRA's parameters if there are any, else the last block; the last block; or all",
            choices=("auto", "last_block", "all"),
        )

    def check(self, config: DictConfig) -> None:
        if (strategy := config.actor_rollout_ref.actor.strategy) != "fsdp2":
            raise CompositionError(
                "plugins.gradient_coupling makes passes of its own through verl's FSDP2 engine, and "
                f"actor_rollout_ref.actor.strategy is {strategy!r}: set it to fsdp2"
            )

    def due(self, step: int) -> bool:
        """Whether the step is measured."""
        return (step - 1) % self.config.every == 0

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        if self.due(run.step):
            names = batch.labels(self.config.role)
            if len(roles := sorted(set(names))) > MOST_ROLES:
                raise DataError(
                    f"plugins.gradient_coupling.role={self.config.role}: the step has {len(roles)} of them, and each "
                    f"costs a pass of its own; choose a column with at most {MOST_ROLES}"
                )
            batch.put(FIELD, Groups(roles + names).index[len(roles) :].float() + 1)

    @hookimpl(wrapper=True)
    def optimizer_step(self, actor: Actor) -> Generator[None, Any, Any]:
        if self.due(actor.step) and actor.mini_batch == 0:
            self.measure(actor)
        return (yield)

    def measure(self, actor: Actor) -> None:
        """Log how the roles' gradients lie."""
        chosen = self.chosen(dict(actor.module.named_parameters()))
        parts = actor.gradients(FIELD, list(chosen.values()))
        actor.log({"roles": len(parts)})
        if len(parts) < 2:
            return
        pieces = zip(chosen.values(), *parts.values(), strict=True)
        found = coupling(sum(over_shards(parameter)(products(of)) for parameter, *of in pieces))
        actor.log({"mean_cosine": found.mean_cosine, "conflict_fraction": found.conflict_fraction})
        if found.coherence is not None:
            actor.log({"coherence": found.coherence})

    def chosen(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of the parameters that are trained, those whose gradients are compared; all where no block has a number."""
        trained = {name: one for name, one in parameters.items() if one.requires_grad}
        adapters = {name: one for name, one in trained.items() if ADAPTER in name}
        if self.config.parameters == "all" or (self.config.parameters == "auto" and adapters):
            return adapters if self.config.parameters == "auto" else trained
        block = {name: int(found[1]) for name in trained if (found := BLOCK.search(name))}
        last = {name: trained[name] for name, number in block.items() if number == max(block.values())}
        return last or trained
