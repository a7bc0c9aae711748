"""Imbalanced classes in deep linear networks: the optimum by class, against grids and other parameters, and the lab."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_page import not_on_page

from verl_plugins.diagnostics.nc_deep_linear import Problem, class_objective, fitted, optimum
from verl_plugins.labs import nc_deep_linear
from verl_plugins.labs.nc_deep_linear import PROBLEMS, Ends, Settings, Weights, labels, objective, optimal_weights

FEW = settings(max_examples=60, deadline=None)
DECAY = st.floats(1e-5, 0.3)
COUNTS = st.lists(st.integers(1, 30), min_size=1, max_size=5)
DRAWN = st.builds(Problem, COUNTS.map(tuple), st.lists(DECAY, min_size=1, max_size=3).map(tuple), DECAY)


def whole(problem: Problem) -> float:
    """The objective of the theory's weights, as the paper writes it."""
    return float(objective(Weights.of(optimal_weights(problem), problem), problem))


@FEW
@given(st.floats(0.01, 1), st.floats(1e-6, 1), st.integers(1, 4))
def test_no_other_response_is_better(share, cost, layers):
    share, cost = torch.tensor([share]).double(), torch.tensor([cost]).double()
    p = fitted(share, cost, layers)
    grid = torch.linspace(0, 1.2, 4001).double()
    values = class_objective(grid, share, cost, layers)
    assert float(class_objective(p, share, cost, layers)) <= float(values.min()) + 1e-12
    assert 0 <= float(p) <= 1


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_a_class_is_lost_exactly_where_losing_it_is_better(layers):
    """Over a fine row of costs, of which the last ones lose the class, against a grid of responses."""
    share, costs = 0.6, torch.linspace(0.001, 0.7, 700).double()
    p = fitted(torch.full_like(costs, share), costs, layers)
    grid = torch.linspace(1e-4, 1, 4000).double()
    best = class_objective(grid[:, None], torch.tensor(share).double(), costs, layers).amin(0)
    kept = best < share / 2
    clear = (best - share / 2).abs() > 1e-5
    assert torch.equal((p > 0)[clear], kept[clear])
    assert bool(kept[0]) and not bool(kept[-1]) and int(clear.sum()) > 500


@FEW
@given(st.integers(1, 40), st.integers(1, 40), DECAY, DECAY)
def test_one_layer_in_closed_form(count, others, decay, feature_decay):
    total = count + others
    found = optimum(Problem((count, others), (decay,), feature_decay)).fit
    expected = max(0.0, 1 - total * math.sqrt(decay * feature_decay / count))
    assert float(found[0]) == pytest.approx(expected, abs=1e-12)


@FEW
@given(DRAWN)
def test_the_sum_over_classes_is_the_loss_of_the_weights(problem):
    assert whole(problem) == pytest.approx(float(optimum(problem).objective), rel=1e-9, abs=1e-14)


@FEW
@given(DRAWN)
def test_every_regularised_term_of_a_class_is_the_same(problem):
    found, counts = optimum(problem), torch.tensor(problem.counts)
    of_features = problem.feature_decay * counts * found.feature_norm.square()
    of_layers = torch.tensor(problem.decays).double() * found.singular_values.square()
    assert torch.allclose(of_layers, of_features[:, None].expand_as(of_layers))
    assert torch.allclose(found.singular_values.prod(1) * found.feature_norm, found.fit)


@FEW
@given(DRAWN, st.integers(0, 1000), st.sampled_from([0.01, 0.3, 1.0]))
def test_no_parameters_beside_it_have_a_lower_objective(problem, seed, size):
    flat = optimal_weights(problem)
    noise = torch.randn(len(flat), generator=torch.Generator().manual_seed(seed)).double()
    for other in (flat + size * noise, size * noise):
        assert float(objective(Weights.of(other, problem), problem)) >= float(optimum(problem).objective) - 1e-12


@FEW
@given(DRAWN, st.randoms(use_true_random=False))
def test_the_order_of_classes_and_of_layers_is_that_of_the_results(problem, shuffler):
    places = list(range(len(problem.counts)))
    shuffler.shuffle(places)
    other = Problem(tuple(problem.counts[p] for p in places), problem.decays[::-1], problem.feature_decay)
    one, two = optimum(problem), optimum(other)
    assert torch.allclose(one.fit[places], two.fit, atol=1e-9)
    assert torch.allclose(one.singular_values[places].flip(1), two.singular_values, atol=1e-6)


def test_a_class_without_samples_has_no_length():
    for decays in ((0.01,), (0.01, 0.01)):
        found = optimum(Problem((5, 0, 3), decays, 0.01))
        without = optimum(Problem((5, 3), decays, 0.01))
        assert [float(value[1]) for value in (found.fit, found.feature_norm)] == [0, 0]
        assert found.singular_values[1].tolist() == [0] * len(decays)
        assert torch.allclose(found.fit[[0, 2]], without.fit)


@pytest.mark.parametrize("count", [9, 10, 11])
def test_at_the_threshold_a_class_has_vanished(count):
    """n <= N^2 lw lh, here with N^2 lw lh = 10."""
    problem = Problem((count, 100 - count), (0.1,), 0.01)
    assert (float(optimum(problem).fit[0]) == 0) == (count <= 10)


