"""TTRL: reward agreement with the majority of the sampled answers, so that no label is needed.

arXiv:2504.16084. Per prompt, over n_votes responses with extracted answers a_i:

    y   = the most frequent answer, by equality of normal forms; among equally frequent ones the first in vote order
    R_i = 1 if a_i equals y mathematically, else 0         (0.5 earns the reward of 1/2, though it was no vote for it)

The first rollout.n votes of each prompt are trained on, the others dropped once the rewards are known. Vote order is
the order of sessions. The ground truth, where there is one, feeds metrics only. Against GRPO: more responses than are
trained on, and other rewards.

Missing answers, cut-off responses among them, have no vote and reward 0; if nobody has an answer all rewards are 0.
The authors' code instead counts "" as an answer, and if that wins pays every response without an answer:
`missing: as_empty_answer`. Degenerate cases: a unanimous group teaches nothing; one vote always agrees with itself.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from verl_plugins import Batch, CompositionError, DataError, Plugin, Prompts, Run, hookimpl, setting
from verl_plugins.reward.comparer import Comparer
from verl_plugins.reward.equivalence import given_answers

NO_VOTE = -1
COMPARERS = 4
"""Processes that compare answers with the label."""


def majority(votes: np.ndarray, group: np.ndarray, order: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [B] -> per group [G] the row that first gave the most frequent answer (-1: nobody voted), and its votes.

    Args:
        votes: number of each row's answer; NO_VOTE for none.
        group: number of each row's group.
        order: place of each row in the vote order of its group.
        groups: G.
    """
    rows = np.flatnonzero(votes != NO_VOTE)
    rows = rows[np.lexsort((order[rows], votes[rows], group[rows]))]
    new = np.ones(len(rows), dtype=bool)
    new[1:] = (votes[rows[1:]] != votes[rows[:-1]]) | (group[rows[1:]] != group[rows[:-1]])
    first, count = rows[new], np.diff(np.append(np.flatnonzero(new), len(rows)))
    ranked = np.lexsort((order[first], -count, group[first]))
    decided, best = np.unique(group[first[ranked]], return_index=True)
    winner, ballots = np.full(groups, -1), np.zeros(groups, dtype=np.int64)
    winner[decided], ballots[decided] = first[ranked[best]], count[ranked[best]]
    return winner, ballots


def agreement(
    votes: np.ndarray, labels: np.ndarray, answers: np.ndarray, equal: Callable[[np.ndarray], list[bool]] | None = None
) -> np.ndarray:
    """Rows [B] -> [B] bool: whether the row's answer is its group's label, or `equal` to it.

    Args:
        votes: number of each row's answer; NO_VOTE for none, which equals nothing.
        labels: number of the label of each row's group; NO_VOTE for none.
        answers: the text of each number; "" is only equal to itself.
        equal: says of pairs of different texts [pairs,2], each asked once, whether they are equal.
    """
    same = (votes == labels) & (votes != NO_VOTE)
    if equal is None:
        return same
    differ = np.flatnonzero(~same & (votes != NO_VOTE) & (labels != NO_VOTE))
    differ = differ[(answers[votes[differ]] != "") & (answers[labels[differ]] != "")]
    pairs, place = np.unique(np.stack([votes[differ], labels[differ]], 1), axis=0, return_inverse=True)
    same[differ] = np.array(equal(answers[pairs]), dtype=bool)[place.ravel()]
    return same


