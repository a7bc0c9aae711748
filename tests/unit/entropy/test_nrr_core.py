"""NRR-Core: the coefficient that follows lost entropy, the bonus in the loss, and answers in bits."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, DataError, Tokens
from verl_plugins.composition import manager
from verl_plugins.entropy.nrr_core import COEFFICIENT, MISSING, NrrCore, Retention, answer_entropy

UNTIMED = settings(deadline=None, max_examples=50)
ENTROPIES = st.lists(st.floats(0, 3), min_size=1, max_size=12)
KINDS = st.sampled_from(["prev", "ema", "initial"])
CONFIG = {"actor_rollout_ref": {"actor": {"entropy_coeff": 0}}}


def method(**options) -> NrrCore:
    return NrrCore(NrrCore.Config(**options))


def coefficients(retention: Retention, entropies) -> list[float]:
    return [retention.step(entropy)[0] for entropy in entropies]


class TestRetention:
    """c and H_ref over the steps."""

    @UNTIMED
    @given(ENTROPIES, KINDS, st.floats(0, 0.3), st.floats(0.01, 1))
    def test_in_plain_python(self, entropies, kind, epsilon, kappa):
        made, coefficient, reference = Retention(kind, epsilon, kappa, 0.02, 0.01, 0.9), 0.01, entropies[0]
        for number, entropy in enumerate(entropies):
            gap = reference - epsilon - entropy
            if number:
                coefficient = sorted([0.0, coefficient + kappa * gap, 0.02])[1]
            expected = (coefficient, max(gap, 0.0), reference)
            assert made.step(entropy) == pytest.approx(expected)
            if kind == "prev":
                reference = entropy
            if kind == "ema":
                reference = 0.9 * reference + 0.1 * entropy

    @UNTIMED
    @given(ENTROPIES, KINDS)
    def test_never_leaves_its_bounds(self, entropies, kind):
        assert all(0 <= c <= 0.02 for c in coefficients(Retention(kind, 0.02, 5.0, 0.02, 0.0, 0.9), entropies))

    def test_a_single_step(self):
        assert Retention("prev", 0.02, 0.05, 0.02, 0.01, 0.9).step(1.5) == (0.01, 0.0, 1.5)

    def test_rising_entropy_takes_it_to_zero(self):
        made = Retention("prev", 0.02, 0.05, 0.02, 0.02, 0.9)
        found = coefficients(made, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5])
        assert found == sorted(found, reverse=True)
        assert found[-1] == 0 and math.copysign(1, found[-1]) == 1

    def test_falling_within_the_allowance_raises_nothing(self):
        made = Retention("prev", 0.05, 0.1, 0.02, 0.0, 0.9)
        assert coefficients(made, [1.0, 0.96, 0.92, 0.88]) == [0, 0, 0, 0]

    def test_a_slow_fall_is_seen_by_the_first_entropy(self):
        assert coefficients(Retention("initial", 0.05, 0.1, 0.02, 0.0, 0.9), [1.0, 0.96, 0.92])[-1] > 0

    @pytest.mark.parametrize(("kind", "epsilon"), [("prev", 0.02), ("ema", 0.1), ("initial", 0.1)])
    def test_usual_allowance(self, kind, epsilon):
        assert method(reference=kind).retention.epsilon == epsilon
        assert method(reference=kind, epsilon=0.0).retention.epsilon == 0

    @UNTIMED
    @given(ENTROPIES, ENTROPIES, KINDS)
    def test_a_resumed_run_goes_on(self, before, after, kind):
        plugin, again = method(reference=kind), method(reference=kind)
        coefficients(plugin.retention, before)
        again.load_state_dict(json.loads(json.dumps(plugin.state_dict())))
        assert coefficients(again.retention, after) == coefficients(plugin.retention, after)

    def test_a_state_before_the_first_step(self):
        again = method(initial_coeff=0.01)
        again.load_state_dict(method(initial_coeff=0.01).state_dict())
        assert again.retention.step(1.0) == (0.01, 0.0, 1.0)


class TestAnswers:
    """Bits of the answers to each prompt."""

    @UNTIMED
    @given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 3)), max_size=20), st.sampled_from(["class", "drop"]))
    def test_in_plain_python(self, rows, missing):
        group, answer = (np.array([row[place] for row in rows], dtype=np.int64) for place in (0, 1))
        bits, normalised = answer_entropy(group, answer, 3, missing)
        for number in range(3):
            own = [a for g, a in rows if g == number and (missing == "class" or a != MISSING)]
            shares = [own.count(a) / len(own) for a in set(own)]
            expected = sum(p * math.log2(1 / p) for p in shares)
            assert bits[number] == pytest.approx(expected)
            assert normalised[number] == pytest.approx(expected / math.log2(len(own)) if len(own) > 1 else 0)
            assert 0 <= normalised[number] <= 1 + 1e-12
            assert math.copysign(1, bits[number]) == 1

    def test_all_different_and_all_alike(self):
        bits, normalised = answer_entropy(np.repeat([0, 1, 2], [4, 4, 1]), np.array([0, 1, 2, 3, 5, 5, 5, 5, 0]), 3)
        assert (bits.tolist(), normalised.tolist()) == ([2, 0, 0], [1, 0, 0])


def batch(entropy: float = 1.0, **fields) -> Batch:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])
    values = torch.where(mask.bool(), entropy, 99.0)
    given = {"uid": ["0-1-0", "0-1-0", "1-1-1", "1-1-1"], "answer": ["2", " 2 ", "", None], **fields}
    return Batch.from_tensors(rm_scores=torch.zeros(4, 3), response_mask=mask, entropy=values, **given)


class TestStep:
    """What a step learns, logs and ships."""

    def test_logs_and_ships(self):
        plugin, run = method(initial_coeff=0.01), FakeRun()
        plugin.observe(run, batch(1.0))
        found = batch(0.5)
        plugin.observe(run, found)
        assert run.metrics["violation"] == pytest.approx(0.48)
        assert run.metrics["reference"] == pytest.approx(1.0)
        assert run.metrics["entropy_coeff"] == 0.02
        assert found.written[COEFFICIENT].tolist() == pytest.approx([0.02] * 4)
        assert run.metrics["answer_bits"] == run.metrics["answer_bits_norm"] == 0

    def test_entropy_is_the_mean_over_tokens(self):
        plugin, given = method(), batch(entropy=1.0)
        given.entropy[2] = torch.tensor([3.0, 3.0, 3.0])
        plugin.observe(run := FakeRun(), given)
        assert run.metrics["reference"] == pytest.approx((5 * 1 + 3 * 3) / 8)

    @pytest.mark.parametrize(("missing", "expected"), [("class", 1.5), ("drop", 1.0)])
    def test_missing_answers(self, missing, expected):
        given = batch(uid=["0-1-0"] * 4, answer=["1", "", None, "2"], session=[0, 1, 2, 3])
        bits, _ = method(missing=missing).answer_bits(given)
        assert bits[0] == pytest.approx(expected)

    def test_the_last_output_of_a_session_speaks(self):
        given = batch(uid=["0-1-0"] * 4, answer=["1", "2", "1", "2"], session=[0, 0, 1, 1], turn=[0, 1, 0, 1])
        assert method().answer_bits(given)[0].tolist() == [0]

    def test_numbers(self):
        assert method().answer_bits(batch(answer=torch.tensor([1.0, 2.0, 3.0, 3.0])))[0].tolist() == [1, 0]

    def test_without_answers(self):
        run = FakeRun()
        method(answer=None).observe(run, batch())
        assert "answer_bits" not in run.metrics
        with pytest.raises(DataError, match="'verdict_text'"):
            method(answer="verdict_text").observe(run, batch())


def tokens_of(entropy: torch.Tensor, coefficient: list[float]) -> Tokens:
    zeros = torch.zeros_like(entropy)
    return Tokens(
        log_probs=zeros.clone().requires_grad_(),
        old_log_probs=zeros,
        advantages=zeros,
        response_mask=torch.ones_like(entropy),
        entropy=entropy,
        config=SimpleNamespace(),
        extra={COEFFICIENT: torch.tensor(coefficient)}.__getitem__,
    )


class TestLoss:
    """Minus c H, also where padding rows know no c."""

    def test_bonus_and_its_gradient(self):
        entropy = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).requires_grad_()
        term = method().loss_terms(tokens_of(entropy, [0.25, 0.0]))["nrr_entropy"]
        assert term.tolist() == [[-0.25, -0.5], [-0.75, -1.0]]
        term.sum().backward()
        assert entropy.grad.unique().tolist() == [-0.25]

    def test_nothing_at_zero(self):
        assert method().loss_terms(tokens_of(torch.ones(2, 2), [0.0, 0.0])) is None


class TestRefused:
    """Settings and neighbours."""

    def test_verls_own_bonus(self, sentence):
        config = OmegaConf.create({"actor_rollout_ref": {"actor": {"entropy_coeff": 0.001}}})
        with pytest.raises(CompositionError) as error:
            method().check(config)
        sentence(error.value, "actor_rollout_ref.actor.entropy_coeff=0.001", "set it to 0", "initial_coeff")

    def test_a_beginning_above_the_bound(self, sentence):
        with pytest.raises(CompositionError) as error:
            method(initial_coeff=0.03).check(OmegaConf.create(CONFIG))
        sentence(error.value, "initial_coeff=0.03", "max_coeff=0.02")

    def test_usual_settings(self):
        method().check(OmegaConf.create(CONFIG))
        method(initial_coeff=0.02).check(OmegaConf.create(CONFIG))

    @pytest.mark.parametrize("others", [("clip_cov",), ("steer",), ("clip_cov", "steer"), ("vade",)])
    def test_beside(self, others):
        manager.build({"grpo": {}, "nrr_core": {}, **{name: {} for name in others}})
