"""Does a word keep its two readings until the context is known: a classifier with one vector for it, and with two.

Saito, NRR-Core, arXiv 2512.13478, code kei-saito-research/nrr-core. The paper's: a first turn says something of a bank,
a second brings a cue for one of two senses, and a classifier names the sense from the mean embeddings of both turns.

    gates = softmax(mean(turn 2) W_g + b_g),    bank = gates_a v_a + gates_b v_b       NRR-lite; baseline: one vector
    p     = softmax(relu([mean(turn 1), mean(turn 2)] W_1 + b_1) W_2 + b_2)

Trained on both turns, it is asked with an empty second one: how many bits has p? In the authors' code NRR-lite embeds
padding as zeros, the baseline as a random vector that is trained on in every row and fills the empty turn. What of the
difference is due to that is ours to ask: `zero_padding` gives the baseline zeros as well. Ours are the words, which are
numbers here, and the random streams. As in the code the embeddings of turn 1 are not trained, those of turn 2, senses
and gate by rules of thumb.

Degenerate: two equal probabilities have 1 bit, a certain one 0; an empty turn 2 with b_g = 0 opens each gate half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from verl_plugins.lab import Claim, Curve, Findings, Panel, Progress
from verl_plugins.plugin import setting

SEEDS = (42, 123, 456, 789, 1000)
LENGTH, WIDTH, HIDDEN, ROWS, ASKED, BATCH = 20, 32, 64, 1000, 100, 32
RATE, RATE_OF_WORDS, RATE_OF_GATE, RATE_OF_SENSES = 0.1, 0.001 / LENGTH, 0.01, 0.005
"""SGD steps of the classifier, of embeddings of turn 2, of the gate, of the two senses."""
PAD, BANK, CUES, VARIANTS = 0, 1, 6, 3
FIRST_ADJECTIVE, FIRST_CUE, FIRST_FRAME = 2, 8, 32
"""Six adjectives; six cues of each sense, in the middle and at the end of a sentence; words around them."""
VOCABULARY = FIRST_FRAME + 11
FRAMES = (((0, 1, 2), (0, 3, 4), (5, 0)), ((0, 6, 7), (0, 1, 8), (9, 10, 0)))
"""Words around a cue by sense and variant: the cue is second, and last in the third variant, as another token."""


@dataclass
class Settings:
    epochs: int = setting(100, "epochs of training on 1000 rows", authors=100, ge=1)
    zero_padding: bool = setting(False, "whether the baseline embeds padding as zeros, as NRR-lite does", authors=False)


def bits(probs: np.ndarray) -> np.ndarray:
    """Entropy in bits of probabilities [..., classes]."""
    return 0.0 - (probs * np.log2(np.maximum(probs, 1e-300))).sum(-1)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last dimension."""
    mass = np.exp(logits - logits.max(-1, keepdims=True))
    return mass / mass.sum(-1, keepdims=True)


def turn1_vector(
    embedding: np.ndarray, ids: np.ndarray, ambiguous: int, senses: np.ndarray, gates: np.ndarray
) -> np.ndarray:
    """[n, d] mean of turn 1, ids [n, T], with the mixture of senses [2, d] by gates [n, 2] for the ambiguous word."""
    is_word = (ids == ambiguous)[..., None]
    return np.where(is_word, (gates @ senses)[:, None], embedding[ids]).mean(1)


