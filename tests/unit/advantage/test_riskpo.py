"""RiskPO: bundles of prompts, papers, and what they get; see also test_riskpo_tracking."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from advantages import batch_of, per_row
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import CompositionError, DataError, Groups
from verl_plugins.advantage.riskpo import (
    RiskPo,
    at_level,
    averages,
    bundle_order,
    bundle_quantiles,
    bundle_std,
    make_papers,
    risk,
    share_out,
)

FEW = settings(max_examples=50, deadline=None)
MODES = st.sampled_from(["track", "batch", "mix"])
CREDITS = st.sampled_from(["uniform", "score", "std", "sum-mean"])


def method(**options) -> RiskPo:
    return RiskPo(RiskPo.Config(**options))


def estimate(uid, scores, run=None, plugin=None, fields=None, **options) -> torch.Tensor:
    batch = batch_of(uid, scores, **(fields or {}))
    return per_row((plugin or method(**options)).estimate_advantage(run or FakeRun(), batch))


def prompts_of(*groups: list[float]) -> tuple[list[str], list[float]]:
    """One prompt for each list of scores."""
    uid = [f"{number}-1-0" for number, scores in enumerate(groups) for _ in scores]
    return uid, [float(score) for scores in groups for score in scores]


@st.composite
def outcomes(draw, even: bool = False) -> tuple[list[str], list[float], list[int]]:
    """uid, score and session of each row, 1 to 7 prompts in any order."""
    count, size = draw(st.integers(1, 7)), draw(st.integers(2, 5))
    sizes = [size if even else draw(st.integers(1, 5)) for _ in range(count)]
    rows = [(f"{prompt}-1-0", session) for prompt, n in enumerate(sizes) for session in range(n)]
    rows = draw(st.permutations(rows))
    scores = draw(st.lists(st.sampled_from([0.0, 0.25, 1.0, -1.0]), min_size=len(rows), max_size=len(rows)))
    return [uid for uid, _ in rows], scores, [session for _, session in rows]


def papers_of(*groups: list[float], bundle=None):
    uid, scores = prompts_of(*groups)
    bundle = torch.zeros(len(groups), dtype=torch.int64) if bundle is None else torch.tensor(bundle)
    return make_papers(torch.tensor(scores), Groups(uid), torch.arange(len(uid)), bundle)


class TestBundles:
    @FEW
    @given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 5))
    def test_all_but_the_last_are_full(self, prompts, size, seed):
        groups = Groups([f"{prompt}-3-1" for prompt in range(prompts)])
        bundle = bundle_order(groups, np.random.default_rng(seed)) // size
        full, rest = divmod(prompts, size)
        assert sorted(torch.bincount(bundle).tolist(), reverse=True) == [size] * full + [rest] * (rest > 0)

    @FEW
    @given(st.permutations([f"{prompt}-3-{draw}" for prompt in range(12) for draw in range(2)]), st.integers(0, 5))
    def test_row_order_does_not_matter(self, uid, seed):
        one, other = Groups(sorted(uid)), Groups(uid)
        orders = [bundle_order(groups, np.random.default_rng(seed)) for groups in (one, other)]
        assert dict(zip(one.labels, orders[0].tolist(), strict=True)) == dict(
            zip(other.labels, orders[1].tolist(), strict=True)
        )

    def test_neighbours_in_the_dataset_are_not_always_together(self):
        groups = Groups([f"{prompt}-3-1" for prompt in range(40)])
        orders = [bundle_order(groups, FakeRun(step=step).rng("bundles")) // 2 for step in (1, 2)]
        assert not torch.equal(*orders)
        assert (orders[0][::2] == orders[0][1::2]).sum() < 10


class TestPapers:
    def test_one_response_to_each_prompt(self):
        papers = papers_of([1, 0, 1], [10, 20, 30], [100, 100, 100], bundle=[0, 0, 1])
        assert papers.scores.tolist() == [[11, 20, 31], [100, 100, 100]]
        assert papers.prompts.tolist() == [2, 1]

    def test_the_smallest_group_says_how_many(self):
        papers = papers_of([1, 2, 3], [10, 20], [5], bundle=[0, 0, 1])
        assert papers.scores.tolist() == [[11, 22], [5, 0]]
        assert papers.there.tolist() == [[True, True], [True, False]]
        assert papers.cell.tolist() == [0, 1, 4, 0, 1, 2], "the third response belongs to no paper"

    def test_surplus_responses_get_nothing(self):
        found = estimate(*prompts_of([0, 1, 1], [0, 1]), credit="uniform", quantiles="batch")
        assert found[2] == 0
        assert (found[[0, 1, 3, 4]] != 0).all()

    @FEW
    @given(st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=6), min_size=1, max_size=5), st.floats(0.01, 0.99))
    def test_statistics_are_those_of_numpy(self, groups, level):
        papers = papers_of(*groups, bundle=list(range(len(groups))))
        (quantile,) = bundle_quantiles(papers, [level])
        std = bundle_std(papers, guard=-1.0)
        for row, group in enumerate(np.asarray(g, dtype=np.float32).astype(float) for g in groups):
            assert quantile[row].item() == pytest.approx(np.quantile(group, level), abs=1e-9)
            assert std[row].item() == pytest.approx(np.std(group, ddof=1) if len(group) > 1 else 1.0, abs=1e-9)

    def test_no_division_by_hardly_any_spread(self):
        assert bundle_std(papers_of([1.0, 1.0005, 1.0]))[0] == 1
        assert bundle_std(papers_of([1.0, 1.01, 1.0]))[0] < 0.01


class TestCredit:
    """A paper's advantage over its responses."""

    UID, SCORES = prompts_of([1, 0, 0], [1, 1, 0])

    def shared(self, credit: str) -> list[float]:
        groups, scores = Groups(self.UID), torch.tensor(self.SCORES)
        papers = make_papers(scores, groups, torch.arange(6), torch.tensor([0, 0]))
        return share_out(torch.tensor([[6.0, 3.0, -1.0]]).double(), papers, scores, groups, credit).tolist()

    def test_by_hand(self):
        std = (1 / 3) ** 0.5
        assert self.shared("uniform") == [6, 3, -1, 6, 3, -1]
        assert self.shared("score") == [3, 4.5, -1.5, 3, 1.5, -1.5]
        assert self.shared("std") == pytest.approx([value / std for value in (6, 3, -1, 6, 3, -1)], rel=1e-5)
        # above the mean: 2/3 -1/3 -1/3 and 1/3 1/3 -2/3; the second paper's add up to 0, and it is halved
        assert self.shared("sum-mean") == pytest.approx([4, 1.5, -1 / 3, 2, 1.5, -2 / 3])

    def test_std_of_an_equal_group_counts_as_1(self):
        uid, scores = prompts_of([1, 1], [0, 1])
        groups, scores = Groups(uid), torch.tensor(scores)
        papers = make_papers(scores, groups, torch.arange(4), torch.tensor([0, 0]))
        found = share_out(torch.tensor([[2.0, 4.0]]).double(), papers, scores, groups, "std")
        assert found[:2].tolist() == pytest.approx([2, 4], rel=1e-5)

    @FEW
    @given(outcomes())
    def test_sum_mean_hands_out_all_there_is(self, rows):
        uid, scores, session = rows
        groups, scores = Groups(uid), torch.tensor(scores)
        bundle = torch.arange(len(groups)) // 2
        papers = make_papers(scores, groups, torch.tensor(session), bundle)
        advantage = torch.arange(papers.there.numel()).double().view(papers.there.shape) - 3
        total = papers.total(share_out(advantage, papers, scores, groups, "sum-mean"))
        torch.testing.assert_close(total[papers.there], advantage[papers.there], rtol=0, atol=1e-6)


