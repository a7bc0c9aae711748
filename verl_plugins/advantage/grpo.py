"""GRPO: a response is as good as its score lies above the mean of its group, in units of the group's spread.

arXiv:2402.03300 (DeepSeekMath), outcome supervision: A_i = (r_i - mean(r)) / (std(r) + epsilon) on every token of
response i, with the unbiased std. `scale: none` leaves the division out, as Dr.GRPO does (arXiv:2503.20783).

The numbers are those of verl's `compute_grpo_outcome_advantage`, with two intended differences. A group whose rewards
are all equal gives exactly 0 (verl: the rounding error of the mean divided by that of the std). A group of one gives 0,
for there is nothing to compare with (verl: the raw score, which makes it REINFORCE without a baseline).
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from verl_plugins import Batch, CompositionError, Groups, Plugin, Run, hookimpl, setting


def grpo_advantage(scores: Tensor, groups: Groups, scale: str = "std", epsilon: float = 1e-6) -> Tensor:
    """Scores [rows] -> advantage [rows]; 0 in groups of one and where all scores of the group are equal."""
    mean, std = groups.moments(scores)
    return scores - mean if scale == "none" else (scores - mean) / (std + epsilon)


class Grpo(Plugin):
    """The default estimator: any other plugin that estimates advantages replaces it."""

    name = "grpo"
    paper = "arXiv:2402.03300"

    @dataclass
    class Config:
        scale: str = setting("std", "divide by the group's std, or by nothing (Dr.GRPO)", choices=("std", "none"))
        epsilon: float = setting(1e-6, "added to the std", gt=0)

    def check(self, config: DictConfig) -> None:
        n = OmegaConf.select(config, "actor_rollout_ref.rollout.n")
        if n is not None and n < 2:
            raise CompositionError(
                f"plugins.grpo compares the responses of a prompt, and actor_rollout_ref.rollout.n={n} leaves none to "
                "compare with; set actor_rollout_ref.rollout.n to 2 or more"
            )
        if self.config.scale == "std" and OmegaConf.select(config, "algorithm.norm_adv_by_std_in_grpo") is False:
            raise CompositionError(
                "algorithm.norm_adv_by_std_in_grpo=false asks for advantages that are not divided by the std, "
                "plugins.grpo.scale=std for the opposite; set plugins.grpo.scale=none"
            )

    @hookimpl(trylast=True)
    def estimate_advantage(self, run: Run, batch: Batch) -> Tensor:
        advantage = grpo_advantage(batch.scores, batch.groups, self.config.scale, self.config.epsilon)
        run.log(
            {
                "zero_advantage_rows": float((advantage == 0).float().mean()),
                "group_size_min": int(batch.groups.count().min()),
            }
        )
        return batch.to_tokens(advantage)
