"""Columns of the studies beside this file that are more than a metric over some steps: functions of a run."""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from verl_plugins.commands.curves import Run
from verl_plugins.commands.study.columns import validations
from verl_plugins.cpu.task import TaskSettings

SUM = re.compile(r"\b\d(\+\d)+=")
"""A prompt of the CPU task."""
DUMPS = {"rollouts": "rollouts", "validation": "validations"}
"""What is dumped -> folder of the run, as the studies name it in trainer.rollout_data_dir and validation_data_dir."""


def _dumped(run: Run, kind: str, step: int) -> Iterator[Mapping[str, Any]]:
    file = run.folder / DUMPS[kind] / f"{step}.jsonl"
    yield from map(json.loads, file.read_text().splitlines() if file.exists() else ())


def _trained(run: Run) -> Iterator[Mapping[str, Any]]:
    """The metrics of each step."""
    return (row.dropna().to_dict() for step, row in run.steps.iterrows() if step > 0)


def level_accuracy(run: Run, level: int, last: bool = True) -> float | None:
    """Accuracy of sampled answers to held-out prompts of one level of the CPU task, in the last or first validation."""
    right = _of_level(run, level, last)
    return statistics.fmean(itertools.chain(*right.values())) if right else None


def level_solved(run: Run, level: int, last: bool = True) -> float | None:
    """Share of these prompts of which any answer was right: pass@k of the k samples of a validation."""
    right = _of_level(run, level, last)
    return statistics.fmean(any(answers) for answers in right.values()) if right else None


def _of_level(run: Run, level: int, last: bool) -> dict[str, list[float]]:
    """Held-out prompt -> whether each of its answers was right."""
    found, right = validations(run), {}
    for row in _dumped(run, "validation", int(found.index[-1 if last else 0])) if len(found) else ():
        asked = SUM.search(row["input"])
        if asked and sum(int(digit) >= TaskSettings.large_from for digit in asked[0][:-1].split("+")) == level:
            right.setdefault(asked[0], []).append(row["acc"])
    return right


def distinct(run: Run, first: int, last: int) -> float | None:
    """Mean number of different answers to a prompt in the rollouts of the steps from `first` to `last`."""
    counts = []
    for step in range(first, last + 1):
        answers: dict[str, set[str]] = {}
        for row in _dumped(run, "rollouts", step):
            answers.setdefault(row["input"], set()).add(row["output"])
        if answers:
            counts.append(statistics.fmean(map(len, answers.values())))
    return statistics.fmean(counts) if counts else None


def groups_with_signal(run: Run) -> float:
    """Share of prompts that teach something, over all steps: for copo its own metric, else the mixed ones."""
    own, mixed = "plugins/copo/groups_with_signal", "health/mixed_groups"
    return statistics.fmean(step.get(own, step[mixed]) for step in _trained(run))


def groups_with_success(run: Run) -> float:
    """Share of groups that are not all wrong, over all steps."""
    return 1 - statistics.fmean(step["health/all_wrong_groups"] for step in _trained(run))


def rows_with_signal(run: Run) -> float:
    """Share of rows whose advantage is not 0, over all steps."""
    return 1 - statistics.fmean(step["health/zero_advantage_rows"] for step in _trained(run))


def advantage_variance(run: Run) -> float:
    """Mean over steps of the variance of the advantages, by formula for grpo: (n-1)/n of the rows that have one."""
    own, steps = "plugins/bnpo/advantage_var", [*_trained(run)]
    if own in steps[0]:
        return statistics.fmean(step[own] for step in steps)
    size, none = "plugins/grpo/group_size_min", "plugins/grpo/zero_advantage_rows"
    return statistics.fmean((1 - 1 / step[size]) * (1 - step[none]) for step in steps)


def reweighted(run: Run) -> float | None:
    """Share of groups whose weight ADORA changed: the advantageous ones where these are scaled up, else the others."""
    steps = [*_trained(run)]
    if "plugins/adora/frac_tas" not in steps[0]:
        return None
    changed = "tas" if max(step["plugins/adora/weight_mean"] for step in steps) > 1 else "tds"
    return statistics.fmean(step[f"plugins/adora/frac_{changed}"] for step in steps)


def law_at_half(run: Run, key: str) -> float | None:
    """A number of the entropy law as it was after half of the steps; None where there was none."""
    steps = [*_trained(run)]
    return steps[len(steps) // 2 - 1].get(f"plugins/entropy_law/{key}")


def law_error(run: Run) -> float | None:
    """How far the law of the first half is from the scores of the second: root mean square."""
    steps = [*_trained(run)]
    half, a, b = len(steps) // 2, law_at_half(run, "a"), law_at_half(run, "b")
    entropy = {step["step"]: step["plugins/entropy_law/entropy"] for step in steps}
    later = [(entropy[step + 1], value) for step, value in validations(run).items() if half <= step < len(steps)]
    if a is None or not later:
        return None
    return statistics.fmean((value - b + a * math.exp(h)) ** 2 for h, value in later) ** 0.5
