"""More cases of losses, selection and format rewards, from the formulas in plain Python; `make_more.py` writes them.

Masks with holes, rows without tokens, probabilities near 0 and 1, ratios beyond every clip, values on a threshold.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from more_advantage import GRADED, RIGHT, UID, WIDTH, case, grpo, lower_median, members, numbers, quantile, rewarded

Grid = list[list[float]]
MASK = [[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
OLD = [numbers(row, WIDTH, 1.5) for row in range(len(MASK))]
RATIO = [
    [1.0, 1.1, 0.5, 1.4],
    [0.85, 9.0, 12.0, 0.1],
    [2.0, 2.0, 2.0, 2.0],
    [5.0, 0.3, 1.0, 1.0],
    [1.25, 0.7, 1.0, 3.0],
]
ADVANTAGE = [1.0, -0.5, 2.0, -2.0, 0.75]
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3, "clip_ratio_c": 3.0, "loss_agg_mode": "token-mean"}


def moved(old: Grid, ratio: Grid) -> Grid:
    return [[o + math.log(r) for o, r in zip(*rows, strict=True)] for rows in zip(old, ratio, strict=True)]


def zeros(like: Sequence[Sequence[Any]] = MASK) -> Grid:
    return [[0.0] * len(row) for row in like]


def shares(mask: Sequence[Sequence[int]], mode: str) -> Grid:
    """What each token counts in the loss."""
    rows = sum(any(row) for row in mask)
    tokens = sum(map(sum, mask))
    return [[one / max(tokens if mode == "token-mean" else rows * sum(row), 1) for one in row] for row in mask]


def clipped(new: float, old: float, advantage: float, clip: dict[str, Any]) -> tuple[float, float]:
    """PPO's dual-clipped loss of one token and its derivative by the log-prob."""
    log_ratio = max(-20.0, min(20.0, new - old))
    ratio = math.exp(log_ratio)
    inside = max(1 - clip["clip_ratio_low"], min(1 + clip["clip_ratio_high"], ratio))
    loss, slope = -advantage * ratio, -advantage * ratio * (abs(new - old) < 20)
    if -advantage * inside > loss:
        loss, slope = -advantage * inside, 0.0
    if advantage < 0 and loss > -advantage * clip["clip_ratio_c"]:
        loss, slope = -advantage * clip["clip_ratio_c"], 0.0
    return loss, slope


def policy(new: Grid, old: Grid, advantages: Grid, weight: Grid, mask: Any, clip: dict[str, Any]) -> tuple[float, Grid]:
    """The loss of all tokens, each times its weight, and its gradient by the log-probs."""
    share, total, gradient = shares(mask, clip["loss_agg_mode"]), 0.0, zeros(mask)
    for i, row in enumerate(mask):
        for t, one in enumerate(row):
            loss, slope = clipped(new[i][t], old[i][t], advantages[i][t], clip)
            total += loss * weight[i][t] * share[i][t] * one
            gradient[i][t] = slope * weight[i][t] * share[i][t] * one
    return total, gradient


def of_rows(values: Sequence[float]) -> Grid:
    return [[value] * WIDTH for value in values]


def copo_losses(mode: str, gate: str) -> dict[str, Any]:
    """Two losses; one ratio lies beyond e^20, where there is no gradient."""
    ratio = [list(row) for row in RATIO]
    ratio[3][1] = math.exp(21.0)
    new, clip = moved(OLD, ratio), CLIP | {"loss_agg_mode": mode}
    across, entropy, rewards = [-1.5, 0.4, 1.0, 0.6, -0.3], [0.0, 1.2, 0.5, 2.0, 1.0], [1.0, 0.0, 1.0, 0.0, 1.0]
    weight = [1 / (1 + math.exp(-4 * (h - 1.1))) for h in entropy]
    if gate == "soft-with-zero":
        weight = [w * r for w, r in zip(weight, rewards, strict=True)]
    one, by_one = policy(new, OLD, of_rows(ADVANTAGE), of_rows(weight), MASK, clip)
    two, by_two = policy(new, OLD, of_rows(across), of_rows([1 - w for w in weight]), MASK, clip)
    global_adv = [[g * m for m in row] for g, row in zip(across, MASK, strict=True)]
    inputs = {"old_log_probs": OLD, "log_prob": new, "advantages": of_rows(ADVANTAGE), "global_adv": global_adv}
    inputs |= {"reward_entropy": entropy, "local_reward": rewards, "response_mask": MASK}
    gradient = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(by_one, by_two, strict=True)]
    expected = {"pg_loss": one + two, "grad_log_prob": gradient, "local_weight": weight}
    return case(f"two_losses_{gate}_{mode}", inputs, clip | {"global_flg": gate, "k": 4, "b": 1.1}, expected, atol=1e-6)


