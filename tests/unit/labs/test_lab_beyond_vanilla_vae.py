"""Linear conditional VAE: what x leaves unexplained, the exact loss, the model of the theory, and the lab."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lab_page import not_on_page

from verl_plugins.labs import beyond_vanilla_vae
from verl_plugins.labs.beyond_vanilla_vae import (
    Model,
    Problem,
    Settings,
    collapsed,
    expected_loss,
    fit,
    optimal_model,
    optimal_strengths,
    regression,
    residual_covariance,
    spectrum,
    strengths_of,
)

FEW = settings(max_examples=40, deadline=None)
SEED = st.integers(0, 10_000)
SIZES = st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(1, 5))


def drawn(sizes: tuple[int, int, int], seed: int, threshold: float = 0.5) -> Problem:
    dx, dy, latents = sizes
    root = torch.randn(dx + dy, dx + dy + 1, generator=torch.Generator().manual_seed(seed)).double()
    return Problem("drawn", root @ root.T / (dx + dy), dx, latents, 1.0, threshold)


def random_model(problem: Problem, seed: int) -> Model:
    dx, dy, latents = problem.dx, len(problem.cov) - problem.dx, problem.latents
    size = 2 * dy * latents + dx * (dy + latents) + latents
    return Model.of(torch.randn(size, generator=torch.Generator().manual_seed(seed)).double(), dx, dy, latents)


@FEW
@given(SIZES, SEED)
def test_what_is_left_is_the_error_of_the_best_prediction(sizes, seed):
    """By sampling's counterpart: y - T x has covariance Cyy - T Cxy - Cyx T' + T Cxx T'."""
    cov_x, cov_xy, cov_y = drawn(sizes, seed).blocks
    best = regression(cov_x, cov_xy)
    error = cov_y - best @ cov_xy - cov_xy.T @ best.T + best @ cov_x @ best.T
    left = residual_covariance(cov_x, cov_xy, cov_y)
    assert torch.allclose(left, error, atol=1e-8)
    assert float(spectrum(left).min()) > -1e-9


@FEW
@given(SIZES, SEED)
def test_conditions_given_twice_or_turned_explain_no_more(sizes, seed):
    assume(sizes[0] > 0)
    cov_x, cov_xy, cov_y = drawn(sizes, seed).blocks
    once = residual_covariance(cov_x, cov_xy, cov_y)
    mix = torch.randn(sizes[0] + 2, sizes[0], generator=torch.Generator().manual_seed(seed)).double()
    assume(float(torch.linalg.svdvals(mix).min()) > 0.05)
    turned = residual_covariance(mix @ cov_x @ mix.T, mix @ cov_xy, cov_y)
    assert torch.allclose(once, turned, atol=1e-6)


@FEW
@given(st.lists(st.floats(0, 10), max_size=6), st.integers(1, 6), st.floats(0, 5))
def test_strengths_are_what_stands_above_the_threshold(values, latents, threshold):
    values = sorted(values, reverse=True)
    found = optimal_strengths(torch.tensor(values, dtype=torch.float64), latents, threshold)
    assert found.tolist() == pytest.approx([max(0, v - threshold) for v in [*values, *[0.0] * latents][:latents]])


@FEW
@given(SIZES, SEED, st.floats(0.05, 5))
def test_no_other_model_has_a_lower_loss(sizes, seed, threshold):
    problem = drawn(sizes, seed, threshold)
    best = expected_loss(optimal_model(problem), problem)
    assert expected_loss(random_model(problem, seed), problem) >= best
    parts = vars(optimal_model(problem))
    generator = torch.Generator().manual_seed(seed)
    moved = Model(**{k: v + 0.05 * torch.randn(v.shape, generator=generator).double() for k, v in parts.items()})
    assert expected_loss(moved, problem) >= best - 1e-12


@FEW
@given(SIZES, SEED, st.floats(0.05, 5))
def test_the_loss_has_no_slope_at_the_theory_s_model(sizes, seed, threshold):
    problem = drawn(sizes, seed, threshold)
    model = Model(**{name: value.requires_grad_() for name, value in vars(optimal_model(problem)).items()})
    slopes = torch.autograd.grad(expected_loss(model, problem), list(vars(model).values()))
    assert max([float(slope.abs().max()) for slope in slopes if slope.numel()]) < 1e-6


@FEW
@given(SIZES, SEED)
def test_the_expected_loss_is_the_mean_over_samples(sizes, seed):
    """Written once more, for samples of x, y and z whose second moments are exact."""
    problem = drawn(sizes, seed)
    model, dx, latents = random_model(problem, seed), problem.dx, problem.latents
    size = len(problem.cov)
    points = torch.linalg.cholesky(problem.cov) @ torch.cat([torch.eye(size), -torch.eye(size)], 1).double() * size**0.5
    total = 0.0
    for point in points.T:
        x, y = point[:dx], point[dx:]
        mean, deviation = model.from_y @ y + model.from_x @ x, (model.log_variance / 2).exp()
        squared = 0.0
        for k in range(latents):
            for sign in (1, -1):
                z = mean.clone()
                z[k] += sign * deviation[k] * latents**0.5
                squared += float((y - model.decoder @ z - model.skip @ x).square().sum()) / (2 * latents)
        kl = 0.5 * float((mean.square() + deviation.square() - 1 - model.log_variance).sum())
        total += squared / (2 * problem.variance) + problem.beta * kl
    assert float(expected_loss(model, problem)) == pytest.approx(total / (2 * size))


