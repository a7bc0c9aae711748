"""Portfolio mixture: how many prompts of each source, which of them, and what a step says of a source."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeRun
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, DataError, StateError
from verl_plugins.composition import manager
from verl_plugins.composition.settings import typed
from verl_plugins.sampling.portfolio_mixture import PortfolioMixture

WHERE = "plugins.portfolio_mixture"


class Sourced:
    """A dataset with these sources, row after row."""

    fingerprint = "sourced"

    def __init__(self, sources: str, column: str = "data_source", nested: bool = False) -> None:
        self.sources, self.column, self.nested = list(sources), column, nested

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, prompt_id: int) -> dict[str, Any]:
        row = {self.column: self.sources[prompt_id]}
        return {"extra_info": row} if self.nested else row


def method(**options: Any) -> PortfolioMixture:
    return PortfolioMixture(typed(PortfolioMixture.Config, options, WHERE))


def drawn(plugin: PortfolioMixture, run: FakeRun, count: int) -> str:
    """The sources of the prompts that are asked."""
    return "".join(sorted(run.dataset.sources[i] for i in plugin.select_prompts(run, count)))


def outcome(*groups: tuple[int, list[float]], right: list[float] | None = None, **fields: Any) -> Batch:
    """One draw per (prompt id, advantages of its responses), each of two tokens; a response is right if > 0."""
    rows = [(f"{prompt}-1-{draw}", value) for draw, (prompt, values) in enumerate(groups) for value in values]
    advantages = torch.tensor([[value, value, 99.0] for _, value in rows])
    mask = torch.tensor([[1.0, 1.0, 0.0]]).expand(len(rows), 3)
    correct = right or [float(value > 0) for _, value in rows]
    return Batch.from_tensors(
        uid=[uid for uid, _ in rows],
        response_mask=mask,
        rm_scores=torch.tensor(correct)[:, None] * torch.tensor([0.0, 1.0, 0.0]),
        advantages=advantages,
        **fields,
    )


class TestCounts:
    """How many of each source."""

    def test_equal_at_first_and_ties_to_the_first(self):
        run = FakeRun(dataset=Sourced("bca" * 20))
        assert drawn(method(), run, 8) == "aaabbbcc"

    def test_what_rounding_kept_is_owed(self):
        plugin, run = method(), FakeRun(dataset=Sourced("abc" * 20))
        assert [drawn(plugin, run, 8) for _ in range(3)] == ["aaabbbcc", "aaabbccc", "aabbbccc"]
        assert plugin.owed == pytest.approx(np.zeros(3), abs=1e-9)

    def test_draws_of_one_follow_the_weights(self):
        """As in asynchronous modes: one prompt at a time."""
        plugin, run = method(mode="wealth", initial_weights=[6.0, 3.0, 1.0], floor=0.0), FakeRun()
        run.dataset = Sourced("abc" * 40)
        found = "".join(drawn(plugin, run, 1) for _ in range(40))
        assert [found.count(name) for name in "abc"] == [24, 12, 4]
        for seen in range(1, 41):
            assert all(abs(found[:seen].count(n) - w * seen) < 1.5 for n, w in zip("abc", (0.6, 0.3, 0.1), strict=True))

    def test_the_floor_keeps_a_source_observed(self):
        """Below one prompt a step, it is asked every few steps."""
        plugin, run = method(mode="wealth", scale=40.0, floor=0.03), FakeRun(dataset=Sourced("ab" * 40))
        plugin.observe(run, outcome((0, [1, -1.0]), (1, [0, 0])))
        found = "".join(drawn(plugin, run, 8) for _ in range(8))
        assert found.count("b") == 2

    def test_a_small_source_leaves_the_rest_to_the_others(self):
        plugin, run = method(), FakeRun(dataset=Sourced("abb" + "b" * 20))
        for run.step in range(1, 9):
            assert drawn(plugin, run, 6) == "abbbbb"
        assert np.abs(plugin.owed).max() <= 1

    def test_a_batch_smaller_than_the_sources(self):
        plugin, run = method(floor=0.2), FakeRun(dataset=Sourced("abcd" * 3))
        assert [drawn(plugin, run, 2) for _ in range(2)] == ["ab", "cd"]

    def test_too_few_prompts(self, sentence):
        run = FakeRun(dataset=Sourced("aab"), flying=[0])
        with pytest.raises(DataError) as error:
            method().select_prompts(run, 3)
        sentence(error.value, "portfolio_mixture: 3 prompts", "only 2 of 3")


class TestOrder:
    """A shuffled pass within each source."""

    def test_each_epoch_asks_everybody_once_in_another_order(self):
        plugin, run = method(), FakeRun(dataset=Sourced("ab" * 9))
        passes = []
        for _ in range(3):
            ids = [i for _ in range(9) for i in plugin.select_prompts(run, 2).tolist()]
            assert sorted(ids) == list(range(18))
            passes.append(tuple(ids))
        assert len(set(passes)) == 3
        assert (plugin.epochs == 3).all()
        assert run.metrics["epoch_a"] == run.metrics["epoch_b"] == 3

    def test_draws_that_do_not_divide_an_epoch_lose_nobody(self):
        plugin, run = method(), FakeRun(dataset=Sourced("a" * 7))
        draws = [plugin.select_prompts(run, 3).tolist() for _ in range(14)]
        assert all(len(set(ids)) == 3 for ids in draws)
        assert (np.bincount(sum(draws, [])) == 6).all()

    def test_a_source_keeps_its_order_whatever_the_others_do(self):
        alone, beside = FakeRun(dataset=Sourced("a" * 8)), FakeRun(dataset=Sourced("a" * 8 + "b" * 8))
        first = [i for _ in range(2) for i in method().select_prompts(alone, 8).tolist()][:8]
        plugin = method()
        second = [i for _ in range(4) for i in plugin.select_prompts(beside, 4).tolist() if i < 8]
        assert first == second

    def test_seeds_have_other_orders(self):
        orders = {tuple(method().select_prompts(FakeRun(dataset=Sourced("a" * 12), seed=s), 12)) for s in range(50)}
        assert len(orders) == 50


class Steps(RuleBasedStateMachine):
    """Draws ahead, outcomes and restarts in any order."""

    @initialize(small=st.integers(1, 6), large=st.integers(4, 20), mode=st.sampled_from(["universal", "eg", "wealth"]))
    def start(self, small, large, mode):
        self.options = {"mode": mode, "forgetting": 0.9, "utility": "accuracy_change"}
        self.plugin = method(**self.options)
        self.run = FakeRun(dataset=Sourced("b" * small + "a" * large))

    @rule(count=st.integers(1, 4))
    def draw(self, count):
        if len(self.run.flying) + count > len(self.run.dataset):
            return
        ids = self.plugin.select_prompts(self.run, count).tolist()
        assert len(set(ids)) == count
        assert set(ids).isdisjoint(self.run.flying)
        self.run.flying = [*self.run.flying, *ids]

    @rule(right=st.integers(0, 3))
    def outcome(self, right):
        if self.run.flying:
            prompt, *self.run.flying = self.run.flying
            self.plugin.observe(self.run, outcome((prompt, [1.0] * right + [-1.0] * (3 - right))))
            self.run.step += 1

    @rule()
    def restart(self):
        state, again = self.plugin.state_dict(), method(**self.options)
        again.load_state_dict(state)
        assert again.state_dict() is state or not state
        if len(self.run.flying) < len(self.run.dataset):
            twin = method(**self.options)
            twin.load_state_dict(state)
            runs = [FakeRun(dataset=self.run.dataset, step=self.run.step, flying=self.run.flying) for _ in range(2)]
            assert twin.select_prompts(runs[0], 1).tolist() == again.select_prompts(runs[1], 1).tolist()
            again = method(**self.options)
            again.load_state_dict(state)
        self.plugin = again

    @invariant()
    def weights_are_a_distribution(self):
        if self.plugin.sources:
            assert self.plugin.mixture.weights().sum() == pytest.approx(1)
            assert np.isfinite(self.plugin.mixture.log_wealth).all()


TestSteps = Steps.TestCase
TestSteps.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)


class TestUtility:
    """What a step says of a source."""

    def seen(self, batch: Batch, **options: Any) -> FakeRun:
        run = FakeRun(dataset=Sourced("abc"))
        method(**options).observe(run, batch)
        return run

    def test_mean_advantage_of_the_tokens_that_count(self):
        run = self.seen(outcome((0, [1.0, -1.0]), (1, [0.5, 0.0, 0.0, -0.5])))
        assert (run.metrics["utility_a"], run.metrics["utility_b"]) == (1.0, 0.25)
        assert "utility_c" not in run.metrics
        assert run.metrics["log_wealth_a"] == pytest.approx(0.375)
        assert (run.metrics["log_wealth_b"], run.metrics["log_wealth_c"]) == (pytest.approx(-0.375), 0)
        assert [run.metrics[f"prompts_{name}"] for name in "abc"] == [1, 1, 0]
        assert run.metrics["weight_a"] == pytest.approx(1 / 3)
        growth = (np.exp(0.375) + np.exp(-0.375) + 1) / 3
        assert run.metrics["combined_log_wealth"] == pytest.approx(np.log(growth))

    def test_dropped_rows_have_no_advantage(self):
        full = outcome((0, [1.0, -1.0]), (1, [0.0, 0.0]), (1, [1.0, -1.0]))
        part = outcome((0, [1.0, -1.0]), (1, []), (1, [1.0, -1.0]), full=full)
        run = self.seen(part)
        assert (run.metrics["utility_a"], run.metrics["utility_b"]) == (1.0, 0.5)
        assert run.metrics["prompts_b"] == 2

    def test_mixed_groups(self):
        batch = outcome((0, [1.0, -1.0]), (0, [1.0, 1.0]), (2, [-1.0, -1.0]))
        run = self.seen(batch, utility="mixed_groups")
        assert (run.metrics["utility_a"], run.metrics["utility_c"]) == (0.5, 0)
        assert "utility_b" not in run.metrics

    def test_change_of_accuracy(self):
        plugin, run = method(utility="accuracy_change"), FakeRun(dataset=Sourced("ab"))
        plugin.observe(run, outcome((0, [1.0, -1.0]), (1, [1.0, -1.0])))
        assert "utility_a" not in run.metrics
        plugin.observe(run, outcome((0, [1.0, 1.0])))
        assert run.metrics["utility_a"] == 0.5
        assert plugin.accuracy.tolist() == [1.0, 0.5]
        plugin.observe(run, outcome((0, [1.0, 1.0]), (1, [-1.0, -1.0])))
        assert (run.metrics["utility_a"], run.metrics["utility_b"]) == (0, -0.5)

    def test_of_several_outputs_the_last_speaks(self):
        batch = outcome((0, [1.0, -1.0]), right=[0.0, 1.0], session=[0, 0], turn=[0, 1])
        for utility, expected in (("mixed_groups", 0.0), ("accuracy_change", 1.0)):
            plugin, run = method(utility=utility), FakeRun(dataset=Sourced("a"))
            plugin.observe(run, batch)
            assert (plugin.accuracy[0] if utility == "accuracy_change" else run.metrics["utility_a"]) == expected
            assert run.metrics["prompts_a"] == 1

    def test_a_source_that_is_always_solved_falls_to_the_floor(self):
        """The sheet's smallest real test, without a model."""
        plugin, run = method(), FakeRun(dataset=Sourced("ab" * 50))
        for run.step in range(1, 21):
            ids = plugin.select_prompts(run, 16).tolist()
            plugin.observe(run, outcome(*[(i, [0.0, 0.0] if i % 2 else [1.0, -1.0]) for i in ids]))
        assert plugin.mixture.weights()[1] < 0.1
        before = plugin.mixture.weights()[1]
        for run.step in range(21, 200):
            plugin.observe(run, outcome((0, [1.0, -1.0]), (1, [0.0, 0.0])))
        assert 0.02 <= plugin.mixture.weights()[1] < 0.03 < before

    def test_foreign_prompt(self):
        with pytest.raises(DataError, match="portfolio_mixture: prompt ids 3 to 3 are not all among the 3"):
            self.seen(outcome((3, [1.0])))


