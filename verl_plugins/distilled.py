"""What the distillation loss sees: `Distilled`, the response tokens of one micro-batch in an actor worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from verl_plugins.fields import version


class Distilled:
    """N response tokens that count, what the policy's head reads at each, and what the teacher says of it.

    The head is there as it is in this forward pass, gathered from all ranks: read it now, keep a copy or nothing.
    Neither padding nor prompts are here; a micro-batch of padding rows has N = 0.
    """

    def __init__(
        self,
        *,
        hidden: Tensor,
        weight: Tensor,
        teacher_ids: Tensor,
        teacher_log_probs: Tensor,
        temperature: Tensor,
        config: Any,
        bias: Tensor | None = None,
        log: Callable[[str, Mapping[str, float], str], None] | None = None,
        step: int = 0,
        mini_batch: int = 0,
        micro_batch: int = 0,
        owner: str = "",
    ) -> None:
        self.hidden = hidden
        """[N,D] last hidden states, with gradient: what predicts the token."""
        self.weight = weight
        """[V,D] weights of the policy's head, with gradient."""
        self.bias = bias
        """[V] its bias, if it has one."""
        self.teacher_ids = teacher_ids
        """[N,k] the teacher's k most probable tokens."""
        self.teacher_log_probs = teacher_log_probs
        """[N,k] their log-probs, at temperature 1."""
        self.temperature = temperature
        """[N] the rollout's, by which logits are divided."""
        self.config = config
        """verl's settings `distillation.distillation_loss`."""
        self.step, self.mini_batch, self.micro_batch = step, mini_batch, micro_batch
        self._log, self._owner = log, owner
        self._given = {name: version(value) for name, value in vars(self).items() if isinstance(value, Tensor)}

    def scoped(self, owner: str) -> Distilled:
        """The same tokens in the hands of plugin `owner`: its metrics are its own."""
        other = object.__new__(Distilled)
        other.__dict__.update(self.__dict__, _owner=owner)
        return other

    def changed_in_place(self) -> list[str]:
        """Names of the tensors that were written into: others read them, too."""
        return [name for name, known in self._given.items() if version(getattr(self, name)) != known]

    def logits(self, *, detached: bool = False) -> Tensor:
        """[N,V] float32 what the policy's head makes of `hidden`, over the temperature.

        `detached`: its weights are constants, so that gradients reach the layers below and not the head.
        """
        weight, bias = self.weight, self.bias
        if detached:
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        return linear(self.hidden, weight, bias).float() / self.temperature[:, None]

    def log(self, metrics: Mapping[str, float], reduce: str = "mean") -> None:
        """Add metrics as `plugins/<plugin>/<key>`, joined as those of `Tokens.log`."""
        if self._log is not None:
            self._log(self._owner, metrics, reduce)


def of_teacher(logits: Tensor, ids: Tensor) -> Tensor:
    """[N,V] logits -> [N,k] log-probs of the teacher's tokens `ids`."""
    return logits.log_softmax(-1).gather(-1, ids.long())


def forward_kl(log_probs: Tensor, teacher_log_probs: Tensor, floor: float | None = None) -> Tensor:
    """[N,k] log-probs q and p of the teacher's k tokens -> [N] sum of p (log p - log q), as verl's `forward_kl_topk`.

    What is outside of the k is left out, so that it may be negative. `floor` is verl's `log_prob_min_clamp`.
    """
    if floor is not None:
        log_probs, teacher_log_probs = log_probs.clamp(min=floor), teacher_log_probs.clamp(min=floor)
    return (teacher_log_probs.exp() * (teacher_log_probs - log_probs)).sum(-1)
