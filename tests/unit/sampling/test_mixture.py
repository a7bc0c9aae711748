"""Weights from wealth: the identity of the universal mixture, its limits, rounding, levels."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from verl_plugins import StateError
from verl_plugins.sampling.mixture import (
    Mixture,
    largest_remainder,
    lattice,
    lattice_prior,
    log_relatives,
    make_level,
    within,
)

STEPS = st.integers(1, 4).flatmap(lambda k: arrays(np.float64, (6, k), elements=st.floats(0.2, 5)))
UNTIMED = settings(deadline=None, max_examples=50)
METHODS = ("universal", "eg", "wealth")


def mixture(
    k: int, method: str = "universal", groups=None, floor: float = 0.0, kept: float = 1.0, **options
) -> Mixture:
    groups = [np.array(group) for group in groups or [range(k)]]
    return Mixture(groups, make_level(method, **options), floor, kept)


def after(made: Mixture, relatives: np.ndarray) -> Mixture:
    for row in relatives:
        made.add(np.log(row))
    return made


class TestLattice:
    """All multiples of 1/q on the simplex."""

    @pytest.mark.parametrize(("k", "q"), [(1, 10), (2, 7), (3, 10), (4, 10)])
    def test_against_counting_out(self, k, q):
        expected = {point for point in itertools.product(range(q + 1), repeat=k) if sum(point) == q}
        points = lattice(k, q)
        assert {tuple(np.rint(point * q).astype(int).tolist()) for point in points} == expected
        assert points.shape == (math.comb(q + k - 1, k - 1), k)
        np.testing.assert_allclose(points.sum(1), 1)

    def test_prior(self):
        points = np.array([[0.0, 1.0], [0.5, 0.5]])
        expected = [(0.25 * 1.25) ** -0.5, 1 / 0.75]
        np.testing.assert_allclose(lattice_prior(points, 2, "dirichlet_half"), expected)
        assert lattice_prior(points, 2, "uniform").tolist() == [1, 1]


class TestMixture:
    """Wealth makes weights."""

    @UNTIMED
    @given(STEPS, st.sampled_from(METHODS), st.floats(0, 0.25))
    def test_weights_are_a_distribution_above_the_floor(self, relatives, method, floor):
        weights = after(mixture(relatives.shape[1], method, floor=floor), relatives).weights()
        assert weights.sum() == pytest.approx(1)
        assert (weights >= floor - 1e-12).all()

    @UNTIMED
    @given(STEPS, st.sampled_from(("uniform", "dirichlet_half")))
    def test_the_wealth_of_the_universal_mixture_is_the_mean_of_all_allocations(self, relatives, prior):
        made = after(mixture(relatives.shape[1], q=6, prior=prior), relatives)
        points = lattice(relatives.shape[1], 6)
        mu = lattice_prior(points, 6, prior)
        expected = (mu / mu.sum()) @ np.prod(points @ relatives.T, axis=1)
        assert math.exp(made.combined) == pytest.approx(expected)

    @UNTIMED
    @given(STEPS)
    def test_buy_and_hold_is_the_mean_of_the_sources_and_below_the_best(self, relatives):
        made = after(mixture(relatives.shape[1], "wealth"), relatives)
        assert math.exp(made.combined) == pytest.approx(relatives.prod(0).mean())
        assert made.combined <= made.log_wealth.max() + 1e-9
        np.testing.assert_allclose(made.log_wealth, np.log(relatives).sum(0), atol=1e-9)

    def test_universal_can_beat_every_source(self):
        """The sheet's example: sources that end where they began."""
        made = after(mixture(2, q=20), np.array([[2, 0.5], [0.5, 2]] * 6))
        np.testing.assert_allclose(np.exp(made.log_wealth), [1, 1])
        assert math.exp(made.combined) == pytest.approx(7.81, abs=0.005)
        assert after(mixture(2, "wealth"), np.array([[2, 0.5], [0.5, 2]] * 6)).combined == pytest.approx(0)

    @UNTIMED
    @given(STEPS, st.sampled_from(METHODS))
    def test_scaling_all_relatives_moves_no_weight(self, relatives, method):
        made = [after(mixture(relatives.shape[1], method), relatives * scale) for scale in (1, 3.5)]
        np.testing.assert_allclose(made[0].weights(), made[1].weights(), atol=1e-9)

    @pytest.mark.parametrize("method", METHODS)
    def test_equal_relatives_move_no_weight(self, method):
        made = after(mixture(3, method), np.ones((5, 3)))
        np.testing.assert_allclose(made.weights(), 1 / 3)
        assert made.combined == pytest.approx(0)

    @pytest.mark.parametrize("method", METHODS)
    def test_one_source_has_all_the_weight(self, method):
        made = after(mixture(1, method), np.array([[0.1], [7.0]]))
        assert made.weights().tolist() == [1.0]
        assert made.combined == pytest.approx(math.log(0.7))

    @UNTIMED
    @given(STEPS, st.sampled_from(METHODS), st.randoms())
    def test_sources_have_no_order(self, relatives, method, random):
        order = list(range(relatives.shape[1]))
        random.shuffle(order)
        plain = after(mixture(len(order), method), relatives).weights()
        np.testing.assert_allclose(
            after(mixture(len(order), method), relatives[:, order]).weights(), plain[order], rtol=1e-6
        )

    def test_eg_step(self):
        made = after(mixture(2, "eg", eta=0.5), np.array([[2.0, 1.0]]))
        raw = np.exp(0.5 * np.array([2.0, 1.0]) / 1.5)
        np.testing.assert_allclose(made.weights(), raw / raw.sum())
        again = made.weights() * np.exp(0.5 * np.array([1.0, 3.0]) / (made.weights() @ [1.0, 3.0]))
        made.add(np.log([1.0, 3.0]))
        np.testing.assert_allclose(made.weights(), again / again.sum())

    def test_first_weights(self):
        made = mixture(3, "wealth", start=[7.0, 2.0, 1.0])
        np.testing.assert_allclose(made.weights(), [0.7, 0.2, 0.1])

    def test_a_distant_past_neither_overflows_nor_is_lost(self):
        made = after(mixture(2, "wealth"), np.tile([[1e200, 1e199]], (50, 1)))
        assert made.log_wealth[0] - made.log_wealth[1] == pytest.approx(50 * math.log(10))
        assert made.weights().tolist() == [1.0, pytest.approx(1e-50)]

    def test_forgetting(self):
        made = after(mixture(2, "wealth", kept=0.5), np.array([[math.e, 1], [1, 1], [math.e, 1]]))
        np.testing.assert_allclose(made.log_wealth, [1.25, 0])
        np.testing.assert_allclose(made.weights(), np.exp([1.25, 0]) / np.exp([1.25, 0]).sum())
        before = math.log((math.e + 1) / 2)
        assert after(mixture(2, "wealth", kept=0.5), np.array([[math.e, 1], [1, 1]])).combined == before / 2


