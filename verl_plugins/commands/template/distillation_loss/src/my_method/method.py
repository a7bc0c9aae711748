"""My method: the student is drawn to what the teacher finds most probable, and to nothing else.

The loss of a token is -log q(v), v the teacher's most probable token there and q the policy's probabilities.
"""

from dataclasses import dataclass

from torch import Tensor

from verl_plugins import Distilled, Plugin, hookimpl, setting


def imitation(logits: Tensor, token: Tensor) -> Tensor:
    """Logits [tokens, vocabulary] and token ids [tokens] -> loss [tokens]."""
    return -logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]


class MyMethod(Plugin):
    """The teacher's first choice as a label."""

    name = "my_method"

    @dataclass
    class Config:
        weight: float = setting(0.1, "weight of the loss", ge=0)

    @hookimpl
    def distillation_loss(self, distilled: Distilled) -> Tensor:
        return self.config.weight * imitation(distilled.logits(), distilled.teacher_ids[:, 0])
