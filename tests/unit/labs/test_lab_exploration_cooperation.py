"""The lab of shared networks in small: payoffs, states, returns by hand, runs that do not meet, what a claim says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from lab_page import not_on_page

from verl_plugins.lab import Findings
from verl_plugins.labs import exploration_cooperation as lab
from verl_plugins.labs.exploration_cooperation import Memory, Networks, Outcome, Settings, claims, rewards, state_of

SHORT = Settings(steps=400, runs=1)


def world(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((2, 30, 30)) < 0.4


def around(row: int, column: int) -> list[tuple[int, int]]:
    """Above, right, below, left."""
    return [((row - 1) % 30, column), (row, (column + 1) % 30), ((row + 1) % 30, column), (row, (column - 1) % 30)]


def test_payoffs_are_means_over_four_neighbours() -> None:
    defects, payoff = world(), {(0, 0): 1.0, (0, 1): -0.25, (1, 0): 1.25, (1, 1): 0.0}
    found = rewards(defects, 0.25)
    for row, column in ((0, 0), (29, 29), (13, 4), (0, 29)):
        for run in range(2):
            me = int(defects[run, row, column])
            paid = [payoff[me, int(defects[run][place])] for place in around(row, column)]
            assert found[run, row, column] == pytest.approx(sum(paid) / 4)


def test_a_state_is_the_neighbours_actions_and_one_s_own() -> None:
    defects = world(1)
    found = state_of(defects)
    for row, column in ((0, 0), (29, 29), (7, 21), (29, 0)):
        bits = [int(defects[1][place]) for place in around(row, column)] + [int(defects[1, row, column])]
        assert found[1, row, column] == sum(bit << place for place, bit in enumerate(bits))
        assert lab.STATES[found[1, row, column]].tolist() == bits


def filled(steps: int, groups: int = 1) -> tuple[Memory, Networks, list[np.random.Generator]]:
    """A memory in which the reward of a step is the step, of run 1 a thousand more."""
    memory, rngs = Memory(2), [np.random.default_rng(seed) for seed in (0, 1)]
    networks = Networks(rngs, groups)
    for step in range(steps):
        shape = np.ones((2, 30, 30))
        paid = (step + shape * np.array([0, 1000])[:, None, None]).astype(np.float32)
        memory.add(step % 32 * shape, step % 2 * shape, paid, (step + 1) % 32 * shape)
    return memory, networks, rngs


@pytest.mark.parametrize(("steps", "lengths"), [(1, {1}), (5, {1}), (6, {1, 5}), (130, {1, 5})])
def test_returns_over_five_steps_where_the_memory_reaches(steps: int, lengths: set[int]) -> None:
    memory, networks, rngs = filled(steps)
    states, actions, returns, later, discount = memory.draw(networks, rngs)
    seen = set()
    for run in range(2):
        for state, action, paid, after, kept in zip(
            *(one[run].tolist() for one in (states, actions, returns, later, discount)), strict=True
        ):
            length = round(math.log(kept) / math.log(0.99))
            step = next(
                one
                for one in range(max(0, steps - 100), steps)
                if one % 32 == state and abs(sum(0.99**k * (one + k + 1000 * run) for k in range(length)) - paid) < 1e-2
            )
            seen.add(length)
            assert action == step % 2 and after == (step + length) % 32
            assert length == (5 if step + 5 <= steps and steps > 5 else 1)
    assert seen == lengths


def test_groups_learn_from_their_own_players() -> None:
    memory, networks, rngs = filled(3, groups=10)
    assert networks.players.shape == (20, 90)
    assert sorted(networks.players[:10].ravel().tolist()) == list(range(900))
    assert sorted(networks.players[10:].ravel().tolist()) == list(range(900, 1800))
    returns = memory.draw(networks, rngs)[2]
    assert bool((returns[:10] < 900).all()) and bool((returns[10:] >= 1000).all())
    place = networks.offset.reshape(-1)[networks.players[13]]
    assert set(place.tolist()) == {13 * 32}


def test_an_update_is_double_dqn_with_a_gradient_of_bounded_length() -> None:
    networks = Networks([np.random.default_rng(0), np.random.default_rng(1)], 1)
    before = [weight.detach().clone() for weight in networks.weights]
    with torch.no_grad():
        networks.weights[3][0, 0, 0] += 5  # online prefers cooperating, the target does not know
    batch = [torch.randint(0, high, (2, 256), generator=torch.Generator().manual_seed(high)) for high in (32, 2)]
    later, returns = batch[0].flip(1), torch.ones(2, 256) * 40
    table, target = networks.table(networks.weights).detach(), networks.table(networks.target)
    wanted = 40 + 0.5 * target[0, later[0], table[0, later[0]].argmax(-1)]
    weights = [weight.detach()[0].clone().requires_grad_() for weight in networks.weights]
    q = (torch.relu(lab.STATES @ weights[0] + weights[1]) @ weights[2] + weights[3])[batch[0][0], batch[1][0]]
    torch.nn.functional.smooth_l1_loss(q, wanted).backward()
    length = torch.cat([weight.grad.flatten() for weight in weights]).norm()
    networks.learn(batch[0], batch[1], returns, later, torch.full((2, 256), 0.5))
    assert length > 0.5
    for weight, expected in zip(networks.weights, weights, strict=True):
        torch.testing.assert_close(weight.grad[0], expected.grad * 0.5 / length, rtol=1e-4, atol=1e-6)
    assert not any(torch.equal(now, then) for now, then in zip(networks.weights, before, strict=True))
    networks.copy_target()
    assert all(map(torch.equal, networks.target, networks.weights))


def test_runs_do_not_meet() -> None:
    both = lab.play([0.2, 0.7], [(0, 1), (0, 2)], SHORT, 1, lambda share, what: None)
    alone = lab.play([0.7], [(0, 2)], SHORT, 1, lambda share, what: None)
    assert both.cooperation[1] == pytest.approx(alone.cooperation[0], abs=1e-6)
    assert both.course[1] == pytest.approx(alone.course[0], abs=1e-6)
    assert both.gap[1] == pytest.approx(alone.gap[0], rel=1e-4)


def outcome(cooperation: list[float], gap: list[float]) -> Outcome:
    return Outcome(np.array(cooperation), np.array(gap), np.zeros((len(gap), lab.POINTS)))


HELD = outcome([0.99, 1.0, 0.05, 0.98], [60.0, 50.0, 0.4, 55.0])


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        (HELD, [True, True, True]),
        (outcome([0.99, 1.0, 0.05, 0.5], [60.0, 50.0, 0.4, 55.0]), [False, True, True]),
        (outcome([0.05, 1.0, 0.05, 0.98], [0.4, 50.0, 0.4, 55.0]), [True, False, True]),
        (outcome([0.99, 1.0, 0.05, 0.98], [60.0, 50.0, 1.1, 55.0]), [True, True, False]),
        (outcome([0.99, 1.0, 0.99, 0.98], [60.0, 50.0, 51.0, 55.0]), [True, False, False]),
        (outcome([0.01, 0.0, 0.02, 0.03], [0.4, 0.4, 0.4, 0.4]), [True, False, False]),
    ],
)
def test_what_a_claim_says(found: Outcome, holds: list[bool]) -> None:
    assert [claim.holds for claim in claims(found, 2)] == holds


def test_the_page_has_the_claims() -> None:
    """Which runs collapse differs from processor to processor: not the numbers."""
    four = outcome([1.0] * 4 + [0.06] * 3 + [1.0], [60.0] * 4 + [0.3] * 3 + [55.0])
    assert not_on_page("exploration_cooperation", Findings(claims(four, 4)), close=math.inf) == []


def test_a_short_lab_with_groups_reports_them_and_claims_nothing_of_them() -> None:
    told = []
    found = lab.lab(Settings(steps=400, runs=1, groups=2), 0, lambda share, what: told.append((share, what)))
    assert len(found.claims) == 3 and "every shared run ends all or nothing" in {claim.name for claim in found.failed}
    assert "2 networks" in found.notes[1]
    assert [what for _, what in told] == ["2 runs with 1 network each", "2 runs with 2 networks each"]
    (panel,) = found.panels
    assert [curve.label for curve in panel.curves] == ["tau_init 0.127", "tau_init 0.727"]
    assert all(len(curve.x) == len(curve.y) == lab.POINTS for curve in panel.curves)


def test_groups_that_do_not_go_into_the_players_are_refused() -> None:
    with pytest.raises(ValueError, match="groups=7"):
        Settings(groups=7)
