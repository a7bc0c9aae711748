"""What every run shows of itself: how many groups and rows carry a signal, how certain the policy is, what it costs.

Shares of groups count each session once; padding rows and dropped rows do not matter. `Watch` says once, in words, when
training has stopped making sense.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from verl_plugins.batch import Batch
from verl_plugins.errors import DataError

QUANTILES = (0.1, 0.5, 0.9)
PATIENCE = 10
"""Steps in a row that must look wrong before anything is said."""
MOST_TRUNCATED, FEW_GROUPS = 0.9, 0.05


def group_health(batch: Batch) -> dict[str, float]:
    """Reward, accuracy, shares of groups (mixed, all right, all wrong, another size than asked), length by verdict."""
    groups, correct = batch.groups, batch.correct
    one_per_group = groups.first(batch.is_last)
    right, wrong = groups.all(correct)[one_per_group], groups.all(~correct)[one_per_group]
    off_size = (groups.count() != torch.as_tensor(batch.extra("__rollout_n__")))[one_per_group]
    lengths = {
        f"health/length_{which}": float(batch.ends[rows].float().mean())
        for which, rows in (("right", correct & batch.is_last), ("wrong", ~correct & batch.is_last))
        if rows.any()
    }
    return lengths | {
        "health/reward": float(batch.scores[batch.is_last].mean()),
        "health/accuracy": _share(correct[batch.is_last]),
        "health/mixed_groups": _share(~right & ~wrong),
        "health/all_right_groups": _share(right),
        "health/all_wrong_groups": _share(wrong),
        "health/groups_off_size": _share(off_size),
        "health/truncated": _share(batch.truncated[batch.is_last]),
        "health/generated_tokens": float(batch.response_mask.sum()),
    }


def signal_health(batch: Batch) -> dict[str, float]:
    """What the advantages do with the rows they are computed for.

    A row's advantage is the mean over its tokens. `sign_flips` is the share of rows that are pushed against their
    score: advantage and score minus the group's mean have opposite signs. `effective_rows` is (Σ|A|)² / (B ΣA²): 1 when
    all rows weigh the same, 1/B when one row is all there is, 0 without any signal.
    """
    mask = batch.response_mask
    advantage = (batch.advantages * mask).sum(1) / mask.sum(1).clamp(min=1)
    against = advantage * (batch.scores - batch.groups.mean(batch.scores)) < 0
    return {
        "health/zero_advantage_rows": _share(~(batch.advantages * mask).any(1)),
        "health/sign_flips": _share(against),
        "health/effective_rows": _effective(advantage.abs().double()),
    }


def policy_health(batch: Batch) -> dict[str, float]:
    """Entropy per token (mean and quantiles), and how far rollouts are from the policy that is updated.

    `effective_sample_size` is (Σw)² / (B Σw²) of the rows' importance weights, w = Π old probability / rollout
    probability: 1 on-policy. What verl did not compute in this run is left out.
    """
    metrics, mask = {}, batch.response_mask
    if (entropy := _field(batch, "entropy")) is not None:
        tokens = entropy[mask].float().numpy()
        metrics["health/entropy_mean"] = float(tokens.mean())
        for share, value in zip(QUANTILES, np.quantile(tokens, QUANTILES), strict=True):
            metrics[f"health/entropy_q{round(share * 100)}"] = float(value)
    if (rollout := _field(batch, "rollout_log_probs")) is not None and (
        old := _field(batch, "old_log_probs")
    ) is not None:
        log_weight = ((old - rollout) * mask).double().sum(1)
        metrics["health/effective_sample_size"] = _effective((log_weight - log_weight.max()).exp())
    return metrics


def lag_health(batch: Batch) -> dict[str, float]:
    """How old the rows are: optimiser updates since the weights that began them, and the same in steps."""
    return {
        "health/lag_mean": float(batch.lag.float().mean()),
        "health/lag_max": float(batch.lag.max()),
        "health/lag_steps_mean": float(batch.lag_steps.float().mean()),
        "health/lag_steps_max": float(batch.lag_steps.max()),
    }


def reward_parts(batch: Batch) -> dict[str, float]:
    """The mean of each numeric part of the reward, over the responses whose reward has it."""
    last = batch.is_last.nonzero()[:, 0].tolist()
    fields = batch.extra("extra_fields")
    parts = pd.DataFrame([fields[row].get("reward_extra_info", {}) for row in last]).convert_dtypes()
    means = parts.select_dtypes(["number", "boolean"]).mean()
    return {f"reward/{name}": float(mean) for name, mean in means.items()}


class Watch:
    """Looks at the metrics of each step; each sentence is said once per run."""

    def __init__(self) -> None:
        self._bad: dict[str, int] = {}
        self._said: set[str] = set()

    def look(self, metrics: Mapping[str, float]) -> list[str]:
        """What the user should know now."""
        steps = f"for {PATIENCE} steps"
        sentences = {
            f"no group had both right and wrong answers {steps}: there is nothing to learn from; the task is too "
            "hard or too easy for this model": metrics["health/mixed_groups"] == 0,
            f"over {MOST_TRUNCATED:.0%} of the responses were cut off at their token budget {steps}: raise "
            "data.max_response_length": metrics["health/truncated"] > MOST_TRUNCATED,
            f"over {FEW_GROUPS:.0%} of the groups had another size than actor_rollout_ref.rollout.n {steps}: responses "
            "fail (see verl.log) or uids are mixed up": metrics["health/groups_off_size"] > FEW_GROUPS,
        }
        for sentence, bad in sentences.items():
            self._bad[sentence] = self._bad.get(sentence, 0) + 1 if bad else 0
        due = [text for text, steps in self._bad.items() if steps >= PATIENCE and text not in self._said]
        self._said.update(due)
        return due


def _field(batch: Batch, name: str) -> Tensor | None:
    try:
        return getattr(batch, name)
    except DataError:
        return None


def _share(flags: Tensor) -> float:
    return float(flags.float().mean())


def _effective(weights: Tensor) -> float:
    squares = float((weights**2).sum())
    return float(weights.sum()) ** 2 / (len(weights) * squares) if squares > 0 else 0.0