class TestSources:
    """What names a source."""

    @pytest.mark.parametrize("nested", [False, True])
    def test_another_column(self, nested):
        run = FakeRun(dataset=Sourced("xyx", column="level", nested=nested))
        plugin = method(column="level")
        plugin.select_prompts(run, 1)
        assert plugin.sources == ["x", "y"]
        assert plugin.source_of.tolist() == [0, 1, 0]

    def test_groups(self):
        plugin, run = method(mode="hierarchical", groups=[["a"], ["c", "b"]], floor=0), FakeRun(dataset=Sourced("abc"))
        plugin.select_prompts(run, 1)
        assert plugin.mixture.weights().tolist() == [0.5, 0.25, 0.25]

    def test_numbers_are_names(self):
        dataset = Sourced("")
        dataset.sources, run = [3, 1, 3], FakeRun(dataset=dataset)
        plugin = method(mode="hierarchical", groups=[[1], [3]])
        plugin.select_prompts(run, 1)
        assert plugin.sources == ["1", "3"]

    @pytest.mark.parametrize(
        ("options", "sources", "words"),
        [
            ({"column": "topic"}, "ab", ("row 0", "'topic'", "column")),
            ({"floor": 0.4}, "abc", ("floor=0.4", "3 sources", "0.333")),
            ({}, "abcde", ("lattice", "4 sources", "hierarchical", "mode=eg")),
            ({"mode": "hierarchical", "groups": [["a"], ["b"]]}, "abc", ("['a', 'b']", "'c'", "data_source")),
            ({"mode": "hierarchical", "groups": [[*"abcde"], ["f"]]}, "abcdef", ("5 in one", "4 sources")),
            ({"mode": "hierarchical", "groups": [*"abcdefg"]}, "abcdefg", ("7 in all", "6 groups")),
            ({"mode": "eg", "initial_weights": [1.0, 2.0]}, "abc", ("initial_weights", "2 numbers", "3 sources")),
            ({"mode": "eg"}, [f"{n}" for n in range(65)], ("65 sources", "at most 64", "another column")),
        ],
    )
    def test_refused(self, sentence, options, sources, words):
        if "groups" in options:
            options = {**options, "groups": [[*group] for group in options["groups"]]}
        with pytest.raises(DataError) as error:
            method(**options).select_prompts(FakeRun(dataset=Sourced(sources)), 1)
        sentence(error.value, *words)

    def test_many_sources_without_a_lattice(self):
        options = {"mode": "hierarchical", "inner": "eg", "groups": [[*"abcdef"], [*"ghijkl"]]}
        for chosen in ({"mode": "eg"}, {"mode": "wealth"}, options):
            assert drawn(method(**chosen), FakeRun(dataset=Sourced("abcdefghijkl")), 12) == "abcdefghijkl"

    def test_other_sources_than_in_the_checkpoint(self, sentence):
        plugin, other = method(), method()
        plugin.select_prompts(FakeRun(dataset=Sourced("ab")), 1)
        other.load_state_dict(plugin.state_dict())
        with pytest.raises(StateError) as error:
            other.select_prompts(FakeRun(dataset=Sourced("ac")), 1)
        sentence(error.value, "['a', 'b']", "['a', 'c']")


