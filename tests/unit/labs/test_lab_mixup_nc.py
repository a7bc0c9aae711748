"""Mixed features: the optimum against other solvers, its shape, the degenerate cases, and the lab."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_page import not_on_page

from verl_plugins.labs import mixup_nc
from verl_plugins.labs.mixup_nc import (
    Settings,
    cosines,
    descended,
    minimised,
    mixed_target,
    optimal_features,
    optimal_logits,
    simplex_etf,
)

FEW = settings(max_examples=40, deadline=None)
CLASSES = st.integers(2, 12)
NORM = st.floats(0.2, 5)
DECAY = st.sampled_from([1e-6, 1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0])
MIX = st.floats(0, 1)


def solved(classes: int, norm: float, decay: float, mix: float, i: int = 0, j: int = 1):
    """classifier, target, features, logits, and a = m^2 K / (K - 1)."""
    classifier = simplex_etf(classes, norm)
    target = mixed_target(classes, i, j, torch.tensor(mix, dtype=torch.float64))
    features, logits = optimal_features(classifier, target, decay)
    return classifier, target, features, logits, norm**2 * classes / (classes - 1)


@given(CLASSES, NORM)
def test_the_classifier_has_equal_norms_and_angles(classes, norm):
    rows = simplex_etf(classes, norm)
    gram = rows @ rows.T
    assert torch.allclose(gram.diagonal(), torch.full((classes,), norm**2).double())
    off = gram[~torch.eye(classes, dtype=torch.bool)]
    assert torch.allclose(off, torch.full_like(off, -(norm**2) / (classes - 1)))


@FEW
@given(CLASSES, NORM, DECAY, MIX)
def test_the_loss_has_no_slope_at_the_optimum(classes, norm, decay, mix):
    classifier, target, features, logits, scale = solved(classes, norm, decay, mix)
    assert torch.allclose(classifier @ features, logits, atol=1e-9 * (1 + float(logits.abs().max())))
    slope = (logits.softmax(-1) - target) @ classifier + decay * features
    assert float(slope.abs().max()) < 1e-10 * (1 + norm)
    moved = math.fsum((logits.softmax(-1) - target + decay / scale * logits).abs().tolist())
    assert moved < 1e-9


@FEW
@given(CLASSES, NORM, DECAY, MIX, st.integers(0, 1000))
def test_no_other_features_have_a_lower_loss(classes, norm, decay, mix, seed):
    classifier, target, features, _, _ = solved(classes, norm, decay, mix)

    def loss(h):
        z = classifier @ h
        return float(z.logsumexp(0) - target @ z + decay / 2 * h @ h)

    other = features + torch.randn(classes, generator=torch.Generator().manual_seed(seed)).double()
    assert loss(other) > loss(features)


@FEW
@given(CLASSES, NORM, DECAY, MIX)
def test_swapping_the_classes_swaps_their_logits(classes, norm, decay, mix):
    here, there = (solved(classes, norm, decay, one)[3] for one in (mix, 1 - mix))
    order = [1, 0, *range(2, classes)]
    assert torch.allclose(here, there[order], atol=1e-7)
    assert torch.allclose(here[2:], here[2:].mean().expand(classes - 2), atol=1e-9)


@FEW
@given(CLASSES, NORM, DECAY, MIX)
def test_the_difference_of_the_two_logits_is_what_is_left_of_the_label(classes, norm, decay, mix):
    _, _, _, z, scale = solved(classes, norm, decay, mix)
    p = z.softmax(-1)
    left = scale / decay * ((mix - p[0]) - (1 - mix - p[1]))
    assert float(z[0] - z[1]) == pytest.approx(float(left), abs=1e-11 * scale / decay + 1e-9)


@FEW
@given(CLASSES, NORM, DECAY, st.booleans(), MIX)
def test_a_mix_within_a_class_is_parallel_to_its_row(classes, norm, decay, same, mix):
    classifier, _, features, _, _ = solved(classes, norm, decay, mix if same else 1.0, 1, 1 if same else 0)
    assert torch.allclose(features, classifier[1] * features.norm() / norm, atol=1e-8 * (1 + float(features.norm())))


@FEW
@given(st.integers(3, 12), NORM, MIX)
def test_the_classifier_s_norm_and_the_decay_trade(classes, norm, mix):
    """Only mu / a counts for the logits."""
    one, other = (solved(classes, n, d, mix)[3] for n, d in ((norm, 0.01), (2 * norm, 0.04)))
    assert torch.allclose(one, other, atol=1e-8)


def test_two_classes_in_equal_parts_have_no_feature_and_no_angle():
    classifier, _, features, logits, _ = solved(2, 1.0, 1e-3, 0.5)
    assert features.tolist() == [0, 0] and logits.tolist() == [0, 0]
    assert cosines(features, classifier).tolist() == [0, 0]


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan])
def test_without_decay_there_is_no_optimum(ratio):
    with pytest.raises(ValueError, match="greater than 0"):
        optimal_logits(torch.tensor([1.0, 0.0]).double(), ratio)


@pytest.mark.parametrize("decay", [1e-8, 1e-6, 1e-3, 1.0, 100.0])
def test_many_labels_are_solved_at_once_as_one_by_one(decay):
    classifier, mix = simplex_etf(5, 1.0), torch.linspace(0, 1, 7).double()
    together, _ = optimal_features(classifier, mixed_target(5, 0, 1, mix), decay)
    alone = [optimal_features(classifier, mixed_target(5, 0, 1, one), decay)[0] for one in mix]
    assert torch.allclose(together, torch.stack(alone), atol=1e-6 * (1 + float(together.abs().max())))


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_gradient_descent_and_l_bfgs_end_there(classes):
    classifier, target = simplex_etf(classes, 1.0), mixed_target(classes, 0, 1, torch.tensor([1.0, 0.8, 0.5]).double())
    features, _ = optimal_features(classifier, target, 0.01)
    assert torch.allclose(descended(classifier, target, 0.01, 4000), features, atol=1e-7)
    assert torch.allclose(minimised(classifier, target, 0.01, 3), features, atol=1e-6)


class TestClaims:
    """Each is false on the other side of its threshold."""

    @pytest.mark.parametrize(("gap", "holds"), [(0.9e-6, True), (1.1e-6, False), (0.5, False), (math.nan, False)])
    def test_same(self, gap, holds):
        assert mixup_nc._same("", gap).holds is holds

    @pytest.mark.parametrize(("turned", "holds"), [(0.0, True), (1e-2, False), (1.0, False)])
    def test_aligned(self, turned, holds):
        classifier = simplex_etf(3, 2.0)
        assert (
            mixup_nc._aligned(5 * classifier[0] + turned * (classifier[1] - classifier[2]), classifier).holds is holds
        )

    @pytest.mark.parametrize(
        ("height", "share", "holds"),
        [
            (5.0, 0.45, [True, True, True]),
            (0.4, 0.45, [False, True, True]),
            (5.0, 0.55, [True, False, True]),
            (-5.0, 0.45, [True, True, False]),
        ],
    )
    def test_shape(self, height, share, holds):
        """Straight mixes at (4, 4 … 0), the features above or below them; logits of the two classes 10 and 0."""
        straight = torch.tensor([[4.0, 4.0], [3.0, 4.0], [1.0, 4.0], [0.0, 4.0]]).double()
        features = straight + torch.tensor([0.0, height]).double()
        features[0] = straight[0]
        logits = torch.tensor([[10.0, 0.0], [8 * share, 0.0], [2.0, 0.0], [0.0, 0.0]]).double()
        assert [claim.holds for claim in mixup_nc._shape(features, straight, logits)] == holds

    def test_one_short_feature_is_enough_to_fail(self):
        straight = torch.tensor([[4.0, 4.0], [3.0, 4.0], [1.0, 4.0], [0.0, 4.0]]).double()
        for place in (1, 2, 3):
            features = 2 * straight
            features[place] = 0.5 * straight[place]
            found = mixup_nc._shape(features, straight, torch.zeros(4, 2).double())
            assert not found[2].holds


class TestLab:
    @pytest.fixture(scope="class")
    def found(self):
        return mixup_nc.lab(Settings(), 0, lambda share, what: None)

    def test_every_claim_holds_and_stands_on_the_page(self, found):
        assert found.failed == []
        assert not_on_page("mixup_nc", found) == []

    def test_lengths_are_those_of_the_formula_s_reference(self, found):
        length = found.panels[1]
        for curve, there in zip(length.curves, ([6.59, 6.96, 7.26, 7.33], [6.59, 5.89, 4.81, 4.39]), strict=True):
            at = dict(zip((round(x, 2) for x in curve.x), curve.y, strict=True))
            assert [at[mix] for mix in (1.0, 0.9, 0.7, 0.5)] == pytest.approx(there, abs=0.006)

    def test_the_features_lie_in_the_plane_that_is_drawn(self, found):
        plane, length = found.panels
        for drawn, curve in zip(plane.curves, length.curves, strict=True):
            radius = [math.hypot(x, y) for x, y in zip(drawn.x, drawn.y, strict=True)]
            assert radius == pytest.approx(list(curve.y))

    def test_two_classes_break_the_claim_about_lengths(self):
        found = mixup_nc.lab(Settings(num_classes=2), 0, lambda share, what: None)
        names = [claim.name for claim in found.failed]
        assert "they are longer than the straight mix" in names and len(names) == 2

    @pytest.mark.parametrize("steps", [10, 900])
    def test_too_few_steps_of_descent_are_noticed(self, steps):
        found = mixup_nc.lab(Settings(descent_steps=steps), 0, lambda share, what: None)
        assert [claim.name for claim in found.failed] == ["gradient descent on the loss ends there, too"]