class TestLaws:
    @FEW
    @given(outcomes(), st.randoms(use_true_random=False), MODES, CREDITS)
    def test_row_order_does_not_matter(self, rows, random, mode, credit):
        order = random.sample(range(len(rows[0])), len(rows[0]))
        one, other = (method(quantiles=mode, credit=credit, bundle_size=2) for _ in range(2))
        for _ in range(2):
            found = [
                estimate(*columns[:2], plugin=plugin, fields={"session": columns[2]})
                for plugin, columns in ((one, rows), (other, [[column[row] for row in order] for column in rows]))
            ]
            torch.testing.assert_close(found[0][order], found[1], rtol=1e-4, atol=1e-5)

    @FEW
    @given(outcomes(even=True), st.integers(-4, 4), st.sampled_from(["uniform", "std", "sum-mean"]))
    def test_shift_of_all_scores(self, rows, shift, credit):
        uid, scores, session = rows
        fields, options = {"session": session}, {"quantiles": "batch", "credit": credit, "bundle_size": 3}
        found = estimate(uid, [score + shift for score in scores], fields=fields, **options)
        torch.testing.assert_close(estimate(uid, scores, fields=fields, **options), found, rtol=1e-3, atol=1e-4)

    @FEW
    @given(outcomes(even=True), st.sampled_from([0.5, 4.0]), st.sampled_from(["uniform", "sum-mean"]))
    def test_scale_of_all_scores(self, rows, scale, credit):
        uid, scores, session = rows
        fields, options = {"session": session}, {"quantiles": "batch", "credit": credit, "bundle_size": 3}
        found = estimate(uid, [scale * score for score in scores], fields=fields, **options)
        torch.testing.assert_close(estimate(uid, scores, fields=fields, **options), found, rtol=1e-3, atol=1e-4)

    @FEW
    @given(outcomes(), MODES, CREDITS)
    def test_float32_suffices(self, rows, mode, credit):
        uid, scores, session = rows
        found = [
            estimate(uid, scores, fields={"session": session, "dtype": dtype}, quantiles=mode, credit=credit)
            for dtype in (torch.float32, torch.float64)
        ]
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("score", [0.0, 0.1, 1 / 3, 0.7, -2.3])
    @pytest.mark.parametrize("size", [1, 2, 5, 12, 64])
    @pytest.mark.parametrize("credit", ["uniform", "std", "sum-mean"])
    def test_equal_papers_are_exactly_zero_with_their_own_quantiles(self, size, score, credit):
        groups = [[score] * size] * 3
        assert (estimate(*prompts_of(*groups), quantiles="batch", credit=credit) == 0).all()

    def test_equal_papers_far_from_tracked_quantiles_are_not_divided_by_nothing(self):
        plugin = method(credit="uniform")
        estimate(*prompts_of([0, 0, 0, 0], [1, 0, 0, 0]), plugin=plugin)
        found = estimate(*prompts_of([1, 1, 1, 1], [1, 1, 1, 1]), plugin=plugin)
        assert (found > 0).all() and float(found.max()) < 10

    def test_padding_width(self):
        rows = prompts_of([1, 0, 1], [0, 0, 1])
        assert torch.equal(estimate(*rows), estimate(*rows, fields={"tokens": 9}))

    def test_each_session_by_its_last_output(self):
        uid, scores = prompts_of([1, 0, 1], [1, 0])
        expected = estimate(uid, scores, fields={"session": [0, 1, 2, 0, 1]})
        fields = {"session": [0, 0, 1, 2, 0, 1], "turn": [0, 1, 0, 0, 0, 0]}
        found = estimate([uid[0], *uid], [5.0, *scores], fields=fields)
        assert torch.equal(found, torch.cat([expected[:1], expected]))
        assert expected[0] != 0

    def test_nan_is_refused(self):
        with pytest.raises(DataError, match="finite"):
            estimate(*prompts_of([1, float("nan")], [0, 1]))