def classify(combined: np.ndarray, weights: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Both turns [n, 2d] -> hidden [n, h] and p [n, 2]."""
    hidden = np.maximum(combined @ weights["W1"] + weights["b1"], 0)
    return hidden, softmax(hidden @ weights["W2"] + weights["b2"])


class Classifier:
    """One of the two: with `gated` senses for the ambiguous word, or a single vector."""

    def __init__(self, rng: np.random.Generator, gated: bool, zero_padding: bool) -> None:
        self.embedding = 0.1 * rng.standard_normal((VOCABULARY, WIDTH))
        if zero_padding:
            self.embedding[PAD] = 0
        self.senses = 0.1 * rng.standard_normal((2, WIDTH)) if gated else None
        self.gate = {"W": 0.01 * rng.standard_normal((WIDTH, 2)), "b": np.zeros(2)}
        self.weights = {
            "W1": 0.1 * rng.standard_normal((2 * WIDTH, HIDDEN)),
            "b1": np.zeros(HIDDEN),
            "W2": 0.1 * rng.standard_normal((HIDDEN, 2)),
            "b2": np.zeros(2),
        }

    def forward(self, turn1: np.ndarray, turn2: np.ndarray) -> tuple[np.ndarray, ...]:
        """Ids [n, T] of both turns -> gates [n, 2], both turns [n, 2d], hidden [n, h], p [n, 2]."""
        second = self.embedding[turn2].mean(1)
        gates = softmax(second @ self.gate["W"] + self.gate["b"])
        if self.senses is None:
            first = self.embedding[turn1].mean(1)
        else:
            first = turn1_vector(self.embedding, turn1, BANK, self.senses, gates)
        combined = np.concatenate([first, second], 1)
        return gates, combined, *classify(combined, self.weights)

    def train(self, turn1: np.ndarray, turn2: np.ndarray, sense: np.ndarray) -> None:
        """One SGD step on cross-entropy."""
        gates, combined, hidden, probs = self.forward(turn1, turn2)
        error = (probs - np.eye(2)[sense]) / len(sense)
        behind = error @ self.weights["W2"].T * (hidden > 0)
        into_second = behind @ self.weights["W1"][WIDTH:].T
        slopes = (combined.T @ behind, behind.sum(0), hidden.T @ error, error.sum(0))
        for name, slope in zip(("W1", "b1", "W2", "b2"), slopes, strict=True):
            self.weights[name] -= RATE * slope
        row, place = np.nonzero(turn2 != PAD)
        np.subtract.at(self.embedding, turn2[row, place], RATE_OF_WORDS * into_second[row])
        if self.senses is not None:
            self.gate["W"] -= RATE_OF_GATE * combined[:, WIDTH:].T @ error
            self.gate["b"] -= RATE_OF_GATE * error.sum(0)
            self.senses -= RATE_OF_SENSES * gates.T @ into_second


def sentences(rng: np.random.Generator, sense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids [n, T] of both turns, padded at the end, for senses [n]."""
    rows = len(sense)
    turn1, turn2 = np.zeros((2, rows, LENGTH), dtype=np.int64)
    turn1[:, 0], turn1[:, 1], turn1[:, 2] = FIRST_FRAME, BANK, FIRST_FRAME + 1
    turn1[:, 3] = FIRST_ADJECTIVE + rng.integers(0, CUES, rows)
    cue, variant = FIRST_CUE + CUES * sense + rng.integers(0, CUES, rows), rng.integers(0, VARIANTS, rows)
    for of_sense, variants in enumerate(FRAMES):
        for number, frame in enumerate(variants):
            here = (sense == of_sense) & (variant == number)
            ids = np.tile(FIRST_FRAME + np.array(frame), (int(here.sum()), 1))
            last = number == VARIANTS - 1
            cues = cue[here] + 2 * CUES * last
            turn2[here, : len(frame) + 1] = np.insert(ids, len(frame) if last else 1, cues, axis=1)
    return turn1, turn2


@dataclass(frozen=True)
class Outcome:
    """Of one seed."""

    kept: float
    """Bits of p with an empty second turn, mean over sentences."""
    right: float
    """Accuracy with both turns."""
    gate: float
    """Bits of the gates with an empty second turn."""


def outcome(model: Classifier, rng: np.random.Generator) -> Outcome:
    """What a trained model says without context, and with one of each sense."""
    sense = np.arange(2 * ASKED) % 2
    turn1, turn2 = sentences(rng, sense)
    gates, _, _, alone = model.forward(turn1, np.full_like(turn2, PAD))
    right = model.forward(turn1, turn2)[-1].argmax(1) == sense
    return Outcome(float(bits(alone).mean()), float(right.mean()), float(bits(gates).mean()))


def trained(seed: int, gated: bool, zero_padding: bool, epochs: int) -> Outcome:
    """One model of one seed."""
    rng = np.random.default_rng([seed, gated])
    sense = rng.integers(0, 2, ROWS)
    turn1, turn2 = sentences(rng, sense)
    model = Classifier(rng, gated, zero_padding)
    for _ in range(epochs):
        order = rng.permutation(ROWS)
        for rows in np.split(order, range(BATCH, ROWS, BATCH)):
            model.train(turn1[rows], turn2[rows], sense[rows])
    return outcome(model, rng)


def lab(settings: Settings, seed: int, progress: Progress) -> Findings:
    """NRR-lite, the baseline, and the baseline with zeros for padding, five seeds each."""
    kinds = {"baseline": (False, settings.zero_padding), "NRR-lite": (True, True), "zeros": (False, True)}
    found: dict[str, list[Outcome]] = {name: [] for name in kinds}
    for number, one in enumerate(SEEDS):
        progress(number / len(SEEDS), f"seed {one + seed}")
        for name, (gated, zero_padding) in kinds.items():
            found[name].append(trained(one + seed, gated, zero_padding, settings.epochs))
    kept = {name: np.array([each.kept for each in outcomes]) for name, outcomes in found.items()}
    notes = [
        "In the authors' code padding is zeros in NRR-lite and a random vector in the baseline; the last claim is of "
        "a baseline with zeros as well, to see what is due to that."
    ]
    return Findings(_claims(found, kept), [_panel(kept)], notes)


def _claims(found: dict[str, list[Outcome]], kept: dict[str, np.ndarray]) -> list[Claim]:
    wins = int((kept["NRR-lite"] > kept["baseline"]).sum())
    right = {name: float(np.mean([each.right for each in found[name]])) for name in ("baseline", "NRR-lite")}
    gate = float(np.mean([each.gate for each in found["NRR-lite"]]))
    means = {name: float(values.mean()) for name, values in kept.items()}
    return [
        Claim(
            "NRR-lite keeps more bits than the baseline without context",
            f"in each of {len(SEEDS)} seeds",
            f"in {wins}: {means['NRR-lite']:.2f} against {means['baseline']:.2f} in the mean",
            wins == len(SEEDS),
        ),
        Claim(
            "NRR-lite keeps most of the one bit there is",
            "0.91 in the mean, within 0.1",
            f"{means['NRR-lite']:.2f}",
            abs(means["NRR-lite"] - 0.91) <= 0.1,
        ),
        Claim(
            "both name the sense with context",
            "accuracy at least 0.9 in the mean; 1 in the paper",
            f"{right['NRR-lite']:.3f}, baseline {right['baseline']:.3f}",
            min(right.values()) >= 0.9,
        ),
        Claim("the gate stays half open without context", "at least 0.99 bits", f"{gate:.2f}", gate >= 0.99),
        Claim(
            "a baseline with zeros for padding keeps as much as NRR-lite, without gate or second vector",
            "means within 0.1 bits",
            f"{means['zeros']:.2f} against {means['NRR-lite']:.2f}",
            abs(means["zeros"] - means["NRR-lite"]) <= 0.1,
            "ours",
        ),
    ]


def _panel(kept: dict[str, np.ndarray]) -> Panel:
    labels = {"zeros": "baseline, zeros for padding"}
    places = range(1, len(SEEDS) + 1)
    curves = [Curve(labels.get(name, name), places, values.tolist(), "points") for name, values in kept.items()]
    return Panel("bits that are left without context", "seed, first to fifth", "bits", curves)
