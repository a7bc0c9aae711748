"""Grokking: the task, the network by hand, what one step does, and the labs of perp_grad and stablemax."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_plugins import CompositionError
from verl_plugins.labs import grokking
from verl_plugins.labs.grokking import (
    PerpGradSettings,
    StableMaxSettings,
    all_sums,
    logits,
    losses,
    network,
    trained,
)
from verl_plugins.optim.stablemax import symlog

FEW = settings(max_examples=25, deadline=None)


@FEW
@given(st.integers(2, 12), st.floats(0.2, 0.8), st.integers(0, 99))
def test_every_pair_is_shown_or_held_out_once(modulus, share, seed):
    task = all_sums(modulus, share, seed)
    together = [*task.pairs.tolist(), *task.other_pairs.tolist()]
    assert sorted(map(tuple, together)) == [(a, b) for a in range(modulus) for b in range(modulus)]
    assert len(task.pairs) == round(share * modulus**2)
    for pairs, sums in ((task.pairs, task.sums), (task.other_pairs, task.other_sums)):
        assert sums.tolist() == [(a + b) % modulus for a, b in pairs.tolist()]


def test_a_seed_is_a_division_and_a_network():
    one, again, other = (all_sums(7, 0.5, seed).pairs for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    nets = [network(7, 5, seed) for seed in (1, 1, 2)]
    assert torch.equal(nets[0][1], nets[1][1]) and not torch.equal(nets[0][1], nets[2][1])


@pytest.mark.parametrize("share", [1e-6, 1 - 1e-6])
def test_an_empty_part_is_refused(share, sentence):
    with pytest.raises(CompositionError) as refusal:
        all_sums(5, share, 0)
    sentence(refusal.value, "train_share", "25 pairs of modulus=5")


def test_the_network_by_hand():
    layers = network(5, 4, 3)
    assert [tuple(layer.shape) for layer in layers] == [(10, 4), (4, 4), (4, 5)]
    for layer in layers:
        bound = 1 / math.sqrt(len(layer))
        assert layer.requires_grad and float(layer.detach().abs().max()) <= bound
        assert float(layer.detach().min()) < -bound / 4 < bound / 4 < float(layer.detach().max())
    a, b = 2, 4
    one_hot = torch.zeros(1, 10)
    one_hot[0, a] = one_hot[0, 5 + b] = 1
    hidden = (one_hot @ layers[0]).clamp(min=0)
    hidden = (hidden @ layers[1]).clamp(min=0)
    torch.testing.assert_close(logits(layers, torch.tensor([[a, b]])), hidden @ layers[2])


def test_the_loss_is_the_cross_entropy():
    z, sums = torch.tensor([[1.0, 2.0], [0.0, -3.0]]), torch.tensor([0, 1])
    by_hand = [math.log(1 + math.e), math.log(1 + math.exp(3))]
    assert losses(z, sums).tolist() == pytest.approx(by_hand)


@pytest.mark.parametrize("perp", [True, False])
@pytest.mark.parametrize("shape", [symlog, lambda z: z])
def test_a_step_follows_the_gradient_or_what_of_it_is_orthogonal(perp, shape):
    task, rate = all_sums(5, 0.5, 0), 0.1
    layers, reference = network(5, 4, 0), network(5, 4, 0)
    sgd = lambda parts: torch.optim.SGD(parts, rate)  # noqa: E731
    (course,) = trained(task, layers, sgd, 1, perp=perp, shape=shape)
    losses(shape(logits(reference, task.pairs)), task.sums).mean().backward()
    along = []
    for layer, before in zip(layers, reference, strict=True):
        gradient, weight = before.grad, before.detach()
        cosine = float((gradient * weight).sum() / gradient.norm() / weight.norm())
        along.append(abs(cosine))
        if perp:
            rest = gradient - (gradient * weight).sum() / weight.square().sum() * weight
            gradient = rest * gradient.norm() / rest.norm()
        torch.testing.assert_close(layer.detach(), weight - rate * gradient)
    assert course.along == [pytest.approx(sum(along) / 3, rel=1e-4)]
    with torch.no_grad():
        z = logits(reference, task.pairs)
        after = logits(layers, task.other_pairs)
    assert course.epochs == [1] and course.largest == [pytest.approx(float(z.abs().max()))]
    assert course.known == [pytest.approx(float((z.argmax(1) == task.sums).double().mean()))]
    assert course.held_out == [pytest.approx(float((after.argmax(1) == task.other_sums).double().mean()))]


def test_looks_are_at_the_first_every_tenth_and_the_last_epoch():
    sgd = lambda parts: torch.optim.SGD(parts, 0.1)  # noqa: E731
    courses = trained(all_sums(5, 0.5, 0), network(5, 4, 0), sgd, 25, perp=True, shape=symlog)
    assert [*courses][-1].epochs == [1, 10, 20, 25]


class TestSmall:
    """The labs on a task that is too small for what they claim: that is noticed."""

    def test_too_few_epochs_are_noticed(self):
        settings = PerpGradSettings(modulus=11, width=20, epochs=5)
        found = grokking.perp_grad(settings, 0, lambda share, what: None)
        assert found.failed[0].name == "⊥AdamW comes to know the sums that it was not shown"

    def test_progress_is_told(self):
        told = []
        settings = PerpGradSettings(modulus=5, width=4, epochs=10)
        grokking.perp_grad(settings, 0, lambda share, what: told.append((share, what)))
        assert told == [(0.05, "⊥AdamW"), (0.5, "⊥AdamW"), (0.55, "AdamW"), (1.0, "AdamW")]

    @pytest.mark.parametrize("change", [{"epochs": 5}, {"learning_rate": 1e-4, "epochs": 30}])
    def test_what_learns_too_little_is_noticed(self, change):
        settings = StableMaxSettings(modulus=11, width=20, **change)
        found = grokking.stablemax(settings, 0, lambda share, what: None)
        names = [claim.name for claim in found.failed]
        assert names[0] == "StableMax with ⊥SGD comes to know the sums that it was not shown"
        assert len(names) == 2  # softmax has not learnt its own sums either

    def test_where_softmax_saturates(self):
        """Where 1 + 112 exp(-m) is 1 in single precision: all terms together from 22 on, each alone from 17 on."""
        assert 112 * math.exp(-22) < 2**-24 < 112 * math.exp(-21) and math.exp(-17) < 2**-24 < math.exp(-16)
        assert 17 <= grokking._saturated(113, lambda z: z) <= 22
        assert grokking._saturated(113, symlog) is None

    def test_both_trainings_start_alike_and_only_one_is_orthogonal(self):
        settings = PerpGradSettings(modulus=7, width=8, epochs=1)
        accuracy, along = grokking.perp_grad(settings, 4, lambda share, what: None).panels
        one, _, other, _ = accuracy.curves
        assert along.curves[0].y == along.curves[1].y and list(one.x) == list(other.x) == [1]
        largest = grokking.stablemax(
            StableMaxSettings(modulus=7, width=8, epochs=1), 4, lambda share, what: None
        ).panels[1]
        assert largest.curves[0].y == largest.curves[1].y
