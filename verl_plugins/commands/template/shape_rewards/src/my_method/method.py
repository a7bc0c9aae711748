"""My method: long responses are worth less.

A response of L tokens, of B that it could have, loses weight * L / B of its reward. `batch.correct` keeps the raw
verdict.
"""

from dataclasses import dataclass

from torch import Tensor

from verl_plugins import Batch, Plugin, Run, hookimpl, setting


def cost(lengths: Tensor, budgets: Tensor, weight: float) -> Tensor:
    """Lengths and budgets [rows] -> what is taken from the rewards [rows]."""
    return weight * lengths / budgets


class MyMethod(Plugin):
    """A price per token."""

    name = "my_method"

    @dataclass
    class Config:
        weight: float = setting(0.1, "reward that a response as long as its budget loses", ge=0)

    @hookimpl
    def shape_rewards(self, run: Run, batch: Batch) -> None:
        taken = cost(batch.lengths, batch.budgets, self.config.weight)
        batch.rewards = batch.rewards.sum(-1) - taken  # on the last token
        run.log({"cost_mean": float(taken.mean())})
