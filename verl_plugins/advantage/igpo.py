"""IGPO: a turn of a conversation earns what it adds to the policy's belief in the known answer.

arXiv:2510.14967, equations 2 to 7. A response has turns 1..T, all but the last answered by a tool; a = a_1..a_L is the
ground truth. With the policy before the update, no gradient:

    belief after turn t:  lp_t = mean of log pi(a_j | what is there after turn t, a short sentence, a_<j)
    gain of turn t < T:   g_t = lp_t - lp_{t-1}          (prob_diff: exp lp_t - exp lp_{t-1})
    outcome of turn T:    the response's reward
    z = (x - mean) / std over the group, outcomes and gains apart (joint: together)
    A_T = z_T,  A_t = z_t + gamma A_{t+1},  on every token of turn t

What differs from GRPO: (1) the advantage, of turns instead of responses, so that a group whose outcomes are equal still
learns; (2) T scorings of the known answer per response, in one batched pass without gradient.

Degenerate cases: one turn has no gain; a response alone, and a pool of equal values, get 0; without a ground truth, or
with a belief that is no number, a response has its outcome only (`fallback_frac`); tokens of tools get 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from verl_plugins import Batch, CompositionError, DataError, Groups, Plugin, Run, hookimpl, setting

TURN_ENDS = "turn_ends"
"""Field of a row, from the agent loop: places of the last generated token of each turn."""
EPSILON, VARIANCE = 1e-6, 1e-8


def ends_of_turns(mask: Tensor, told: Sequence[Sequence[int] | None] | None = None) -> Tensor:
    """[B,T] generated tokens -> [B,T] bool: the last one of each turn, as told, or else of each run of such tokens."""
    runs = mask & ~torch.nn.functional.pad(mask, (0, 1))[:, 1:]
    if told is None:
        return runs
    known = torch.tensor([row is not None for row in told])
    rows = np.repeat(np.arange(len(told)), [len(row or ()) for row in told])
    places = np.concatenate([np.asarray(row, dtype=np.int64) for row in told if row], axis=None) if len(rows) else rows
    ends = torch.zeros_like(mask)
    ends[torch.from_numpy(rows), torch.from_numpy(places)] = True
    return torch.where(known[:, None], ends & mask, runs)


def turn_advantage(
    rewards: Tensor,
    ends: Tensor,
    mask: Tensor,
    group: Tensor,
    *,
    mode: str = "separate",
    by_std: bool = True,
    gamma: float = 1.0,
    weights: tuple[float, float] = (1.0, 1.0),
    counted: Tensor | None = None,
) -> Tensor:
    """[B,T] rewards at the ends of turns -> [B,T] advantages of the turns' tokens.

    Args:
        rewards: the last turn's is the outcome, all others are gains.
        ends: [B,T] bool, the turns that count.
        mask: [B,T] bool, generated tokens.
        group: [B] number of each row's group.
        mode: pools of the group: `separate` for outcomes and gains, or `joint`.
        by_std: divide by the pool's population standard deviation.
        gamma: discount per turn, from above 0.
        weights: of outcomes and gains, before they are brought to one scale.
        counted: [B] bool, rows whose outcome is in the pools; None: all.
    """
    row, place = ends.nonzero().unbind(1)
    count = ends.long().cumsum(1)
    last = count[row, place] == count[row, -1]
    value = rewards.double()[row, place] * torch.where(last, *weights)
    once = None if counted is None else counted[row] | ~last
    pools = Groups(group[row] * 2 + (last if mode == "separate" else 0), once)
    mean, std = pools.moments(value, unbiased=False)
    centred = value - mean
    if by_std:
        centred = centred / ((std.square() + VARIANCE).sqrt() + EPSILON)
    turn = (count[row, place] - 1).double()
    scaled = torch.zeros_like(rewards, dtype=torch.double).index_put((row, place), centred * gamma**turn)
    later = scaled.flip(1).cumsum(1).flip(1)  # of a token: of its turn's end and all after it
    number = (count - ends.long()).clamp(max=100_000).double()  # turns that have ended before a token
    return (later / gamma**number).masked_fill(~mask, 0.0)


class Igpo(Plugin):
    """Pays turns for information."""

    name = "igpo"
    paper = "arXiv:2510.14967"
    needs = frozenset({"old_log_probs"})

    @dataclass
    class Config:
        gain: str = setting(
            "log_prob_diff",
            "difference of beliefs: of log-probs or of probabilities",
            authors="log_prob_diff",
            choices=("log_prob_diff", "prob_diff"),
        )
        normalize: str = setting(
            "separate",
            "outcomes and gains of a group apart, or together",
            authors="separate",
            choices=("separate", "joint"),
        )
        by_std: bool = setting(True, "divide by the standard deviation", authors=True)
        gamma: float = setting(1.0, "discount per turn", authors=1.0, gt=0, le=1)
        sentence: str = setting(
            "Now there's enough information to answer.</think> <answer>", "between the history and the known answer"
        )
        outcome_weight: float = setting(
            1.0, "of outcomes before they are normalised; acts in joint pools only", authors=1.0, ge=0
        )
        gain_weight: float = setting(1.0, "of gains likewise", authors=1.0, ge=0)

    def check(self, config: DictConfig) -> None:
        if config.algorithm.use_kl_in_reward:
            raise CompositionError(
                "algorithm.use_kl_in_reward=true gives every token a reward, and plugins.igpo pays turns: set it to "
                "false, or use actor_rollout_ref.actor.use_kl_loss=true"
            )

    @hookimpl
    def estimate_advantage(self, run: Run, batch: Batch) -> Tensor:
        mask, scores = batch.response_mask, batch.scores
        ends = ends_of_turns(mask, _told(batch))
        beliefs, states = self._beliefs(run, batch, ends)
        gains, fine = self.gains(beliefs, states, ends)
        outcome = ends & (ends.long().cumsum(1) == ends.long().sum(1, keepdim=True))
        counted = torch.where(fine[:, None], ends, outcome)
        rewards = torch.where(outcome, scores.double()[:, None], gains)
        self._log(run, batch, counted & ~outcome, gains, fine, ends)
        return turn_advantage(
            rewards,
            counted,
            mask,
            batch.groups.index,
            mode=self.config.normalize,
            by_std=self.config.by_std,
            gamma=self.config.gamma,
            weights=(self.config.outcome_weight, self.config.gain_weight),
            counted=batch.is_last,
        ).float()

    def _beliefs(self, run: Run, batch: Batch, ends: Tensor) -> tuple[Tensor, Tensor]:
        """[states] belief before each turn of the responses that have an answer to believe in, [states,2] row and turn.

        A state is the prompt and all of the response that stands before the turn's first token.
        """
        truths = pd.Series(batch.extra("reward_model"), dtype=object).str.get("ground_truth")
        truths = truths.map(lambda truth: truth[0] if isinstance(truth, (list, tuple)) and truth else truth)
        known = torch.tensor([pd.notna(truth) and str(truth) != "" for truth in truths.where(truths.map(_is_text))])
        starts = _starts(batch.response_mask, ends) & known[:, None] & (ends.sum(1) > 1)[:, None]
        row, place = starts.nonzero().unbind(1)
        if not len(row):
            return torch.zeros(0, dtype=torch.double), torch.zeros(0, 2, dtype=torch.long)
        prompts, lengths = batch.extra("prompts"), batch.prompt_lengths.tolist()
        between = run.tokenizer(self.config.sentence, add_special_tokens=False)["input_ids"]
        histories = [
            [*prompts[r][: lengths[r]].tolist(), *batch.responses[r, :p].tolist(), *between]
            for r, p in zip(row.tolist(), place.tolist(), strict=True)
        ]
        answers = run.score(histories, [str(truths[r]) for r in row.tolist()])
        belief = torch.stack([answer.double().mean() for answer in answers])
        turn = starts.long().cumsum(1)[row, place] - 1
        return belief, torch.stack([row, turn], 1)

    def gains(self, beliefs: Tensor, states: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """[B,T] gain at the end of each turn but the last, and [B] bool: rows whose gains are all there."""
        turns = int(ends.sum(1).max()) if len(ends) else 0
        table = torch.full((len(ends), turns + 1), torch.nan, dtype=torch.double)
        table[states[:, 0], states[:, 1]] = beliefs if self.config.gain == "log_prob_diff" else beliefs.exp()
        change = table[:, 1:] - table[:, :-1]
        row, place = ends.nonzero().unbind(1)
        turn = ends.long().cumsum(1)[row, place] - 1
        gains = torch.zeros(ends.shape, dtype=torch.double).index_put((row, place), change[row, turn])
        wanted = torch.arange(turns)[None] < ends.sum(1)[:, None] - 1
        fine = (change[:, :turns].isfinite() | ~wanted).all(1)
        return gains.nan_to_num(0.0, posinf=0.0, neginf=0.0), fine

    def _log(self, run: Run, batch: Batch, at: Tensor, gains: Tensor, fine: Tensor, ends: Tensor) -> None:
        turns, several = ends.sum(1), ends.sum(1) > 1
        run.log(
            {"turns": float(turns.double().mean()), "outcome_mean": float(batch.scores[batch.is_last].double().mean())}
        )
        if several.any():
            run.log({"fallback_frac": float((~fine[several]).double().mean())})
        found = gains[at]
        if len(found):
            run.log(
                {
                    "info_gain_mean": float(found.mean()),
                    "info_gain_std": float(found.std(correction=0)),
                    "info_gain_min": float(found.min()),
                    "info_gain_max": float(found.max()),
                    "frac_positive_gain": float((found > 0).double().mean()),
                }
            )
        flat = batch.groups.std(batch.scores.double()) == 0
        run.log({"groups_zero_outcome_spread": float(flat[batch.groups.first(torch.ones_like(flat))].double().mean())})


def _is_text(truth: Any) -> bool:
    return isinstance(truth, (str, int, float))


def _starts(mask: Tensor, ends: Tensor) -> Tensor:
    """[B,T] bool: the first generated token of each turn."""
    before = (ends.long().cumsum(1) - ends.long()).masked_fill(~mask, -1)
    earlier = torch.nn.functional.pad(before, (1, 0), value=-1)[:, :-1].cummax(1).values
    return mask & (before > earlier)


def _told(batch: Batch) -> Any:
    """What the agent loop said of each row's turns; None where it said nothing."""
    try:
        return batch.extra(TURN_ENDS)
    except DataError:
        return None
