"""What estimators log is what their pages say of it, counted response by response in plain Python."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from typing import Any

import pytest
import torch
from advantages import batch_of, outcomes
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins.advantage.a_grae import AGrae
from verl_plugins.advantage.bnpo import Bnpo
from verl_plugins.advantage.copo import Copo
from verl_plugins.advantage.grpo import Grpo
from verl_plugins.advantage.mc_grpo import McGrpo
from verl_plugins.advantage.progrpo import ProGrpo
from verl_plugins.advantage.riskpo import RiskPo
from verl_plugins.composition.manager import Plugins

METHODS = {method.name: method for method in (Grpo, McGrpo, ProGrpo, Copo, RiskPo, Bnpo, AGrae)}
FEW = settings(max_examples=30, deadline=None)
EPSILON, SHARE, ALPHA = 1e-6, 0.5, 0.8


def groups_of(uid: list[str]) -> dict[str, list[int]]:
    found = defaultdict(list)
    for row, name in enumerate(uid):
        found[name].append(row)
    return found


def sign(value: float) -> int:
    return (value > 1e-7) - (value < -1e-7)


def share(flags: Any) -> float:
    flags = list(flags)
    return sum(map(bool, flags)) / len(flags)


def grpo(uid: list[str], scores: list[float]) -> list[float]:
    found = [0.0] * len(uid)
    for rows in groups_of(uid).values():
        own = [scores[row] for row in rows]
        for row in rows:
            if len(set(own)) > 1:
                found[row] = (scores[row] - statistics.fmean(own)) / (statistics.stdev(own) + EPSILON)
    return found


def logged(name: str, batch: Any, options: dict[str, Any], *others: Any) -> dict[str, float]:
    plugin = METHODS[name](METHODS[name].Config(**options))
    run = FakeRun(config=OmegaConf.create({"actor_rollout_ref": {"rollout": {"n": 4}}}))
    Plugins([*others, plugin]).hook.estimate_advantage(run=run, batch=batch)
    return run.metrics


def agree(found: dict[str, float], expected: dict[str, float | None]) -> None:
    """None: the page says that it is left out."""
    for name, value in expected.items():
        assert (name in found) == (value is not None), name
        if value is not None:
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@FEW
@given(outcomes())
@pytest.mark.parametrize("name", ["mc_grpo"])
def test_median(name, rows):
    uid, scores = rows
    median, spread, mean = {}, {}, {}
    for prompt, own in groups_of(uid).items():
        values = [scores[row] for row in own]
        median[prompt], mean[prompt] = statistics.median_low(values), statistics.fmean(values)
        spread[prompt] = statistics.median_low([abs(value - median[prompt]) for value in values])
    advantage = [(s - median[prompt]) / (spread[prompt] + 1e-3) for prompt, s in zip(uid, scores, strict=True)]
    pairs = [(sign(s - mean[prompt]), sign(s - median[prompt])) for prompt, s in zip(uid, scores, strict=True)]
    both = [one != other for one, other in pairs if one and other]
    expected = {
        "median_mean": statistics.fmean(median[prompt] for prompt in uid),
        "mad_mean": statistics.fmean(spread[prompt] for prompt in uid),
        "frac_mad_zero": share(spread[prompt] == 0 for prompt in uid),
        "frac_zero_adv_rows": share(value == 0 for value in advantage),
        "sign_flip_rate": share(both) if both else 0.0,
        "abs_adv_max": max(map(abs, advantage)),
        "group_size_min": min(map(len, groups_of(uid).values())),
    }
    agree(logged(name, batch_of(uid, scores), {}), expected)


@FEW
@given(outcomes(), st.integers(0, 99), st.booleans())
@pytest.mark.parametrize("name", ["progrpo"])
def test_confidence(name, rows, seed, skip):
    uid, scores = rows
    rng, groups = torch.Generator().manual_seed(seed), groups_of(uid)
    old = -2 * torch.rand(len(uid), 4, generator=rng)
    prompts = -2 * torch.rand(len(groups), 3, generator=rng)[[list(groups).index(prompt) for prompt in uid]]
    batch = batch_of(
        uid, scores, old_log_probs=old, prompt_log_probs=prompts, prompt_lengths=torch.full((len(uid),), 4)
    )
    right, answer = batch.correct.tolist(), []
    for row, mask in zip(old.tolist(), batch.response_mask.tolist(), strict=True):
        tokens = sorted(value for value, one in zip(row, mask, strict=True) if one)
        answer.append(math.exp(statistics.fmean(tokens[: max(1, math.ceil(SHARE * len(tokens)))])))
    of_prompt = [math.exp(statistics.fmean(row)) for row in prompts.tolist()]
    active = {
        prompt: any(right[row] for row in own) and not (skip and all(right[row] for row in own))
        for prompt, own in groups.items()
    }
    shift = [ALPHA * (of_prompt[row] - answer[row]) * active[prompt] for row, prompt in enumerate(uid)]
    before = grpo(uid, scores)
    of = {flag: [answer[row] for row, one in enumerate(right) if one == flag] for flag in (True, False)}
    spreads = [statistics.stdev([answer[row] for row in own]) if len(own) > 1 else 0.0 for own in groups.values()]
    expected = {
        "prompt_confidence": statistics.fmean(of_prompt[own[0]] for own in groups.values()),
        "answer_confidence_correct": statistics.fmean(of[True]) if of[True] else None,
        "answer_confidence_wrong": statistics.fmean(of[False]) if of[False] else None,
        "answer_confidence_spread": statistics.fmean(spreads),
        "shift_mean": statistics.fmean(shift),
        "shift_abs_mean": statistics.fmean(map(abs, shift)),
        "shift_abs_max": max(map(abs, shift)),
        "sign_changes": share(sign(a) * sign(a + s) < 0 for a, s in zip(before, shift, strict=True)),
        "active_groups": share(active.values()),
    }
    options = {"alpha": ALPHA, "low_prob_ratio": SHARE, "skip_all_correct": skip}
    agree(logged(name, batch, options, Grpo(Grpo.Config())), expected)


@FEW
@given(outcomes(min_groups=2), st.data(), st.sampled_from(["soft", "soft-with-zero"]))
@pytest.mark.parametrize("name", ["copo"])
def test_consistency(name, rows, data, gate):
    uid, scores = rows[0], [float(score > 0) for score in rows[1]]
    answers = data.draw(st.lists(st.sampled_from(["1", "2", "3", None]), min_size=len(uid), max_size=len(uid)))
    local, across, weight, entropy, returns = grpo(uid, scores), {}, [], {}, {}
    for prompt, own in groups_of(uid).items():
        given_ = [answers[row] or row for row in own]
        shares = [given_.count(answer) / len(own) for answer in set(given_)]
        entropy[prompt] = -sum(p * math.log2(p + 1e-8) for p in shares)
        returns[prompt] = statistics.fmean(scores[row] for row in own)
    mean, std = statistics.fmean(returns.values()), statistics.pstdev(returns.values())
    unbiased = statistics.stdev(returns.values()) if len(returns) > 1 else 0.0
    for prompt, value in returns.items():
        across[prompt] = (value - mean) / (unbiased + EPSILON) if abs(value - mean) > 1e-9 else 0.0
    for row, prompt in enumerate(uid):
        opened = 1 / (1 + math.exp(-5 * (entropy[prompt] - 1)))
        weight.append(opened if gate == "soft" or scores[row] else 0.0)
    blended = [w * a + (1 - w) * across[prompt] for w, a, prompt in zip(weight, local, uid, strict=True)]
    expected = {
        "answer_entropy_mean": statistics.fmean(entropy.values()),
        "answer_entropy_min": min(entropy.values()),
        "answer_entropy_max": max(entropy.values()),
        "unanimous_groups": share(value < 1e-6 for value in entropy.values()),
        "no_answer": share(answer is None for answer in answers),
        "local_weight_mean": statistics.fmean(weight),
        "local_weight_min": min(weight),
        "local_weight_max": max(weight),
        "local_abs_mean": statistics.fmean(map(abs, local)),
        "global_abs_mean": statistics.fmean(abs(across[prompt]) for prompt in uid),
        "opposite_signs": share(sign(a) * sign(across[prompt]) < 0 for a, prompt in zip(local, uid, strict=True)),
        "return_mean": mean,
        "return_std": std,
        "groups_with_signal": share(any(abs(blended[row]) > 1e-9 for row in own) for own in groups_of(uid).values()),
    }
    extra = [{"reward_extra_info": {"answer": answer}} for answer in answers]
    agree(logged(name, batch_of(uid, scores, extra_fields=extra), {"gate": gate}), expected)


@FEW
@given(outcomes(), st.sampled_from(["std", "none"]))
@pytest.mark.parametrize("name", ["riskpo"])
def test_risk(name, rows, scale):
    """All prompts are one bundle; what is said of papers is said of the sums over one response of each."""
    uid, scores = rows
    own = list(groups_of(uid).values())
    totals = [sum(scores[row] for row in paper) for paper in zip(*own, strict=False)]
    ordered = sorted(totals)

    def quantile(level: float) -> float:
        place = level * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return low + (high - low) * (place - math.floor(place))

    low, high = quantile(0.25), quantile(0.75)
    std = statistics.stdev(totals) if len(totals) > 1 else 1.0
    std = (std if std > 1e-3 else 1.0) if scale == "std" else 1.0
    cvar = [-max(low - total, 0) / 0.25 for total in totals]
    rvar = [(max(total - low, 0) - max(total - high, 0)) / 0.5 for total in totals]
    given_ = [(1.5 * c + r) / 2.5 / std for c, r in zip(cvar, rvar, strict=True)]
    below, between = [t for t in totals if t <= low], [t for t in totals if low <= t <= high]
    expected = {
        "papers": len(totals),
        "q_alpha": low,
        "q_beta": high,
        "papers_below": share(total < low for total in totals),
        "papers_above": share(total > high for total in totals),
        "zero_std_bundles": float(len(set(totals)) == 1),
        "paper_advantage_mean": statistics.fmean(given_),
        "paper_advantage_min": min(given_),
        "abs_adv_max": max(map(abs, given_)),
        "surplus_responses": len(uid) - len(totals) * len(own),
        "cvar": statistics.fmean(below),
        "rvar": statistics.fmean(between) if between else None,
    }
    expected["mixed_risk"] = (1.5 * expected["cvar"] + expected["rvar"]) / 2.5 if between else None
    options = {"bundle_size": 9, "quantile_down": 0.25, "quantile_up": 0.75, "credit": "uniform", "scale": scale}
    agree(logged(name, batch_of(uid, scores, dtype=torch.float64), options | {"quantiles": "batch"}), expected)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "progrpo"])
def test_two_responses_can_be_compared(name):
    options = {"quantiles": "batch"} if name == "riskpo" else {}
    METHODS[name](METHODS[name].Config(**options)).check(OmegaConf.create({"actor_rollout_ref": {"rollout": {"n": 2}}}))
