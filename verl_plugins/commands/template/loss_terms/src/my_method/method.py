"""My method: the policy is held near the one before the update.

The term of token t is weight / 2 * (log p_t - log q_t)^2, p_t its probability and q_t that before the update. At the
first mini-batch of a step both are the same, and so the term and its gradient are 0.
"""

from dataclasses import dataclass

from torch import Tensor

from verl_plugins import Plugin, Tokens, hookimpl, setting


def distance(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """Log-probs [rows, tokens] -> term of weight 1 [rows, tokens]."""
    return (log_probs - old_log_probs).square() / 2


class MyMethod(Plugin):
    """A term beside the loss."""

    name = "my_method"

    @dataclass
    class Config:
        weight: float = setting(0.1, "weight of the term", ge=0)

    @hookimpl
    def loss_terms(self, tokens: Tokens) -> dict[str, Tensor]:
        return {"my_method": self.config.weight * distance(tokens.log_probs, tokens.old_log_probs)}