@FEW
@given(SIZES, SEED)
def test_beta_and_the_decoder_s_variance_are_one(sizes, seed):
    problem = drawn(sizes, seed)
    other = replace(problem, beta=problem.beta * 4, variance=problem.variance / 4)
    model = random_model(problem, seed)
    assert float(expected_loss(model, other)) == pytest.approx(4 * float(expected_loss(model, problem)))
    assert torch.allclose(problem.strengths, other.strengths)


@FEW
@given(SIZES, SEED, st.floats(0.05, 5))
def test_latents_of_the_theory_s_model_collapse_below_the_threshold(sizes, seed, threshold):
    problem = drawn(sizes, seed, threshold)
    values = spectrum(residual_covariance(*problem.blocks))
    assume(bool((values / threshold - 1).abs().min() > 0.01))
    below = int((values[: problem.latents] <= threshold).sum()) + max(problem.latents - len(values), 0)
    assert collapsed(optimal_model(problem), problem.cov) == below


def test_at_the_threshold_a_latent_is_collapsed():
    assert optimal_strengths(torch.tensor([0.5]).double(), 1, 0.5).tolist() == [0]


@pytest.mark.parametrize("sizes", [(0, 2, 1), (1, 1, 1), (2, 3, 2), (1, 2, 4)])
def test_a_fit_reaches_the_theory(sizes):
    problem = drawn(sizes, 5)
    model, loss = fit(problem, torch.Generator().manual_seed(1), 1000)
    assert loss == pytest.approx(float(expected_loss(optimal_model(problem), problem)), abs=1e-7)
    assert torch.allclose(strengths_of(model), problem.strengths, atol=2e-3)


class TestClaims:
    """Each is false on the other side of its threshold."""

    @pytest.mark.parametrize(
        ("stretched", "above", "count", "holds"),
        [
            (0.0, 0.0, 0, [True, True, True]),
            (3e-4, 0.9e-6, 0, [True, True, True]),
            (3e-3, 0.0, 0, [False, True, True]),
            (0.0, 1.1e-6, 0, [True, False, True]),
            (0.0, -1e-6, 0, [True, False, True]),
            (0.0, 0.0, 1, [True, True, False]),
        ],
    )
    def test_agreement(self, stretched, above, count, holds):
        problem = Problem("", torch.eye(2).double(), 0, 2, 1.0, 0.5)
        model = optimal_model(problem)
        moved = replace(model, decoder=model.decoder * (1 + stretched))
        losses = [float(expected_loss(model, problem)), float(expected_loss(model, problem)) + above]
        found = beyond_vanilla_vae._agreement([problem] * 2, [model, moved], losses, [0, count])
        assert [claim.holds for claim in found] == holds
        assert found[2].measured == f"in {2 - count}"

    @pytest.mark.parametrize(
        ("counts", "holds"), [([0, 1, 1, 2], True), ([0, 2, 1, 3], False), ([2, 2, 2], False), ([3, 2, 1], False)]
    )
    def test_more(self, counts, holds):
        assert beyond_vanilla_vae._more("", "", [0.1] * len(counts), counts, "paper").holds is holds


class TestLab:
    @pytest.fixture(scope="class")
    def found(self):
        return beyond_vanilla_vae.lab(Settings(), 0, lambda share, what: None)

    def test_every_claim_holds_and_stands_on_the_page(self, found):
        assert found.failed == []
        assert not_on_page("beyond_vanilla_vae", found) == []

    def test_the_problems_are_those_that_are_named(self):
        every = beyond_vanilla_vae.problems(Settings(), torch.Generator().manual_seed(0))
        named = {problem.name: problem for problem in every}
        assert named["no condition"].dx == 0
        assert float(named["uncorrelated"].blocks[1].abs().max()) == 0
        assert torch.linalg.matrix_rank(named["a condition given twice"].blocks[0]) == 1
        left = residual_covariance(*named["y a function of x"].blocks)
        assert float(left.abs().max()) < 1e-9
        over = named["more latents than y has directions"]
        assert over.latents > len(over.cov) - over.dx

    def test_unfinished_fits_are_noticed(self):
        found = beyond_vanilla_vae.lab(Settings(iterations=2), 0, lambda share, what: None)
        names = [claim.name for claim in found.failed]
        assert "squared singular values of U are max(0, l_k - beta s2)" in names
        assert "no fit beats the formula's loss, and each reaches it" in names