@pytest.mark.parametrize(
    "problem", [Problem((2, 3), (0.0,), 0.1), Problem((2, 3), (0.1, -1.0), 0.1), Problem((2, 3), (0.1,), 0.0)]
)
def test_without_decay_there_is_no_optimum(problem):
    with pytest.raises(ValueError, match="must be positive"):
        optimum(problem)


def test_without_samples_there_is_no_optimum():
    with pytest.raises(ValueError, match="samples"):
        optimum(Problem((0, 0), (0.1,), 0.1))


def test_labels_are_sorted_by_class():
    assert labels(Problem((2, 1), (0.1,), 0.1)).tolist() == [[1, 1, 0], [0, 0, 1]]


def at_the_optimum(problem: Problem, gap: float = 0.0, small_gap: float = 1.0) -> Ends:
    return Ends(problem, optimum(problem), Weights.of(optimal_weights(problem), problem), gap, small_gap)


class TestClaims:
    """Each is false on the other side of its threshold."""

    @pytest.mark.parametrize(
        ("gap", "cosine", "within", "holds"),
        [
            (0.9e-7, 0.9e-6, 0.9e-4, [True, True, True]),
            (1.1e-7, 0.0, 0.0, [False, True, True]),
            (-1e-9, 0.0, 0.0, [False, True, True]),
            (0.0, 1.1e-6, 0.0, [True, False, True]),
            (0.0, 0.0, 1.1e-4, [True, True, False]),
        ],
    )
    def test_agreement(self, gap, cosine, within, holds):
        every = [
            SimpleNamespace(gap=0.0, cosine=0.0, within=0.0),
            SimpleNamespace(gap=gap, cosine=cosine, within=within),
        ]
        assert [claim.holds for claim in nc_deep_linear._agreement(every)] == holds

    def test_sizes(self):
        ends = {name: at_the_optimum(problem) for name, problem in PROBLEMS.items()}

        def holds(**changed: Ends) -> list[bool]:
            return [claim.holds for claim in nc_deep_linear._sizes(ends | changed)]

        assert holds() == [True, True, True]
        far = at_the_optimum(Problem((20, 8, 3), (0.05,), 0.01))
        assert holds(**{nc_deep_linear.SLOPES: far}) == [False, True, True]
        kept = replace(ends[nc_deep_linear.VANISHING], best=ends["one layer"].best)
        assert holds(**{nc_deep_linear.VANISHING: kept}) == [True, False, True]
        for gap, said in ((1.1e-3, True), (0.9e-3, False)):
            lost = replace(ends[nc_deep_linear.LOST], small_gap=gap)
            assert holds(**{nc_deep_linear.LOST: lost}) == [True, True, said]

    def test_cosine_and_spread_see_what_they_should(self):
        ends = at_the_optimum(PROBLEMS["one layer, a class vanishes"])
        assert ends.cosine < 1e-9 and ends.within < 1e-9
        features = ends.best.features.clone()
        features[:, 0] += 0.3 * features[:, 25]
        moved = replace(ends, best=replace(ends.best, features=features))
        y = labels(ends.problem)
        means = [features[:, y[k] == 1].mean(1) for k in range(3)]
        expected = float(means[0] @ means[1] / (means[0].norm() * means[1].norm()))
        assert moved.cosine == pytest.approx(expected) and expected > 0.01
        spread = torch.cat([features[:, y[k] == 1] - means[k][:, None] for k in range(3)], 1)
        assert moved.within == pytest.approx(float(spread.norm() / features.norm()))

    def test_exponents_are_those_of_a_power_of_the_class_size(self):
        ends = at_the_optimum(Problem((16, 4, 1), (1e-6,), 1e-9))
        assert nc_deep_linear._slopes(ends) == pytest.approx((-0.25, 0.25), abs=1e-4)


class TestLab:
    @pytest.fixture(scope="class")
    def found(self):
        return nc_deep_linear.lab(Settings(), 0, lambda share, what: None)

    def test_every_claim_holds_and_stands_on_the_page(self, found):
        assert found.failed == []
        assert not_on_page("nc_deep_linear", found) == []

    def test_the_problems_are_what_they_are_called(self):
        assert {len(problem.decays) for problem in PROBLEMS.values()} == {1, 2, 3}
        assert len(set(PROBLEMS["equal classes"].counts)) == 1
        for name, problem in PROBLEMS.items():
            assert bool((optimum(problem).fit == 0).any()) == name.endswith("a class vanishes"), name

    def test_dots_lie_on_the_lines(self, found):
        curves = found.panels[0].curves
        for line, dots in zip(curves[::2], curves[1::2], strict=True):
            assert list(dots.y) == pytest.approx(list(line.y), rel=1e-5)

    def test_unfinished_fits_are_noticed(self):
        found = nc_deep_linear.lab(Settings(iterations=3), 0, lambda share, what: None)
        names = [claim.name for claim in found.failed]
        assert "no descent ends below the formula's objective, and the best reaches it" in names
        assert "means of classes are orthogonal, whatever the class sizes" in names
