"""Writes data/grpo.json: inputs, and what verl's own estimator makes of them in float64.

python tests/golden/make_grpo.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

VERL = "verl==0.9.1 verl.trainer.ppo.core_algos.compute_grpo_outcome_advantage"
FORMULA = "formula"


def make_inputs(uid: list[str], scores: list[float], lengths: list[int], tokens: int) -> dict[str, Any]:
    """Each score on the last token of its response."""
    rewards = np.zeros((len(uid), tokens))
    rewards[np.arange(len(uid)), np.maximum(lengths, 1) - 1] = scores
    mask = (np.arange(tokens)[None] < np.array(lengths)[:, None]).astype(int)
    return {"token_level_rewards": rewards.tolist(), "response_mask": mask.tolist(), "uid": uid}


def case(name: str, inputs: dict[str, Any], by_std: bool = True, epsilon: float = 1e-6, note: str = "") -> dict:
    """A case with verl's answer."""
    advantages, _ = compute_grpo_outcome_advantage(
        torch.tensor(inputs["token_level_rewards"], dtype=torch.float64),
        torch.tensor(inputs["response_mask"], dtype=torch.float64),
        np.array(inputs["uid"], dtype=object),
        epsilon=epsilon,
        norm_adv_by_std_in_grpo=by_std,
    )
    return record(name, inputs, by_std, epsilon, advantages.numpy(), VERL, note)


def zeros(name: str, inputs: dict[str, Any], rows: list[bool], note: str, by_std: bool = True) -> dict:
    """A case in which `rows` are exactly 0 by definition; the others keep verl's answer."""
    found = case(name, inputs, by_std)
    advantages = np.array(found["expected"]["advantages"])
    advantages[rows] = 0
    return record(name, inputs, by_std, 1e-6, advantages, FORMULA, note)


def record(name, inputs, by_std, epsilon, advantages, produced_by, note) -> dict:
    params = {"epsilon": epsilon, "norm_adv_by_std_in_grpo": by_std}
    expected = {"advantages": advantages.round(12).tolist()}
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    noted = {"note": note} if note else {}
    return (
        {"name": name, "inputs": inputs, "params": params, "expected": expected}
        | tolerance
        | {"produced_by": produced_by}
        | noted
    )


def make_cases() -> list[dict]:
    rng = np.random.default_rng(20260201)
    binary = make_inputs(["a"] * 4 + ["b"] * 4, [1, 0, 0, 1, 0, 0, 0, 1], rng.integers(1, 6, 8).tolist(), 5)
    uid = rng.permutation(np.repeat(["p0", "p1", "p2"], [5, 3, 8])).tolist()
    scores = rng.normal(0.2, 0.7, 16).round(4).tolist()
    shuffled = make_inputs(uid, scores, rng.integers(1, 8, 16).tolist(), 7)
    ragged = make_inputs(["a", "b", "a", "b", "a", "b"], [0.5, 2, 1.5, -1, 0, 0.25], [6, 1, 0, 3, 2, 6], 6)
    ragged["response_mask"][0] = [1, 1, 0, 0, 1, 1]
    equal = make_inputs(["a"] * 12 + ["b"] * 4, [0.1] * 12 + [0.1, 0.7, 0.1, 0.7], [2] * 16, 3)
    alone = make_inputs(["a", "b", "b", "c"], [1.0, 1.0, 0.0, -0.5], [2, 3, 1, 3], 3)
    return [
        case("binary_groups_of_4", binary),
        case("continuous_uneven_groups_shuffled", shuffled),
        case("dr_grpo_without_std", shuffled, by_std=False),
        case("large_epsilon", shuffled, epsilon=0.5),
        case("ragged_masks", ragged, note="row 0 has tool tokens inside, row 2 an empty mask: its score still counts"),
        zeros("equal_groups_are_exactly_zero", equal, [True] * 12 + [False] * 4, "verl: up to 0.26 in such a group"),
        zeros("group_of_one_is_zero", alone, [True, False, False, True], "verl: the raw score"),
        zeros("group_of_one_without_std", alone, [True, False, False, True], "verl: the raw score", by_std=False),
    ]


if __name__ == "__main__":
    data = {"id": "grpo", "produced_by": f"{VERL}, float64", "stage": "advantage", "cases": make_cases()}
    target = Path(__file__).parent / "data" / "grpo.json"
    target.write_text(json.dumps(data) + "\n", encoding="utf-8")
