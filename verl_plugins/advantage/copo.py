"""COPO: where the answers to a prompt agree, compare prompts with each other instead of the responses of one.

arXiv:2508.04138, as the authors' code computes it (hijih/copo-code). Per prompt with n responses, their rewards r_i of
0 and 1, and p_a the share of them with the extracted answer a:

    local    A_i = (r_i - mean(r)) / (std(r) + epsilon)
    entropy  H   = -sum_a p_a log2(p_a + 1e-8), in bits
    global   G   = (R - mean(R)) / (std(R) + epsilon) over the prompts of the batch,   R = mean(r)
    gate     w_i = sigmoid(gamma (H - rho)), times 1[r_i is not 0] in `soft-with-zero`
    advantage    w_i A_i + (1 - w_i) G

So a scattered group learns from its own mean, a unanimous one from how it compares with other prompts; with
`soft-with-zero`, the authors' COPO, wrong answers learn from G alone. `soft` is the paper's formula.

The authors take w · loss(A) + (1 - w) · loss(G), two clipped losses: `form: two_losses`. The blend of advantages is the
same as long as A and G have one sign or the policy has not moved, and needs nothing in the workers.

Degenerate cases. One prompt, or all with the same R: G is exactly 0. All right or all wrong, or a single response: A is
exactly 0 (the authors: of a single one r / (1 + epsilon)). H of a single response is 0, and its prompt is compared with
the others all the same: G stays.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from verl_plugins import Batch, CompositionError, DataError, Groups, Plugin, Run, Tokens, hookimpl, setting

GLOBAL, WEIGHT = "copo_global", "copo_local_weight"
"""Fields of `form: two_losses`."""
ROUNDING = 1e-6
"""A smaller advantage is zero but for rounding: a prompt whose return is the mean of all."""


def binary_scores(batch: Batch, plugin: str, otherwise: str = "") -> Tensor:
    """The scores [B]; `otherwise` ends the error's sentence.

    Raises:
        DataError: one of them is neither 0 nor 1.
    """
    scores = batch.scores
    for row in ((scores != 0) & (scores != 1)).nonzero()[:1, 0].tolist():
        raise DataError(
            f"{plugin}: the score of row {batch.keys[row]} is {float(scores[row]):g}, expected 0 for wrong or 1 for "
            f"right; use a scorer that gives these, and no shaped rewards{otherwise}"
        )
    return scores


def number_answers(answers: Sequence[Any]) -> np.ndarray:
    """Answers [B], texts, numbers or None -> [B] a number for each different text, -1 for none or a blank one."""
    codes, given = pd.factorize(np.asarray(answers, dtype=object))
    texts = [str(answer).strip() for answer in given]
    numbers = {"": -1} | {text: number for number, text in enumerate(dict.fromkeys(filter(None, texts)))}
    return np.array([*(numbers[text] for text in texts), -1])[codes]


def answer_entropy(answers: np.ndarray, groups: Groups, distinct_missing: bool = True) -> Tensor:
    """Numbers of the answers [B] -> H of each row's group in bits, [B] float64.

    With `distinct_missing` every answer -1 differs from all others, else they are one answer.
    """
    rows = len(answers)
    codes = np.where(answers < 0, rows + np.arange(rows), answers) if distinct_missing else answers + 1
    pairs = pd.factorize(groups.index.numpy() * (2 * rows) + codes)[0]
    same = np.bincount(pairs, None if groups.counted is None else groups.counted.numpy())[pairs]
    count = groups.count()
    share = torch.from_numpy(same) / count.double()
    return groups.sum(-(share + 1e-8).log2()) / count  # the mean over responses is the sum over answers


def prompt_return(mean: Tensor, entropy: Tensor, groups: Groups, coefficient: bool = False) -> Tensor:
    """R [B] from the mean score; `coefficient`: times 1 - H (1 - 1/n) / log2(n), so 1/n of it if all answers differ."""
    if not coefficient:
        return mean
    n = groups.count().double()
    return mean * torch.where(n == 1, 1, 1 - entropy * (1 - 1 / n) / n.clamp(min=2).log2())


def global_advantage(returns: Tensor, groups: Groups, scale: str = "std", epsilon: float = 1e-6) -> Tensor:
    """R [B] -> G [B]: every prompt counts once; exactly 0 where all are equal."""
    once = groups.per_group(returns)
    centred = once - once[0]  # from one prompt's, so that equal ones leave nothing but zeros
    centred -= centred.mean()
    std = (centred.square().sum() / max(len(once) - 1, 1)).sqrt()
    return (centred if scale == "none" else centred / (std + epsilon))[groups.index]


def local_weight(entropy: Tensor, scores: Tensor, gamma: float, rho: float, gate: str = "soft-with-zero") -> Tensor:
    """w [B]: the share of the local advantage."""
    weight = torch.sigmoid(gamma * (entropy - rho))
    return weight * (scores != 0) if gate == "soft-with-zero" else weight


def clipped_loss(tokens: Tokens, advantages: Tensor) -> Tensor:
    """PPO's dual-clipped loss [rows,T] for other advantages, [rows,1] or [rows,T], than the batch's."""
    config = tokens.config
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    ratio = (tokens.log_probs - tokens.old_log_probs).clamp(-20.0, 20.0).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    return torch.where(advantages < 0, torch.minimum(-advantages * config.clip_ratio_c, loss), loss)


class Copo(Plugin):
    """A gate between comparing responses and comparing prompts, by how much the answers agree."""

    name = "copo"
    paper = "arXiv:2508.04138"

    @dataclass
    class Config:
        gate: str = setting(
            "soft-with-zero",
            "by entropy, and wrong answers are all global, or by entropy alone (the paper's formula)",
            authors="soft-with-zero",
            choices=("soft-with-zero", "soft"),
        )
        gamma: float = setting(5.0, "steepness of the gate", authors=5.0, gt=0)
        rho: float = setting(1.0, "answer entropy in bits at which both sides weigh the same", authors=1.0, ge=0)
        reward_coefficient: bool = setting(False, "lower a prompt's return where its answers disagree", authors=False)
        scale: str = setting("std", "divide both advantages by their std, or by nothing", choices=("std", "none"))
        epsilon: float = setting(1e-6, "added to both stds", authors=1e-6, gt=0)
        form: str = setting(
            "blended",
            "blend the advantages, or two clipped losses as the authors do",
            authors="two_losses",
            choices=("blended", "two_losses"),
        )
        missing: str = setting(
            "distinct",
            "a missing answer is like no other, or all missing ones are the same answer",
            choices=("distinct", "one_answer"),
        )
        answer: str = setting("answer", "part of the reward that holds the extracted answer")

    def check(self, config: DictConfig) -> None:
        if (n := OmegaConf.select(config, "actor_rollout_ref.rollout.n")) is not None and n < 2:
            raise CompositionError(
                f"plugins.copo compares the responses of a prompt, and actor_rollout_ref.rollout.n={n} leaves none to "
                "compare with; set actor_rollout_ref.rollout.n to 2 or more"
            )
        if OmegaConf.select(config, "algorithm.filter_groups.enable"):
            raise CompositionError(
                "algorithm.filter_groups.enable=true removes the unanimous groups that plugins.copo learns from; "
                "set it to false"
            )
        if OmegaConf.select(config, "algorithm.use_kl_in_reward"):
            raise CompositionError(
                "algorithm.use_kl_in_reward=true changes the rewards of 0 and 1 that plugins.copo needs; "
                "set actor_rollout_ref.actor.use_kl_loss=true instead"
            )
        if self.config.scale == "std" and OmegaConf.select(config, "algorithm.norm_adv_by_std_in_grpo") is False:
            raise CompositionError(
                "algorithm.norm_adv_by_std_in_grpo=false asks for advantages that are not divided by the std, "
                "plugins.copo.scale=std for the opposite; set plugins.copo.scale=none"
            )

    @hookimpl
    def estimate_advantage(self, run: Run, batch: Batch) -> Tensor:
        config, groups, scores = self.config, batch.groups, binary_scores(batch, self.name)
        answers = self.answers(batch)
        entropy = answer_entropy(answers, groups, config.missing == "distinct")
        mean, std = groups.moments(scores)
        local = scores - mean if config.scale == "none" else (scores - mean) / (std + config.epsilon)
        returns = prompt_return(mean.double(), entropy, groups, config.reward_coefficient)
        across = global_advantage(returns, groups, config.scale, config.epsilon)
        weight = local_weight(entropy, scores, config.gamma, config.rho, config.gate)
        blended = weight * local + (1 - weight) * across

        of_prompts, returned = groups.per_group(entropy), groups.per_group(returns)
        run.log(
            {
                "answer_entropy_mean": float(of_prompts.mean()),
                "answer_entropy_min": float(of_prompts.min()),
                "answer_entropy_max": float(of_prompts.max()),
                "unanimous_groups": float((of_prompts < 1e-6).float().mean()),
                "no_answer": float((answers < 0).mean()),
                "local_weight_mean": float(weight.mean()),
                "local_weight_min": float(weight.min()),
                "local_weight_max": float(weight.max()),
                "local_abs_mean": float(local.abs().mean()),
                "global_abs_mean": float(across.abs().mean()),
                "opposite_signs": float((local * across < -ROUNDING).float().mean()),
                "return_mean": float(returned.mean()),
                "return_std": float(returned.std(correction=0)),
                "groups_with_signal": float(groups.per_group(groups.any(blended.abs() > ROUNDING)).float().mean()),
            }
        )
        if config.form == "blended":
            return batch.to_tokens(blended)
        batch.put(GLOBAL, across.float())
        batch.put(WEIGHT, weight.float())
        return batch.to_tokens(local)

    def answers(self, batch: Batch) -> np.ndarray:
        """[B] the number of each response's answer, -1 where there is none."""
        given = batch.extra(self.config.answer)
        return number_answers(given.tolist() if isinstance(given, Tensor) else given)

    @hookimpl(wrapper=True)
    def policy_loss(self, tokens: Tokens) -> Generator[None, Tensor, Tensor]:
        local = yield
        if self.config.form == "blended":
            return local
        across, weight = (tokens.extra(name).to(local.device)[:, None] for name in (GLOBAL, WEIGHT))
        other = clipped_loss(tokens, across)
        with torch.no_grad():
            mask = tokens.response_mask
            count = mask.sum().clamp(min=1)
            means = [(loss * mask).sum() / count for loss in (local, other)]
            tokens.log(dict(zip(("local_loss", "global_loss"), torch.stack(means).tolist(), strict=True)))
        return weight * local + (1 - weight) * other