class TestHardlyAnything:
    """A millionth is added to all that is divided by."""

    def test_levels_at_an_end_or_next_to_each_other(self):
        near, far = 1e-6, 1 - 1e-6
        scores, low, high = torch.tensor([[-1.0, 0, 3]]).double(), torch.tensor(0.0), torch.tensor(1.0)
        options = {"objective": "rvar", "quantile_down": 0.5, "quantile_up": 0.5 + near}
        assert risk(scores, low, high, RiskPo.Config(**options), [0, 0])[0, 2] == pytest.approx(1 / 2e-6)
        options = {"tail_weight": 1.0, "quantile_down": near}
        assert risk(scores, low, high, RiskPo.Config(**options), [0, 0])[0, 0] == pytest.approx(-1 / 2e-6 / 2)
        options = {"objective": "upper_tail", "tail_weight": 1e9, "quantile_up": far}
        assert risk(scores, low, high, RiskPo.Config(**options), [0, 0])[0, 2] == pytest.approx(2 / 2e-6)

    def test_a_small_std(self):
        uid, scores = prompts_of([0, 0.002])
        std, groups = 0.002 / 2**0.5, Groups(uid)
        papers = make_papers(torch.tensor(scores), groups, torch.arange(2), torch.tensor([0]))
        found = share_out(torch.ones(1, 2).double(), papers, torch.tensor(scores).double(), groups, "std")
        assert found.tolist() == pytest.approx([1 / (std + 1e-6)] * 2, rel=1e-5)
        options = {"quantiles": "batch", "credit": "uniform"}
        plain = estimate(uid, scores, scale="none", **options)
        torch.testing.assert_close(estimate(uid, scores, **options), plain / (std + 1e-6), rtol=1e-5, atol=0)


