"""What every run shows of its groups: how many carry a signal. Sessions count once, padding and drops do not matter."""

from __future__ import annotations

from verl_plugins.batch import Batch


def group_health(batch: Batch) -> dict[str, float]:
    """Accuracy and the shares of mixed, all-right and all-wrong groups of a step's rollouts."""
    groups, correct = batch.groups, batch.correct
    one_per_group = groups.first(batch.is_last)
    right, wrong = groups.all(correct)[one_per_group], groups.all(~correct)[one_per_group]
    return {
        "health/accuracy": float(correct[batch.is_last].float().mean()),
        "health/mixed_groups": float((~right & ~wrong).float().mean()),
        "health/all_right_groups": float(right.float().mean()),
        "health/all_wrong_groups": float(wrong.float().mean()),
    }
