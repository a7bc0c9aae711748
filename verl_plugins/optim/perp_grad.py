"""⊥Grad: the optimiser sees gradients without their part along the weights, which only scales what is there.

arXiv:2501.04697, section 5. For every parameter tensor w with gradient g, before the optimiser steps:

    g_o = g - (w . g) / (w . w) w;   g' = g_o |g| / |g_o|

A network that has fitted its data mostly grows its logits along the weights: the loss falls, no prediction changes, and
softmax saturates at last. Taking that part out makes the optimiser change directions.

What differs from GRPO: (1) the gradients; nothing else. No state of its own: moments see projected gradients only.
The authors have no language model and no RL; what it does there is not known (ours: only matrices by default, since a
norm's gain near 1 lies along itself).

Degenerate cases: w = 0 leaves g as it is; g = 0 stays 0; a g that lies along w up to rounding would be rounding noise
blown up to the old norm: below `min_orth_ratio` of it, g_o is not rescaled. Parameters without gradient are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from verl_plugins import CompositionError, Plugin, hookimpl, setting
from verl_plugins.services import Actor

EPSILON = 1e-30
Total = Callable[[Tensor], Tensor]
"""Sums numbers over the ranks that hold parts of the same parameters."""


class Projected(NamedTuple):
    """The new gradients of n tensors, and how they lay."""

    gradients: list[Tensor]
    cosine: Tensor
    """[n] of gradient and weights, before."""
    removed: Tensor
    """[n] share of the gradient's norm that was taken out."""
    guarded: Tensor
    """[n] bool: not rescaled, since next to nothing was left."""


@torch.no_grad()
def project(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    *,
    granularity: str = "per_tensor",
    rescale: bool = True,
    min_orth_ratio: float = 0.0,
    total: Total = lambda sums: sums,
) -> Projected:
    """Gradients without their part along the weights.

    Args:
        weights: n tensors, or this rank's parts of them.
        gradients: of the same shapes.
        granularity: `per_tensor`, or `global`: all tensors are one vector.
        rescale: to the norm that the gradient had.
        min_orth_ratio: with less than this of its norm left, a gradient is not rescaled.
        total: sums over the ranks between which tensors are split.
    """
    pairs = [(w.reshape(-1).to(_wide(w)), g.reshape(-1).to(_wide(g))) for w, g in zip(weights, gradients, strict=True)]
    sums = _joined(total(torch.stack([torch.stack([w @ w, w @ g, g @ g]) for w, g in pairs])), granularity)
    ww, wg, gg = sums.unbind(1)
    along = wg / (ww + EPSILON)
    rest = [g - share * w for (w, g), share in zip(pairs, along, strict=True)]
    left = _joined(total(torch.stack([one @ one for one in rest])[:, None]), granularity)[:, 0].sqrt()
    norm = gg.sqrt()
    guarded = (left < min_orth_ratio * norm) & (norm > 0)
    scale = torch.where(guarded, 1.0, norm / (left + EPSILON)) if rescale else torch.ones_like(norm)
    made = [(one * by).reshape(g.shape).to(g.dtype) for one, by, g in zip(rest, scale, gradients, strict=True)]
    cosine = wg / (ww.sqrt() * norm + EPSILON)
    removed = along.abs() * ww.sqrt() / (norm + EPSILON)
    return Projected(made, cosine, removed, guarded)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _joined(sums: Tensor, granularity: str) -> Tensor:
    """[n,k] sums of each tensor, or those of all in every row."""
    return sums if granularity == "per_tensor" else sums.sum(0, keepdim=True).expand_as(sums)


def over_shards(parameter: Tensor) -> Total:
    """Sums over the ranks between which a parameter is split; of one that is whole everywhere nothing is to be done."""
    placements, mesh = getattr(parameter, "placements", ()), getattr(parameter, "device_mesh", None)
    groups = [mesh.get_group(dim) for dim, placement in enumerate(placements) if placement.is_shard()]

    def total(sums: Tensor) -> Tensor:
        for group in groups:
            torch.distributed.all_reduce(sums, group=group)
        return sums

    return total


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class PerpGrad(Plugin):
    """Projects gradients before the optimiser's step."""

    name = "perp_grad"
    paper = "arXiv:2501.04697"

    @dataclass
    class Config:
        project: bool = setting(True, "change the gradients; if false, only measure", authors=True)
        granularity: str = setting(
            "per_tensor",
            "what is orthogonal: each tensor, or all as one",
            authors="per_tensor",
            choices=("per_tensor", "global"),
        )
        rescale: bool = setting(True, "bring each gradient to the norm it had", authors=True)
        min_ndim: int = setting(
            2, "dimensions from which a tensor is projected; 2 leaves norms and biases", authors=0, ge=0
        )
        min_orth_ratio: float = setting(
            1e-4, "with less of its norm left, a gradient is not rescaled", authors=0.0, ge=0, lt=1
        )

    def check(self, config: DictConfig) -> None:
        actor = config.actor_rollout_ref.actor
        if actor.strategy == "fsdp":
            raise CompositionError(
                "plugins.perp_grad projects whole parameters, and actor_rollout_ref.actor.strategy=fsdp leaves "
                "flat pieces of them on each rank, use_orig_params or not: set it to fsdp2"
            )
        if config.get("model_engine", "dp") == "megatron" or actor.strategy == "megatron":
            raise CompositionError(
                "plugins.perp_grad works with FSDP; Megatron's optimiser keeps its parameters in pieces"
            )

    @hookimpl(wrapper=True)
    def optimizer_step(self, actor: Actor) -> Generator[None, Any, Any]:
        chosen = [*self.chosen(actor.module)]
        if chosen:
            weights, gradients = ([local(tensor).detach() for tensor in part] for part in zip(*chosen, strict=True))
            found = project(
                weights,
                gradients,
                granularity=self.config.granularity,
                rescale=self.config.rescale,
                min_orth_ratio=self.config.min_orth_ratio,
                total=over_shards(chosen[0][0]),
            )
            if self.config.project:
                for gradient, made in zip(gradients, found.gradients, strict=True):
                    gradient.copy_(made)
            actor.log(
                {
                    "cos_w_g_mean": float(found.cosine.mean()),
                    "cos_w_g_max_abs": float(found.cosine.abs().max()),
                    "removed_norm_share": float(found.removed.mean()),
                    "guarded_tensors": float(found.guarded.sum()),
                }
            )
        return (yield)

    def chosen(self, module: torch.nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Parameters with their gradients."""
        for parameter in module.parameters():
            if parameter.grad is not None and parameter.ndim >= self.config.min_ndim:
                yield parameter, parameter.grad
