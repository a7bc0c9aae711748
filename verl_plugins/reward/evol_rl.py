r"""EVOL-RL: the majority decides the sign of the reward, novelty within its side the size; no labels.

arXiv:2509.15194. Per prompt, over the votes with an agreement m_i of 0 or 1 (TTRL's reward) and an embedding each:

    S_ij      = cosine of the embeddings of i and j, at least 0
    u_i       = 1 - (mean of S_ij over the others of i's side + max of S_ij over all others) / 2
    R_i       = 0.5 + 0.5 v_i if m_i else -1 + 0.5 v_i,   v = u brought to [0, 1] within its side

A side is the valid responses of one m. A response without a valid answer gets -1 and is compared with nobody.

What differs from GRPO: (1) rewards; (2) by default labels from the majority, which the plugin `ttrl` gives: this one
works on its rewards; (3) settings of the recipe: an asymmetric clip range and an entropy bonus.

Degenerate cases: a side of one gets 1 or -0.5, a side whose u are all equal the middle of its band. A response alone
in its group keeps m. Where only one is valid the authors' code gives it -1 as well, even to the majority:
`single_valid: band` gives 1 or -0.5. Without another of its side, all other valid ones stand for the side's mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from verl_plugins import Batch, CompositionError, Groups, Plugin, Run, hookimpl, setting
from verl_plugins.reward.embedding import embedder

ROUNDING = 1e-6
"""Novelties that differ by less are equal."""
VALID = {"boxed_digit": r"\\boxed\{[^}]*\d[^}]*\}", "boxed": r"\\boxed\{[^}]*\}"}
"""What a text must have somewhere; of `answer_extracted`, the scorer says."""
BANDS = {True: (0.5, 1.0), False: (-1.0, -0.5)}
INVALID = -1.0


def novelty(embeddings: Tensor, agrees: Tensor, valid: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """[B,d] embeddings -> [B] u, and [pairs] the similarities of different valid rows of a group.

    Args:
        embeddings: of the rows, in any length; those of rows that are not valid are not looked at.
        agrees: [B] bool m.
        valid: [B] bool.
        groups: which rows belong to a prompt.
    """
    row = valid.nonzero()[:, 0]
    place = Groups(groups.index[row]).rank(row.double()).long()
    at = groups.index[row], place
    shape = len(groups), int(place.max()) + 1 if len(row) else 1
    unit = embeddings[row].double()
    unit = unit / unit.norm(dim=1, keepdim=True).clamp(min=1e-8)
    table = torch.zeros(*shape, unit.shape[1], dtype=torch.double).index_put(at, unit)
    there = torch.zeros(shape, dtype=torch.bool).index_put(at, torch.tensor(True))
    side = torch.zeros(shape, dtype=torch.bool).index_put(at, agrees[row])
    similar = (table @ table.mT).clamp(0, 1)
    other = there[:, :, None] & there[:, None, :] & ~torch.eye(shape[1], dtype=torch.bool)
    own = other & (side[:, :, None] == side[:, None, :])
    near = torch.where(own.any(2, keepdim=True), own, other)
    mean = (similar * near).sum(2) / near.sum(2).clamp(min=1)
    most = (similar * other).amax(2)
    u = torch.zeros(len(valid), dtype=torch.double)
    u[row] = (1 - (mean + most) / 2)[at]
    return u, similar[other]


def banded(
    u: Tensor, agrees: Tensor, valid: Tensor, groups: Groups, single_valid: str = "authors", min_spread: float = 0.0
) -> Tensor:
    """[B] novelties -> [B] rewards.

    Args:
        u: novelties; those of rows that are not valid are not looked at.
        agrees: [B] bool m.
        valid: [B] bool.
        groups: which rows belong to a prompt; rows that do not count get some reward.
        single_valid: the only valid response of several gets -1 (`authors`), or what a side of one gets (`band`).
        min_spread: a side whose novelties differ by less gets the middle of its band.
    """
    sides = Groups(groups.index * 2 + agrees.long(), valid)
    low, high = sides.min(u), sides.max(u)
    spread = high - low
    share = torch.where(spread > max(min_spread, ROUNDING), (u - low) / spread.clamp(min=ROUNDING), 0.5)
    share = torch.where(sides.count() == 1, 1.0, share)
    bottom, top = (torch.where(agrees, *(BANDS[side][end] for side in (True, False))).double() for end in (0, 1))
    reward = torch.where(valid, bottom + (top - bottom) * share, INVALID)
    if single_valid == "authors":
        reward = torch.where(groups.sum(valid) == 1, INVALID, reward)
    return torch.where(groups.count() == 1, agrees.double(), reward)


class EvolRl(Plugin):
    """Rewards by side and novelty."""

    name = "evol_rl"
    paper = "arXiv:2509.15194"
    label_free = True

    @dataclass
    class Config:
        anchor: str = setting(
            "majority",
            "the sign is the vote's, or the scorer's",
            authors="majority",
            choices=("majority", "ground_truth"),
        )
        valid: str = setting(
            "boxed_digit",
            "which responses are valid",
            authors="boxed_digit",
            choices=("boxed_digit", "boxed", "answer_extracted"),
        )
        answer: str = setting("answer", "part of the reward that holds the extracted answer, for `answer_extracted`")
        embedder: str = setting(
            "hashing", "what embeds texts", authors="http", choices=("hashing", "folder", "http", "callable")
        )
        source: str = setting("", "the embedder's folder, address or module:function")
        long_text: str = setting(
            "windows", "texts longer than a folder's model reads", authors="tail", choices=("windows", "tail")
        )
        single_valid: str = setting(
            "authors",
            "the only valid response of a group gets -1, or its band",
            authors="authors",
            choices=("authors", "band"),
        )
        min_spread: float = setting(0.0, "novelties of a side that differ by less are equal", authors=0.0, ge=0, le=1)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embed = embedder(config.embedder, config.source, config.long_text)

    def check(self, config: DictConfig) -> None:
        votes = "ttrl" in config.plugins
        if self.config.anchor == "majority" and not votes:
            raise CompositionError(
                "plugins.evol_rl.anchor=majority works on the votes of the plugin ttrl, which is not there: add it, or "
                "set anchor=ground_truth"
            )
        if self.config.anchor == "ground_truth" and votes:
            raise CompositionError(
                "plugins.evol_rl.anchor=ground_truth takes the scorer's verdict, and the plugin ttrl puts a vote in "
                "its place: leave it out with ~plugins.ttrl"
            )

    @hookimpl(trylast=True)
    def shape_rewards(self, run: Run, batch: Batch) -> None:
        last = batch.is_last
        groups = Groups(batch.groups.index, last)
        agrees = batch.scores > 0 if self.config.anchor == "majority" else batch.correct > 0
        texts = pd.Series(batch.text, dtype=object).map(after_thinking)
        valid = last & self.valid(batch, texts)
        row = valid.nonzero()[:, 0]
        found = torch.from_numpy(self.embed(texts[row.numpy()].tolist()))
        embeddings = torch.zeros(len(batch), found.shape[1], dtype=torch.double).index_put((row,), found.double())
        u, similar = novelty(embeddings, agrees, valid, batch.groups)
        reward = banded(u, agrees, valid, groups, self.config.single_valid, self.config.min_spread)
        batch.rewards = batch.of_session(reward.float())
        run.log(
            {
                "valid_share": float(valid[last].double().mean()),
                "majority_ratio": float(agrees[last].double().mean()),
                "reward_mean": float(reward[last].mean()),
                "reward_std": float(reward[last].std(correction=0)),
            }
        )
        if len(similar):
            run.log(
                {
                    "similarity_mean": float(similar.mean()),
                    "similarity_min": float(similar.min()),
                    "similarity_max": float(similar.max()),
                }
            )
        if (valid & agrees).any():
            run.log({"novelty_majority_mean": float(u[valid & agrees].mean())})
        if (valid & ~agrees).any():
            run.log({"novelty_minority_mean": float(u[valid & ~agrees].mean())})

    def valid(self, batch: Batch, texts: pd.Series) -> Tensor:
        """[B] bool: responses that take part."""
        if self.config.valid == "answer_extracted":
            part = batch.extra(self.config.answer)
            part = part.tolist() if isinstance(part, Tensor) else part
            return torch.tensor(pd.Series(part, dtype="string").fillna("").ne("").tolist())
        return torch.tensor(texts.str.contains(VALID[self.config.valid]).tolist())


def after_thinking(text: str) -> str:
    """What stands behind the first `</think>`, else all of it."""
    return text.partition("</think>")[2].strip() if "</think>" in text else text
