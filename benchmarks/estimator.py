"""Advantage estimators against one copy of the rewards: grouping of fresh uids, statistics, spreading over tokens.

python benchmarks/estimator.py
"""

from __future__ import annotations

import itertools
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


def compare(rows: int, tokens: int, shuffled: bool, batches: int) -> None:
    """Every function goes through `batches` batches in turn: one stays in the caches, sixteen (64 MB up) do not."""
    fields = [make_batch(rows, tokens, shuffled, seed) for seed in range(batches)]
    made = [Batch.from_tensors(**one) for one in fields]
    run, plugins = Silent(), {"grpo": Grpo(Grpo.Config()), "mc_grpo": McGrpo(McGrpo.Config())}
    turns = itertools.count()

    def next_batch() -> tuple[Batch, np.ndarray]:
        # What a step computes anew: grouping, sums and the check for rewards that are not finite.
        turn = next(turns) % batches
        for cached in ("groups", "_row_sums"):
            made[turn].__dict__.pop(cached, None)
        return made[turn], fields[turn]["uid"]

    def verl_grpo() -> None:
        one = fields[next(turns) % batches]
        compute_grpo_outcome_advantage(one["rm_scores"], one["response_mask"].float(), one["uid"])

    best = best_times(
        {
            "copy": lambda: fields[next(turns) % batches]["rm_scores"].clone(),
            "grpo": lambda: grpo(*next_batch()),
            "mc_grpo": lambda: mc_grpo(*next_batch()),
            "grpo, the stage with its metrics": lambda: plugins["grpo"].estimate_advantage(run, next_batch()[0]),
            "mc_grpo, the stage with its metrics": lambda: plugins["mc_grpo"].estimate_advantage(run, next_batch()[0]),
        }
    )
    best |= best_times({"verl's grpo": verl_grpo}, rounds=1)
    order = "shuffled, as balancing over ranks leaves them" if shuffled else "sorted by key, as with one rank"
    where = "in the caches" if batches == 1 else "from memory"
    report(f"[{rows}, {tokens}] {where}, {rows // GROUP} groups, rows {order}", best, "copy")
    verl = best["verl's grpo"]
    for name in ("grpo", "mc_grpo"):
        print(f"  {name}: {verl / best[name]:.0f} times as fast as verl's grpo")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for shape in ((1024, 1024), (8192, 256)):
        for shuffled in (False, True):
            for batches in (1, 16):
                compare(*shape, shuffled, batches)
