"""Advantage estimators against one copy of the rewards: grouping of fresh uids, statistics, spreading over tokens.

python benchmarks/estimator.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from timing import best_times, report
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from verl_plugins import Batch, Groups
from verl_plugins.advantage.grpo import Grpo, grpo_advantage
from verl_plugins.advantage.mc_grpo import McGrpo, median_advantage, median_and_mad

GROUP = 8


class Silent:
    """A run that logs into nothing."""

    def log(self, metrics: dict[str, float]) -> None:
        pass


def make_batch(rows: int, tokens: int, shuffled: bool, seed: int = 0) -> dict[str, object]:
    """0/1 outcomes on the last token of responses of random length, groups of 8; rows sorted by key or shuffled."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=rng)
    order = torch.randperm(rows, generator=rng).numpy() if shuffled else np.arange(rows)
    rewards = torch.zeros(rows, tokens)
    rewards.scatter_(1, lengths - 1, torch.randint(0, 2, (rows, 1), generator=rng).float())
    uid = np.array([f"{1234 + row // GROUP}-17-{row // GROUP % 3}" for row in range(rows)], dtype=object)[order]
    return {"uid": uid, "rm_scores": rewards, "response_mask": torch.arange(tokens)[None] < lengths}


def grpo(batch: Batch, uid: np.ndarray) -> torch.Tensor:
    return batch.to_tokens(grpo_advantage(batch.scores, Groups(uid)))


def mc_grpo(batch: Batch, uid: np.ndarray) -> torch.Tensor:
    scores, groups = batch.scores, Groups(uid)
    return batch.to_tokens(median_advantage(scores, *median_and_mad(scores, groups)))


def compare(rows: int, tokens: int, shuffled: bool) -> None:
    fields = make_batch(rows, tokens, shuffled)
    uid, rewards = fields["uid"], fields["rm_scores"]
    batches = {name: Batch.from_tensors(**fields) for name in ("grpo", "mc_grpo")}

    def fresh(name: str) -> Batch:
        # What a step computes anew: grouping, sums and the check for rewards that are not finite.
        batch = batches[name]
        for cached in ("groups", "_row_sums"):
            batch.__dict__.pop(cached, None)
        return batch

    run, plugins = Silent(), {"grpo": Grpo(Grpo.Config()), "mc_grpo": McGrpo(McGrpo.Config())}
    best = best_times(
        {
            "copy": rewards.clone,
            "grpo": lambda: grpo(fresh("grpo"), uid),
            "mc_grpo": lambda: mc_grpo(fresh("mc_grpo"), uid),
            "grpo, the stage with its metrics": lambda: plugins["grpo"].estimate_advantage(run, fresh("grpo")),
            "mc_grpo, the stage with its metrics": lambda: plugins["mc_grpo"].estimate_advantage(run, fresh("mc_grpo")),
        }
    )
    mask = fields["response_mask"].float()
    best |= best_times({"verl's grpo": lambda: compute_grpo_outcome_advantage(rewards, mask, uid)}, rounds=1)
    order = "shuffled, as balancing over ranks leaves them" if shuffled else "sorted by key, as with one rank"
    report(f"[{rows}, {tokens}], {rows // GROUP} groups, rows {order}", best, "copy")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for shape in ((1024, 1024), (8192, 256)):
        for shuffled in (False, True):
            compare(*shape, shuffled)
