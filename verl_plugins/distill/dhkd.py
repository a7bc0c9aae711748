"""Two heads: the reward trains the policy's own, a teacher trains another, and both the layers below.

arXiv:2411.08937, Dual-Head Knowledge Distillation. A linear classifier that a probability-level loss and a logit-level
loss train together collapses, since their gradients contradict each other in the head and not below it. So the student
has two heads on the same features f: the loss is CE(g1(f)) + alpha L(g2(f), teacher), and g2 is thrown away after
training. Here CE is the policy gradient, alpha is verl's `distillation_loss_coef`, and with s and t log-probs of the
student's auxiliary head and of the teacher for the teacher's k most probable tokens,

    forward_kl:      sum_k p_t (t - s), verl's own
    binary_kl_norm:  T^2 sum_k [(log .5 - log d) / 2 + (log .5 - log(1 - d)) / 2],  d = sigmoid((s - t) / T)
    binary_kl:       T^2 sum_k KL(sigmoid(t / T) | sigmoid(s / T)), the paper's ablation

What differs from GRPO: (1) a teacher's log-probs enter the loss; (2) their gradient does not reach the policy's head.
Ours: log-probs in the place of logits (verl's teacher tells no others); heads that start as the policy's, whose weights
they read without training them; the update of an auxiliary head by AdamW with the actor's learning rate.

Degenerate cases: no token that counts gives a loss of 0 with a gradient of 0; where d leaves [1e-8, 1 - 1e-8] the
gradient is 0; equal log-probs give exactly 0. With tied embeddings the head is trained through the input side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.functional import logsigmoid

from verl_plugins import CompositionError, Distilled, Plugin, hookimpl, setting
from verl_plugins.distill.auxiliary import AuxiliaryHead, over_ranks
from verl_plugins.distilled import forward_kl, of_teacher
from verl_plugins.services import Actor

LIMIT = math.log((1 - 1e-8) / 1e-8)
"""Where the sigmoid is 1e-8 from its ends: beyond, the losses are flat."""


def binary_kl_norm(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """[...,k] -> [...] summed over k; a term is log cosh(x / 2) of x = (s - t) / T, times T^2."""
    x = ((student - teacher) / temperature).clamp(-LIMIT, LIMIT)
    return temperature**2 * (-math.log(2) - (logsigmoid(x) + logsigmoid(-x)) / 2).sum(-1)


def binary_kl(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """[...,k] -> [...] summed over k, times T^2."""
    s, t = (values.div(temperature).clamp(-LIMIT, LIMIT) for values in (student, teacher))
    terms = t.sigmoid() * (logsigmoid(t) - logsigmoid(s)) + (-t).sigmoid() * (logsigmoid(-t) - logsigmoid(-s))
    return temperature**2 * terms.sum(-1)


BINARY = {"binary_kl_norm": binary_kl_norm, "binary_kl": binary_kl}


class Aligned(NamedTuple):
    """The gradient that two losses have together."""

    merged: list[Tensor]
    dot: Tensor
    """[] of the two, before."""
    projected: bool


@torch.no_grad()
def align(
    primary: Sequence[Tensor], secondary: Sequence[Tensor], total: Callable[[Tensor], Tensor] = lambda sums: sums
) -> Aligned:
    """Where the two contradict each other (one dot product over all tensors), secondary loses its part along primary.

    `total` sums over the ranks between which the tensors are split.
    """
    pairs = list(zip(primary, secondary, strict=True))
    sums = [torch.stack([(a * b).sum(dtype=torch.float64), (a * a).sum(dtype=torch.float64)]) for a, b in pairs]
    dot, square = total(torch.stack(sums).sum(0)) if sums else torch.zeros(2, dtype=torch.float64)
    projected = bool(dot < 0)
    share = float(dot / square) if projected else 0.0
    return Aligned([a + (b - share * a) for a, b in pairs], dot, projected)


class DHKD(Plugin):
    """Distillation through a head of its own."""

    name = "dhkd"
    paper = "arXiv:2411.08937"

    @dataclass
    class Config:
        head: str = setting(
            "detached",
            "the auxiliary head: the policy's as a constant, that and a low-rank part, or all of its own",
            authors="full",
            choices=("detached", "lowrank", "full"),
        )
        rank: int = setting(64, "rank of the low-rank part", ge=1)
        loss: str = setting(
            "forward_kl",
            "what it is compared with the teacher by",
            authors="binary_kl_norm",
            choices=("forward_kl", "binary_kl_norm", "binary_kl"),
        )
        temperature: float = setting(2.0, "T of the binary losses", authors=2.0, gt=0)
        align_gradients: bool = setting(
            False, "take out of the distillation's gradient what contradicts the reward's", authors=False
        )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.head = None if config.head == "detached" else AuxiliaryHead(config.head, config.rank)

    def check(self, config: DictConfig) -> None:
        if not config.distillation.distillation_loss.use_task_rewards:
            raise CompositionError(
                "plugins.dhkd keeps the policy's head for the reward, and distillation.distillation_loss."
                "use_task_rewards=False leaves none: set it to True, or leave the plugin out with ~plugins.dhkd"
            )
        actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
        if model.lora_rank or (model.get("lora") or {}).get("rank"):
            raise CompositionError(
                "plugins.dhkd keeps distillation away from the policy's head, which LoRA does not train: set "
                "actor_rollout_ref.model.lora_rank=0, or leave the plugin out with ~plugins.dhkd"
            )
        if self.config.align_gradients and actor.strategy == "fsdp":
            raise CompositionError(
                "plugins.dhkd.align_gradients takes a gradient of its own, which actor_rollout_ref.actor.strategy=fsdp "
                "has no place for: set actor_rollout_ref.actor.strategy=fsdp2"
            )

    @hookimpl
    def distillation_loss(self, distilled: Distilled) -> Tensor:
        logits = distilled.logits(detached=True) if self.head is None else self.head.logits(distilled)
        losses = self.compare(of_teacher(logits, distilled.teacher_ids), distilled)
        if len(losses):
            distilled.log({"aux_loss": float(losses.detach().mean())})
        if len(losses) and self.head is not None:
            with torch.no_grad():
                main, other = distilled.logits().log_softmax(-1), logits.log_softmax(-1)
                distilled.log({"head_vs_aux_kl": float((main.exp() * (main - other)).sum(-1).mean())})
        return losses

    def compare(self, log_probs: Tensor, distilled: Distilled) -> Tensor:
        """[N,k] log-probs of the teacher's tokens -> loss [N]."""
        teacher = distilled.teacher_log_probs
        if self.config.loss == "forward_kl":
            return forward_kl(log_probs, teacher, distilled.config.log_prob_min_clamp)
        return BINARY[self.config.loss](log_probs, teacher, self.config.temperature)

    @hookimpl(wrapper=True)
    def optimizer_step(self, actor: Actor) -> Generator[None, Any, Any]:
        own = {} if self.head is None else self.head.gradients()
        if self.config.align_gradients:
            self._align(actor)
        norm = yield
        if own and math.isfinite(float(norm)):
            self.head.step(own, actor.optimizer.param_groups[0])
        return norm

    def _align(self, actor: Actor) -> None:
        secondary = actor.distillation_gradient()
        trained = [parameter.grad for parameter in actor.module.parameters() if parameter.requires_grad]
        there = [(local(grad), part) for grad, part in zip(trained, secondary, strict=True) if grad is not None]
        found = align([grad - part for grad, part in there], [part for _, part in there], over_ranks)
        for (grad, _), merged in zip(there, found.merged, strict=True):
            grad.copy_(merged)
        if self.head is not None:
            self.head.gradients()  # of the second pass, which were taken before
        actor.log({"grad_dot_sign": float(found.dot.sign())})

    def state_dict(self) -> dict[str, Any]:
        return {} if self.head is None else self.head.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.head is not None:
            self.head.load_state_dict(state)


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
