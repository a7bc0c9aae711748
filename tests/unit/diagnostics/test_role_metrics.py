"""What is measured of roles: sums written once more in plain Python, sessions of several rows, the alarm."""

from __future__ import annotations

import pytest
import torch

from verl_plugins import Batch, DataError
from verl_plugins.diagnostics.role_metrics import MOST_ROLES, RoleMetrics, diverging, last_of_role, role_summary
from verl_plugins.testing import FakeRun

ROLES = ["b", "a", "b", "a"]
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
ENTROPY = torch.tensor([[1.0, 2.0, torch.nan], [4.0, 9.0, 9.0], [0.0, 0.0, 3.0], [7.0, 7.0, 7.0]])


def batch(roles: list[str] | None = ROLES, **fields: object) -> Batch:
    rewards = torch.zeros(4, 3)
    rewards[:, 0] = torch.tensor([1.0, 0.0, 0.5, 1.0])
    fields = {"entropy": ENTROPY, "top2_gap": 2 * ENTROPY, "response_mask": MASK, "rm_scores": rewards} | fields
    if roles is not None:
        fields["role"] = roles
    return Batch.from_tensors(uid=["1-1-0", "1-1-0", "2-1-1", "2-1-1"], **fields)


def observed(batch: Batch, run: FakeRun | None = None, plugin: RoleMetrics | None = None, **config: object) -> dict:
    run = run or FakeRun()
    (plugin or RoleMetrics(RoleMetrics.Config(**config))).observe(run, batch)
    return run.metrics


def test_means_are_those_of_the_role_s_tokens() -> None:
    found = role_summary(
        ROLES, MASK, torch.tensor([1.0, 0.0, 0.5, 1.0]), ENTROPY, 2 * ENTROPY, torch.tensor([1, 0, 0, 0])
    )
    assert list(found) == ["a", "b"]
    assert found["a"] == {"count": 2, "reward_mean": 0.5, "entropy": 4.0, "action_gap": 8.0, "decision_rate": 0.0}
    b = {"count": 2, "reward_mean": 0.75, "entropy": 6 / 5, "action_gap": 12 / 5, "decision_rate": 0.5}
    assert found["b"] == pytest.approx(b)


def test_the_order_of_rows_does_not_matter() -> None:
    order = [2, 3, 0, 1]
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0])
    turned = role_summary([ROLES[k] for k in order], MASK[order], rewards[order], ENTROPY[order])
    assert turned == role_summary(ROLES, MASK, rewards, ENTROPY)


def test_of_a_role_without_a_token_only_the_reward_is_told() -> None:
    found = observed(batch(["b", "b", "b", "a"]))
    assert found["a/reward"] == 0.0  # the reward stands on a token that is not the policy's
    assert not {"a/entropy", "a/action_gap"} & found.keys()


def test_absent_roles_and_decisions_that_nobody_asks_for_have_no_metric() -> None:
    found = observed(batch())
    assert {key.partition("/")[0] for key in found if "/" in key} == {"a", "b"}
    assert found["roles"] == 2 and "a/decision_rate" not in found
    assert found["reward_spread"] == 0.75
    assert found["action_gap"] == pytest.approx(2 * 10 / 6)


def test_decisions_are_read_from_their_column() -> None:
    parts = [{"reward_extra_info": {"acc": 1.0, "kept": kept}} for kept in (1.0, 0.0, 1.0, 1.0)]
    found = observed(batch(extra_fields=parts), decision="kept")
    assert (found["a/decision_rate"], found["b/decision_rate"]) == (0.5, 1.0)


