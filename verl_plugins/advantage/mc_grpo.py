"""MC-GRPO: the median of a group is a steadier baseline than its mean when there are only a few rollouts.

arXiv:2601.22582, as the authors' code computes it. Of K = G+1 responses to a prompt, with m = median(r) and
d = median(|r - m|), both the lower middle value when K is even:

    A_i = (r_i - m) / (d + epsilon)

and one response whose reward is m, the pivot, is left out of the update (its advantage is 0). Other responses with the
pivot's reward stay: they count in the loss's denominators and in its KL term.

Against GRPO: median for mean, median absolute deviation (MAD) for std, one more rollout than is trained on
(`rollout.n` = G+1). The pivot is dropped before the log-probs, so a step costs what GRPO's costs with G.

Degenerate cases. Equal rewards: all advantages are exactly 0, one response is dropped all the same. A group of one:
nothing of it is trained on. Rewards of 0 and 1: m is the majority's reward and d is 0, so the minority gets exactly
±1/epsilon = ±1000 and gradient clipping sets the step; verl's dual clip (`clip_ratio_c`, 3), which the authors do not
have, acts on such rows: set it very large for parity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from verl_plugins import Batch, CompositionError, Groups, Plugin, Run, hookimpl, setting


def median_and_mad(scores: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Scores [rows] -> m and d of each row's group, both [rows]."""
    median = groups.median(scores)
    return median, groups.median((scores - median).abs())


def median_advantage(scores: Tensor, median: Tensor, spread: Tensor, epsilon: float = 1e-3) -> Tensor:
    """(r - m) / (d + epsilon), [rows]; exactly 0 for every response at its group's median, whatever the spread."""
    return (scores - median) / (spread + epsilon)


def rescale_nonzero(advantage: Tensor, groups: Groups) -> Tensor:
    """Times group size / number of responses with |A| > 1e-6, for those responses [rows]; the others keep theirs."""
    nonzero = advantage.abs() > 1e-6
    factor = groups.count() / groups.sum(nonzero).clamp(min=1)
    return torch.where(nonzero, advantage * factor, advantage)


def pivots(scores: Tensor, groups: Groups) -> Tensor:
    """[rows] bool: one counted row per group, the first whose score is the group's median."""
    return groups.first(scores == groups.median(scores))


def sign_flip_rate(above_mean: Tensor, above_median: Tensor) -> float:
    """Share of rows for which mean and median disagree about the sign, among those away from both."""
    signs = above_mean.sign() * above_median.sign()
    away = signs.count_nonzero()
    return float((signs < 0).sum() / away) if away else 0.0


class McGrpo(Plugin):
    """Median baseline, and one rollout less in the update than was generated."""

    name = "mc_grpo"
    paper = "arXiv:2601.22582"

    @dataclass
    class Config:
        epsilon: float = setting(1e-3, "added to the scale", authors=1e-3, gt=0)
        scale: str = setting("mad", "what the distance to the median is divided by", choices=("mad", "std", "none"))
        rescale_nonzero: bool = setting(
            False, "multiply non-zero advantages by group size / their number (only in the authors' GSM8K trainer)"
        )
        advantage_clip: float | None = setting(None, "bound on |advantage|; ours, the authors have none", gt=0)
        drop_only_if_complete: bool = setting(
            False, "keep the pivot of a group with fewer than rollout.n responses (some failed)"
        )

    def check(self, config: DictConfig) -> None:
        n = OmegaConf.select(config, "actor_rollout_ref.rollout.n")
        if n is not None and n < 2:
            raise CompositionError(
                f"plugins.mc_grpo trains on all but one response of a prompt, and actor_rollout_ref.rollout.n={n} "
                "leaves none; set actor_rollout_ref.rollout.n to one more than the responses to train on"
            )
        actor = OmegaConf.select(config, "actor_rollout_ref.actor") or {}
        mini, micro = actor.get("ppo_mini_batch_size"), actor.get("ppo_micro_batch_size_per_gpu")
        if None in (n, mini, micro) or actor.get("use_dynamic_bsz") is not False:
            return
        if (n - 1) * mini % micro:
            raise CompositionError(
                f"plugins.mc_grpo leaves {(n - 1) * mini} responses in a mini-batch, which micro-batches of "
                f"actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu={micro} do not fill; "
                "set actor_rollout_ref.actor.use_dynamic_bsz=true"
            )

    @hookimpl
    def select_rows(self, run: Run, batch: Batch) -> None:
        groups = batch.groups
        pivot = pivots(batch.scores, groups)
        if self.config.drop_only_if_complete:
            pivot &= groups.count() >= run.config.actor_rollout_ref.rollout.n
        run.log({"pivots_dropped": int(pivot.sum())})
        batch.drop(batch.of_session(pivot))

    @hookimpl
    def estimate_advantage(self, run: Run, batch: Batch) -> Tensor:
        full = batch.full
        median, mad = median_and_mad(full.scores, full.groups)
        advantage = self._advantage(full.scores, median, mad, full.groups)
        run.log(
            {
                "median_mean": float(median.mean()),
                "mad_mean": float(mad.mean()),
                "frac_mad_zero": float((mad == 0).float().mean()),
                "frac_zero_adv_rows": float((advantage == 0).float().mean()),
                "sign_flip_rate": sign_flip_rate(full.scores - full.groups.mean(full.scores), full.scores - median),
                "abs_adv_max": float(advantage.abs().max()),
                "group_size_min": int(full.groups.count().min()),
            }
        )
        return batch.to_tokens(batch.from_full(advantage))

    def _advantage(self, scores: Tensor, median: Tensor, mad: Tensor, groups: Groups) -> Tensor:
        config = self.config
        if config.scale == "none":
            advantage = scores - median
        else:
            spread = mad if config.scale == "mad" else groups.std(scores)
            advantage = median_advantage(scores, median, spread, config.epsilon)
        if config.rescale_nonzero:
            advantage = rescale_nonzero(advantage, groups)
        bound = config.advantage_clip
        return advantage if bound is None else advantage.clamp(-bound, bound)