def mc_grpo_loss() -> dict[str, Any]:
    """Each prompt's first response at the lower median is left out of the loss and of what it is divided by."""
    epsilon, keep, advantage = 0.5, [not uid.startswith("pad") for uid in UID], [0.0] * len(UID)
    for rows in members().values():
        middle = lower_median([GRADED[row] for row in rows])
        spread = lower_median([abs(GRADED[row] - middle) for row in rows])
        keep[next(row for row in rows if GRADED[row] == middle)] = False
        for row in rows:
            advantage[row] = (GRADED[row] - middle) / (spread + epsilon)
    inputs = rewarded(GRADED)
    old = [numbers(row, WIDTH) for row in range(len(UID))]
    new = moved(old, [[RATIO[row % 5][(t + row) % 4] for t in range(WIDTH)] for row in range(len(UID))])
    mask = [[one * kept for one in row] for row, kept in zip(inputs["response_mask"], keep, strict=True)]
    loss, gradient = policy(new, old, of_rows(advantage), of_rows([1.0] * len(UID)), mask, CLIP)
    params = CLIP | {"epsilon": epsilon, "scale": "mad"}
    inputs |= {"old_log_probs": old, "log_prob": new}
    return case("loss_of_what_is_kept", inputs, params, {"loss": loss, "grad_log_prob": gradient}, atol=1e-6)


def steer(name: str, mask: Any = MASK, old: Grid = OLD, scale: float = 1.0, **given: Any) -> dict[str, Any]:
    params = {"token_weight_min": 0.7, "token_weight_max": 1.3, "linear": False} | CLIP | given
    new, floor = moved(old, RATIO), params.get("floor", 0.02)
    entropy = [[0.2 + ((3 * i + 5 * t) % 7) / 4 for t in range(WIDTH)] for i in range(len(mask))]
    advantages = of_rows([scale * advantage for advantage in ADVANTAGE])
    size = zeros(mask)
    for i, row in enumerate(mask):
        for t, one in enumerate(row):
            p = max(1e-8, min(1 - 1e-8, math.exp(new[i][t])))
            q = max(1e-8, min(1.0, math.exp(old[i][t])))
            size[i][t] = one * abs(advantages[i][t] / q * p * (1 - p) * (math.log(p) + entropy[i][t]))
    valid = [size[i][t] for i, row in enumerate(mask) for t, one in enumerate(row) if one]
    most, least, low, high = max(valid), min(valid), params["token_weight_min"], params["token_weight_max"]

    def weight_of(value: float) -> float:
        if not params["linear"]:
            return max(low, math.exp(math.log(low) / max(most, floor) * value)) if most else 1.0
        return high - (value - least) * (high - low) / (most - least) if most > least else (low + high) / 2

    weights = [[one * weight_of(s) for one, s in zip(*rows, strict=True)] for rows in zip(mask, size, strict=True)]
    loss, gradient = policy(new, old, advantages, weights, mask, params)
    used = [weights[i][t] for i, row in enumerate(mask) for t, one in enumerate(row) if one]
    inputs = {"old_log_probs": old, "log_prob": new, "advantages": advantages, "response_mask": mask}
    expected = {"pg_loss": loss, "grad_log_prob": gradient, "token_weights": weights, "abs_omega": size}
    expected |= {"token_weight_mean": statistics.fmean(used), "token_weight_max_seen": max(used)}
    expected["token_weight_min_seen"] = min(used)
    return case(name, inputs | {"entropy": entropy}, params, expected, atol=1e-6)


