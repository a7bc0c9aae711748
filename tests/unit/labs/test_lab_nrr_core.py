"""A word with two readings: gate, classifier, its training steps, and the lab."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lab_page import not_on_page

from verl_plugins.labs import nrr_core
from verl_plugins.labs.nrr_core import BANK, LENGTH, PAD, Classifier, Settings, bits, sentences, softmax, turn1_vector

FEW = settings(max_examples=30, deadline=None)


@FEW
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=5))
def test_bits_and_softmax_in_plain_python(logits):
    mass = [math.exp(value) for value in logits]
    shares = [value / sum(mass) for value in mass]
    np.testing.assert_allclose(softmax(np.array(logits)), shares, rtol=1e-9)
    assert bits(np.array(shares)) == pytest.approx(-sum(p * math.log2(p) for p in shares if p > 0), abs=1e-9)


@pytest.mark.parametrize(("probs", "expected"), [([0.5, 0.5], 1), ([1, 0], 0), ([0.25] * 4, 2)])
def test_bits(probs, expected):
    found = bits(np.array(probs, dtype=float))
    assert found == expected and math.copysign(1, found) == 1


def test_the_ambiguous_word_is_a_mixture_and_the_others_are_what_they_are():
    embedding, senses = np.arange(8.0).reshape(4, 2), np.array([[10.0, 0.0], [0.0, 20.0]])
    found = turn1_vector(embedding, np.array([[1, 2], [3, 3]]), 1, senses, np.array([[0.25, 0.75], [1.0, 0.0]]))
    assert found.tolist() == [[(2.5 + 4) / 2, (15 + 5) / 2], [6, 7]]


def test_an_empty_second_turn_opens_each_gate_half():
    model = Classifier(np.random.default_rng(0), gated=True, zero_padding=True)
    turn1, turn2 = sentences(np.random.default_rng(1), np.array([0, 1]))
    assert model.forward(turn1, np.full_like(turn2, PAD))[0].tolist() == [[0.5, 0.5]] * 2


def test_sentences_have_the_word_in_the_first_turn_and_a_cue_of_the_sense_in_the_second():
    sense = np.arange(400) % 2
    turn1, turn2 = sentences(np.random.default_rng(0), sense)
    assert turn1.shape == turn2.shape == (400, LENGTH)
    assert (turn1[:, 1] == BANK).all() and ((turn1 != PAD).sum(1) == 4).all()
    is_cue = (turn2 >= nrr_core.FIRST_CUE) & (turn2 < nrr_core.FIRST_FRAME)
    assert (is_cue.sum(1) == 1).all()
    cues = turn2[is_cue] - nrr_core.FIRST_CUE
    assert (cues // nrr_core.CUES % 2 == sense).all()
    words = [set(turn2[sense == one].ravel()) - {PAD, nrr_core.FIRST_FRAME} for one in (0, 1)]
    assert words[0] & words[1] == {nrr_core.FIRST_FRAME + 1}
    assert turn2.max() == nrr_core.VOCABULARY - 1 and len(set(cues)) == 24


@pytest.mark.parametrize("gated", [False, True])
def test_a_step_goes_down_the_gradient_of_the_classifier(gated):
    model = Classifier(np.random.default_rng(0), gated, True)
    sense = np.array([0, 1, 1, 0, 1])
    turn1, turn2 = sentences(np.random.default_rng(1), sense)

    def loss() -> float:
        return float(-np.log(model.forward(turn1, turn2)[-1][np.arange(5), sense]).mean())

    slopes = {}
    for name, place in (("W1", (40, 3)), ("b1", (3,)), ("W2", (3, 1)), ("b2", (0,))):
        value = model.weights[name][place]
        ends = []
        for change in (1e-5, -1e-5):
            model.weights[name][place] = value + change
            ends.append(loss())
        model.weights[name][place] = value
        slopes[name, place] = (ends[0] - ends[1]) / 2e-5
    before = {name: values.copy() for name, values in model.weights.items()}
    words, gate = model.embedding.copy(), model.gate["W"].copy()
    model.train(turn1, turn2, sense)
    for (name, place), slope in slopes.items():
        assert model.weights[name][place] - before[name][place] == pytest.approx(-0.1 * slope, abs=1e-8)
    moved = np.flatnonzero((model.embedding != words).any(1))
    assert set(moved.tolist()) == set(turn2.ravel().tolist()) - {PAD}
    assert (model.gate["W"] != gate).any() == gated


def test_lab():
    """One run: the page says what it finds."""
    found = nrr_core.lab(Settings(), 0, lambda share, what: None)
    assert not_on_page("nrr_core", found) == []
    assert found.failed == []


def test_a_baseline_with_zeros_is_not_beaten(monkeypatch):
    monkeypatch.setattr(nrr_core, "SEEDS", (42, 123))
    found = nrr_core.lab(Settings(zero_padding=True), 0, lambda share, what: None)
    assert "NRR-lite keeps more bits than the baseline without context" in [claim.name for claim in found.failed]