def test_a_session_s_reward_counts_once_for_each_of_its_roles() -> None:
    fields = {"session": [0, 0, 0, 1], "turn": [0, 1, 2, 0]}
    made = batch(["plan", "solve", "solve", "plan"], **fields)
    made = Batch.from_tensors(
        uid=["1-1-0"] * 4,
        role=["plan", "solve", "solve", "plan"],
        entropy=ENTROPY,
        top2_gap=ENTROPY,
        response_mask=torch.ones(4, 3),
        rm_scores=torch.tensor([[1.0, 0, 0], [0.25, 0, 0], [0.5, 0, 0], [0.0, 0, 0]]),
        **fields,
    )
    assert last_of_role(made, made.labels("role")).tolist() == [True, False, True, True]
    found = observed(made)
    assert (found["solve/reward"], found["solve/rows"]) == (0.5, 1)
    assert (found["plan/reward"], found["plan/rows"]) == (0.5, 2)


@pytest.mark.parametrize(
    ("gaps", "spreads", "said"),
    [
        ([4, 4, 2, 2], [0.1, 0.1, 0.3, 0.3], True),
        ([4, 4, 3.3, 3.3], [0.1, 0.1, 0.3, 0.3], False),
        ([4, 4, 2, 2], [0.1, 0.1, 0.14, 0.14], False),
        ([2, 2, 4, 4], [0.1, 0.1, 0.3, 0.3], False),
        ([4, 4, 2, 2], [0.3, 0.3, 0.1, 0.1], False),
        ([4, 3, 1], [0.0, 0.2, 0.2], True),
    ],
)
def test_the_alarm_needs_both(gaps: list[float], spreads: list[float], said: bool) -> None:
    assert diverging(gaps, spreads, 0.2, 0.05) is said


def test_the_alarm_waits_for_its_window_and_survives_a_resume() -> None:
    settings = RoleMetrics.Config(window=4)
    plugin, told = RoleMetrics(settings), []
    for step in range(1, 8):
        run = FakeRun(step=step)
        rewards = torch.zeros(4, 3)
        rewards[:, 0] = torch.tensor([1.0, 1.0, 1.0, 1.0]) if step < 4 else torch.tensor([1.0, 0.0, 1.0, 0.0])
        gap = torch.full((4, 3), 3.0 if step < 4 else 0.5)
        observed(batch(rm_scores=rewards, top2_gap=gap, response_mask=torch.ones(4, 3)), run, plugin)
        told.append(run.metrics.get("alarm"))
        resumed = RoleMetrics(settings)
        resumed.load_state_dict(plugin.state_dict())
        plugin = resumed
    assert told == [None, None, None, True, True, True, False]


def test_one_role_alone_raises_no_alarm() -> None:
    plugin = RoleMetrics(RoleMetrics.Config(window=2))
    for _ in range(3):
        found = observed(batch(["a"] * 4), plugin=plugin)
    assert not {"alarm", "reward_spread", "action_gap"} & found.keys()


def test_what_is_wrong_with_roles_is_named(sentence) -> None:
    with pytest.raises(DataError) as error:
        observed(batch(None))
    sentence(error.value, "'role'")
    some = [{"role": "a"}, {"role": "b"}, {}, {"role": "a"}]
    with pytest.raises(DataError) as error:
        observed(batch(None, extra_fields=some))
    sentence(error.value, "row 2-1-1_2_0 has no field 'role'")
    with pytest.raises(DataError) as error:
        observed(batch(["a", None, "b", "b"]))
    sentence(error.value, "'role'", "row 1-1-0_1_0")
    rows = MOST_ROLES + 1
    many = Batch.from_tensors(
        uid=["1-1-0"] * rows,
        role=[f"r{k}" for k in range(rows)],
        response_mask=torch.ones(rows, 1),
        rm_scores=torch.zeros(rows, 1),
    )
    with pytest.raises(DataError) as error:
        observed(many)
    sentence(error.value, "plugins.role_metrics.role", "65", "64")


def test_numbers_name_roles_in_their_shortest_form() -> None:
    assert batch(None, player=torch.tensor([2.0, 10.0, 2.0, 0.5])).labels("player") == ["2", "10", "2", "0.5"]
