"""IGPO: gains of turns from beliefs, outcomes of answers, and the advantage of both."""

import torch
from cases import Case, NotOffered

from verl_plugins import Groups
from verl_plugins.advantage.igpo import Igpo, turn_advantage
from verl_plugins.reward.word_f1 import WordF1
from verl_plugins.services import Answer

FIXED = {"epsilon": 1e-6, "var_eps": 1e-8, "std": "population"}


def replay(case: Case, expected: dict) -> dict:
    if case.has("solution_str"):
        return outcome(case)
    if case.has("gt_token_log_probs_per_turn"):
        return gains(case)
    for name, value in FIXED.items():
        if case.param(name, value) != value:
            raise NotOffered(f"{name} is {value}, not {case.param(name)}")
    mask = case.tensor("response_mask").bool()
    found = turn_advantage(
        case.tensor("token_level_rewards"),
        case.tensor("turn_end_mask").bool() & mask,
        mask,
        Groups(case.input("uid")).index,
        mode=case.param("info_gain_norm_mode", "separate"),
        by_std=case.param("norm_adv_by_std_in_grpo", True),
        gamma=case.param("gamma", 1.0),
        weights=(case.param("outcome_weight", 1.0), case.param("info_gain_weight", 1.0)),
    )
    return {"advantages": found, "returns": found}


def gains(case: Case) -> dict:
    """One response whose known answer was scored before each turn."""
    means = torch.tensor([sum(row) / len(row) for row in case.input("gt_token_log_probs_per_turn")], dtype=torch.double)
    turns = len(means)
    states = torch.stack([torch.zeros(turns, dtype=torch.long), torch.arange(turns)], 1)
    plugin = Igpo(Igpo.Config(gain=case.param("info_gain_type", "log_prob_diff")))
    found, fine = plugin.gains(means, states, torch.ones(1, turns, dtype=torch.bool))
    return {"mean_log_prob": means, "info_gain": found[0, :-1], "fine": fine}


def outcome(case: Case) -> dict:
    plugin = WordF1(
        WordF1.Config(
            penalty=case.param("format_penalty", -2.0),
            separator=case.param("multi_answer_separator", "<|answer_split|>"),
        )
    )
    answers = [
        plugin.score_answer(Answer(text, truth, "qa"))
        for text, truth in zip(case.input("solution_str"), case.input("ground_truth"), strict=True)
    ]
    penalty = case.param("format_penalty", -2.0)
    exact = [penalty if one.parts["format_error"] else one.parts["em"] for one in answers]
    return {"score": [one.score for one in answers], "em": exact}