class TestLevels:
    """Groups are sources of the level above."""

    @UNTIMED
    @given(arrays(np.float64, (5, 4), elements=st.floats(0.2, 5)), st.sampled_from(METHODS))
    def test_against_doing_it_by_hand(self, relatives, method):
        groups, made = [[2, 0], [3, 1]], mixture(4, method, groups=[[2, 0], [3, 1]], q=5)
        inner, outer = [mixture(2, method, q=5) for _ in groups], mixture(2, method, q=5)
        for row in relatives:
            growth = []
            for group, one in zip(groups, inner, strict=True):
                growth.append(one.weights() @ row[group])
                one.add(np.log(row[group]))
            outer.add(np.log(growth))
            made.add(np.log(row))
        expected = np.zeros(4)
        for group, one, share in zip(groups, inner, outer.weights(), strict=True):
            expected[group] = share * one.weights()
        np.testing.assert_allclose(made.weights(), expected, rtol=1e-8)
        assert made.combined == pytest.approx(outer.combined)

    def test_groups_of_unequal_size_begin_equal(self):
        np.testing.assert_allclose(mixture(3, groups=[[0], [1, 2]]).weights(), [0.5, 0.25, 0.25])


class TestState:
    """Bit for bit."""

    @UNTIMED
    @given(STEPS, st.sampled_from(METHODS))
    def test_goes_on_as_if_nothing_had_happened(self, relatives, method):
        k = relatives.shape[1]
        groups = [[0], list(range(1, k))] if k > 1 else None
        made, again = (mixture(k, method, groups=groups, floor=0.01, kept=0.9) for _ in range(2))
        again.load_state_dict(after(made, relatives).state_dict())
        for one in (made, again):
            after(one, relatives)
        assert made.weights().tobytes() == again.weights().tobytes()
        assert made.combined == again.combined
        assert made.log_wealth.tobytes() == again.log_wealth.tobytes()

    def test_other_settings(self, sentence):
        with pytest.raises(StateError) as error:
            mixture(3, q=9).load_state_dict(mixture(3).state_dict())
        sentence(error.value, "67 allocations", "56", "mode, groups and q")


class TestRelatives:
    """Utilities against the mean of those observed."""

    @UNTIMED
    @given(arrays(np.float64, 5, elements=st.floats(0, 1)), st.lists(st.booleans(), min_size=5, max_size=5))
    def test_unobserved_are_exactly_one_and_the_others_cancel(self, utility, observed):
        observed = np.array(observed)
        found = log_relatives(utility, observed, 2.0)
        assert (found[~observed] == 0).all()
        assert found.sum() == pytest.approx(0, abs=1e-9)
        np.testing.assert_allclose(np.diff(found[observed]), 2 * np.diff(utility[observed]), atol=1e-9)

    def test_nothing_observed(self):
        assert log_relatives(np.array([0.3, 0.4]), np.array([False, False])).tolist() == [0, 0]


class TestCounts:
    """Largest remainder, equal ones by lower index."""

    @UNTIMED
    @given(arrays(np.float64, st.integers(1, 8), elements=st.floats(0.01, 1)), st.integers(0, 64))
    def test_whole_shares_within_one(self, weights, count):
        shares = weights / weights.sum()
        given = largest_remainder(shares, count)
        assert given.sum() == count
        assert (np.abs(given - shares * count) < 1 + 1e-6).all()

    def test_ties(self):
        assert largest_remainder(np.full(3, 1 / 3), 32).tolist() == [11, 11, 10]
        assert largest_remainder(np.array([0.7, 0.2, 0.1]), 32).tolist() == [23, 6, 3]

    def test_fewer_prompts_than_sources(self):
        assert largest_remainder(np.array([0.3, 0.3, 0.4]), 2).tolist() == [1, 0, 1]

    @UNTIMED
    @given(
        st.lists(st.tuples(st.floats(-1, 9), st.integers(0, 9)), min_size=1, max_size=6),
        st.integers(0, 30),
    )
    def test_no_source_gives_more_than_it_has(self, sources, count):
        owed, available = (np.array(values) for values in zip(*sources, strict=True))
        count = min(count, int(available.sum()))
        given = within(owed, available, count)
        assert given.sum() == count
        assert (given >= 0).all() and (given <= available).all()

    def test_the_rest_goes_by_what_is_owed(self):
        assert within(np.array([8.0, 2.0, 2.0]), np.array([2, 9, 9]), 12).tolist() == [2, 5, 5]
