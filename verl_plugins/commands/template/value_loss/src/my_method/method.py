"""My method: a critic that had rather be too low than too high.

The loss of a value above its return is multiplied by w, that of one below by 1 (an expectile). Against the loss it
wraps (verl's clipped one, summed over the heads): nothing else. w = 1 leaves the loss as it is.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from verl_plugins import Plugin, Values, hookimpl, setting


def caution(values: Tensor, returns: Tensor, weight: float) -> Tensor:
    """Values [rows, tokens, heads] and returns [rows, tokens] -> weights [rows, tokens]: `weight` where too high."""
    return torch.where(values.detach().mean(-1) > returns, weight, 1.0)


class MyMethod(Plugin):
    """A weight on the loss of every value."""

    name = "my_method"

    @dataclass
    class Config:
        weight: float = setting(2.0, "weight of the loss of values above their returns", gt=0)

    @hookimpl(wrapper=True)
    def value_loss(self, values: Values) -> Generator[None, Tensor, Tensor]:
        losses = yield
        weights = caution(values.values, values.returns, self.config.weight)
        count = values.response_mask.sum().clamp(min=1)
        values.log({"weight_mean": float((weights * values.response_mask).sum() / count)})
        return losses * weights
