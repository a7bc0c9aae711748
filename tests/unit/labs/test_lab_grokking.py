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
    Course,
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


def test_a_training_with_nothing_left_to_learn_ends():
    sgd = lambda parts: torch.optim.SGD(parts, 0.5)  # noqa: E731
    task, layers = all_sums(5, 0.5, 0), network(5, 16, 0)
    with torch.no_grad():
        first = float(losses(logits(layers, task.pairs), task.sums).mean())
    *_, course = trained(task, layers, sgd, 500, perp=False, shape=lambda z: z, enough=0.9 * first)
    with torch.no_grad():
        left = float(losses(logits(layers, task.pairs), task.sums).mean())
    assert 1 < course.epochs[-1] < 500 and left < 0.9 * first


class Played:
    """Stands for `trained`: gives courses that were made up, and keeps what it was asked for."""

    def __init__(self, *courses: Course) -> None:
        self.courses, self.asked = iter(courses), []

    def __call__(self, task, layers, optimizer, epochs, *, perp, shape, enough=0.0):
        made = optimizer(layers)
        kept = {name: made.defaults[name] for name in ("lr", "weight_decay", "momentum") if name in made.defaults}
        tried = shape(torch.tensor([2.0])).item()
        start = [layer.detach().clone() for layer in layers]
        self.asked.append((type(made).__name__, kept, epochs, perp, tried, start, len(task.pairs), enough))
        yield next(self.courses)


def course(held_out: float, known: float = 0.995, along: float = 0.9, largest: float = 20.0) -> Course:
    return Course([1, 8], [0.1, known], [0.2, held_out], [0.04, along], [50.0, largest])


def claims(monkeypatch, lab, settings, *courses: Course):
    played = Played(*courses)
    monkeypatch.setattr(grokking, "trained", played)
    return lab(settings, 3, lambda share, what: None), played.asked


class TestClaims:
    """What the labs make of two trainings."""

    SMALL = {"modulus": 7, "width": 6, "train_share": 0.5, "epochs": 8}

    def perp_grad(self, monkeypatch, *courses: Course):
        return claims(monkeypatch, grokking.perp_grad, PerpGradSettings(**self.SMALL, learning_rate=0.3), *courses)

    def stablemax(self, monkeypatch, *courses: Course):
        settings = StableMaxSettings(**self.SMALL, learning_rate=0.3, momentum=0.6, enough=0.2)
        return claims(monkeypatch, grokking.stablemax, settings, *courses)

    def test_perp_grad_trains_twice_from_the_same_weights(self, monkeypatch):
        _, (one, other) = self.perp_grad(monkeypatch, course(0.996), course(0.0))
        assert one[:5] == ("AdamW", {"lr": 0.3, "weight_decay": 0.0}, 8, True, 2.0)
        assert other[:5] == ("AdamW", {"lr": 0.3, "weight_decay": 0.0}, 8, False, 2.0)
        assert all(map(torch.equal, one[5], other[5])) and one[6:] == other[6:] == (24, 0.0)
        assert all(map(torch.equal, one[5], network(7, 6, 3)))

    def test_stablemax_trains_twice_on_orthogonal_gradients(self, monkeypatch):
        _, (one, other) = self.stablemax(monkeypatch, course(0.996), course(0.0))
        sgd = ("SGD", {"lr": 0.3, "weight_decay": 0, "momentum": 0.6}, 8, True)
        assert one[:4] == other[:4] == sgd
        assert one[4] == pytest.approx(math.log(3)) and other[4] == 2.0
        assert all(map(torch.equal, one[5], other[5])) and one[6:] == other[6:] == (24, 0.2)

    def test_what_perp_grad_says(self, monkeypatch):
        found, _ = self.perp_grad(monkeypatch, course(0.996, largest=20), course(0.04, along=0.5, largest=40))
        assert [claim.measured for claim in found.claims] == [
            "100 %",
            "100 % and 4 %",
            "50 % against 4 %",
            "20 against 40",
        ]
        assert found.failed == []
        assert [curve.y for curve in found.panels[1].curves] == [[0.04, 0.9], [0.04, 0.5]]

    def test_what_stablemax_says(self, monkeypatch):
        found, _ = self.stablemax(monkeypatch, course(0.91, largest=30), course(0.4))
        assert [claim.measured for claim in found.claims[:2]] == ["91 %", "100 % and 40 %"]
        assert found.failed == []
        assert [curve.y for curve in found.panels[1].curves] == [[50, 30], [50, 20]]

    @pytest.mark.parametrize(
        ("one", "other", "place"),
        [
            (course(0.989), course(0.0), 0),
            (course(0.996), course(0.06), 1),
            (course(0.996), course(0.0, known=0.98), 1),
            (course(0.996), course(0.0, along=0.03, largest=21.0), 2),
            (course(0.996, largest=21.0), course(0.0), 3),
        ],
    )
    def test_claims_of_perp_grad_can_fail(self, monkeypatch, one, other, place):
        found, _ = self.perp_grad(monkeypatch, one, other)
        assert not found.claims[place].holds

    @pytest.mark.parametrize(
        ("one", "other", "place"),
        [(course(0.89), course(0.0), 0), (course(0.95), course(0.51), 1), (course(0.95), course(0.4, known=0.9), 1)],
    )
    def test_claims_of_stablemax_can_fail(self, monkeypatch, one, other, place):
        found, _ = self.stablemax(monkeypatch, one, other)
        assert [claim.holds for claim in found.claims] == [number != place for number in range(4)]

    @pytest.mark.parametrize("wrong", [lambda z: z, lambda z: symlog(z) * 1.001])
    def test_another_transform_is_not_the_paper_s_quotient(self, monkeypatch, wrong):
        assert grokking._apart(0) < 1e-12
        monkeypatch.setattr(grokking, "symlog", wrong)
        found, _ = self.stablemax(monkeypatch, course(0.95), course(0.4))
        assert not found.claims[2].holds

    def test_a_transform_that_saturates_is_noticed(self, monkeypatch):
        monkeypatch.setattr(grokking, "symlog", lambda z: 2 * z)
        found, _ = self.stablemax(monkeypatch, course(0.95), course(0.4))
        assert not found.claims[3].holds and found.claims[3].measured.startswith("from ")


class TestSmall:
    """The labs on small tasks."""

    def test_what_perp_grad_claims_holds_for_sums_modulo_23_too(self):
        settings = PerpGradSettings(modulus=23, width=100, train_share=0.8, epochs=200)
        assert grokking.perp_grad(settings, 0, lambda share, what: None).failed == []

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
