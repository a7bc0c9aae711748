"""A session speaks by its last output: what stands in the earlier ones changes no estimator's advantages.

So it is with agents of several outputs, and with responses that a plugin publishes in segments.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeRun
from omegaconf import OmegaConf

from verl_plugins import Batch, Groups
from verl_plugins.composition import manager, manifest
from verl_plugins.reward.structural_entropy import dominance, ranking_reward

UID = ["1-1-0"] * 4 + ["2-1-0"] * 3 + ["3-1-0"] * 3 + ["4-1-0"] * 2
SESSION = [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 0, 1]
RIGHT = [1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 0, 1]
ANSWER = ["7", "8", "9", "7", "1", "1", "2", "5", "5", "5", None, "6"]
OUTPUTS = [1, 3, 1, 2, 2, 1, 1, 1, 2, 1, 3, 1]
"""Of each session; only the last one counts."""
TOKENS, END = 5, 2
ESTIMATORS = [
    ("grpo", {}),
    ("adora", {}),
    ("adora", {"variant": "paper_llm"}),
    ("progrpo", {}),
    ("igpo", {}),
    ("igpo", {"normalize": "joint", "by_std": False}),
    ("mc_grpo", {"scale": "std"}),
    ("bnpo", {}),
    ("bnpo", {"components": ["part", "acc"]}),
    ("a_grae", {}),
    ("a_grae", {"variant": "code"}),
    ("a_grae", {"correctness_key": "part"}),
    ("riskpo", {"bundle_size": 2}),
    ("riskpo", {"bundle_size": 4, "credit": "std", "quantiles": "batch"}),
    ("copo", {}),
    ("copo", {"gate": "soft", "reward_coefficient": True, "missing": "one_answer"}),
    ("r3", {"rank_set": "all_failed", "r_max": 0.5}),
    ("r3", {"rank_set": "truncated", "ties": "stable"}),
    ("action_grouping", {"sigma": 0.5}),
    ("action_grouping", {"mode": "select", "sigma": 0.5}),
    ("ttrl", {"grader": "exact"}),
    ("ttrl", {"grader": "exact", "missing": "as_empty_answer"}),
]
BY_TOKENS = ("progrpo",)
"""These add to a row what its own tokens say: of the earlier outputs they say something else."""
ALONE = {
    "drpo": "refuses them, see its own test",
    "spo_chain": "compares a response with its own continuations",
    "dcpo": "its term and its weight are of the tokens of the step",
}
"""Estimators in whose advantages no group is counted."""


def batch_of(outputs: list[int], noise: int) -> Batch:
    """Sessions of so many outputs; the earlier ones have other rewards, answers, entropies and lengths."""
    rng, rows = torch.Generator().manual_seed(7), []
    lasts = torch.rand(len(UID), TOKENS, generator=rng)
    for place, count in enumerate(outputs):
        right = float(RIGHT[place])
        last = {
            "score": right,
            "acc": right,
            "part": 0.25 + right / 2,
            "answer": ANSWER[place],
            "entropy": lasts[place],
        }
        for turn in range(count):
            row = last if turn == count - 1 else junk(noise + 10 * place + turn)
            rows.append({**row, "uid": UID[place], "session": SESSION[place], "turn": turn})
    lengths = torch.tensor([TOKENS] * len(rows))
    score = torch.tensor([row["score"] for row in rows])
    return Batch.from_tensors(
        **{name: [row[name] for row in rows] for name in ("uid", "session", "turn", "answer")},
        **{name: torch.tensor([row[name] for row in rows]) for name in ("acc", "part")},
        rm_scores=torch.nn.functional.pad(score[:, None], (TOKENS - 1, 0)),
        response_mask=torch.ones(len(rows), TOKENS, dtype=torch.bool),
        response_lengths=lengths,
        responses=torch.tensor([[7 if row["uid"][0] == "2" else END] * TOKENS for row in rows]),
        entropy=torch.stack([row["entropy"] for row in rows]),
        rollout_log_probs=torch.zeros(len(rows), TOKENS),
        old_log_probs=-torch.stack([row["entropy"] for row in rows]),
        prompt_log_probs=torch.tensor([[-0.1 * int(row["uid"][0])] * 2 for row in rows]),
        prompt_lengths=torch.tensor([3] * len(rows)),
        reward_model=[{"ground_truth": "5"}] * len(rows),
        tokenizer=SimpleNamespace(eos_token_id=END),
        budget=TOKENS,
    )


def junk(seed: int) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(seed)
    given = torch.rand(TOKENS + 1, generator=rng)
    score = float(given[0] * 6 - 3)
    return {"score": score, "acc": score, "part": score, "answer": str(seed), "entropy": 9 * given[1:]}


def estimate(name: str, options: dict[str, Any], batch: Batch) -> tuple[dict[str, float], dict[str, float]]:
    """What each session gets, by its name, from the stage that the plugin has; and what is logged."""
    plugins = manager.build({name: options} if name == "grpo" else {name: options, "grpo": {}})
    run = FakeRun(config=OmegaConf.create({"actor_rollout_ref": {"rollout": {"n": 4}}}))
    if name in ("ttrl", "action_grouping"):
        batch.correct  # noqa: B018  the verdict is what the verifier said
        plugins.hook.shape_rewards(run=run, batch=batch)
        given = batch.scores
    else:
        given = plugins.hook.estimate_advantage(run=run, batch=batch)[:, 0]
    found: dict[str, float] = {}
    counted = batch.is_last | torch.tensor(name not in BY_TOKENS)
    for key, value in zip(np.array(batch.keys)[counted], given[counted].tolist(), strict=True):
        session = key.rpartition("_")[0]
        assert found.setdefault(session, value) == value, "outputs of one session get the same"
    return found, run.metrics


@pytest.mark.parametrize(("name", "options"), ESTIMATORS, ids=[f"{name}-{options}" for name, options in ESTIMATORS])
@pytest.mark.parametrize("noise", [0, 1000])
def test_earlier_outputs_change_nothing(name, options, noise):
    given, logged = estimate(name, options, batch_of([1] * len(UID), noise))
    found, metrics = estimate(name, options, batch_of(OUTPUTS, noise))
    assert found == pytest.approx(given, abs=1e-6)
    assert any(given.values())
    if name in ("a_grae", "bnpo", "ttrl", "action_grouping", "riskpo", "igpo"):  # others average over rows
        assert metrics == pytest.approx(logged, abs=1e-6)


def test_no_estimator_is_left_out():
    known = {name for name, _ in ESTIMATORS} | ALONE.keys()
    ours = [entry for entry in manifest.entries() if entry.dist and entry.dist.name == "verl-plugins"]
    assert {one.name for one in manifest.manifests(ours) if "estimate_advantage" in one.hooks} <= known


@pytest.mark.parametrize("ties", ["average", "stable"])
def test_ranking_leaves_out_what_does_not_count(ties):
    peak, mean = torch.tensor([9.0, 3, 0, 2, 9, 1, 4]), torch.tensor([0.0, 1, 9, 2, 0, 3, 0.5])
    counted, labels = torch.tensor([False, True, False, True, False, True, True]), list("aaaaaab")
    groups, own = Groups(labels, counted), Groups([label for label, one in zip(labels, counted, strict=True) if one])
    dominated = dominance(peak, mean, groups)
    assert dominated[~counted].tolist() == [0, 0, 0]
    assert dominated[counted].tolist() == dominance(peak[counted], mean[counted], own).tolist() == [2, 1, 0, 0]
    paid = ranking_reward(dominated, groups, 0.5, ties)
    assert paid[~counted].tolist() == [0, 0, 0]
    assert paid[counted].tolist() == ranking_reward(dominated[counted], own, 0.5, ties).tolist() == [0.5, 0.25, 0, 0]


@pytest.mark.parametrize(
    ("peak", "mean"), [([1.0, 1.0], [1.0, 2.0]), ([2.0, 1.0], [1.0, 1.0]), ([1.0, 1.0], [1.0, 1.0])]
)
def test_an_equal_peak_or_mean_does_not_dominate(peak, mean):
    assert dominance(torch.tensor(peak), torch.tensor(mean), Groups(["a", "a"])).tolist() == [0, 0]
