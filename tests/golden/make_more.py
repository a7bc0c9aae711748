"""Cases of the schema that the recorded ones do not have, from the formulas of the papers in plain Python.

    python tests/golden/make_more.py        writes data/<id>_more.json

Prompts with a single response, rows without tokens, padding in the middle, empty lists, null for what is missing.
Nothing here is taken from the package: each function says a formula once more, row by row. A single response has 0 as
in the package, or its score as in verl and in the authors' codes (`authors`): a replay takes both.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import more_advantage
import more_loss
import more_trees

DATA = Path(__file__).parent / "data"
UID = ["b", "a", "pad-1", "b", "c", "a", "b", "pad-2", "a", "d", "d"]
"""c has a single response, two rows are padding."""
SCORES = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]
LENGTHS = [3, 0, 0, 2, 1, 4, 3, 0, 2, 4, 1]
"""The second response has no token."""
WIDTH = 4


def write(method: str, cases: list[dict[str, Any]]) -> None:
    text = {"id": method, "produced_by": "tests/golden/make_more.py: the formula in plain Python", "cases": cases}
    (DATA / f"{method}_more.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


def case(name: str, inputs: dict, params: dict, expected: dict, atol: float = 1e-6) -> dict[str, Any]:
    return {"name": name, "inputs": inputs, "params": params, "expected": expected, "rtol": 1e-5, "atol": atol}


def members() -> dict[str, list[int]]:
    """Rows of each prompt, in order of first appearance."""
    found: dict[str, list[int]] = {}
    for row, uid in enumerate(UID):
        if not uid.startswith("pad"):
            found.setdefault(uid, []).append(row)
    return found


def rows_of_rewards() -> dict[str, Any]:
    """The score of each response on its first place, whether there is a token or not."""
    return {
        "uid": UID,
        "token_level_rewards": [[score] + [0.0] * (WIDTH - 1) for score in SCORES],
        "response_mask": [[1] * length + [0] * (WIDTH - length) for length in LENGTHS],
    }


def on_tokens(values: list[float]) -> list[list[float]]:
    return [[value] * length + [0.0] * (WIDTH - length) for value, length in zip(values, LENGTHS, strict=True)]


def a_grae(variant: str, scale: bool, alpha: float = 1.0, epsilon: float = 1e-6) -> dict[str, Any]:
    found, groups = [0.0] * len(UID), members()
    mean = {uid: statistics.fmean(SCORES[row] for row in rows) for uid, rows in groups.items()}
    omega = statistics.fmean(SCORES[row] for rows in groups.values() for row in rows)
    if variant == "code":
        omega = statistics.fmean(mean[uid] if len(rows) > 1 else 0 for uid, rows in groups.items())
    for uid, rows in groups.items():
        if len(rows) < 2 or not 0 < mean[uid] < 1:
            continue
        std, p = statistics.stdev(SCORES[row] for row in rows), mean[uid]
        hard, easy, small = math.sqrt(p), math.sqrt(1 - p), 0.0
        if variant == "code":
            easy, small = 1 - hard, 1e-6
        factor = 0.5 * omega / (hard + small) + 0.5 * (1 - omega) / (easy + small)
        for row in rows:
            advantage = (SCORES[row] - p) / (std + epsilon if scale else 1) * factor
            found[row] = advantage * min(1, omega / alpha) if advantage > 0 else advantage
    params = {"variant": variant, "alpha": alpha, "norm_adv_by_std_in_grpo": scale}
    expected = {"advantages": on_tokens(found), "seq_advantage": found, "omega": omega}
    return case(f"{variant}_{'std' if scale else 'no_std'}_alpha_{alpha:g}", rows_of_rewards(), params, expected)


def bnpo(max_weight: float, authors: bool = False) -> dict[str, Any]:
    groups, found = members(), [0.0] * len(UID)
    rate = {uid: statistics.fmean(SCORES[row] for row in rows) for uid, rows in groups.items()}
    several = [rate[uid] for uid, rows in groups.items() if len(rows) > 1]
    mean, variance = statistics.fmean(several), statistics.variance(several)
    c = mean * (1 - mean) / variance - 1
    a, b = max(1.0, 1 + c * mean / 3), max(1.0, 1 + c * (1 - mean) / 3)
    weight: dict[str, float | None] = {}
    for uid, rows in groups.items():
        p = rate[uid]
        weight[uid] = None
        if 0 < p < 1:
            density = p ** (a - 1) * (1 - p) ** (b - 1) * math.gamma(a + b) / math.gamma(a) / math.gamma(b)
            weight[uid] = min(max_weight, 1 / density)
            for row in rows:
                found[row] = weight[uid] * (SCORES[row] - p)
        if authors and len(rows) == 1:
            found[rows[0]] = SCORES[rows[0]]
    expected = {"advantages": on_tokens(found), "seq_advantage": found, "alpha": a, "beta": b}
    order = sorted(groups)
    expected |= {"uid_order": order, "p": [rate[uid] for uid in order], "weight": [weight[uid] for uid in order]}
    name = f"lone_and_empty_weight_to_{max_weight:g}{'_authors' * authors}"
    return case(name, rows_of_rewards(), {"max_weight": max_weight}, expected)


def drpo(wrong: float, right: float, threshold: float) -> dict[str, Any]:
    budget, tau, temperature = 8, 10.0, 0.1
    scores = [right if score else wrong for score in SCORES]
    old = [[-0.1 * (row + 1) - 0.05 * t for t in range(WIDTH)] for row in range(len(UID))]
    weight, groups = [0.0] * len(UID), {uid: [r for r in rows if LENGTHS[r]] for uid, rows in members().items()}
    for rows in groups.values():
        good, bad = ([row for row in rows if (scores[row] > threshold) == one] for one in (True, False))
        if not good or not bad:
            continue
        sizes = {row: math.exp((1 - LENGTHS[row] / budget) / temperature) for row in good}
        sizes |= {row: math.exp(statistics.fmean(old[row][: LENGTHS[row]]) / tau) for row in bad}
        for part, sign in ((good, 1), (bad, -1)):
            for row in part:
                weight[row] = sign * sizes[row] / sum(sizes[other] for other in part)
    advantages = on_tokens([w / max(length, 1) for w, length in zip(weight, LENGTHS, strict=True)])
    prompts = sum(bool(rows) for rows in groups.values())
    inputs = {"uid": UID, "response_mask": rows_of_rewards()["response_mask"], "old_log_probs": old}
    params = {"tau": tau, "Lambda": temperature, "max_response_length": budget, "correct_threshold": threshold}
    expected = {"advantages": advantages, "num_questions": prompts}
    return case(f"scores_{wrong:g}_and_{right:g}", inputs | {"seq_level_rewards": scores}, params, expected)


def entropy_law() -> list[dict[str, Any]]:
    entropy = [0.9, None, 0.7, 0.5, 0.4, 0.2]
    score = [0.1, 0.2, None, 0.35, 0.36, 0.5]
    pairs = [(math.exp(h), r) for h, r in zip(entropy, score, strict=True) if h is not None and r is not None]
    slope, b = statistics.linear_regression(*zip(*pairs, strict=True))
    at = [None if h is None else slope * math.exp(h) + b for h in entropy]
    expected = {"n_used": 4, "a": -slope, "b": b, "ceiling": b + slope, "law_applies": True, "predicted": at}
    nothing = dict.fromkeys(("a", "b", "ceiling", "r2"))
    constant = {"a": 0.0, "b": 0.25, "ceiling": None, "r2": None, "law_applies": False, "n_used": 3}
    return [
        case("missing_points", {"entropy": entropy, "performance": score}, {"n_fit": None}, expected),
        case("constant_score", {"entropy": [0.3, 0.2, 0.1], "performance": [0.25] * 3}, {"n_fit": None}, constant),
        case(
            "no_complete_point",
            {"entropy": [0.3, None], "performance": [None, 0.2]},
            {"n_fit": None},
            nothing | {"n_used": 0, "law_applies": False},
        ),
    ]


def vade() -> list[dict[str, Any]]:
    alpha, beta = [1.0, 2.0, 0.0], [0.5, 0.0, 4.0]
    decays = {"op": "update", "lambda_selected": 0.5, "lambda_unselected": 0.9}
    nobody = {"observed_ids": [], "correct": [], "n_rollouts": []}
    twice = {"observed_ids": [2, 0, 2], "correct": [1, 0, 3], "n_rollouts": [4, 0, 4]}
    faded = {"alpha": [0.9 * a for a in alpha], "beta": [0.9 * b for b in beta]}
    summed = {"alpha": [0.9, 1.8, 4.0], "beta": [0.45, 0.0, 0.5 * 4 + 4]}
    return [
        case("nobody_came_back", {"alpha": alpha, "beta": beta} | nobody, decays, faded),
        case("one_prompt_twice_and_one_without_responses", {"alpha": alpha, "beta": beta} | twice, decays, summed),
        case("nobody_is_asked", {"theta": [0.1, 0.5]}, {"op": "select", "batch_size": 0}, {"selected_ids": []}),
        case("any_order", {"theta": [0.1, 0.3, 0.9]}, {"op": "select", "batch_size": 2}, {"selected_ids": [0, 1]}),
    ]


def siri() -> dict[str, Any]:
    inputs = {"length_cap": [4, 4, 4, 4], "response_length": [0, 4, 6, 3]}
    inputs |= {"answer_end": [None, 4, 4, None], "answer_correct": [0, 1, 1, 0]}
    return case("no_answer_and_no_token", inputs, {}, {"reward": [0, 1, 1, 0], "truncated": [0, 0, 1, 0]})


def ttrl() -> list[dict[str, Any]]:
    params = {"n_samples_per_prompt": 2, "grader": "exact", "missing": "excluded"}
    nobody = {"majority_answer": None, "rewards": [0, 0, 0], "train_rewards": [0, 0], "label_accuracy": 0.0}
    unlabelled = {"majority_answer": "5", "rewards": [0, 1, 1], "train_rewards": [0, 1], "majority_ratio": 2 / 3}
    return [
        case("nobody_answered", {"answers": [None, "", None], "ground_truth": "5"}, params, nobody),
        case("without_a_label", {"answers": ["3", "5", "5"], "ground_truth": None}, params, unlabelled),
    ]


def r3() -> list[dict[str, Any]]:
    half = 0.5**0.5
    rewards = [[1.5, 0.0], [0.0, 1.0], [0.0, 0.0], [2.0, 0.0], [0.0, 0.0]]
    mask = [[1, 1], [1, 1], [1, 0], [1, 0], [0, 0]]
    inputs = {"uid": ["a", "b", "b", "c", "pad-9"], "token_level_rewards": rewards, "response_mask": mask}
    advantages = [[0, 0], [half, half], [-half, 0], [0, 0], [0, 0]]
    params = {"op": "mixed_advantage", "alpha": 2.0, "lam": 1e-6, "std_ddof": 1}
    select = {"buffer": [], "current_correct": {"a": [0, 0], "b": [1, 0]}}
    return [
        case("lone_and_padding", inputs | {"is_replay": [0] * 5}, params, {"advantages": advantages}, atol=1e-5),
        case(
            "nothing_stored",
            select,
            {"op": "replay_select", "k": 2, "strategy": "recent"},
            {"entry_ids": {"a": [], "b": []}},
        ),
        case("no_prompt_seen", {"history_outcome": {}}, {"op": "isr_trigger", "tau": 0.5, "epoch": 2}, {"hard": []}),
    ]


def a_grae_authors() -> dict[str, Any]:
    """The lone response has its score over 1 + epsilon, times the factor of positive advantages."""
    one = a_grae("paper", True)
    row, omega = UID.index("c"), one["expected"]["omega"]
    value = SCORES[row] / (1 + 1e-6) * min(1, omega)
    one["expected"]["seq_advantage"][row] = value
    one["expected"]["advantages"][row] = [value] * LENGTHS[row] + [0.0] * (WIDTH - LENGTHS[row])
    return one | {"name": "lone_as_the_authors"}


def nothing_but_padding(**params: Any) -> dict[str, Any]:
    zeros = [[0.0] * 3] * 2
    inputs = {name: zeros for name in ("old_log_probs", "log_prob", "advantages")} | {"response_mask": [[0] * 3] * 2}
    expected = {"pg_loss": 0.0, "grad_log_prob": zeros, "selected_mask": zeros}
    return case("nothing_but_padding", inputs, params | {"batch_num_tokens": 1}, expected)


def sage() -> list[dict[str, Any]]:
    """The first has no hint; the second none of level 1; the third is solved without; levels beyond are never asked."""
    rewards = [[[0, 0], [0, 0], [1, 0]], [None, None, None], [None, [0, 1], None], [None, None, None]]
    hints = [None, {"level_1": "", "level_2": "two", "level_3": None}, None]
    params = {"op": "escalate", "group_size": 2, "max_level": 3, "success_threshold": 0.0}
    expected = {"level": [0, 2, 0], "rewards": [[0, 0], [0, 1], [1, 0]], "accuracy": [0, 0.5, 0.5]}
    expected |= {"prompts_rolled_out_at_level": [0, 1, 0]}
    return [
        case("levels_that_are_missing", {"rewards_by_level": rewards, "hints": hints}, params, expected),
        case("no_text", {"text": []}, {"op": "parse_hint"}, {"payload": []}),
    ]


def main() -> None:
    settings = [("paper", True, 1.0), ("paper", False, 0.5), ("code", True, 1.0), ("code", False, 1.0)]
    write("a_grae", [*(a_grae(*one) for one in settings), a_grae_authors()])
    write("bnpo", [bnpo(1e6), bnpo(0.5), bnpo(1e6, authors=True)])
    write("clip_cov", [nothing_but_padding(seed=None)])
    write("drpo", [drpo(-1.0, 1.0, 0.0), drpo(0.25, 3.0, 0.25)])
    write("entropy_law", entropy_law())
    write("kl_cov", [nothing_but_padding()])
    write("r3", r3())
    write("sage", sage())
    write("siri", [siri()])
    write("spo_tree", more_trees.cases())
    write("ttrl", ttrl())
    write("vade", vade())
    of_losses = more_loss.cases()
    for method, found in (of_losses | more_advantage.cases()).items():
        write(method, [*found, *(of_losses.get(method, []) if method in more_advantage.cases() else [])])


if __name__ == "__main__":
    main()