def dcpo(
    name: str, scores: Sequence[float], entropy: float | None, outputs: bool = False, **params: Any
) -> dict[str, Any]:
    """`outputs`: rows of one prompt are pairs of outputs of a session, of which the last one speaks."""
    usual = {"entropy_base": 0.5, "temperature_high": 1.2, "temperature_low": 0.8, "alpha_cap": 0.1}
    params = usual | {"score_threshold": 0.05} | params | {"entropy": entropy}
    inputs = {name: value for name, value in rewarded(scores).items() if name != "token_level_rewards"}
    mask = inputs["response_mask"]
    sessions = {row: (uid, place // 2) for uid, rows in members().items() for place, row in enumerate(rows)}
    last = {session: row for row, session in sessions.items()} if outputs else {row: row for row in sessions}
    speaks = {row: last[sessions[row] if outputs else row] for row in sessions}
    right = {row: scores[speaks[row]] > params["score_threshold"] for row in sessions}
    share = statistics.fmean(right[row] for row in last.values())
    gap = params["entropy_base"] - (entropy or 0.0)
    size = min(abs(gap), params["alpha_cap"])
    alpha = size / (size + share) if share else 0.0
    old = [numbers(row, WIDTH) for row in range(len(UID))]
    tempered = [numbers(row + 20, WIDTH) for row in range(len(UID))]
    advantages = [[value * one for one in row] for value, row in zip(grpo(scores), mask, strict=True)]
    mixed, found = [[(1 - alpha) * value for value in row] for row in advantages], []
    for row in sessions:
        for t, one in enumerate(mask[row]):
            if one and right[row]:
                found.append(math.exp(tempered[row][t] - old[row][t]))
                mixed[row][t] += alpha * found[-1]
    inputs |= {"token_level_scores": rewarded(scores)["token_level_rewards"], "advantages": advantages}
    inputs |= {"old_log_probs": old, "old_log_probs_t": tempered}
    if outputs:
        places = {row: place for rows in members().values() for place, row in enumerate(rows)}
        inputs |= {"session_id": [places.get(row, 0) // 2 for row in range(len(UID))]}
        inputs |= {"output_index": [places.get(row, 0) % 2 for row in range(len(UID))]}
    expected = {"advantages": mixed, "alpha": alpha, "true_ratio": share, "target_gap": gap, "a0": size}
    expected["temperature"] = params["temperature_high" if gap >= 0 else "temperature_low"]
    if alpha:
        tokens = sum(map(sum, mask))
        before, after = (sum(abs(v) for row in values for v in row) for values in (advantages, mixed))
        expected |= {"rho_mean": statistics.fmean(found), "rho_min": min(found), "rho_max": max(found)}
        expected |= {"rho_p99": quantile(found, 0.99), "abs_advantage_before": before / tokens}
        expected |= {"abs_advantage": after / tokens}
        expected["reinforce_share"] = alpha * sum(found) / ((1 - alpha) * before + alpha * sum(found))
    return case(name, inputs, params, expected)


TURNS = [[0, 0, 1, 2], [1, 1, 2, 3], [0, 0, 0, 0], [3, 3, 0, 0], [0, 1, 1, 0]]
ENTROPY = [
    [0.5, 1.5, 1.0, 0.25],
    [2.0, 0.3, 0.0, 0.7],
    [1.0, 1.0, 1.0, 1.0],
    [3.0, 0.1, 0.0, 0.0],
    [0.6, 0.9, 4.0, 0.5],
]
USUAL = [1.0, 0.8, 0.0, 1.2]
"""The third turn has no history; values of 0.5 and 1.5 in the first lie on the band of 0.5 to 1.5."""


def epo(
    form: str, name: str, gate: int, low: float, high: float, sequence: bool = False, **given: Any
) -> dict[str, Any]:
    params = {"entropy_smooth": True, "entropy_coeff": 0.01, "entropy_smooth_coeff": 2.0, "max_epochs": 9, "epoch": 3}
    params |= {"entropy_smooth_mask_mode": "token", "entropy_smooth_min_ratio": low}
    params |= {"entropy_smooth_max_ratio": high, "entropy_smooth_out_range_penalty": 0.1, "gate_step": gate}
    params |= {"enable_smooth_weights": form != "mask_pg"} | given | CLIP
    opened = any(
        one and turn >= gate for rows in zip(MASK, TURNS, strict=True) for one, turn in zip(*rows, strict=True)
    )
    half = params["max_epochs"] // 2
    w = 1 - 0.2 * (1 - math.exp(-2 * params["epoch"] / half))
    if params["epoch"] > half:
        w = 0.8 * math.exp(-3 * (params["epoch"] - half) / (params["max_epochs"] - half))
    w = (w if params["enable_smooth_weights"] else 1.0) * opened
    share, penalty, kept = shares(MASK, "token-mean"), zeros(), [[1.0] * WIDTH for _ in MASK]
    by_entropy, inside, c = zeros(), zeros(), params["entropy_smooth_out_range_penalty"]
    scale = params["entropy_coeff"] * params["entropy_smooth_coeff"]
    for i, row in enumerate(MASK):
        for t, one in enumerate(row):
            usual, value = USUAL[TURNS[i][t]], ENTROPY[i][t]
            within = usual == 0 or low * usual < value < high * usual
            inside[i][t] = one * (within or form == "hinge")
            kept[i][t] = 1.0 if within or not opened else c
            by_entropy[i][t] = -params["entropy_coeff"] * share[i][t]
            if form == "hinge" and usual:
                penalty[i][t] = one * c * w * (max(low * usual - value, 0) + max(value - high * usual, 0))
                by_entropy[i][t] += scale * c * w * share[i][t] * ((value > high * usual) - (value < low * usual))
            elif form == "indicator":
                penalty[i][t] = one * c * w * (not within)
    new, advantages = moved(OLD, RATIO), of_rows(ADVANTAGE)
    weights = kept if form == "mask_pg" else of_rows([1.0] * len(MASK))
    loss, by_log_prob = policy(new, OLD, advantages, weights, MASK, CLIP)
    inputs = {"response_mask": MASK, "entropy": ENTROPY, "rollout_step": TURNS, "entropy_history": USUAL}
    bonus, smooth = (
        sum(value * part for rows in zip(values, share, strict=True) for value, part in zip(*rows, strict=True))
        for values in (ENTROPY, penalty)
    )
    if form == "hinge":
        regularizer = scale * smooth - params["entropy_coeff"] * bonus
        expected = {"regularizer": regularizer, "entropy_loss": bonus, "smooth_loss": smooth, "penalty": penalty}
        return case(name, inputs, params, expected | {"grad_entropy": by_entropy}, atol=1e-7)
    inputs |= {"old_log_probs": OLD, "log_prob": new, "advantages": advantages}
    if form == "mask_pg":
        expected = {"pg_loss": loss, "entropy_mask": kept, "grad_log_prob": by_log_prob}
        return case(name, inputs, params, expected, atol=1e-7)
    total = loss - params["entropy_coeff"] * bonus + scale * smooth
    expected = {"policy_loss": total, "pg_loss": loss, "entropy_loss": bonus, "smooth_loss": smooth}
    expected |= {"penalty": penalty, "within_band_fraction": statistics.fmean(v for row in inside for v in row)}
    expected |= {"grad_log_prob": by_log_prob, "grad_entropy": by_entropy}
    return case(name, inputs, params, expected, atol=1e-7)


def epo_history() -> dict[str, Any]:
    """Episodes of other lengths, one longer than is kept; a turn that no row of a step has is null."""
    steps, most = [[0.9, 0.8, None, 0.6, 0.5], [0.7], [0.4, 0.3, 0.2]], 4
    padded = [[0.0] * (most - len(step[-most:])) + [value or 0.0 for value in step[-most:]] for step in steps]
    reached = [[s[turn] for s in steps if turn < len(s) and s[turn] is not None] for turn in range(5)]
    expected = {"entropy_history_authors": [statistics.fmean(values) for values in zip(*padded, strict=True)]}
    expected["entropy_history_right_aligned"] = [statistics.fmean(values) for values in reached]
    return case("episodes_of_other_lengths", {"step_entropy_lists": steps}, {"max_steps": most}, expected, atol=1e-9)


def epo_weights(steps: int) -> dict[str, Any]:
    """The schedule at its ends, in the middle and beyond."""
    half, epochs, found = steps // 2, [-1, 0, 1, steps // 2, steps // 2 + 1, steps - 1, steps, steps + 5], []
    for epoch in epochs:
        e = min(max(epoch, 0), max(steps, 0))
        if steps <= 0 or (half == 0 and e <= half):
            found.append(1.0)
        elif e <= half:
            found.append(1 - 0.2 * (1 - math.exp(-2 * e / half)))
        else:
            found.append(0.8 * math.exp(-3 * (e - half) / (steps - half)))
    return case(f"schedule_of_{steps}", {"epoch": epochs}, {"max_epochs": steps}, {"weight": found}, atol=1e-9)


def mopps(name: str, theta: Sequence[float], count: int, **given: Any) -> dict[str, Any]:
    params = {"op": "select_then_update", "batch_size": count, "group_size": 5, "decay": 0.75, "strategy": "topk"}
    params |= {"prior_alpha": 2.0, "prior_beta": 0.5, "target": 0.5, "lower": 0.25, "upper": 0.75} | given
    ids = [17, 3, 8, 40, 1, 22, 9][: len(theta)]
    alpha = [2.0 + 3 * (i % 3) for i in range(len(ids))]
    beta = [0.5 + 1.5 * (i % 4) for i in range(len(ids))]
    rate = [(2 * i % 6) / 5 for i in range(len(ids))]

    def distance(value: float) -> float:
        if params["strategy"] == "topk":
            return (value - params["target"]) ** 2
        return max(params["lower"] - value, value - params["upper"], 0.0)

    asked = sorted(range(len(ids)), key=lambda i: distance(theta[i]))[:count]
    after_alpha, after_beta = list(alpha), list(beta)
    for i in asked:
        right = rate[i] * params["group_size"]
        for after, prior, new in ((after_alpha, 2.0, right), (after_beta, 0.5, params["group_size"] - right)):
            after[i] = params["decay"] * after[i] + (1 - params["decay"]) * prior + new
    inputs = {
        "candidate_ids": ids,
        "alpha": alpha,
        "beta": beta,
        "theta": list(theta),
        "success_rate_if_selected": rate,
    }
    expected = {"selected_ids": [ids[i] for i in asked], "alpha": after_alpha, "beta": after_beta}
    return case(name, inputs, params, expected, atol=1e-6)


ONCE = {
    "default": {
        "open-r1": ["<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>"],
        "open-r1-teacher": ["\n</think>\n", "\n<answer>\n", "\n</answer>"],
        "deepseek-r1": ["<think>", "</think>", "<answer>", "</answer>"],
        "deepseek-r1-teacher": ["</think>", "<answer>", "</answer>"],
        "reflective_prompt": [
            *("<solution>\n", "\n</solution>\n", "\n<check>\nLet's verify step by step", "\n</check>"),
        ],
        "reflective_prompt-teacher": ["\n</solution>\n", "\n<check>\nLet's verify step by step", "\n</check>"],
        "lm_eval_prompt1": ["The final answer is:"],
        "lm_eval_prompt4": ["The final answer is:"],
        **{name: [] for name in ("abel", "simplerl", "qwen-math", "formal", "lm_eval_prompt8")},
    },
    "deepseek": {
        "r1-distilled": ["</think>"],
        "think_only_v5": ["<think>", "</think>"],
        "think_only_v9": ["<think>", "</think>"],
        "think_only_v5_teacher": ["</think>"],
        "think_only_v9_teacher": ["</think>"],
        "lm_eval_prompt9": ["We conclude that the answer is:"],
        "lm_eval_prompt10": ["Therefore, the final answer is"],
        "lm_eval_prompt11": ["Based on the analysis, the answer is:"],
        "lm_eval_prompt12": ["From the steps above, the answer is:"],
        "r1_strict_v7": ["<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>"],
        "r1_strict_v7_teacher": ["\n</think>\n", "\n<answer>\n", "\n</answer>"],
        "r1_strict_v3": ["<think>", "</think>", "<answer>", "</answer>"],
        "r1_strict_v3_teacher": ["</think>", "<answer>", "</answer>"],
        "r1_strict_v8_teacher": ["</think>", "<answer>", "</answer>"],
        **{name: [] for name in ("stepwise_v1", "strict_format_v2", "concise_v1", "concise_v2")},
    },
}


def prompt_augmentation(family: str, weight: float) -> dict[str, Any]:
    """Each format with its strings once, one of them twice, one missing, all in the wrong order, and none."""
    names, texts = [], []
    for name, once in ONCE[family].items():
        whole = "a" + "b".join(once) + "\\boxed{4}"
        variants = [whole, whole + "".join(once[-1:]), "".join(once[1:]), "-".join(reversed(once)), ""]
        texts += variants
        names += [name] * len(variants)
    fmt = []
    for name, text in zip(names, texts, strict=True):
        once = ONCE[family][name]
        fmt.append(statistics.fmean(text.count(part) == 1 for part in once) if once else 1.0)
    correct = [(3 * row) % 4 // 2 for row in range(len(texts))]
    inputs = {"format_name": names, "completion": texts, "answer_correct": correct}
    expected = {"format_reward": fmt, "acc": correct}
    expected["score"] = [acc + weight * value for acc, value in zip(correct, fmt, strict=True)]
    params = {"variant": family, "accuracy_weight": 1.0, "format_weight": weight}
    return case(f"{family}_weight_{weight:g}", inputs, params, expected, atol=1e-6)


def cases() -> dict[str, list[dict[str, Any]]]:
    """Of each method."""
    certain = [[-1e-10, -1e-4, -3.0, -0.5], *OLD[1:3], [-25.0, -30.0, -1.0, -1.0], OLD[4]]
    one_token = [[0, 0, 0, 0], [0, 0, 1, 0], *[[0] * 4] * 3]
    seq = {"loss_agg_mode": "seq-mean-token-mean"}
    negative = [score - 4.0 for score in GRADED]
    signs = [2.0 * right - 1 for right in RIGHT]
    at_threshold = [0.25 if right else 0.125 for right in RIGHT]
    return {
        "copo": [copo_losses("token-mean", "only-soft"), copo_losses("seq-mean-token-mean", "soft-with-zero")],
        "mc_grpo": [mc_grpo_loss()],
        "steer": [
            steer("exp_holes"),
            steer("linear_holes", linear=True),
            steer("exp_seq_mean_no_floor", scale=1e-3, floor=0.0, **seq),
            steer("exp_below_the_floor", scale=1e-3, floor=0.1),
            steer("linear_certain_and_rare", old=certain, linear=True, token_weight_min=0.5, token_weight_max=1.0),
            steer("exp_certain_and_rare", old=certain, token_weight_min=0.05),
            steer("linear_one_token", mask=one_token, linear=True),
            steer("exp_one_token", mask=one_token),
            steer("exp_no_advantage", scale=0.0),
        ],
        "dcpo": [
            dcpo("first_step", [float(right) for right in RIGHT], None),
            dcpo("nothing_right", negative, 0.3),
            dcpo("signs_and_a_small_gap", signs, 0.53, temperature_high=1.5, temperature_low=0.5),
            dcpo("not_above_the_threshold", at_threshold, 0.1, score_threshold=0.125, alpha_cap=0.3),
            dcpo("all_right", [1.0] * len(UID), 0.9, alpha_cap=0.25),
            dcpo("sessions_of_several_outputs", GRADED, 0.2, outputs=True),
        ],
        "epo": [
            epo("indicator", "indicator_at_the_edges", 3, 0.5, 1.5),
            epo("indicator", "indicator_gate_closed", 4, 0.5, 1.5),
            epo("indicator", "indicator_second_half", 0, 0.0, 1.25, epoch=7),
            epo("hinge", "hinge_at_the_edges", 3, 0.5, 1.5),
            epo("hinge", "hinge_gate_closed", 9, 0.5, 1.5),
            epo("hinge", "hinge_wide", 1, 0.0, 2.0, epoch=8),
            epo("mask_pg", "mask_pg_at_the_edges", 2, 0.5, 1.5),
            epo("mask_pg", "mask_pg_gate_closed", 4, 0.5, 1.5),
            epo_history(),
            *map(epo_weights, (1, 2, 7, 20)),
        ],
        "mopps": [
            mopps("topk_low_target", [0.1, 0.35, 0.9, 0.62, 0.22, 0.48, 0.05], 3, target=0.2),
            mopps("within_with_the_ends", [0.25, 0.75, 0.1, 0.9, 0.5], 3, strategy="threshold"),
            mopps("nearest_to_the_interval", [0.05, 0.2, 0.8, 0.99, 0.5, 0.0], 4, strategy="threshold"),
            mopps("no_memory", [0.4, 0.7, 0.2], 2, decay=0.0, target=1.0),
        ],
        "prompt_augmentation": [prompt_augmentation(family, w) for family, w in (("default", 0.5), ("deepseek", 2.0))],
    }
