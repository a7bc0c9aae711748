"""My method: easy prompts first, of data that is in the order of difficulty.

In step s, prompts are drawn from the first size * s / steps rows of the dataset, each with the same chance and none
twice; from all rows after `steps` steps. Against verl's shuffled pass: a prompt may come again before all have come.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from verl_plugins import Plugin, Run, hookimpl, setting


def candidates(size: int, share: float, count: int, flying: Sequence[int]) -> np.ndarray:
    """Ids of the first `share` of the rows without those in flight; of more rows where `count` would not be left."""
    reached = max(int(size * min(share, 1.0)), count + len(flying))
    return np.setdiff1d(np.arange(min(reached, size)), flying)


class MyMethod(Plugin):
    """A growing part of the dataset."""

    name = "my_method"

    @dataclass
    class Config:
        steps: int = setting(100, "steps until prompts are drawn from the whole dataset", ge=1)

    @hookimpl
    def select_prompts(self, run: Run, count: int) -> np.ndarray:
        ids = candidates(len(run.dataset), run.step / self.config.steps, count, run.in_flight())
        run.log({"candidates": len(ids)})
        return run.rng().choice(ids, count, replace=False)
