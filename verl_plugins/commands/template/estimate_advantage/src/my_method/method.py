"""My method: only the order of the scores within a group counts, not their distances.

A_i = bound * (2 rank_i / (K - 1) - 1) for the K responses to a prompt, rank 0 for the worst and ties sharing their
average: from -bound (worst) to +bound (best). Against GRPO: no mean, no std, and one extreme score cannot shrink
the others. Equal scores and groups of one give exactly 0.
"""

from dataclasses import dataclass

from torch import Tensor

from verl_plugins import Batch, Groups, Plugin, Run, hookimpl, setting


def centred_ranks(scores: Tensor, groups: Groups, bound: float) -> Tensor:
    """Scores [rows] -> advantage [rows]."""
    others = (groups.count() - 1).clamp(min=1)
    centred = 2 * groups.rank(scores) - (groups.count() - 1)
    return bound * centred / others


class MyMethod(Plugin):
    """Advantages from ranks."""

    name = "my_method"

    @dataclass
    class Config:
        bound: float = setting(1.0, "advantage of the best response of a group", gt=0)

    @hookimpl
    def estimate_advantage(self, run: Run, batch: Batch) -> Tensor:
        advantage = centred_ranks(batch.scores, batch.groups, self.config.bound)
        run.log({"zero_advantage_rows": float((advantage == 0).float().mean())})
        return batch.to_tokens(advantage)
