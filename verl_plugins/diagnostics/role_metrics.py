"""Roles that share one policy: rewards, entropy, action gap and decisions of each. It only measures.

arXiv:2601.05509 trains one Q-network for all players of a game; where exploration drives it into the defecting answer,
the distance |Q(C) - Q(D)| between its two actions vanishes. The language-model form is ours. For the rows of a role,
with the masks of their response tokens and the policy before the update:

    reward         mean over sessions of the role's reward
    entropy        mean over the role's tokens
    action_gap     mean over the role's tokens of log p(likeliest) - log p(second), in the place of |Q(C) - Q(D)|
    decision_rate  mean of a flag that says whether the role took the cooperative action

    alarm          over the last `window` steps, newer half against older half: the action gap of all tokens fell by
                   more than the share `gap_fall`, and the distance between the best and the worst role's reward grew by
                   more than `reward_rise`

What differs from GRPO: nothing, no reward, row or loss is changed.

Degenerate cases: a role that is not in the batch has no metrics; one whose responses are all empty has neither entropy
nor gap; with one role alone there is no alarm, nor before `window` steps with two and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl_plugins import Batch, DataError, Groups, Plugin, Run, hookimpl, setting

MOST_ROLES = 64
"""Each has metrics of its own."""


def role_summary(
    roles: Sequence[str],
    mask: Tensor,
    rewards: Tensor,
    entropy: Tensor | None = None,
    gap: Tensor | None = None,
    decision: Tensor | None = None,
    counted: Tensor | None = None,
) -> dict[str, dict[str, float | None]]:
    """What is measured, by role in order of names; None of what a role has no token for.

    Args:
        roles: [B] the role of each row.
        mask: [B,T] tokens that count.
        rewards: [B].
        entropy: [B,T], or None if it is not asked for, as the next two.
        gap: [B,T] log p(likeliest) - log p(second).
        decision: [B] flags.
        counted: [B] bool, rows whose reward and decision count; None counts all.
    """
    groups, of_rows = Groups(list(roles)), Groups(list(roles), counted)
    tokens = mask.double().sum(1)
    columns = {"reward_mean": of_rows.mean(rewards.double())}
    for name, values in (("entropy", entropy), ("action_gap", gap)):
        if values is not None:
            sums = groups.sum(torch.where(mask.bool(), values.double(), 0.0).sum(1))
            columns[name] = sums / groups.sum(tokens)
    if decision is not None:
        columns["decision_rate"] = of_rows.mean(decision.double())
    table = {"count": of_rows.per_group(of_rows.count()).tolist()}
    table |= {name: groups.per_group(values).tolist() for name, values in columns.items()}
    order = np.argsort(groups.labels).tolist()
    return {
        str(groups.labels[k]): {name: None if np.isnan(of[k]) else of[k] for name, of in table.items()} for k in order
    }


def diverging(gaps: Sequence[float], spreads: Sequence[float], gap_fall: float, reward_rise: float) -> bool:
    """Whether, newer half against older half, the gap fell by this share and the rewards' distance grew by so much."""
    half = len(gaps) // 2
    (old_gap, gap), (old_spread, spread) = ((np.mean(of[:half]), np.mean(of[half:])) for of in (gaps, spreads))
    return bool(gap < (1 - gap_fall) * old_gap and spread > old_spread + reward_rise)


class RoleMetrics(Plugin):
    """Says of each role how it is rewarded and how sure the shared policy is of its actions."""

    name = "role_metrics"
    paper = "arXiv:2601.05509"
    needs = frozenset({"entropy", "top2_gap"})

    @dataclass
    class Config:
        role: str = setting("role", "column that names the role of a row, as agent_name does where loops are roles")
        decision: str = setting("", "column with 1 where a row took the cooperative action, else 0; none: no rate")
        window: int = setting(20, "steps over which the alarm looks", ge=2)
        gap_fall: float = setting(0.2, "alarm: share of the action gap that is lost", ge=0, le=1)
        reward_rise: float = setting(0.05, "alarm: growth of the distance between the roles' rewards", ge=0)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.gaps, self.spreads = np.zeros(0), np.zeros(0)
        """[steps with two and more roles] of all tokens, and between the best and the worst role."""

    @hookimpl
    def observe(self, run: Run, batch: Batch) -> None:
        roles = batch.labels(self.config.role)
        if len(set(roles)) > MOST_ROLES:
            raise DataError(
                f"plugins.role_metrics.role={self.config.role}: the step has {len(set(roles))} of them, at most "
                f"{MOST_ROLES} can be told apart; choose another column"
            )
        mask = batch.response_mask
        decision = batch.numbers(self.config.decision) if self.config.decision else None
        rewards = torch.where(mask, batch.rewards, 0.0).sum(1)
        counted = last_of_role(batch, roles)
        found = role_summary(roles, mask, rewards, batch.entropy, batch.top2_gap, decision, counted)
        for role, values in found.items():
            names = {"reward": "reward_mean", "rows": "count"}
            names |= {name: name for name in ("entropy", "action_gap", "decision_rate") if name in values}
            run.log({f"{role}/{name}": values[of] for name, of in names.items() if values[of] is not None})
        run.log({"roles": len(found)})
        self._watch(run, batch, [values["reward_mean"] for values in found.values()])

    def _watch(self, run: Run, batch: Batch, rewards: Sequence[float]) -> None:
        tokens = batch.response_mask.sum()
        if len(rewards) < 2 or not tokens:
            return
        gap = torch.where(batch.response_mask, batch.top2_gap.double(), 0.0).sum() / tokens
        spread = max(rewards) - min(rewards)
        window = self.config.window
        self.gaps = np.append(self.gaps, float(gap))[-window:]
        self.spreads = np.append(self.spreads, spread)[-window:]
        run.log({"reward_spread": spread, "action_gap": float(gap)})
        if len(self.gaps) == window:
            run.log({"alarm": diverging(self.gaps, self.spreads, self.config.gap_fall, self.config.reward_rise)})

    def state_dict(self) -> dict[str, Any]:
        return {"gaps": self.gaps.copy(), "spreads": self.spreads.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gaps, self.spreads = np.array(state["gaps"]), np.array(state["spreads"])


def last_of_role(batch: Batch, roles: Sequence[str]) -> Tensor:
    """[B] bool: of the rows of a session that have the same role, the last one."""
    pairs = np.stack([batch.sessions.index.numpy(), Groups(list(roles)).index.numpy()], 1)
    of_pair = Groups(np.unique(pairs, axis=0, return_inverse=True)[1].ravel())
    return batch.turn == of_pair.max(batch.turn)
