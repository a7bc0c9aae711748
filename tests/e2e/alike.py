"""A plugin for whose first step all responses are alike."""

from __future__ import annotations

from verl_plugins import Batch, Plugin, Run, hookimpl


class Alike(Plugin):
    """Rewards of 1 in the first step."""

    name = "alike"

    @hookimpl
    def shape_rewards(self, run: Run, batch: Batch) -> None:
        if run.step == 1:
            batch.rewards = 1 + 0 * batch.scores
