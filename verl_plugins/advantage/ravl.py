"""RAVL: an ensemble of values that is pessimistic where an episode was cut off and goes on untrained.

Sims, Lu, Foerster, Teh, "The Edge-of-Reach Problem in Offline Model-Based RL", NeurIPS 2024, arXiv 2402.12527, code
anyasims/edge-of-reach. The paper's: rollouts of a model are cut after k steps, and the value of the state behind the
last step, which occurs only as a next state, is never trained; bootstrapped from, it grows without bound, even with
exact dynamics. N critics disagree there, and the smallest of them is taken:

    y = r + gamma (1 - d) (min_k Q_k(s', a') - alpha log pi(a'|s')),    loss = sum_k mean (Q_k - y)^2 + eta D
    D = 1 / (N - 1) sum_{i != j} cos(grad_a Q_i, grad_a Q_j)

Ours: the same for a language model's critic, whose unreached state is the one behind the last token of a response that
its budget cut off. The heads are linear in one hidden state h, so that grad_h V_k is the head's weight w_k.

What differs from PPO with verl's GAE:

1. The critic has N heads. Each learns to predict the same returns, with verl's clipping, and their losses are added.
2. The value that GAE subtracts, bootstraps from and adds to its returns is the smallest of the heads.
3. Behind the last token of a truncated row GAE goes on with the smallest value there, in the place of 0.
4. eta D of the heads' weights is added to the critic's loss.

Degenerate: with one head D and the spread do not exist, and without a truncated row everything is verl's to the last
bit. A row without generated tokens has no part in anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from verl_plugins.errors import CompositionError
from verl_plugins.hookspecs import hookimpl
from verl_plugins.plugin import Plugin, setting

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from verl_plugins.batch import Batch
    from verl_plugins.services import Run
    from verl_plugins.values import Values

TINY = 1e-10
"""Added to the length of a gradient before it is divided by, as in the authors' code."""
PER_TOKEN = ("token-mean", "seq-mean-token-mean")
"""Ways of aggregating a loss under which what is added to every token is added to the loss."""


def aggregate(members: Tensor, how: str = "min") -> Tensor:
    """Values of the members [..., N] -> [...]: the smallest (the paper's min_k), or the mean."""
    return members.amin(-1) if how == "min" else members.mean(-1)


def spread(members: Tensor, where: Tensor) -> Tensor | None:
    """Mean over `where` [...] of the members' standard deviation, [..., N]; None with one member, or nowhere to look.

    The authors' mark of the edge of reach: it is larger there than inside.
    """
    return members[where].std(-1).mean() if members.shape[-1] > 1 and bool(where.any()) else None


def diversity(gradients: Tensor) -> Tensor:
    """D [...] of the members' gradients [..., N, D]: N times the mean cosine of a member to another; N at least 2."""
    directions = gradients / (gradients.norm(dim=-1, keepdim=True) + TINY)
    cosines = directions @ directions.transpose(-1, -2)
    count = gradients.shape[-2]
    return (cosines.sum((-1, -2)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)) / (count - 1)


class Ravl(Plugin):
    """Wraps verl's GAE and the critic's loss."""

    name = "ravl"
    paper = "arXiv:2402.12527"
    needs = frozenset({"values"})

    @dataclass
    class Config:
        members: int = setting(5, "heads of the value model (N)", authors=10, ge=1, le=1000)
        eta: float = setting(1.0, "weight of the heads' diversity in the critic's loss", authors=1.0, ge=0)
        bootstrap: str = setting(
            "truncated_only",
            "after which rows GAE goes on: truncated ones, or none",
            authors="truncated_only",
            choices=("truncated_only", "none"),
        )
        aggregate: str = setting(
            "min", "the value behind a truncated row, of all heads", authors="min", choices=("min", "mean")
        )
        baseline: str = setting("min", "the value inside of rows, of all heads", authors="min", choices=("min", "mean"))

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.value_heads = config.members

    def check(self, config: DictConfig) -> None:
        if (estimator := config.algorithm.adv_estimator) != "gae":
            raise CompositionError(
                f"plugins.ravl changes the values that GAE takes, and algorithm.adv_estimator={estimator} takes none: "
                "set algorithm.adv_estimator=gae"
            )
        mode = config.critic.loss_agg_mode
        if self.config.members > 1 and self.config.eta > 0 and mode not in PER_TOKEN:
            raise CompositionError(
                f"plugins.ravl.eta={self.config.eta} weighs a term of the whole loss, and critic.loss_agg_mode={mode} "
                "would multiply it by a length: set critic.loss_agg_mode=token-mean, or plugins.ravl.eta=0"
            )

    @hookimpl(wrapper=True)
    def estimate_advantage(self, run: Run, batch: Batch) -> Iterator[None]:
        cut = batch.truncated & batch.response_mask.any(1)
        behind = aggregate(batch.bootstrap_values, self.config.aggregate)
        follows = cut if self.config.bootstrap == "truncated_only" else torch.zeros_like(cut)
        batch.values = aggregate(batch.head_values, self.config.baseline)
        batch.bootstrap = torch.where(follows, behind, 0.0)
        run.log({"truncated_frac": float(cut.float().mean())})
        if (inside := spread(batch.head_values, batch.response_mask)) is not None:
            run.log({"ensemble_std_interior": float(inside)})
        if (at_the_edge := spread(batch.bootstrap_values, cut)) is not None:
            run.log({"ensemble_std_boundary": float(at_the_edge)})
        if bool(follows.any()):
            run.log({"bootstrap_mean": float(behind[follows].mean())})
        return (yield)

    @hookimpl(wrapper=True)
    def value_loss(self, values: Values) -> Iterator[None]:
        loss = yield
        if values.head_weight is None:
            return loss
        term = diversity(values.head_weight)
        if bool(values.response_mask.any()):
            values.log({"diversity": float(term.detach())})
        return loss + self.config.eta * term
