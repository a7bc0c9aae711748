"""My method: no logit is larger than a bound, so no answer is ever certain.

z is replaced by bound tanh(z / bound), before the temperature. Against GRPO: the policy itself, wherever it is
evaluated; nothing else. Logits that are small beside the bound stay as they are; banned ones, -inf, become -bound.
"""

from dataclasses import dataclass

from torch import Tensor

from verl_plugins import Plugin, hookimpl, setting


def capped(logits: Tensor, bound: float) -> Tensor:
    """Logits [..., vocabulary] -> within the bound, in the same order."""
    return bound * (logits / bound).tanh()


class MyMethod(Plugin):
    """A soft cap on logits."""

    name = "my_method"

    @dataclass
    class Config:
        bound: float = setting(30.0, "what no logit exceeds, either way", gt=0)

    @hookimpl
    def shape_logits(self, logits: Tensor) -> Tensor:
        return capped(logits, self.config.bound)
