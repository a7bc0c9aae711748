"""Every plugin of this package keeps the laws that `check_plugin` holds third parties to.

A law that a method breaks on purpose stands here with the reason.
"""

from __future__ import annotations

from typing import Any

import pytest

from verl_plugins.composition import manifest
from verl_plugins.reward.gym_entries import to_text
from verl_plugins.testing import Scenario, check_plugin

OURS = sorted(
    entry.name
    for entry in manifest.entries()
    if entry.dist and entry.dist.name == "verl-plugins" and not manifest.is_recipes(entry)
)
FIRST = {"row_order.select_rows": "of several responses at the median the first is the pivot, as in the authors' code"}
TIES = "where all advantages are equal so are the covariances, and any of the tokens may be the largest"
BY_CHANCE = "as in the authors' code, candidates are numbered in row order and drawn by number"
PER_CALL = "as in the authors' code, means, counts and draws are per micro-batch; scope: batch does without"
LONE = {"lonely_group.estimate_advantage": "prompts are compared with each other, the lone response's as well"}
LONE_QUANTILES = {"lonely_group.estimate_advantage": "tracked quantiles of earlier steps are compared with"}
LONE_TERM = {"lonely_group.estimate_advantage": "the term that is added looks at the response alone"}
OF_VALUES = {"lonely_group.estimate_advantage": "GAE compares a response with the critic, whoever else is there"}
LONE_SEGMENTS = {"lonely_group.estimate_advantage": "segments are compared with continuations of their own response"}
TRUST_REGION = "as in the authors' code, the drift that is penalised is the mean of the micro-batch"
SUMS_PER_ROW = Scenario(overrides={"actor_rollout_ref.actor.loss_agg_mode": "seq-mean-token-sum"})
OF_GROUPS = Scenario(overrides={"algorithm.adv_estimator": "grpo"})
FIRST_RANK = {
    "ranks.distillation_loss": "the invented actor steps on the first rank only, and so does this head's decay"
}
FSDP2 = Scenario(overrides={"actor_rollout_ref.actor.strategy": "fsdp2"})
SEQUENCES = Scenario(
    overrides={
        "algorithm.rollout_correction.rollout_is": "sequence",
        "algorithm.rollout_correction.rollout_is_threshold": 8.0,
    }
)
WITH_BONUS = Scenario(overrides={"actor_rollout_ref.actor.entropy_coeff": 0.001})
SOLVED = Scenario(
    columns={"extra_info": lambda prompt_id: {"solution": f"{prompt_id} and 7 more"}},
    overrides={"data.max_prompt_length": 2048},
)
OF_THE_GYM = Scenario(
    columns={
        "extra_info": lambda prompt_id: {
            "index": prompt_id,
            "task": "chain_sum",
            "entry": to_text({"question": f"{prompt_id} + 7 =", "answer": str(prompt_id + 7), "metadata": {}}),
        }
    }
)
OF_SOURCES = Scenario(columns={"data_source": lambda prompt_id: "abc"[prompt_id % 3]})
OF_ROLES = Scenario(
    columns={"role": lambda prompt_id: ("planner", "solver", "critic")[prompt_id % 3]},
    overrides={"actor_rollout_ref.actor.strategy": "fsdp2", "trainer.total_training_steps": 4},
)
OF_ANCHORS = Scenario(columns={"anchor_id": lambda prompt_id: prompt_id % 5})
SHORT_ANSWERS = Scenario(tokens=7)
SECOND_EPOCH = Scenario(overrides={"data.train_batch_size": 48}, seed=5)
"""Every step is an epoch of its own, so that prompts are reflected on; with this seed answers are replayed, too."""
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "grpo": [{"config": {"scale": "none"}}],
    "mc_grpo": [
        {"except_for": FIRST},
        {"except_for": FIRST, "config": {"scale": "std", "rescale_nonzero": True, "advantage_clip": 2.0}},
    ],
    "bnpo": [{}, {"config": {"components": ["acc", "score"]}}],
    "a_grae": [{}, {"config": {"variant": "code", "scale": "none"}}, {"config": {"correctness_key": "acc"}}],
    "adora": [
        {},
        {"config": {"variant": "vlm", "correct_score": 0.5, "max_length_threshold": 8}},
        {"config": {"variant": "paper_llm"}},
    ],
    "riskpo": [
        {"config": {"bundle_size": 2}, "except_for": LONE_QUANTILES},
        {"config": {"quantiles": "batch", "credit": "std", "natural_baseline_adv": True}},
        {"config": {"quantiles": "mix", "mean_baseline": True, "credit": "score"}, "except_for": LONE_QUANTILES},
    ],
    "vade": [{}, {"config": {"mode": "greedy", "score": "variance"}}, {"config": {"metric": "acc"}}],
    "reasoning_gym": [{"scenario": OF_THE_GYM}],
    "action_grouping": [
        {},
        {"config": {"mode": "select", "sigma": 0.5, "group_missing": True}},
        {"config": {"equivalence": "jaccard", "similarity": 0.5, "sigma": 0.5}},
        {"config": {"equivalence": "tool_call"}},
    ],
    "linguistic_collapse": [
        {"config": {"freq": 2, "min_per_class": 1}},
        {"config": {"labels": ["uid"], "freq": 1}},
        {"config": {"freq": 1, "fixed_classes": False, "holdout": 0.5, "ncc_classes": "all", "max_tokens": 40}},
    ],
    "nc_perturbation": [
        {"config": {"freq": 2, "layer_step": 2}},
        {"config": {"labels": "token", "freq": 1, "layer_step": 1}},
    ],
    "nc_deep_linear": [{"config": {"freq": 2}}, {"config": {"freq": 1, "feature_decay": 50.0, "min_per_class": 2}}],
    "mgt": [{"config": {"freq": 2, "layer_step": 1}}, {"config": {"freq": 1, "max_tokens": 7}}],
    "be_more_active": [
        {"config": {"slots": ["answer"]}},
        {"config": {"slots": ["answer", "acc"], "statistic": "log_length", "steps": 2}},
    ],
    "evol_rl": [
        {"config": {"anchor": "ground_truth", "valid": "answer_extracted"}},
        {"config": {"anchor": "ground_truth", "valid": "answer_extracted", "single_valid": "band", "min_spread": 0.2}},
    ],
    "vcpo": [
        {"scenario": SEQUENCES},
        {
            "scenario": SEQUENCES,
            "config": {"score_norm": "length", "agg_mode": "winsorized_mean", "scaling_rule": "linear"},
        },
        {"scenario": SEQUENCES, "config": {"scope": "minibatch", "agg_mode": "median", "use_clipped": True}},
    ],
    "ravl": [
        {"except_for": OF_VALUES},
        {"config": {"members": 1}, "except_for": OF_VALUES},
        {"config": {"members": 3, "aggregate": "mean", "baseline": "mean", "eta": 0.1}, "except_for": OF_VALUES},
        {"config": {"bootstrap": "none"}, "except_for": OF_VALUES},
    ],
    "perp_grad": [{"scenario": FSDP2}, {"scenario": FSDP2, "config": {"granularity": "global", "min_ndim": 0}}],
    "dhkd": [
        {"scenario": FSDP2},
        {"scenario": FSDP2, "config": {"head": "lowrank", "rank": 2, "align_gradients": True}},
        {"scenario": FSDP2, "config": {"head": "full", "loss": "binary_kl_norm"}, "except_for": FIRST_RANK},
        {"scenario": FSDP2, "config": {"loss": "binary_kl", "temperature": 1.0}},
    ],
    "ghosts_of_softmax": [
        {"scenario": FSDP2},
        {"scenario": FSDP2, "config": {"target_r": 1e-3, "quantile": 0.9}},
        {"scenario": FSDP2, "config": {"mode": "diagnose", "radius": "top2", "every": 2}},
    ],
    "stablemax": [{"config": {"allow_pretrained": True}}, {"config": {"allow_pretrained": True, "dtype": "float64"}}],
    "saturation": [{}, {"config": {"probe_tokens": 0}}],
    "lr_spike": [{"config": {"step": 3}}],
    "role_metrics": [
        {"scenario": OF_ROLES},
        {"scenario": OF_ROLES, "config": {"decision": "acc", "window": 2, "gap_fall": 0.0, "reward_rise": 0.0}},
        {"config": {"role": "data_source"}},
    ],
    "gradient_coupling": [
        {"scenario": OF_ROLES, "config": {"every": 2}},
        {"scenario": OF_ROLES, "config": {"every": 1, "parameters": "all"}},
    ],
    "state_augmentation": [{"scenario": OF_ROLES, "config": {"place": "user"}}],
    "anchor_tags": [{"scenario": OF_ANCHORS}, {"scenario": OF_ANCHORS, "config": {"tag": "[{anchor}] "}}],
    "anchor_strata": [{"scenario": OF_ANCHORS}],
    "prob_mask": [{"scenario": OF_GROUPS, "config": {"rho": 0.5}}],
    "spo_chain": [
        {"config": {"interval": 1, "samples": 2}, "except_for": LONE_SEGMENTS},
        {"config": {"interval": 2, "samples": 3, "whiten": "none", "rho": 0.5}, "except_for": LONE_SEGMENTS},
    ],
    "spo_tree": [
        {"scenario": SHORT_ANSWERS, "config": {"branches": [3, 2, 2], "segment_tokens": 2}},
        {"scenario": SHORT_ANSWERS, "config": {"branches": [2, 2], "segment_tokens": 2, "by_std": True, "rows": 13}},
        {
            "scenario": SHORT_ANSWERS,
            "config": {"branches": [3, 2], "segment_tokens": 2, "rows_per_prompt": 2, "whiten": "none", "rho": 0.5},
        },
    ],
    "mopps": [{}, {"config": {"strategy": "threshold", "pool_ratio": 2, "decay": 0.5}}, {"config": {"metric": "acc"}}],
    "portfolio_mixture": [
        {"scenario": OF_SOURCES},
        {"scenario": OF_SOURCES, "config": {"mode": "eg", "utility": "mixed_groups", "scale": 3.0}},
        {"scenario": OF_SOURCES, "config": {"mode": "wealth", "utility": "accuracy_change", "forgetting": 0.9}},
        {"scenario": OF_SOURCES, "config": {"mode": "hierarchical", "groups": [["a", "c"], ["b"]]}},
    ],
    "clip_cov": [
        {
            "config": {"clip_cov_ratio": 0.1, "clip_cov_lb": 0.01},
            "except_for": {"row_order.policy_loss": BY_CHANCE, "micro_batches.policy_loss": PER_CALL},
        },
        {
            "config": {"clip_cov_ratio": 0.1, "clip_cov_lb": 0.01, "scope": "batch"},
            "except_for": {"row_order.observe": BY_CHANCE},
        },
    ],
    "kl_cov": [
        {
            "config": {"kl_cov_ratio": 0.1},
            "except_for": {
                "row_order.policy_loss": TIES,
                "padding.policy_loss": TIES,
                "micro_batches.policy_loss": PER_CALL,
            },
        },
        {"config": {"kl_cov_ratio": 0.1, "scope": "batch"}},
    ],
    "steer": [
        {"except_for": {"micro_batches.policy_loss": PER_CALL}},
        {"config": {"map": "linear"}, "except_for": {"micro_batches.policy_loss": PER_CALL}},
        {"config": {"scope": "batch"}},
        {"config": {"map": "linear", "scope": "batch"}},
    ],
    "dcpo": [
        {"except_for": LONE_TERM},
        {"config": {"entropy_source": "previous_mc", "entropy_base": 0.5}, "except_for": LONE_TERM},
    ],
    "epo": [
        {"scenario": WITH_BONUS, "config": {"schedule": "constant", "max_ratio": 1.2}},
        {"scenario": WITH_BONUS, "config": {"smooth_mode": "sequence", "gate_scope": "row", "gate_turn": 0}},
        {
            "scenario": WITH_BONUS,
            "config": {"smooth_form": "indicator", "history": "left_padded", "min_ratio": 0.8, "max_ratio": 1.2},
            "except_for": {"gradient.loss_terms": "the authors' form has no gradient"},
        },
        {"config": {"smooth_form": "mask_pg", "max_ratio": 1.2, "schedule": "exp"}},
    ],
    "nrr_core": [
        {"config": {"initial_coeff": 0.01, "kappa": 1e-3}},
        {"config": {"initial_coeff": 0.01, "kappa": 1e-3, "reference": "ema", "missing": "drop"}},
    ],
    "r3": [
        {"scenario": SECOND_EPOCH},
        {"scenario": SECOND_EPOCH, "config": {"old_log_probs": "stored", "rank_set": "all_failed", "alpha": 2.0}},
        {"scenario": SECOND_EPOCH, "config": {"mix": "append", "strategy": "random", "capacity": 1}},
    ],
    "sage": [
        {"scenario": SOLVED, "config": {"hint_max_tokens": 64}},
        {"scenario": SOLVED, "config": {"hint_max_tokens": 64, "variant": "sage-light"}},
    ],
    "entropy_law": [{"scenario": Scenario(overrides={"trainer.test_freq": 1}), "config": {"min_points": 2}}],
    "progrpo": [{"except_for": LONE_TERM}, {"config": {"prompt_scope": "low", "skip_all_correct": True}}],
    "copo": [
        {"except_for": LONE},
        {"config": {"form": "two_losses", "gate": "soft", "reward_coefficient": True}},
    ],
    "drpo": [
        {"scenario": SUMS_PER_ROW, "except_for": {"micro_batches.policy_loss": TRUST_REGION}},
        {"scenario": SUMS_PER_ROW, "config": {"beta": 0.0}},
        {"scenario": SUMS_PER_ROW, "config": {"beta": 0.0, "negatives": "old"}},
        {
            "scenario": SUMS_PER_ROW,
            "config": {"beta": 0.0, "negatives": "exact"},
            "except_for": {
                "row_order.estimate_advantage": "groups are numbered as they come",
                "micro_batches.policy_loss": "negatives: exact sums over the rows in the micro-batch; current does not",
            },
        },
    ],
}
"""What `check_plugin` is called with; a plugin without an entry: nothing."""
CASES = [(name, options) for name in OURS for options in VARIANTS.get(name, [{}])]


@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{name}-{options.get('config', '')}" for name, options in CASES]
)
def test_laws(name: str, options: dict[str, Any]) -> None:
    check_plugin(name, **options)


def test_variants_are_of_installed_plugins() -> None:
    assert VARIANTS.keys() <= set(OURS)
