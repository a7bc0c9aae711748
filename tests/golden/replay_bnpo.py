"""BNPO: one score, or components each normalised alone."""

from unittest import mock

import numpy as np
import torch
from cases import Case, Rows, in_order_of
from fakes import FakeRun

from verl_plugins import Batch
from verl_plugins.advantage import bnpo
from verl_plugins.advantage.bnpo import MAX_WEIGHT, Bnpo, Normalised, normalise, to_unit


def replay(case: Case, expected: dict) -> dict:
    with mock.patch.object(bnpo, "MAX_WEIGHT", case.param("max_weight", MAX_WEIGHT)):
        return replay_within(case, expected)


def replay_within(case: Case, expected: dict) -> dict:
    low, high = case.param("reward_min", 0.0), case.param("reward_max", 1.0)
    if not case.param("use_advantage_decomposition", False):
        rows = Rows(case)
        found = normalise(to_unit(rows.batch.scores, low, high, "the score"), rows.batch.groups)
        plugin, batch = Bnpo(Bnpo.Config(reward_min=low, reward_max=high)), rows.batch
        alone = to_unit(batch.scores, low, high, "the score")
        ours = {
            "advantages": plugin.estimate_advantage(FakeRun(), batch),
            "seq_advantage": batch.of_session(found.advantage),
        }
        ours = {name: rows.with_lone(values, alone, expected, name) for name, values in ours.items()}
        return ours | of_prompts(found, batch.groups.labels, expected)
    return replay_components(case, expected, low, high)


def of_prompts(found: Normalised, labels: np.ndarray, expected: dict) -> dict:
    """The fit; rate and weight of each prompt, no weight where the rate is 0 or 1, and 1 in groups of one."""
    weight = torch.where(found.several, found.weight.double(), 1.0)
    weight[(found.rate == 0) | (found.rate == 1)] = torch.nan
    order = in_order_of(expected.get("uid_order"), labels)
    names = {"alpha": found.fit.alpha, "beta": found.fit.beta, "uid_order": labels[order].tolist()}
    return names | {"p": found.rate[order], "weight": weight[order]}


def replay_components(case: Case, expected: dict, low: float, high: float) -> dict:
    uid, mask = [str(name) for name in case.input("uid")], torch.tensor(case.input("response_mask")).bool()
    real = torch.tensor([not name.startswith("pad") for name in uid])
    places, parts = real.nonzero()[:, 0].tolist(), case.input("reward_components")
    order = case.param("component_order", list(parts))
    batch = Batch.from_tensors(
        uid=[uid[row] for row in places],
        response_mask=mask[real],
        rm_scores=torch.zeros(len(places), mask.shape[1]),
        **{name: torch.tensor(parts[name], dtype=torch.float64)[real] for name in order},
    )

    def on_all(values: torch.Tensor) -> torch.Tensor:
        whole = torch.zeros(len(uid), *values.shape[1:], dtype=torch.float64)
        whole[real] = values.double()
        return whole

    each = {}
    for name in order:
        found = normalise(to_unit(batch.extra(name), low, high, name), batch.groups)
        wanted = expected.get("per_component", {}).get(name, {})
        each[name] = of_prompts(found, batch.groups.labels, wanted) | {"seq_advantage": on_all(found.advantage)}
    plugin = Bnpo(Bnpo.Config(components=list(order), reward_min=low, reward_max=high))
    return {
        "advantages": on_all(plugin.estimate_advantage(FakeRun(), batch)),
        "seq_advantage": sum(one["seq_advantage"] for one in each.values()) / len(each),
        "per_component": each,
    }
