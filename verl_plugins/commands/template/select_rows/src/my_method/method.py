"""My method: groups whose responses are all worth the same are left out of the update.

They have no advantage under GRPO, so only time is saved and averages over rows change. Where all groups are such, all
are kept: at least one row must remain.
"""

from dataclasses import dataclass

from torch import Tensor

from verl_plugins import Batch, Groups, Plugin, Run, hookimpl, setting


def alike(scores: Tensor, groups: Groups, distance: float) -> Tensor:
    """Scores [rows] -> bool [rows]: best and worst of the group are not further apart than `distance`."""
    return groups.max(scores) - groups.min(scores) <= distance


class MyMethod(Plugin):
    """Only groups to learn from."""

    name = "my_method"

    @dataclass
    class Config:
        distance: float = setting(0.0, "scores that are this far apart count as the same", ge=0)

    @hookimpl
    def select_rows(self, run: Run, batch: Batch) -> None:
        rows = alike(batch.scores, batch.groups, self.config.distance)
        if not rows.all():
            batch.drop(rows)
        run.log({"alike_rows": float(rows.float().mean())})
