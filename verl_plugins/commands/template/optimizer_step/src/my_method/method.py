"""My method: later optimiser steps of a training step are smaller.

The learning rate of mini-batch m, from 0, is multiplied by decay^m: the policy has then moved away from the one that
wrote the responses. With one mini-batch per step, nothing changes.
"""

from collections.abc import Generator
from dataclasses import dataclass

from verl_plugins import Actor, Plugin, hookimpl, setting


class MyMethod(Plugin):
    """A factor on the learning rate."""

    name = "my_method"

    @dataclass
    class Config:
        decay: float = setting(0.5, "factor from one mini-batch to the next; 1: none", gt=0, le=1)

    @hookimpl(wrapper=True)
    def optimizer_step(self, actor: Actor) -> Generator[None, float, float]:
        groups = actor.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] *= self.config.decay**actor.mini_batch
        actor.log({"learning_rate": groups[0]["lr"]})
        try:
            return (yield)
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
