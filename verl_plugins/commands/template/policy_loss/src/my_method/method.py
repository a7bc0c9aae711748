"""My method: tokens the policy was sure of count less in its loss.

The loss of token t is multiplied by w_t = (1 - p_t)^gamma, p_t its probability before the update; the weight carries
no gradient. Against the loss it wraps (verl's clipped one, or another plugin's): nothing else. gamma = 0 leaves the
loss as it is; a token of probability 1 has no loss.
"""

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor

from verl_plugins import Plugin, Tokens, hookimpl, setting


def doubt(old_log_probs: Tensor, gamma: float) -> Tensor:
    """Log-probs [rows, tokens] -> weights [rows, tokens], from 0 (sure) to 1."""
    return (1 - old_log_probs.exp()).clamp(min=0) ** gamma


class MyMethod(Plugin):
    """A weight on every token's loss."""

    name = "my_method"

    @dataclass
    class Config:
        gamma: float = setting(1.0, "how much less sure tokens count; 0: not at all", ge=0)

    @hookimpl(wrapper=True)
    def policy_loss(self, tokens: Tokens) -> Generator[None, Tensor, Tensor]:
        losses = yield
        weights = doubt(tokens.old_log_probs, self.config.gamma)
        count = tokens.response_mask.sum().clamp(min=1)
        tokens.log({"weight_mean": float((weights * tokens.response_mask).sum() / count)})
        return losses * weights
