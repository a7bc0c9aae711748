"""VADE: belief per prompt, selection, two-scale forgetting."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from fakes import FakeDataset, FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, DataError, StateError
from verl_plugins.sampling.vade import (
    Selections,
    Vade,
    decay_and_add,
    draw,
    expected_gain,
    information_gain,
    largest,
    log_outcomes,
    posterior_mean,
    refuse_unknown,
    select,
)

FEW = settings(max_examples=60, deadline=None)


def method(**options) -> Vade:
    return Vade(Vade.Config(**options))


def make_batch(*prompts: tuple[int, list[float]], **fields) -> Batch:
    """One draw per (prompt id, scores)."""
    scores = torch.tensor([score for _, scores in prompts for score in scores])[:, None]
    uid = [f"{prompt}-1-{draw}" for draw, (prompt, scores) in enumerate(prompts) for _ in scores]
    return Batch.from_tensors(uid=uid, rm_scores=scores, response_mask=torch.ones_like(scores), **fields)


class TestSelect:
    """The best, distinct, eligible, best first, ties by id."""

    @FEW
    @given(st.lists(st.integers(0, 8).map(lambda n: n / 8), min_size=1, max_size=40), st.data())
    def test_against_sorting_everything(self, theta, data):
        theta = np.array(theta)
        eligible = np.array(data.draw(st.lists(st.booleans(), min_size=len(theta), max_size=len(theta))))
        count = data.draw(st.integers(0, int(eligible.sum())))
        gain = information_gain(theta)
        expected = sorted(np.flatnonzero(eligible), key=lambda i: (-gain[i], i))[:count]
        assert select(theta, eligible, count).tolist() == expected

    def test_leaves_theta_alone(self):
        theta = np.linspace(0, 1, 9)
        select(theta, np.arange(9) > 3, 2)
        assert (theta == np.linspace(0, 1, 9)).all()

    def test_everything(self):
        assert sorted(select(np.random.default_rng(0).random(7), None, 7)) == list(range(7))

    def test_of_equals_no_more_than_are_asked(self):
        assert largest(np.array([1.0, 5, 1, 1]), 2).tolist() == [1, 0]

    def test_too_few(self, sentence):
        with pytest.raises(DataError) as error:
            select(np.zeros(4), np.array([True, False, False, True]), 3)
        sentence(error.value, "3 prompts", "only 2 of 4")

    def test_largest_score(self):
        theta = np.linspace(0, 1, 3001)
        assert theta[select(theta, None, 1)[0]] == pytest.approx(1 / 3)
        assert theta[select(theta, None, 1, "variance")[0]] == pytest.approx(1 / 2)
        assert information_gain(np.array([1 / 3]))[0] == pytest.approx(4 / 27)


class TestBelief:
    """Decay first, then add; nothing observed drifts to uniform."""

    def test_decay_before_add(self):
        alpha, beta = np.array([10.0, 10.0]), np.array([5.0, 5.0])
        decay_and_add(alpha, beta, np.array([0]), np.array([3]), np.array([8]), 0.2, 0.5)
        assert alpha.tolist() == [0.2 * 10 + 3, 5]
        assert beta.tolist() == [0.2 * 5 + 5, 2.5]

    def test_all_of_what_is_not_asked_can_be_forgotten(self):
        alpha, beta = np.array([10.0, 10.0]), np.array([5.0, 5.0])
        decay_and_add(alpha, beta, np.array([0]), np.array([3]), np.array([8]), 1.0, 0.0)
        assert (alpha.tolist(), beta.tolist()) == ([13, 0], [10, 0])

    def test_steady_state_of_a_prompt_always_asked(self):
        alpha, beta = np.zeros(1), np.zeros(1)
        for _ in range(50):
            decay_and_add(alpha, beta, np.array([0]), np.array([2]), np.array([8]), 0.2, 0.999)
        assert (alpha + beta)[0] == pytest.approx(8 / (1 - 0.2))

    def test_half_life_and_drift_to_uniform(self):
        alpha, beta, nobody = np.array([8.0]), np.array([1.0]), np.array([], dtype=int)
        for step in range(10_000):
            if step == 693:
                assert alpha[0] == pytest.approx(4, rel=1e-3)
            decay_and_add(alpha, beta, nobody, nobody, nobody, 0.2, 0.999)
        assert posterior_mean(alpha, beta)[0] == pytest.approx(0.5, abs=1e-3)
        assert expected_gain(alpha, beta)[0] == pytest.approx(1 / 12, abs=1e-3)

    @pytest.mark.parametrize("score", ["infogain", "variance"])
    def test_closed_forms(self, score):
        alpha, beta = np.array([0.0, 3.0, 9.0]), np.array([0.0, 5.0, 0.5])
        theta = draw(np.random.default_rng(0), np.tile(alpha, (200_000, 1)), np.tile(beta, (200_000, 1)))
        np.testing.assert_allclose(theta.mean(0), posterior_mean(alpha, beta), atol=5e-3)
        np.testing.assert_allclose(information_gain(theta, score).mean(0), expected_gain(alpha, beta, score), atol=2e-3)


class TestEvidence:
    """One verdict per session that came back, summed per prompt."""

    def test_of_a_step(self):
        plugin, run = method(), FakeRun(dataset=FakeDataset(10))
        plugin.observe(run, make_batch((7, [1.0, 0.0, 1.0]), (2, [0.0, 0.0]), (7, [1.0])))
        assert plugin.alpha[[2, 7]].tolist() == [0, 3]
        assert plugin.beta[[2, 7]].tolist() == [2, 1]
        assert run.metrics["effective_ratio"] == 0.5
        assert run.metrics["solve_none"] == 0.5
        assert run.metrics["solve_all"] == 0
        assert run.metrics["seen_fraction"] == 0.2

    def test_same_prompt_twice_decays_once(self):
        plugin, run = method(lambda_selected=0.5), FakeRun(dataset=FakeDataset(3))
        plugin._prepare(3)
        plugin.alpha[1] = 8
        plugin.observe(run, make_batch((1, [1.0]), (1, [0.0])))
        assert (plugin.alpha[1], plugin.beta[1]) == (5, 1)

    def test_rows_dropped_by_others_count(self):
        full = make_batch((0, [1.0, 0.0]))
        part = Batch.from_tensors(uid=["0-1-0"], rm_scores=torch.ones(1, 1), response_mask=torch.ones(1, 1), full=full)
        plugin = method()
        plugin.observe(FakeRun(dataset=FakeDataset(1)), part)
        assert (plugin.alpha[0], plugin.beta[0]) == (1, 1)

    def test_last_output_of_a_session(self):
        batch = make_batch((0, [1.0, 0.0, 1.0]), session=[0, 0, 1], turn=[0, 1, 0])
        ids, correct, n = method().evidence(batch)
        assert (ids.tolist(), correct.tolist(), n.tolist()) == ([0], [1], [2])

    def test_metric_and_threshold(self):
        batch = make_batch((0, [1.0, 1.0, 1.0]), quality=[0.2, 0.8, 0.9])
        assert method(metric="quality", correct_threshold=0.8).evidence(batch)[1].tolist() == [2]

    def test_foreign_prompt(self):
        with pytest.raises(DataError, match="not all among the 3"):
            method().observe(FakeRun(dataset=FakeDataset(3)), make_batch((0, [1.0]), (3, [1.0])))
        with pytest.raises(DataError, match="vade: prompt ids -1 to 0 are not all among the 3"):
            refuse_unknown("vade", np.array([-1, 0]), 3)


class TestSelectPrompts:
    """The hook: own generator, nothing in flight, reproducible."""

    def test_distinct_eligible_and_reproducible(self):
        first, again = [FakeRun(dataset=FakeDataset(50), flying=range(40)) for _ in range(2)]
        ids = method().select_prompts(first, 8)
        assert len(set(ids.tolist())) == 8
        assert min(ids) >= 40
        assert (method().select_prompts(again, 8) == ids).all()

    def test_refill_of_a_step_asks_others(self):
        plugin, run = method(), FakeRun(dataset=FakeDataset(6))
        run.flying = plugin.select_prompts(run, 4).tolist()
        assert {*run.flying, *plugin.select_prompts(run, 2).tolist()} == set(range(6))

    def test_greedy(self):
        plugin, run = method(mode="greedy"), FakeRun(dataset=FakeDataset(3))
        plugin._prepare(3)
        plugin.alpha[:], plugin.beta[:] = [9, 2, 0], [0, 5, 9]
        assert plugin.select_prompts(run, 1).tolist() == [1]
        assert run.metrics["theta_selected_mean"] == pytest.approx(3 / 9)

    def test_prefers_prompts_with_mixed_outcomes(self):
        plugin, run = method(), FakeRun(dataset=FakeDataset(30))
        plugin._prepare(30)
        plugin.alpha[:10], plugin.beta[10:20] = 40, 40
        plugin.alpha[20:], plugin.beta[20:] = 14, 26
        assert (plugin.select_prompts(run, 10) >= 20).mean() > 0.8

    def test_reselected(self):
        plugin, run = method(mode="greedy"), FakeRun(dataset=FakeDataset(4))
        plugin.select_prompts(run, 2)
        assert run.metrics["reselected_fraction"] == 0
        plugin.select_prompts(run, 4)
        assert run.metrics["reselected_fraction"] == 0, "a step may select several times"
        other, run.step = method(mode="greedy"), 2
        other.load_state_dict(plugin.state_dict())
        for again in (plugin, other):
            again.select_prompts(run, 3)
            assert run.metrics["reselected_fraction"] == 1
        plugin.alpha[:2] = 100
        run.step = 3
        plugin.select_prompts(run, 2)
        assert run.metrics["reselected_fraction"] == 0.5

    def test_reselected_is_what_was_asked_a_step_before(self):
        selections = Selections()
        shares = [selections.add(step, np.array(ids)) for step, ids in ((1, [1, 2]), (2, [0, 1]), (3, [0, 2]))]
        assert shares == [0, 0.5, 0.5]


class TestState:
    """What is saved suffices to go on identically."""

    def test_round_trip(self):
        run, plugin = FakeRun(dataset=FakeDataset(20)), method()
        for run.step in (1, 2):
            ids = plugin.select_prompts(run, 4)
            plugin.observe(run, make_batch(*[(int(i), [1.0, 0.0, 0.0]) for i in ids]))
        other = method()
        other.load_state_dict(plugin.state_dict())
        assert other.step == 2
        first, again = [FakeRun(dataset=FakeDataset(20), step=3) for _ in range(2)]
        assert (other.select_prompts(first, 4) == plugin.select_prompts(again, 4)).all()
        assert (other.alpha == plugin.alpha).all()
        other.alpha[:] = 7
        assert not (plugin.alpha == 7).any(), "the loaded arrays are its own"

    def test_before_the_first_step(self):
        other = method()
        other.load_state_dict(method().state_dict())
        assert len(other.select_prompts(FakeRun(dataset=FakeDataset(5)), 5)) == 5

    def test_other_dataset(self, sentence):
        plugin = method()
        plugin._prepare(5)
        with pytest.raises(StateError) as error:
            plugin.select_prompts(FakeRun(dataset=FakeDataset(6)), 1)
        sentence(error.value, "5 prompts", "6")


class Steps(RuleBasedStateMachine):
    """Any order of drawing, outcomes and restarts: what is asked is not in flight, the belief that of the history."""

    @initialize(size=st.integers(4, 20), kept=st.sampled_from([0.0, 0.5, 1.0]), drift=st.sampled_from([0.5, 1.0]))
    def start(self, size, kept, drift):
        self.options = {"lambda_selected": kept, "lambda_unselected": drift}
        self.plugin, self.run = method(**self.options), FakeRun(dataset=FakeDataset(size))
        self.history: list[dict[int, tuple[int, int]]] = []
        """Per step, right and wrong answers of the prompts that came back."""

    @rule(count=st.integers(1, 4))
    def draw(self, count):
        if len(self.run.flying) + count > len(self.run.dataset):
            return
        ids = self.plugin.select_prompts(self.run, count).tolist()
        assert len({*ids}) == count and {*ids}.isdisjoint(self.run.flying)
        self.run.flying = [*self.run.flying, *ids]

    @rule(count=st.integers(1, 3), right=st.integers(0, 3))
    def outcomes(self, count, right):
        back, self.run.flying = self.run.flying[:count], self.run.flying[count:]
        if back:
            scores = [1.0] * right + [0.0] * (3 - right)
            self.plugin.observe(self.run, make_batch(*[(prompt, scores) for prompt in back]))
            self.history.append(dict.fromkeys(back, (right, 3 - right)))
            self.run.step += 1

    @rule()
    def restart(self):
        state, self.plugin = self.plugin.state_dict(), method(**self.options)
        self.plugin.load_state_dict(state)

    @invariant()
    def belief_of_the_history(self):
        for prompt in range(len(self.plugin.alpha)):
            belief = np.zeros(2)
            for step in self.history:
                factor = self.options["lambda_selected" if prompt in step else "lambda_unselected"]
                belief = factor * belief + step.get(prompt, (0, 0))
            assert (self.plugin.alpha[prompt], self.plugin.beta[prompt]) == pytest.approx(tuple(belief))


TestSteps = Steps.TestCase
TestSteps.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


class TestKnownOutcomes:
    """`init_from`."""

    def test_read(self, tmp_path):
        path = tmp_path / "known.json"
        path.write_text(json.dumps({"2": [3, 8], "0": [0, 4], "3": [2, 2]}))
        plugin = method(init_from=str(path), init_weight=0.5)
        plugin._prepare(4)
        assert (plugin.alpha.tolist(), plugin.beta.tolist()) == ([0, 0, 1.5, 1], [2, 0, 2.5, 0])

    @pytest.mark.parametrize(
        "known",
        [
            {"3": [1, 2]},
            {"0": [3, 2]},
            {"-1": [0, 1]},
            {"0": [-1, 2]},
            {"0": [math.nan, 2]},
            {"a": [1, 2]},
            {"0": 1, "1": 2},
            {"0": [1, 2, 3]},
            {"0": [1, float("inf")]},
            {"1": [1, 2], "01": [0, 2]},
            {"9" * 20: [1, 2]},
            [[1, 2]],
            {},
            7,
        ],
    )
    def test_refused(self, known, tmp_path, sentence):
        path = tmp_path / "known.json"
        path.write_text(json.dumps(known))
        with pytest.raises(DataError) as error:
            method(init_from=str(path))._prepare(3)
        sentence(error.value, "prompt ids below 3")


class TestCheck:
    """Settings it cannot work with."""

    def test_filter_groups(self, sentence):
        with pytest.raises(CompositionError) as error:
            method().check(OmegaConf.create({"algorithm": {"filter_groups": {"enable": True}}}))
        sentence(error.value, "algorithm.filter_groups.enable=false")

    def test_threshold_without_metric(self, sentence):
        with pytest.raises(CompositionError) as error:
            method(correct_threshold=0.8).check(OmegaConf.create({}))
        sentence(error.value, "plugins.vade.metric")

    def test_missing_file(self, sentence):
        with pytest.raises(CompositionError) as error:
            method(init_from="nowhere.json").check(OmegaConf.create({}))
        sentence(error.value, "nowhere.json")

    def test_fine(self):
        method().check(OmegaConf.create({"algorithm": {"filter_groups": None}}))


@pytest.mark.parametrize(("predicted", "correlation"), [([0.9, 0.1, 0.5], 1.0), ([0.1, 0.9, 0.5], -1.0)])
def test_how_well_the_belief_predicts(predicted, correlation):
    run = FakeRun(FakeDataset(3))
    log_outcomes(run, np.array(predicted), np.array([2, 0, 4]), np.array([2, 8, 8]), np.ones(3))
    assert run.metrics["predicted_vs_observed_corr"] == pytest.approx(correlation)


@pytest.mark.parametrize(("predicted", "correct"), [([0.5, 0.5], [0, 8]), ([0.1, 0.9], [4, 4])])
def test_what_does_not_vary_has_no_correlation(predicted, correct):
    run = FakeRun(FakeDataset(2))
    log_outcomes(run, np.array(predicted), np.array(correct), np.array([8, 8]), np.ones(2))
    assert "predicted_vs_observed_corr" not in run.metrics