class TestRefused:
    """Settings and neighbours it cannot work with."""

    @pytest.mark.parametrize(
        ("options", "config", "words"),
        [
            ({}, {"algorithm": {"filter_groups": {"enable": True}}}, (WHERE, "filter_groups.enable=false")),
            ({"mode": "hierarchical"}, {}, (f"{WHERE}.groups", "hierarchical")),
            ({"groups": [["a"]]}, {}, (f"{WHERE}.groups", "mode=universal")),
            ({"mode": "hierarchical", "groups": [["a"], ["a"]]}, {}, (f"{WHERE}.groups", "one group")),
            ({"mode": "hierarchical", "groups": [["a"], []]}, {}, (f"{WHERE}.groups", "none empty")),
            ({"initial_weights": [1.0]}, {}, (f"{WHERE}.initial_weights", "mode is universal")),
            ({"mode": "eg", "initial_weights": [1.0, 0.0]}, {}, (f"{WHERE}.initial_weights", "above 0")),
        ],
    )
    def test_settings(self, sentence, options, config, words):
        with pytest.raises(CompositionError) as error:
            method(**options).check(OmegaConf.create(config))
        sentence(error.value, *words)

    def test_usual_settings(self):
        method().check(OmegaConf.create({}))
        method(mode="hierarchical", groups=[["a"], ["b"]]).check(OmegaConf.create({}))
        method(mode="wealth", initial_weights=[1.0, 2.0]).check(OmegaConf.create({}))

    @pytest.mark.parametrize("other", ["vade", "mopps"])
    def test_beside_another_that_chooses_prompts(self, sentence, other):
        with pytest.raises(CompositionError) as error:
            manager.build({other: {}, "portfolio_mixture": {}})
        sentence(error.value, f"'{other}'", "'portfolio_mixture'", "select_prompts")