class Ttrl(Plugin):
    """Labels by majority vote: asks for more responses than are trained on, and rewards agreement."""

    name = "ttrl"
    paper = "arXiv:2504.16084"
    label_free = True

    @dataclass
    class Config:
        n_votes: int = setting(64, "responses that vote; the first rollout.n of them are trained on", authors=64, ge=1)
        missing: str = setting(
            "excluded", "a missing answer has no vote, or is one more answer", choices=("excluded", "as_empty_answer")
        )
        grader: str = setting(
            "math", "equality with the label: mathematical, or of strings", authors="math", choices=("math", "exact")
        )
        answer: str = setting("answer", "part of the reward that holds the extracted answer")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._comparer = Comparer(COMPARERS) if config.grader == "math" else None

    def check(self, config: DictConfig) -> None:
        trained = config.actor_rollout_ref.rollout.n
        if trained > self.config.n_votes:
            raise CompositionError(
                f"actor_rollout_ref.rollout.n={trained} responses are to be trained on, and only "
                f"plugins.ttrl.n_votes={self.config.n_votes} are sampled; set n_votes to {trained} or more"
            )
        if OmegaConf.select(config, "algorithm.filter_groups.enable"):
            raise CompositionError(
                "algorithm.filter_groups.enable=true chooses groups by the true label before plugins.ttrl votes; "
                "set it to false"
            )

    @hookimpl
    def prepare_prompts(self, prompts: Prompts) -> None:
        for prompt in prompts:
            prompt.group_size = self.config.n_votes

    @hookimpl
    def shape_rewards(self, run: Run, batch: Batch) -> None:
        given = self.answers(batch)
        votes, texts = self.votes(given)
        last, group = batch.is_last.numpy(), batch.groups.index.numpy()
        winner, ballots = majority(np.where(last, votes, NO_VOTE), group, batch.session.numpy(), len(batch.groups))
        labels = np.where(winner >= 0, votes[winner], NO_VOTE)
        reward = torch.from_numpy(agreement(votes, labels[group], texts, self._equal if self._comparer else None))
        correct, voters = batch.correct, np.bincount(group[last], minlength=len(winner))
        batch.rewards = batch.of_session(reward.float())

        distinct = len(np.unique((group * len(votes) + votes)[last & (votes != NO_VOTE)]))
        run.log(
            {
                "majority_ratio": float((ballots / voters).mean()),
                "mean_reward": float(reward[batch.is_last].float().mean()),
                "missing_answer_share": float((given[last] == "").mean()),
                "n_distinct_answers": distinct / len(winner),
            }
        )
        known = _has_truth(batch)
        if known.any():
            agrees = (reward == correct).numpy()
            right = np.where(winner >= 0, correct.numpy()[winner], False)
            run.log(
                {
                    "label_accuracy": float(right[np.unique(group[known])].mean()),
                    "reward_accuracy": float(agrees[known & last].mean()),
                    "ground_truth_ratio": float(correct.numpy()[known & last].mean()),
                }
            )

    @hookimpl
    def select_rows(self, run: Run, batch: Batch) -> None:
        kept = batch.groups.rank(batch.session) < run.config.actor_rollout_ref.rollout.n
        agrees = batch.groups.any(kept & (batch.scores > 0))
        one_each = batch.groups.first(torch.ones_like(kept))
        run.log({"no_majority_in_train_share": float((~agrees[one_each]).float().mean())})
        batch.drop(~kept)

    def _equal(self, pairs: np.ndarray) -> list[bool]:
        with ThreadPoolExecutor(COMPARERS) as threads:
            return [found.correct for found in threads.map(self._comparer.compare, *pairs.T)]

    def answers(self, batch: Batch) -> np.ndarray:
        """[B] each response's answer in its normal form, "" where there is none."""
        return given_answers(batch, self.config.answer, cut_off=self.config.missing == "as_empty_answer")

    def votes(self, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[B] the number of each answer, NO_VOTE for a missing one without a vote; and the text of each number."""
        codes, texts = pd.factorize(answers)
        return np.where((answers == "") & (self.config.missing == "excluded"), NO_VOTE, codes), texts


def _has_truth(batch: Batch) -> np.ndarray:
    """[B] bool: whether the row's prompt came with a ground truth."""
    try:
        labels = batch.extra("reward_model")
    except DataError:  # data without labels need not have the column
        return np.zeros(len(batch), dtype=bool)
    truth = pd.Series(labels, dtype=object).str.get("ground_truth")
    return (truth.notna() & (truth != "")).to_numpy(bool)
