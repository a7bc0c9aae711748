"""SIRI: let the response budget swing between a wide and a narrow one, and lengths shrink without a length penalty.

arXiv:2509.25176. Every prompt drawn at step t (updates done, 0 at first) may use L(t) tokens; T is the cycle length:

    cosine         (Lmax+Lmin)/2 + (Lmax-Lmin)/2 cos(2 pi t/T)
    stair          Lmin while t mod T < T/2, then Lmax
    stair-cosine   plateaus of T/4 at Lmax and at Lmin, joined by half cosines

The first half of a cycle is called compression, the second expansion. Rewards stay 0 and 1: a response is judged by
its first L tokens, so one that is cut off before its answer is wrong. It stays in its group and is trained on; these
negative examples do the compressing. Against GRPO only the budget differs. Nothing is remembered: L is a function of
the step, so a resumed run goes on in its phase. Validation is not capped.

In asynchronous modes a prompt keeps the budget of the step that drew it, and truncation is judged by it. Degenerate
cases: Lmin = Lmax is a constant cap; a group cut off as a whole has no advantage and teaches nothing. Ours, where the
paper is silent: rounding to the nearest token, counting from 0, stair's halves in this order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from verl_plugins import Batch, CompositionError, DataError, Plugin, Prompts, Run, hookimpl, setting
from verl_plugins.sampling.prompt_augmentation import SINGLE_TURN, refuse_hidden, refuse_other_loops

THINK_END = "</think>"


def length_budget(t: int, scheduler: str, cycle_length: int, max_length: float, min_length: float) -> float:
    """Section 4.3: the tokens a response may have at step t (from 0), before rounding."""
    place = t % cycle_length / cycle_length
    middle, swing = (max_length + min_length) / 2, (max_length - min_length) / 2
    if scheduler == "stair":
        return min_length if place < 1 / 2 else max_length
    if scheduler == "stair-cosine":
        # The place in a cosine of half the length, held still at both of its ends.
        falling, rising = min(max(place - 1 / 8, 0), 1 / 4), min(max(place - 5 / 8, 0), 1 / 4)
        place = 2 * (falling + rising)
    return middle + swing * math.cos(2 * math.pi * place)


def is_expanding(t: int, cycle_length: int) -> bool:
    """Whether step t is in the second half of its cycle."""
    return 2 * (t % cycle_length) >= cycle_length


class Siri(Plugin):
    """Sets each draw's response budget by a schedule over steps, and reports truncation against that budget."""

    name = "siri"
    paper = "arXiv:2509.25176"

    @dataclass
    class Config:
        scheduler: str = setting(
            "cosine", "shape of a cycle", authors="cosine", choices=("cosine", "stair", "stair-cosine")
        )
        cycle_length: int = setting(640, "steps of a cycle", authors=640, ge=2)
        max_length: int | None = setting(
            None, "widest budget in tokens; default: data.max_response_length", authors=16384, ge=1
        )
        min_length: int | None = setting(
            None, "narrowest budget in tokens; default: half the widest", authors=8192, ge=1
        )
        require_think_end: bool = setting(False, "reward 0 for a response that has not closed its thinking (</think>)")

    def bounds(self, config: DictConfig) -> tuple[int, int]:
        """(widest, narrowest) budget in tokens under verl's configuration."""
        widest = self.config.max_length or int(config.data.max_response_length)
        return widest, self.config.min_length or max(widest // 2, 1)

    def check(self, config: DictConfig) -> None:
        widest, narrowest = self.bounds(config)
        if narrowest > widest:
            raise CompositionError(
                f"plugins.siri.min_length={narrowest} is more than the widest budget of {widest} tokens; "
                "set it to that or less"
            )
        if widest > config.data.max_response_length:
            raise CompositionError(
                f"plugins.siri.max_length={widest} does not fit data.max_response_length="
                f"{config.data.max_response_length}, which sizes rollout and buffers; set both to the widest budget"
            )
        if OmegaConf.select(config, "reward.reward_kwargs.overlong_buffer_cfg.enable"):
            raise CompositionError(
                "reward.reward_kwargs.overlong_buffer_cfg.enable=true punishes long responses, and plugins.siri works "
                "with plain rewards of 0 and 1; set it to false"
            )
        rollout = config.actor_rollout_ref.rollout
        if rollout.multi_turn.enable or rollout.agent.default_agent_loop != SINGLE_TURN:
            raise CompositionError(
                "plugins.siri needs single-turn responses, because the budget would hold for each turn anew; set "
                "actor_rollout_ref.rollout.multi_turn.enable=false and "
                f"actor_rollout_ref.rollout.agent.default_agent_loop={SINGLE_TURN}"
            )

    @hookimpl
    def prepare_prompts(self, run: Run, prompts: Prompts) -> None:
        if self.config.require_think_end:
            refuse_hidden(f"siri: {THINK_END!r}", run, THINK_END)
        t = run.step - 1
        budget = round(length_budget(t, self.config.scheduler, self.config.cycle_length, *self.bounds(run.config)))
        for prompt in prompts:
            refuse_other_loops("siri", prompt, "each of its turns would have the budget anew")
            prompt.max_tokens = budget
        run.log(
            {
                "max_length": budget,
                "phase": is_expanding(t, self.config.cycle_length),
                "cycle_index": t // self.config.cycle_length,
            }
        )

    @hookimpl
    def shape_rewards(self, run: Run, batch: Batch) -> None:
        longer = batch.ends > batch.budgets
        if bool(longer.any()):
            row = int(longer.nonzero()[0])
            raise DataError(
                f"siri: response {batch.keys[row]} has {int(batch.ends[row])} tokens, more than its budget of "
                f"{int(batch.budgets[row])}; the rollout ignored max_tokens"
            )
        if self.config.require_think_end:
            ended = torch.tensor(pd.Series(batch.text).str.contains(THINK_END, regex=False).to_numpy(bool))
            batch.rewards = torch.where(ended[:, None], batch.rewards, batch.rewards.clamp(max=0))

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        batch = batch.full
        last, scores = batch.is_last, batch.scores
        truncated, correct, budgets = (part[last] for part in (batch.truncated, batch.correct, batch.budgets.float()))
        no_signal = batch.groups.min(scores) == batch.groups.max(scores)
        run.log(
            {
                "budget_min": float(budgets.min()),
                "budget_max": float(budgets.max()),
                "truncated_frac": float(truncated.float().mean()),
                "mean_length_over_cap": float((batch.ends[last] / budgets).mean()),
                "no_signal_rows": float(no_signal[last].float().mean()),
                "all_truncated_rows": float(batch.groups.all(batch.truncated)[last].float().mean()),
            }
        )
        if bool(truncated.any()):
            run.log({"accuracy_truncated": float(correct[truncated].float().mean())})
        if not bool(truncated.all()):
            run.log({"accuracy_finished": float(correct[~truncated].float().mean())})
