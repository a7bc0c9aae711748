"""More cases of estimators, from the formulas in plain Python, row by row; `make_more.py` writes them.

Scores on a scale, ragged groups in any order, prompts with a single response, rows without tokens, padding between.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

UID = ["b", "a", "pad-1", "b", "c", "a", "b", "d", "pad-2", "a", "d", "b", "d", "e", "e", "a"]
"""c has a single response; two rows are padding."""
LENGTHS = [3, 0, 0, 2, 1, 4, 3, 1, 0, 2, 4, 4, 2, 3, 3, 1]
RIGHT = [1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1]
GRADED = [1.5, -0.5, 0, 0.25, 2.0, 1.0, 0.75, -1.0, 0, 0.5, -1.0, 3.0, -2.0, 0.5, 0.5, -0.5]
WIDTH = 4


def case(name: str, inputs: dict, params: dict, expected: dict, atol: float = 1e-5) -> dict[str, Any]:
    return {"name": name, "inputs": inputs, "params": params, "expected": expected, "rtol": 1e-4, "atol": atol}


def members(uid: Sequence[str] = UID) -> dict[str, list[int]]:
    """Rows of each prompt, in order of first appearance."""
    found: dict[str, list[int]] = {}
    for row, name in enumerate(uid):
        if not name.startswith("pad"):
            found.setdefault(name, []).append(row)
    return found


def mask() -> list[list[int]]:
    return [[1] * length + [0] * (WIDTH - length) for length in LENGTHS]


def rewarded(scores: Sequence[float]) -> dict[str, Any]:
    """The score of each response on its first place, whether there is a token or not."""
    rewards = [[float(score)] + [0.0] * (WIDTH - 1) for score in scores]
    return {"uid": UID, "token_level_rewards": rewards, "response_mask": mask()}


def on_tokens(values: Sequence[float]) -> list[list[float]]:
    return [[value * one for one in row] for value, row in zip(values, mask(), strict=True)]


def numbers(row: int, count: int, scale: float = 1.0) -> list[float]:
    """Negative log-probs that look like nothing."""
    return [-scale * ((37 * (row + 1) + 53 * (t + 1) ** 2 + 11 * row * t) % 97 + 1) / 50 for t in range(count)]


def grpo(scores: Sequence[float], scale: str = "std", epsilon: float = 1e-6) -> list[float]:
    found = [0.0] * len(UID)
    for rows in members().values():
        own = [scores[row] for row in rows]
        if len(rows) > 1 and len(set(own)) > 1:
            for row in rows:
                off = scores[row] - statistics.fmean(own)
                found[row] = off / (statistics.stdev(own) + epsilon) if scale == "std" else off
    return found


ANSWERS = ["4", None, "", "5", "1", "7", "4", "2", "", "8", "3", "4", "2", "6", "6", None]


def copo(gate: str, coefficient: bool, scale: str, gamma: float, rho: float) -> dict[str, Any]:
    groups, epsilon, rows = members(), 1e-3, range(len(UID))
    entropy, returns = {}, {}
    for name, own in groups.items():
        answers = [ANSWERS[row] or f"none of {row}" for row in own]  # a missing one is like no other
        shares = [answers.count(answer) / len(own) for answer in set(answers)]
        entropy[name] = -sum(share * math.log2(share + 1e-8) for share in shares)
        n = len(own)
        lowered = 1 - entropy[name] * (1 - 1 / n) / math.log2(n) if coefficient and n > 1 else 1
        returns[name] = statistics.fmean(RIGHT[row] for row in own) * lowered
    mean, std = statistics.fmean(returns.values()), statistics.stdev(returns.values())
    local, across, weight = grpo(RIGHT, scale, epsilon), [0.0] * len(UID), [0.0] * len(UID)
    for name, own in groups.items():
        for row in own:
            across[row] = (returns[name] - mean) / (std + epsilon if scale == "std" else 1)
            open_ = 1 / (1 + math.exp(-gamma * (entropy[name] - rho)))
            weight[row] = open_ * RIGHT[row] if gate == "soft-with-zero" else open_
    real = {row: name for name, own in groups.items() for row in own}
    params = {"global_flg": gate, "reward_coef_flg": coefficient, "norm_adv_by_std_in_grpo": scale == "std"}
    expected = {
        "advantages": on_tokens(local),
        "global_adv": on_tokens(across),
        "reward_entropy": [entropy[real[row]] if row in real else 0.0 for row in rows],
        "global_rewards": [returns[real[row]] if row in real else 0.0 for row in rows],
        "local_weight": weight,
        "blended_advantages": on_tokens([w * a + (1 - w) * g for w, a, g in zip(weight, local, across, strict=True)]),
    }
    name = f"{gate}_{scale}{'_coefficient' * coefficient}"
    params |= {"k": gamma, "b": rho, "epsilon": epsilon}
    return case(name, rewarded(RIGHT) | {"extract_answer": ANSWERS}, params, expected)


def lower_median(values: Sequence[float]) -> float:
    return sorted(values)[(len(values) - 1) // 2]


def mc_grpo(scores: Sequence[float], name: str, **params: Any) -> dict[str, Any]:
    """`params` as in the schema; a group is complete with `rollout_n` responses."""
    epsilon, found = params.setdefault("epsilon", 0.01), [0.0] * len(UID)
    median, mad, pivot, keep, dropped = [0.0] * len(UID), [0.0] * len(UID), [0] * len(UID), [1] * len(UID), {}
    for uid, rows in members().items():
        own = [scores[row] for row in rows]
        middle = lower_median(own)
        spread = lower_median([abs(score - middle) for score in own])
        divisor = {"mad": spread + epsilon, "none": 1.0}.get(params["scale"])
        if divisor is None:
            divisor = (statistics.stdev(own) if len(own) > 1 else 0.0) + epsilon
        values = {row: (scores[row] - middle) / divisor for row in rows}
        nonzero = sum(abs(value) > 1e-6 for value in values.values())
        for row, value in values.items():
            value *= len(rows) / nonzero if params.get("rescale_nonzero") and nonzero else 1
            bound = params.get("advantage_clip") or math.inf
            found[row], median[row], mad[row] = max(-bound, min(bound, value)), middle, spread
            pivot[row] = int(scores[row] == middle)
        complete = len(rows) >= params.get("rollout_n", 0)
        dropped[uid] = int(complete or not params.get("drop_only_if_complete"))
        if dropped[uid]:
            keep[next(row for row in rows if pivot[row])] = 0
    expected = {"advantages": on_tokens(found), "seq_advantage": found, "group_median": median, "group_mad": mad}
    expected |= {"pivot_candidate_mask": pivot, "keep_mask": keep, "pivots_dropped_per_uid": dropped}
    return case(name, rewarded(scores), params, expected)


def low_mean(log_probs: Sequence[float], share: float) -> float:
    """Confidence: exp of the mean of the least probable share, one token at least."""
    if not log_probs:
        return 0.0
    count = max(1, math.ceil(share * len(log_probs) - 1e-6))
    return math.exp(statistics.fmean(sorted(log_probs)[:count]))


def progrpo(scores: Sequence[float], name: str, holes: bool = False, **params: Any) -> dict[str, Any]:
    alpha, share = params["alpha"], params["low_prob_ratio"]
    within = [[one * int(not holes or t != 1) for t, one in enumerate(row)] for row in mask()]
    old = [numbers(row, WIDTH) for row in range(len(UID))]
    asked = {uid: 1 + number for number, uid in enumerate(members())}  # tokens of the prompt after its first
    prompts = [numbers(ord(uid[0]), 5) for uid in UID]
    prompt_mask = [[int(t < asked.get(uid, 0)) for t in range(5)] for uid in UID]
    scale = "std" if params["norm_adv_by_std_in_grpo"] else "none"
    found, of_prompt, of_answer = grpo(scores, scale, params["epsilon"]), [0.0] * len(UID), [0.0] * len(UID)
    for uid, rows in members().items():
        right = [scores[row] > 0 for row in rows]
        on = any(right) and not (params["skip_all_correct"] and all(right))
        for row in rows:
            tokens = prompts[row][: asked[uid]]
            of_prompt[row] = low_mean(tokens, share if params["prompt_scope"] == "low" else 1.0)
            of_answer[row] = low_mean([p for p, one in zip(old[row], within[row], strict=True) if one], share)
            found[row] += alpha * (of_prompt[row] - of_answer[row]) if on else 0.0
    inputs = rewarded(scores) | {"response_mask": within, "old_log_probs": old}
    inputs |= {"prompt_log_probs": prompts, "prompt_mask": prompt_mask}
    spread = [[value * one for one in row] for value, row in zip(found, within, strict=True)]
    expected = {"advantages": spread, "prompt_confidence": of_prompt, "answer_confidence": of_answer}
    return case(name, inputs, params, expected)


def adora(variant: str, scores: Sequence[float], threshold: int, name: str, **params: Any) -> dict[str, Any]:
    found, weight, epsilon = grpo(scores, epsilon=1e-6), [1.0] * len(UID), 1e-6
    correct, low, high = 0.5, params.get("lamda", 0.1), params.get("tas_weight", 2.0)
    for rows in members().values():
        right = [LENGTHS[row] for row in rows if scores[row] > correct]
        wrong = [LENGTHS[row] for row in rows if scores[row] <= correct and LENGTHS[row] < threshold]
        longer = bool(right and wrong) and max(right) > statistics.fmean(wrong)
        if variant == "llm":
            value = 1.0 if longer or (right and not wrong) else low
            value = 1.0 if not right and not wrong else value
            value = low if wrong and not right else value
        elif variant == "vlm":
            value = 1.0 if longer or not right else low
            value = low if not wrong else value
            value = 1.0 if not right and not wrong else value
        else:
            few = len(right) / len(rows) <= params.get("success_rate_tau", 0.5)
            value = high if (longer or (right and not wrong)) and few else 1.0
        for row in rows:
            weight[row] = value
            found[row] *= value
    params |= {"variant": variant, "correct_score": correct, "max_length_threshold": threshold, "epsilon": epsilon}
    expected = {"advantages": on_tokens(found), "seq_advantage": found, "weight": weight}
    return case(name, rewarded(scores), params, expected)


BUNDLE = {"b": "x", "a": "x", "c": "y", "d": "y", "e": "z"}
SETTINGS = {
    **{"quantile_down": 0.25, "quantile_up": 0.7, "credit_assign_mode": "uniform", "use_q_track_mode": "batch"},
    **{"use_mixing_risk_measure": False, "w_mix": 1.5, "risk_seeking_upper_tail": False, "upper_weight": 1.5},
    **{"use_mean_as_baseline": False, "natural_baseline_adv": False, "norm_adv_by_std_in_grpo": True},
    **{"epsilon": 1e-6, "q_track_down": None, "q_track_up": None, "g_rvar_avg": 0.0, "g_cvar_avg": 0.0},
    "bundle_std_guard": 0.001,
}


def quantile(values: Sequence[float], level: float) -> float:
    ordered = sorted(values)
    place = level * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def spread_of(values: Sequence[float], guard: float = 1e-3) -> float:
    std = statistics.stdev(values) if len(values) > 1 else 1.0
    return std if std > guard else 1.0


def risk(score: float, low: float, high: float, params: dict[str, Any]) -> float:
    """The advantage of a paper, before it is divided by the deviation of its bundle."""

    def above(value: float) -> float:
        return max(value, 0.0)

    down, up, mean = params["quantile_down"], params["quantile_up"], params["use_mean_as_baseline"]
    rvar = above(score - low) - above(score - high) + (low - high) * params["natural_baseline_adv"]
    rvar = (rvar - params["g_rvar_avg"] * mean) / (up - down + 1e-6)
    if params["use_mixing_risk_measure"]:
        cvar = (-above(low - score) - params["g_cvar_avg"] * mean) / (down + 1e-6)
        return (params["w_mix"] * cvar + rvar) / (params["w_mix"] + 1)
    if params["risk_seeking_upper_tail"]:
        return (params["upper_weight"] * above(score - high) / (1 - up + 1e-6) + rvar) / (params["upper_weight"] + 1)
    return rvar


def limits(scores: Sequence[float], params: dict[str, Any]) -> list[float]:
    own = [quantile(scores, params[level]) for level in ("quantile_down", "quantile_up")]
    tracked = [params["q_track_down"], params["q_track_up"]]
    if params["use_q_track_mode"] == "batch" or tracked[0] is None:
        return own
    return (
        tracked if params["use_q_track_mode"] == "track" else [(a + b) / 2 for a, b in zip(own, tracked, strict=True)]
    )


def riskpo(name: str, scores: Sequence[float] = GRADED, **given: Any) -> dict[str, Any]:
    params, groups, found = SETTINGS | given, members(), [0.0] * len(UID)
    totals, credit = {}, params["credit_assign_mode"]
    for bundle in dict.fromkeys(BUNDLE.values()):
        own = [groups[uid] for uid in groups if BUNDLE[uid] == bundle]
        papers = list(zip(*own, strict=False))  # as many as the smallest group has responses
        totals[bundle] = [sum(scores[row] for row in paper) for paper in papers]
        low, high = limits(totals[bundle], params)
        divisor = spread_of(totals[bundle]) + 1e-6 if params["norm_adv_by_std_in_grpo"] else 1.0
        for paper, total in zip(papers, totals[bundle], strict=True):
            value = risk(total, low, high, params) / divisor
            of_prompt = {row: [scores[other] for other in groups[UID[row]]] for row in paper}
            off = {row: scores[row] - statistics.fmean(of_prompt[row]) for row in paper}
            for row in paper:
                found[row] = {
                    "uniform": lambda row=row, value=value: value,
                    "score": lambda row=row, value=value: value * (0.5 if scores[row] > 0 else 1.5),
                    "std": lambda row=row, value=value, of=of_prompt: value / (spread_of(of[row]) + 1e-6),
                    "sum-mean": lambda row=row, value=value, off=off: (
                        value * off[row] / sum(off.values()) if abs(sum(off.values())) > 1e-6 else value / len(off)
                    ),
                }[credit]()
    inputs = rewarded(scores) | {"bundle_uid": [BUNDLE.get(uid, "pad") for uid in UID]}
    expected = {"advantages": on_tokens(found), "seq_advantage": found}
    expected |= {"bundle_ids": list(totals), "bundle_scores": list(totals.values())}
    return case(name, inputs, params, expected)


LEVELS = [round(0.05 * place, 2) for place in range(1, 20)]


def riskpo_tracker(down: float, up: float, base: bool) -> dict[str, Any]:
    """Steps with different numbers of papers; scores that hit a tracked quantile exactly; levels between two of 19."""
    steps = [[0.0, 1.0, 1.0, 2.0, 5.0], [1.0, 1.0, 4.0, 4.0, 4.0], [-3.0, 2.0, 2.0, 0.5, 9.0]]
    tracked: list[float] = []
    found: dict[str, list[Any]] = {name: [] for name in ("q", "q_track_down", "q_track_up", "g_rvar_avg", "g_cvar_avg")}
    for scores in steps:
        if tracked:
            below = [sum(score < q for score in scores) / len(scores) for q in tracked]
            tracked = [q + 0.2 * (level - share) for q, level, share in zip(tracked, LEVELS, below, strict=True)]
        else:
            tracked = [quantile(scores, level) for level in LEVELS]
        low, high = (tracked[min(range(19), key=lambda k: (abs(LEVELS[k] - at), k))] for at in (down, up))
        between = [max(q - low, 0) - max(q - high, 0) + (low - high) * base for q in tracked]
        tail = [-max(low - q, 0) for q in tracked]
        areas = [sum(0.05 * (a + b) / 2 for a, b in pairwise(values)) for values in (between, tail)]
        for name, value in zip(found, (tracked, low, high, *areas), strict=True):
            found[name].append(value)
    params = {
        "lr_q": 0.2,
        "alpha_list": LEVELS,
        "quantile_down": down,
        "quantile_up": up,
        "natural_baseline_base": base,
    }
    expected = {f"{name}_per_step": values for name, values in found.items()}
    return case(
        f"tracker_{down}_{up}_{'natural' if base else 'plain'}", {"bundle_scores_per_step": steps}, params, expected
    )


PRO = {"alpha": 0.4, "low_prob_ratio": 0.5, "epsilon": 1e-6, "norm_adv_by_std_in_grpo": True}
PRO |= {"skip_all_correct": False, "prompt_scope": "all"}


def cases() -> dict[str, list[dict[str, Any]]]:
    """Of each method."""
    signs = [2 * right - 1 for right in RIGHT]
    mixing = {"use_mixing_risk_measure": True, "use_mean_as_baseline": True, "g_rvar_avg": 0.3, "g_cvar_avg": -0.2}
    tracked = {"q_track_down": 0.4, "q_track_up": 1.6}
    gates = [("soft-with-zero", False, "std", 5, 1), ("soft-with-zero", True, "none", 2, 1.5)]
    return {
        "copo": [
            copo(*gate) for gate in [*gates, ("only-soft", True, "std", 3, 0.5), ("only-soft", False, "none", 5, 1)]
        ],
        "mc_grpo": [
            mc_grpo(GRADED, "mad", scale="mad"),
            mc_grpo(GRADED, "std_rescaled", scale="std", rescale_nonzero=True),
            mc_grpo(GRADED, "none_clipped", scale="none", advantage_clip=0.75),
            mc_grpo(RIGHT, "binary_rescaled_clipped", scale="mad", rescale_nonzero=True, advantage_clip=90.0),
            mc_grpo(GRADED, "complete_only", scale="mad", drop_only_if_complete=True, rollout_n=3),
        ],
        "progrpo": [
            progrpo(RIGHT, "low_scope", **PRO | {"prompt_scope": "low"}),
            progrpo(signs, "signs_skipping_all_correct", **PRO | {"skip_all_correct": True}),
            progrpo(GRADED, "holes", holes=True, **PRO | {"norm_adv_by_std_in_grpo": False, "low_prob_ratio": 0.34}),
            progrpo(RIGHT, "all_tokens", **PRO | {"low_prob_ratio": 1.0, "prompt_scope": "low"}),
        ],
        "adora": [
            adora("llm", RIGHT, 4, "llm_cut_off"),
            adora("llm", GRADED, 5, "llm_scores_at_the_threshold", lamda=0.0),
            adora("vlm", RIGHT, 2, "vlm_cut_off", lamda=0.25),
            adora("vlm", GRADED, 5, "vlm_graded"),
            adora("paper_llm", RIGHT, 4, "paper_half_right"),
            adora("paper_llm", GRADED, 3, "paper_few_right", tas_weight=3.0, success_rate_tau=0.25),
        ],
        "riskpo": [
            riskpo("uniform_own_quantiles"),
            riskpo("score_credit_natural", credit_assign_mode="score", natural_baseline_adv=True),
            riskpo("std_credit_mixed", credit_assign_mode="std", **mixing),
            riskpo("sum_mean_tracked", credit_assign_mode="sum-mean", use_q_track_mode="track", **mixing, **tracked),
            riskpo("upper_tail_mix", use_q_track_mode="mix", risk_seeking_upper_tail=True, upper_weight=0.5, **tracked),
            riskpo("no_std_mean_baseline", norm_adv_by_std_in_grpo=False, use_mean_as_baseline=True, g_rvar_avg=0.2),
            riskpo("equal_papers_tracked", [1.0] * len(UID), use_q_track_mode="track", **tracked),
            riskpo_tracker(0.225, 0.8, True),
            riskpo_tracker(0.1, 0.875, False),
        ],
    }
