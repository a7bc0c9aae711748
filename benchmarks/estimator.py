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
from omegaconf import OmegaConf
from timing import best_times, report
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

from verl_plugins import Batch, Groups
from verl_plugins.advantage.a_grae import AGrae, asymmetric_advantage
from verl_plugins.advantage.adora import generated, group_lengths, is_advantageous
from verl_plugins.advantage.bnpo import normalise, to_unit
from verl_plugins.advantage.copo import (
    answer_entropy,
    global_advantage,
    local_advantage,
    local_weight,
    number_answers,
    prompt_return,
)
from verl_plugins.advantage.drpo import Drpo
from verl_plugins.advantage.grpo import Grpo, grpo_advantage
from verl_plugins.advantage.mc_grpo import McGrpo, median_advantage, median_and_mad
from verl_plugins.advantage.progrpo import confidence, prompt_confidence
from verl_plugins.advantage.riskpo import RiskPo, bundle_order, bundle_std, make_papers, risk, share_out

GROUP, PROMPT = 8, 64


class Silent:
    """A run that logs into nothing."""

    def __init__(self, tokens: int) -> None:
        self.config = OmegaConf.create({"data": {"max_response_length": tokens}})

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
    return {
        "uid": uid,
        "rm_scores": rewards,
        "response_mask": torch.arange(tokens)[None] < lengths,
        "old_log_probs": -torch.rand(rows, tokens, generator=rng),
        "prompt_log_probs": -torch.rand(rows, PROMPT, generator=rng),
        "prompt_lengths": torch.full((rows,), PROMPT + 1),
        "answer": [str(answer) for answer in torch.randint(0, 5, (rows,), generator=rng).tolist()],
    }


def grpo(batch: Batch, uid: np.ndarray) -> torch.Tensor:
    return batch.to_tokens(grpo_advantage(batch.scores, Groups(uid)))


def mc_grpo(batch: Batch, uid: np.ndarray) -> torch.Tensor:
    scores, groups = batch.scores, Groups(uid)
    return batch.to_tokens(median_advantage(scores, *median_and_mad(scores, groups)))


def bnpo(batch: Batch, uid: np.ndarray) -> torch.Tensor:
    return batch.to_tokens(normalise(to_unit(batch.scores, 0.0, 1.0, "the score"), Groups(uid)).advantage)


def a_grae(batch: Batch, uid: np.ndarray) -> torch.Tensor:
    scores = batch.scores
    return batch.to_tokens(asymmetric_advantage(scores, scores, Groups(uid), AGrae.Config())[0])


def adora(batch: Batch, uid: np.ndarray) -> torch.Tensor:
    """Around grpo."""
    scores, groups, lengths = batch.scores, Groups(uid), generated(batch)
    found = group_lengths(lengths, scores > 0.5, lengths >= batch.response_mask.shape[1], groups)
    weight = torch.where(is_advantageous(found), 1.0, 0.1).index_select(0, groups.index)
    return batch.to_tokens(grpo_advantage(scores, groups)) * weight[:, None]


def copo(batch: Batch, uid: np.ndarray) -> torch.Tensor:
    scores, groups = batch.scores, Groups(uid)
    entropy, (mean, std) = answer_entropy(number_answers(batch.extra("answer")), groups), groups.moments(scores)
    local = local_advantage(scores, mean, std, groups)
    across = global_advantage(prompt_return(mean.double(), entropy, groups), groups)
    weight = local_weight(entropy, scores, 5.0, 1.0)
    return batch.to_tokens(weight * local + (1 - weight) * across)


def progrpo(batch: Batch, uid: np.ndarray) -> torch.Tensor:
    """Around grpo."""
    scores, groups = batch.scores, Groups(uid)
    prompt = prompt_confidence(batch.prompt_log_probs, batch.prompt_lengths - 1)
    shift = 0.3 * (prompt - confidence(batch.old_log_probs, batch.response_mask, 0.2)) * groups.any(scores > 0)
    return batch.to_tokens(shift).add_(batch.to_tokens(grpo_advantage(scores, groups)))


def riskpo(batch: Batch, uid: np.ndarray) -> torch.Tensor:
    scores, groups, plugin = batch.scores, Groups(uid), RiskPo(RiskPo.Config())
    bundle = bundle_order(groups, np.random.default_rng(0)) // plugin.config.bundle_size
    papers = make_papers(scores, groups, batch.session, bundle)
    low, high = plugin.limits(papers)
    advantage = risk(papers.scores, low, high, plugin.config, (0, 0)) / bundle_std(papers)
    return batch.to_tokens(share_out(advantage, papers, scores, groups, plugin.config.credit))


def compare(rows: int, tokens: int, shuffled: bool, batches: int) -> None:
    """Every function goes through `batches` batches in turn: one stays in the caches, sixteen (64 MB up) do not."""
    fields = [make_batch(rows, tokens, shuffled, seed) for seed in range(batches)]
    made = [Batch.from_tensors(**one) for one in fields]
    run, drpo = Silent(tokens), Drpo(Drpo.Config())
    plugins = {"grpo": Grpo(Grpo.Config()), "mc_grpo": McGrpo(McGrpo.Config())}
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
            "bnpo": lambda: bnpo(*next_batch()),
            "a_grae": lambda: a_grae(*next_batch()),
            "riskpo": lambda: riskpo(*next_batch()),
            "copo": lambda: copo(*next_batch()),
            "drpo, the stage with its metrics": lambda: drpo.estimate_advantage(run, next_batch()[0]),
            "progrpo around grpo": lambda: progrpo(*next_batch()),
            "adora around grpo": lambda: adora(*next_batch()),
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