class TestObjective:
    ROWS = prompts_of([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    """One prompt: its responses are the papers, with quantiles 2 and 8."""

    def found(self, **options) -> list[float]:
        return estimate(*self.ROWS, quantiles="batch", credit="uniform", scale="none", **options).tolist()

    def test_range_value_at_risk(self):
        middle = [min(max(score - 2, 0), 6) for score in range(11)]
        assert self.found(objective="rvar") == pytest.approx([value / 0.6 for value in middle], rel=1e-4)
        found = self.found(objective="rvar", natural_baseline_adv=True)
        assert found == pytest.approx([(value - 6) / 0.6 for value in middle], rel=1e-4, abs=1e-6)
        assert max(found) == pytest.approx(0, abs=1e-6)

    def test_mixed_with_the_lower_tail(self):
        expected = [(1.5 * -max(2 - s, 0) / 0.2 + min(max(s - 2, 0), 6) / 0.6) / 2.5 for s in range(11)]
        assert self.found() == pytest.approx(expected, rel=1e-4)

    def test_upper_tail(self):
        expected = [(3 * max(s - 8, 0) / 0.2 + min(max(s - 2, 0), 6) / 0.6) / 4 for s in range(11)]
        assert self.found(objective="upper_tail", tail_weight=3.0) == pytest.approx(expected, rel=1e-4)

    def test_the_papers_formula(self):
        expected = [2 * min(s - 2, 0) + min(s - 8, 0) for s in range(11)]
        assert self.found(objective="paper", tail_weight=2.0) == pytest.approx(expected, rel=1e-5, abs=1e-5)

    def test_division_by_the_std(self):
        plain = torch.tensor(self.found())
        found = estimate(*self.ROWS, quantiles="batch", credit="uniform")
        torch.testing.assert_close(found, plain / float(np.std(range(11), ddof=1)), rtol=1e-4, atol=1e-5)

    def test_mean_baseline_is_the_tracked_one(self):
        plugin = method(credit="uniform", scale="none", objective="rvar", mean_baseline=True, bundle_size=1)
        first = estimate(*self.ROWS, plugin=plugin)
        rvar, _ = averages(plugin.tracked, *(at_level(plugin.tracked, level) for level in (0.2, 0.8)), True)
        assert rvar < 0
        second = estimate(*self.ROWS, plugin=plugin)
        torch.testing.assert_close(second - first, torch.full((11,), -rvar / 0.6), rtol=1e-3, atol=1e-3)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "config", "names"),
        [
            ({"quantile_down": 0.8}, {}, "plugins.riskpo.quantile_up=0.8"),
            ({"objective": "paper"}, {}, "plugins.riskpo.credit=uniform"),
            (
                {"quantiles": "batch"},
                {"actor_rollout_ref": {"rollout": {"n": 1}}},
                "actor_rollout_ref.rollout.n=1",
            ),
        ],
    )
    def test_impossible_settings(self, options, config, names, sentence):
        with pytest.raises(CompositionError) as error:
            method(**options).check(OmegaConf.create(config))
        sentence(error.value, names)

    @pytest.mark.parametrize(
        "other", [{"credit": "std"}, {"scale": "std"}, {"natural_baseline_adv": True}, {"mean_baseline": True}]
    )
    def test_the_papers_formula_takes_nothing_of_the_codes(self, other, sentence):
        plain = {"objective": "paper", "credit": "uniform", "scale": "none"}
        method(**plain).check(OmegaConf.create({}))
        with pytest.raises(CompositionError) as error:
            method(**plain | other).check(OmegaConf.create({}))
        sentence(error.value, *other)

    @pytest.mark.parametrize(("credit", "warned"), [("sum-mean", True), ("std", False)])
    def test_a_pair_the_authors_avoid_is_warned_of(self, credit, warned, caplog):
        caplog.set_level(logging.WARNING)
        method(credit=credit, natural_baseline_adv=True).check(OmegaConf.create({}))
        assert ("natural_baseline_adv" in caplog.text) == warned

    def test_the_authors_settings_are_possible(self):
        for field in dataclasses.fields(RiskPo.Config):
            assert field.metadata.get("authors", field.default) == field.default
        easy = {"quantile_up": 0.9, "credit": "std", "natural_baseline_adv": True}
        method(**easy).check(OmegaConf.create({}))


