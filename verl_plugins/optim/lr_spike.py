"""Learning-rate spike: the rate is multiplied in one training step, to see what a run survives.

The experiment by which arXiv:2603.13552 judges step sizes (see `ghosts_of_softmax`). No method: a
means to measure one.

What differs from GRPO: (1) the learning rate of one step, in all its mini-batches; it is put back whatever happens.

Degenerate cases: a step that does not come changes nothing; a factor of 0 leaves a step out.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from verl_plugins import Plugin, hookimpl, setting
from verl_plugins.services import Actor


class LrSpike(Plugin):
    """One step with another learning rate."""

    name = "lr_spike"
    paper = "arXiv:2603.13552"

    @dataclass
    class Config:
        step: int = setting(10, "training step of the spike", ge=1)
        factor: float = setting(100.0, "what the learning rate is multiplied by there", ge=0)

    @hookimpl(wrapper=True)
    def optimizer_step(self, actor: Actor) -> Generator[None, Any, Any]:
        groups = actor.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        if actor.step == self.config.step:
            for group in groups:
                group["lr"] = group["lr"] * self.config.factor
        actor.log({"learning_rate": float(groups[0]["lr"])})
        try:
            return (yield)
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
