"""MoPPS: a shuffled pass in pools, nearest to the target, one-scale forgetting."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from fakes import FakeDataset, FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from omegaconf import OmegaConf
from test_vade import make_batch

from verl_plugins import CompositionError, DataError, StateError
from verl_plugins.composition import manager
from verl_plugins.sampling.mopps import Mopps, select_nearest, select_within

THETA = st.lists(st.integers(0, 16).map(lambda n: n / 16), min_size=1, max_size=40).map(np.array)


def method(**options) -> Mopps:
    return Mopps(Mopps.Config(**options))


def asked(plugin: Mopps, run: FakeRun, count: int) -> list[int]:
    return plugin.select_prompts(run, count).tolist()


class TestSelect:
    """Places in the pool."""

    @given(THETA, st.data())
    def test_nearest_against_sorting(self, theta, data):
        count = data.draw(st.integers(0, len(theta)))
        expected = sorted(range(len(theta)), key=lambda place: ((theta[place] - 0.5) ** 2, place))[:count]
        assert select_nearest(theta, count, 0.5).tolist() == expected

    @given(THETA, st.data())
    def test_symmetric_about_one_half(self, theta, data):
        count = data.draw(st.integers(0, len(theta)))
        assert (select_nearest(theta, count, 0.5) == select_nearest(1 - theta, count, 0.5)).all()

    @given(THETA, st.data())
    def test_within_prefers_the_interval(self, theta, data):
        count = data.draw(st.integers(0, len(theta)))
        places = select_within(theta, count, 0.3, 0.7, np.random.default_rng(0))
        inside = (theta >= 0.3) & (theta <= 0.7)
        assert len(set(places.tolist())) == count
        assert inside[places].sum() == min(count, inside.sum())
        distance = np.maximum(np.maximum(0.3 - theta, theta - 0.7), 0)
        assert distance[places].sum() == pytest.approx(np.sort(distance)[:count].sum())

    def test_within_is_uniform(self):
        theta, rng = np.array([0.1, 0.4, 0.5, 0.6, 0.69]), np.random.default_rng(0)
        counts = np.bincount(np.concatenate([select_within(theta, 2, 0.3, 0.7, rng) for _ in range(4000)]), minlength=5)
        np.testing.assert_allclose(counts / 4000, [0, 0.5, 0.5, 0.5, 0.5], atol=0.03)


class TestBelief:
    """What was asked forgets, towards the prior; the rest stays."""

    @given(st.floats(0, 1), st.integers(0, 8), st.floats(0.5, 3))
    def test_update(self, decay, right, prior):
        plugin, run = method(decay=decay, prior_alpha=prior), FakeRun(dataset=FakeDataset(3))
        plugin._prepare(3)
        plugin.right[:], plugin.wrong[:] = [4, 4, 4], [2, 2, 2]
        plugin.observe(run, make_batch((1, [1.0] * right + [0.0] * (8 - right))))
        alpha, beta = plugin._belief(np.arange(3))
        assert alpha[1] == pytest.approx(decay * (4 + prior) + (1 - decay) * prior + right)
        assert beta[1] == pytest.approx(decay * 3 + (1 - decay) + 8 - right)
        assert (alpha[[0, 2]].tolist(), beta[[0, 2]].tolist()) == ([4 + prior] * 2, [3, 3])

    def test_one_response_counts_as_one(self):
        plugin, run = method(), FakeRun(dataset=FakeDataset(2))
        plugin.observe(run, make_batch((0, [1.0])))
        assert (plugin.right[0], plugin.wrong[0]) == (1, 0)
        assert run.metrics["seen_fraction"] == 0.5

    def test_prompts_of_medium_difficulty_are_preferred(self):
        plugin, run = method(pool_ratio=30), FakeRun(dataset=FakeDataset(30))
        plugin._prepare(30)
        plugin.right[:10], plugin.wrong[10:20] = 40, 40
        plugin.right[20:], plugin.wrong[20:] = 20, 20
        assert np.mean(np.array(asked(plugin, run, 10)) >= 20) > 0.8

    def test_known_outcomes(self, tmp_path, sentence):
        path = tmp_path / "known.json"
        path.write_text(json.dumps({"2": [3, 8], "0": [0, 4]}))
        plugin = method(init_from=str(path))
        plugin._prepare(3)
        assert (plugin.right.tolist(), plugin.wrong.tolist()) == ([0, 0, 9], [12, 0, 15])
        with pytest.raises(DataError) as error:
            method(init_from=str(path))._prepare(2)
        sentence(error.value, "mopps: init_from", "prompt ids below 2")

    def test_how_well_it_predicts_is_told_of_the_success_rates(self):
        """Much evidence is no high rate."""
        plugin, run = method(), FakeRun(dataset=FakeDataset(3))
        plugin._prepare(3)
        plugin.right[:], plugin.wrong[:] = [9, 10, 3], [1, 90, 3]
        plugin.observe(run, make_batch((0, [1, 1]), (1, [0, 0]), (2, [1, 0])))
        expected = np.corrcoef([10 / 12, 11 / 102, 4 / 8], [1, 0, 0.5])[0, 1]
        assert run.metrics["predicted_vs_observed_corr"] == pytest.approx(expected)

    def test_foreign_prompt(self):
        with pytest.raises(DataError, match="mopps: prompt ids 3 to 3 are not all among the 3"):
            method().observe(FakeRun(dataset=FakeDataset(3)), make_batch((3, [1.0])))


class TestPool:
    """A shuffled pass over the dataset, in pieces."""

    def test_a_pass_asks_everybody_once_without_choice(self):
        plugin, run = method(pool_ratio=1), FakeRun(dataset=FakeDataset(12))
        first = []
        for run.step in (1, 2, 3):
            first += asked(plugin, run, 4)
        assert sorted(first) == list(range(12))
        second = []
        for run.step in (4, 5, 6):
            second += asked(plugin, run, 4)
        assert sorted(second) == list(range(12)) != second != first
        assert run.metrics["passes"] == 2

    def test_each_pass_has_an_order_of_its_own_also_after_a_resume(self):
        plugin, run, passes = method(pool_ratio=1), FakeRun(dataset=FakeDataset(12)), []
        for number in range(4):
            if number == 2:  # in the middle of the run, at the end of a pass
                state, plugin = plugin.state_dict(), method(pool_ratio=1)
                plugin.load_state_dict(state)
            pools = []
            for run.step in range(3 * number + 1, 3 * number + 4):
                pools.append(tuple(sorted(asked(plugin, run, 4))))  # within a pool theta decides
            passes.append(tuple(pools))
        assert len(set(passes)) == 4 and all(sorted(sum(pools, ())) == list(range(12)) for pools in passes)
        assert (plugin.passes, run.metrics["passes"]) == (4, 4)

    def test_runs_of_other_seeds_have_other_orders(self):
        plugins = [method(pool_ratio=1) for _ in range(200)]
        for seed, plugin in enumerate(plugins):
            asked(plugin, FakeRun(dataset=FakeDataset(12), seed=seed), 12)
        assert len({tuple(plugin._order) for plugin in plugins}) == 200

    def test_the_first_prompt_asked_begins_a_pass(self):
        plugin, again = method(pool_ratio=1), method(pool_ratio=1)
        again.load_state_dict(plugin.state_dict())
        for one in (plugin, again):
            asked(one, run := FakeRun(dataset=FakeDataset(12)), 1)
            assert run.metrics["passes"] == 1

    def test_a_resume_in_the_middle_goes_on_where_it_was(self):
        run, whole, parts = FakeRun(dataset=FakeDataset(12)), [], []
        for found, resumed in ((whole, ()), (parts, (2, 5, 6))):
            plugin = method(pool_ratio=1)
            for run.step in range(1, 8):
                if run.step in resumed:
                    state, plugin = plugin.state_dict(), method(pool_ratio=1)
                    plugin.load_state_dict(state)
                run = FakeRun(dataset=run.dataset, step=run.step)
                found.append(asked(plugin, run, 4))
        assert whole == parts

    def test_the_rest_of_a_pass_is_left_out(self):
        plugin, run = method(pool_ratio=2), FakeRun(dataset=FakeDataset(10))
        pools = [plugin._next_pool(run, 2).tolist() for _ in range(4) if plugin._prepare(10) is None]
        assert all(len(set(pool)) == 4 for pool in pools)
        assert set(pools[0]).isdisjoint(pools[1])
        assert set(pools[2]).isdisjoint(pools[3])
        assert plugin.passes == 2

    def test_a_small_dataset_is_the_pool(self):
        plugin, run = method(), FakeRun(dataset=FakeDataset(5))
        assert len(set(asked(plugin, run, 3))) == 3
        assert run.metrics["pool_size"] == 5

    def test_too_few(self, sentence):
        run = FakeRun(dataset=FakeDataset(5), flying=[0, 1, 2])
        with pytest.raises(DataError) as error:
            method().select_prompts(run, 3)
        sentence(error.value, "3 prompts", "only 2 of 5")

    def test_a_million_prompts(self):
        """A step costs what its pool costs: far less than one draw for the whole dataset."""
        plugin, run = method(), FakeRun(dataset=FakeDataset(1_000_000))
        plugin.select_prompts(run, 512)
        started = time.perf_counter()
        for run.step in range(2, 12):
            run.flying = plugin.select_prompts(run, 512).tolist()
        step = (time.perf_counter() - started) / 10
        started = time.perf_counter()
        np.random.default_rng(0).beta(np.full(1_000_000, 2.0), np.full(1_000_000, 3.0))
        assert step < (time.perf_counter() - started) / 2


class Steps(RuleBasedStateMachine):
    """Any order of drawing, outcomes and restarts: what is asked is distinct, not in flight, and counted once."""

    @initialize(size=st.integers(8, 40), ratio=st.integers(1, 6))
    def start(self, size, ratio):
        self.options = {"pool_ratio": ratio, "decay": 0.5}
        self.plugin, self.run = method(**self.options), FakeRun(dataset=FakeDataset(size))
        self.observed = np.zeros(size, dtype=bool)

    @rule(count=st.integers(1, 4))
    def draw(self, count):
        if len(self.run.flying) + count > len(self.run.dataset):
            return
        ids = asked(self.plugin, self.run, count)
        assert len(set(ids)) == count
        assert set(ids).isdisjoint(self.run.flying)
        self.run.flying = [*self.run.flying, *ids]

    @rule(right=st.integers(0, 3))
    def outcome(self, right):
        if not self.run.flying:
            return
        prompt, *self.run.flying = self.run.flying
        self.plugin.observe(self.run, make_batch((prompt, [1.0] * right + [0.0] * (3 - right))))
        self.observed[prompt] = True
        self.run.step += 1

    @rule()
    def restart(self):
        other, state = method(**self.options), self.plugin.state_dict()
        other.load_state_dict(state)
        before, after = [FakeRun(dataset=self.run.dataset, step=self.run.step) for _ in range(2)]
        twin = method(**self.options)
        twin.load_state_dict(state)
        assert asked(twin, before, 2) == asked(other, after, 2)
        self.plugin = method(**self.options)
        self.plugin.load_state_dict(state)

    @invariant()
    def evidence_where_there_were_outcomes(self):
        if len(self.plugin.right):
            mass = self.plugin.right + self.plugin.wrong
            assert ((mass > 0) == self.observed).all()
            assert (mass <= 6).all()


TestSteps = Steps.TestCase
TestSteps.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


class TestRefused:
    """Settings and neighbours it cannot work with."""

    @pytest.mark.parametrize(
        ("options", "config", "words"),
        [
            ({}, {"algorithm": {"filter_groups": {"enable": True}}}, ("plugins.mopps", "filter_groups.enable=false")),
            ({"correct_threshold": 0.8}, {}, ("plugins.mopps.metric",)),
            ({"init_from": "nowhere.json"}, {}, ("nowhere.json",)),
            ({"lower": 0.8}, {}, ("plugins.mopps.lower=0.8", "upper=0.7")),
        ],
    )
    def test_settings(self, sentence, options, config, words):
        with pytest.raises(CompositionError) as error:
            method(**options).check(OmegaConf.create(config))
        sentence(error.value, *words)

    def test_an_interval_may_be_a_point(self):
        method(lower=0.5, upper=0.5).check(OmegaConf.create({}))

    def test_beside_vade(self, sentence):
        with pytest.raises(CompositionError) as error:
            manager.build({"vade": {}, "mopps": {}})
        sentence(error.value, "'vade'", "'mopps'", "select_prompts")

    def test_other_dataset(self, sentence):
        plugin = method()
        plugin._prepare(5)
        with pytest.raises(StateError) as error:
            plugin.select_prompts(FakeRun(dataset=FakeDataset(6)), 1)
        sentence(error.value, "5 prompts", "6")