def test_metrics():
    run, plugin = FakeRun(), method(credit="uniform", scale="none", bundle_size=1)
    estimate(*prompts_of(list(range(11)), [4] * 11), run, plugin)
    assert run.metrics["papers"] == 22
    assert (run.metrics["q_alpha"], run.metrics["q_beta"]) == pytest.approx((3, 6))
    assert run.metrics["papers_below"] == run.metrics["papers_above"] == pytest.approx(2 / 22)
    assert run.metrics["zero_std_bundles"] == 0.5
    assert run.metrics["cvar"] == pytest.approx((0 + 1 + 2 + 11 * 4) / 14)
    assert run.metrics["rvar"] == pytest.approx((2 + 3 + 4 + 5 + 6 + 7 + 8 + 11 * 4) / 18)
    assert run.metrics["mixed_risk"] == pytest.approx((1.5 * run.metrics["cvar"] + run.metrics["rvar"]) / 2.5)
    assert run.metrics["abs_adv_max"] >= -run.metrics["paper_advantage_min"] > 0
    assert run.metrics["quantile_0.50"] == 4
    assert run.metrics["surplus_responses"] == 0


class TestAbsentPapers:
    """Groups of different size: a bundle has as many papers as its smallest group."""

    UID = ["1-1-0"] * 4 + ["2-1-0"] * 2 + ["3-1-0"] * 3
    SCORES = [1.0, 0, 1, 1, 1, 0, 0, 1, 1]

    def papers(self, bundle: list[int]):
        groups, session = Groups(self.UID), torch.tensor([0, 1, 2, 3, 0, 1, 0, 1, 2])
        return make_papers(torch.tensor(self.SCORES), groups, session, torch.tensor(bundle))

    def test_table(self):
        papers = self.papers([0, 0, 1])
        assert papers.there.tolist() == [[True, True, False], [True, True, True]]
        assert papers.scores.tolist() == [[2, 0, 0], [0, 1, 1]]
        assert papers.prompts.tolist() == [2, 1]
        assert papers.spread(torch.tensor([[1.0, 2, 9], [3, 4, 5]])).tolist() == [1, 2, 0, 0, 1, 2, 3, 4, 5]

    def test_they_are_no_part_of_quantiles_and_std(self):
        papers = self.papers([0, 0, 1])
        low, high = bundle_quantiles(papers, (0.2, 0.8))
        assert low.flatten().tolist() == pytest.approx([0.4, 0.4])
        assert high.flatten().tolist() == pytest.approx([1.6, 1.0])
        assert bundle_std(papers).flatten().tolist() == pytest.approx([2**0.5, (1 / 3) ** 0.5])

    def test_one_paper(self):
        papers = make_papers(
            torch.tensor([1.0, 0, 1]), Groups(["1-1-0"] * 2 + ["2-1-0"]), torch.tensor([0, 1, 0]), torch.tensor([0, 0])
        )
        assert papers.scores.tolist() == [[2]] and bundle_std(papers).tolist() == [[1]]
        assert [float(q) for q in bundle_quantiles(papers, (0.2, 0.8))] == [2, 2]
        assert estimate(["1-1-0"] * 2 + ["2-1-0"], [1.0, 0.0, 1.0], bundle_size=2).tolist() == [0, 0, 0]
