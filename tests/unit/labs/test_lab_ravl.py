"""The chain whose last state is never left: target, walkers, tables, and the lab."""

from __future__ import annotations

import pytest
import torch
from lab_page import not_on_page

from verl_plugins.labs import ravl
from verl_plugins.labs.ravl import BEST, STATES, Settings, greedy, moves, returns, td_target, trained, walked


def test_the_target_in_numbers():
    members = torch.tensor([[2.0, 1.0], [5.0, 7.0], [3.0, 3.0]])
    found = td_target(
        torch.tensor([0.5, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]), members, torch.tensor([-1.0, 9, 2]), 0.9, 0.1
    )
    assert found.tolist() == pytest.approx([0.5 + 0.9 * (1 + 0.1), 1.0, 0.9 * (3 - 0.2)])


def test_steps_stay_on_the_chain():
    assert moves()[0].tolist() == [0, 0, 1] and moves()[STATES - 1].tolist() == [STATES - 2, STATES - 1, STATES - 1]
    assert moves()[4].tolist() == [3, 4, 5]


def test_the_policy_takes_the_action_whose_smallest_value_is_largest():
    tables = torch.tensor([[[[9.0, 0.0], [2.0, 3.0], [1.0, 1.0]]]])
    assert greedy(tables).tolist() == [[1]]


def test_a_walk_of_three_steps_never_acts_in_the_last_state_and_a_long_one_does():
    right = torch.full((ravl.SEEDS, STATES), 2)
    draw = torch.Generator().manual_seed(0)
    seen = walked(right, 3, moves(), draw)
    assert seen.shape == (ravl.SEEDS, STATES, 3) and seen[:, :7].any() and seen[:, 8].any()
    assert not seen[:, 9].any() and not walked(right, 1, moves(), draw)[:, 7:].any()
    assert walked(right, 30, moves(), draw)[:, 9].any()


def test_returns_of_a_hundred_steps():
    to_goal = torch.tensor([[2, 2, 1, 0, 0, 0, 0, 0, 0, 0]])
    assert returns(to_goal, moves()).tolist() == [BEST]
    assert returns(torch.full((2, STATES), 2), moves()).tolist() == [1, 1], "it passes the goal once"


def test_trained_tables_have_the_values_of_the_best_policy_where_all_is_reached():
    found = trained(2, 30, 400, 5)
    assert (found.returns == BEST).all() and found.edge is None and found.interior < 0.01
    ways = [abs(state - ravl.GOAL) for state in range(ravl.STARTS)]
    assert found.value == pytest.approx(sum(20 * 0.95**way for way in ways) / len(ways), rel=1e-3)


def test_lab():
    """One run: the page says what it finds."""
    found = ravl.lab(Settings(), 0, lambda share, what: None)
    assert not_on_page("ravl", found) == []
    assert found.failed == []


def test_long_rollouts_need_no_ensemble():
    found = ravl.lab(Settings(rollout_steps=30), 0, lambda share, what: None)
    names = [claim.name for claim in found.failed]
    assert "one member fails, though the dynamics are exact" in names
    assert "members differ most in the state at the edge" in names, "there is none"
