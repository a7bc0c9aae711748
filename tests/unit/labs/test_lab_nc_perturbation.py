"""The central path by its formula, and the lab as its page tells it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_page import not_on_page

from verl_plugins.labs import nc_perturbation
from verl_plugins.labs.nc_perturbation import Flow, Settings, best_classifier, central_path, problem, variability

FEW = settings(max_examples=30, deadline=None)
SEED, SIZE = st.integers(0, 1000), st.floats(0.01, 2.0)


def objective(weights, features, start, labels, flow: Flow) -> torch.Tensor:
    """f(W, H), written as in the paper's setting."""
    classes, samples = int(labels.max()) + 1, len(labels)
    targets = torch.zeros(classes, samples).double()
    targets[labels, range(samples)] = 1
    found = (weights @ features - targets).square().sum() / (2 * samples)
    found = found + flow.classifier / (2 * classes) * weights.square().sum()
    found = found + flow.features / (2 * samples) * features.square().sum()
    return found + flow.beta / (2 * samples) * (features - start).square().sum()


@FEW
@given(SEED, SIZE, SIZE, SIZE)
def test_a_step_goes_down_the_gradient_of_the_objective_at_its_best_classifier(seed, classifier, decay, beta):
    start, labels = problem(seed, 0.5)
    flow = Flow(classifier, decay, beta, 0.3)
    here = start + 0.1 * torch.randn(start.shape, generator=torch.Generator().manual_seed(seed)).double()
    targets = torch.nn.functional.one_hot(labels).double().T
    weights = best_classifier(here, targets, classifier).requires_grad_()
    moving = here.clone().requires_grad_()
    objective(weights, moving, start, labels, flow).backward()
    assert float(weights.grad.abs().max()) < 1e-10
    first = central_path(start, labels, flow, 1)[1]
    weights = best_classifier(start, targets, classifier)
    moving = start.clone().requires_grad_()
    objective(weights, moving, start, labels, flow).backward()
    torch.testing.assert_close(first, start - 0.3 * moving.grad, atol=1e-12, rtol=1e-10)


def test_without_steps_the_path_is_the_start():
    start, labels = problem(3, 0.5)
    path = central_path(start, labels, Flow(0.1, 0.1, 0.0, 1.0), 0)
    assert len(path) == 1 and torch.equal(path[0], start)


def test_points_of_one_place_per_class_have_no_variability():
    start, labels = problem(1, 0.0)
    assert float(variability([start], labels)[0]) == pytest.approx(0, abs=1e-30)


class TestLab:
    @pytest.fixture(scope="class")
    def found(self):
        return nc_perturbation.lab(Settings(), 0, lambda share, what: None)

    def test_all_claims_hold_and_are_those_of_the_page(self, found):
        assert found.failed == [] and len(found.claims) == 4
        assert not_on_page("nc_perturbation", found) == []

    def test_curves_begin_at_one_and_have_a_point_for_every_step(self, found):
        for curve in found.panels[0].curves:
            assert curve.y[0] == pytest.approx(1) and len(curve.y) == len(curve.x) == 61

    def test_without_decay_of_the_features_the_last_claim_fails(self):
        found = nc_perturbation.lab(Settings(feature_decay=0.0), 0, lambda share, what: None)
        assert [claim.name for claim in found.failed] == [found.claims[3].name]

    def test_large_steps_leave_the_path(self):
        found = nc_perturbation.lab(Settings(dt=20.0), 0, lambda share, what: None)
        assert not found.claims[1].holds and not found.claims[2].holds
