"""BNPO: a Beta density fitted to the success rates of the batch in the place of the group's std."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from advantages import batch_of, outcomes, per_row
from fakes import FakeRun
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from verl_plugins import Batch, CompositionError, DataError
from verl_plugins.advantage.bnpo import Bnpo, fit, inverse_density

FEW = settings(max_examples=50, deadline=None)
EQUAL = [[], [0.4], [0.5, 0.5], [0.0, 0.0, 0.0], [1 / 3, 1 - 2 / 3 + 1e-8]]
"""Success rates without a spread."""


def estimate(uid, scores, run=None, fields=None, **options) -> torch.Tensor:
    batch = batch_of(uid, scores, **(fields or {}))
    return per_row(Bnpo(Bnpo.Config(**options)).estimate_advantage(run or FakeRun(), batch))


@st.composite
def rewards(draw) -> tuple[list[str], list[float]]:
    """Outcomes between 0 and 1."""
    uid, scores = draw(outcomes())
    return uid, [abs(score) for score in scores]


def groups_of(*groups: list[float]) -> tuple[list[str], list[float]]:
    """One prompt for each list of scores."""
    uid = [f"{number}-1-0" for number, scores in enumerate(groups) for _ in scores]
    return uid, [float(score) for scores in groups for score in scores]


class TestDensity:
    """Moments of the success rates, clamped, and the inverse of the density."""

    @pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (1.5, 1.5), (1.8, 1.1), (40.0, 3.0)])
    def test_is_that_of_torch(self, alpha, beta):
        rates = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
        density = torch.distributions.Beta(*torch.tensor([alpha, beta], dtype=torch.float64))
        expected = (-density.log_prob(rates)).exp().clamp(max=1e6)
        torch.testing.assert_close(inverse_density(rates, alpha, beta), expected)

    def test_three_halves_is_the_std_of_grpo(self):
        rates = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
        expected = (math.pi / 8) / (rates * (1 - rates)).sqrt()
        torch.testing.assert_close(inverse_density(rates, 1.5, 1.5), expected)

    def test_is_bounded_at_the_ends(self):
        assert inverse_density(torch.tensor([0.0, 1.0]), 1.5, 1.5).tolist() == pytest.approx([1e6, 1e6])
        assert inverse_density(torch.tensor([0.0, 1.0]), 1.0, 1.0).tolist() == [1, 1]

    @given(st.lists(st.floats(0, 1), min_size=2, max_size=9))
    def test_never_below_one(self, rates):
        found = fit(torch.tensor(rates))
        assert found.alpha >= 1 and found.beta >= 1
        assert math.isfinite(found.alpha) and math.isfinite(found.beta)

    def test_polarised_rates_give_reinforce(self):
        found = fit(torch.tensor([0.0, 1.0, 0.0, 1.0]))
        assert (found.alpha, found.beta, found.fallback) == (1, 1, False)

    @pytest.mark.parametrize("rates", EQUAL)
    def test_without_spread_mean_and_variance_are_those_of_the_rates(self, rates):
        found = fit(torch.tensor(rates))
        assert found.mean == pytest.approx(sum(rates) / len(rates) if rates else 0.0)
        assert found.variance == pytest.approx(0, abs=1e-6)

    @pytest.mark.parametrize("rates", EQUAL)
    def test_no_spread_to_fit(self, rates):
        found = fit(torch.tensor(rates))
        assert (found.alpha, found.beta, found.fallback) == (1, 1, True)


class TestAdvantage:
    """min(1e6, 1/f(p)) (s - p)."""

    @FEW
    @given(rewards(), st.randoms(use_true_random=False))
    def test_row_order_does_not_matter(self, rows, random):
        uid, scores = rows
        order = random.sample(range(len(uid)), len(uid))
        found = estimate([uid[row] for row in order], [scores[row] for row in order])
        torch.testing.assert_close(estimate(uid, scores)[order], found)

    @FEW
    @given(rewards(), st.sampled_from([(-1.0, 1.0), (0.0, 4.0), (2.0, 3.0)]))
    def test_the_range_of_the_rewards_does_not_matter(self, rows, bounds):
        (uid, scores), (low, high) = rows, bounds
        found = estimate(uid, [low + (high - low) * score for score in scores], reward_min=low, reward_max=high)
        torch.testing.assert_close(estimate(uid, scores), found, rtol=1e-4, atol=1e-5)

    @FEW
    @given(rewards())
    def test_float32_suffices(self, rows):
        double = estimate(*rows, fields={"dtype": torch.float64})
        torch.testing.assert_close(estimate(*rows), double, rtol=1e-4, atol=1e-5)

    @FEW
    @given(rewards())
    def test_centred_within_a_prompt_and_ordered_as_the_scores(self, rows):
        uid, scores = rows
        batch = batch_of(uid, scores)
        advantage = per_row(Bnpo(Bnpo.Config()).estimate_advantage(FakeRun(), batch))
        several = batch.groups.count() > 1
        assert (batch.groups.sum(advantage)[several].abs() < 1e-4).all()
        above = batch.scores - batch.groups.mean(batch.scores)
        assert (advantage * above >= 0)[several].all()

    @pytest.mark.parametrize("score", [0.0, 0.1, 1 / 3, 0.7, 0.9999999, 1.0])
    @pytest.mark.parametrize("size", [2, 5, 12, 64])
    def test_equal_groups_are_exactly_zero(self, size, score):
        found = estimate(*groups_of([score] * size, [0, 1, 0], [1, 1, 0, 1]))
        assert (found[:size] == 0).all()
        assert (found[size:] != 0).all()

    def test_padding_width(self):
        rows = groups_of([1, 0, 1], [0, 0, 1])
        assert torch.equal(estimate(*rows), estimate(*rows, fields={"tokens": 9}))

    @pytest.mark.parametrize("scores", [[[0, 0], [0, 0]], [[1, 1, 1], [1, 1]]])
    def test_nothing_to_learn_from(self, scores):
        assert (estimate(*groups_of(*scores)) == 0).all()

    def test_all_prompts_at_one_rate(self):
        assert estimate(*groups_of([0, 1], [1, 0])).tolist() == [-0.5, 0.5, 0.5, -0.5]

    def test_one_prompt_is_reinforce_with_its_mean(self):
        assert estimate(*groups_of([1, 0, 1, 0, 0])).tolist() == pytest.approx([0.6, -0.4, 0.6, -0.4, -0.4])

    @pytest.mark.parametrize("score", [0.0, 0.4, 1.0])
    def test_a_lone_response_gets_nothing_and_is_no_part_of_the_fit(self, score):
        groups = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
        run, alone = FakeRun(), FakeRun()
        with_it = estimate(*groups_of(*groups, [score]), run)
        without = estimate(*groups_of(*groups), alone)
        assert with_it[-1] == 0
        assert torch.equal(with_it[:-1], without)
        assert run.metrics == pytest.approx(alone.metrics | {"advantage_var": run.metrics["advantage_var"]})

    def test_each_prompt_counts_once(self):
        run, other = FakeRun(), FakeRun()
        estimate(*groups_of([1, 0], [1, 1, 1, 0]), run)
        estimate(*groups_of([1, 1, 0, 0], [1, 1, 1, 0]), other)
        assert run.metrics["alpha"] == pytest.approx(other.metrics["alpha"])

    def test_sessions_of_several_outputs_count_once(self):
        uid, scores = groups_of([1, 1, 0], [0, 1])
        fields = {"session": [0, 0, 1, 0, 1], "turn": [0, 1, 0, 0, 0]}
        found = estimate(uid, [0.0, *scores[1:]], fields=fields)
        assert found.tolist() == pytest.approx([0.5, 0.5, -0.5, -0.5, 0.5])


def with_parts(uid, fields=None, **parts) -> Batch:
    """Responses with these parts of the reward."""
    info = [dict(zip(parts, values, strict=True)) for values in zip(*parts.values(), strict=True)]
    info = [{"reward_extra_info": one} for one in info]
    return batch_of(uid, [0.0] * len(uid), extra_fields=info, **(fields or {}))


class TestComponents:
    """Each alone, then the mean."""

    UID = groups_of([0] * 3, [0] * 3, [0] * 2)[0]
    RIGHT = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    SHAPE = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]

    def test_mean_of_each_alone(self):
        plugin = Bnpo(Bnpo.Config(components=["right", "shape"]))
        found = per_row(plugin.estimate_advantage(FakeRun(), with_parts(self.UID, right=self.RIGHT, shape=self.SHAPE)))
        alone = [estimate(self.UID, values) for values in (self.RIGHT, self.SHAPE)]
        torch.testing.assert_close(found, sum(alone) / 2)

    def test_a_saturated_one_counts(self):
        plugin, run = Bnpo(Bnpo.Config(components=["right", "shape"])), FakeRun()
        found = per_row(plugin.estimate_advantage(run, with_parts(self.UID, right=self.RIGHT, shape=[1.0] * 8)))
        torch.testing.assert_close(found, estimate(self.UID, self.RIGHT) / 2)
        assert (run.metrics["fallback/shape"], run.metrics["fallback/right"]) == (1, 0)

    def test_each_session_by_its_last_output(self):
        fields = {"session": [0, 0, 1, 0, 1], "turn": [0, 1, 0, 0, 0]}
        batch = with_parts(groups_of([0] * 3, [0] * 2)[0], fields, right=[0.0, 1.0, 0.0, 0.0, 1.0])
        found = per_row(Bnpo(Bnpo.Config(components=["right"])).estimate_advantage(FakeRun(), batch))
        assert found.tolist() == pytest.approx([0.5, 0.5, -0.5, -0.5, 0.5])

    @pytest.mark.parametrize(
        ("parts", "text"),
        [({"shape": SHAPE}, "'right'"), ({"right": ["a"] * 8}, "'right', which is not a number per response")],
    )
    def test_without_numbers(self, parts, text, sentence):
        with pytest.raises(DataError) as error:
            Bnpo(Bnpo.Config(components=["right"])).estimate_advantage(FakeRun(), with_parts(self.UID, **parts))
        sentence(error.value, text)

    def test_out_of_range_is_named(self, sentence):
        batch = with_parts(self.UID, right=[2 * value for value in self.RIGHT])
        with pytest.raises(DataError) as error:
            Bnpo(Bnpo.Config(components=["right"])).estimate_advantage(FakeRun(), batch)
        sentence(error.value, "the component 'right' goes from 0 to 2", "plugins.bnpo.reward_max")


class TestRefusals:
    @pytest.mark.parametrize("scores", [[-1, 1], [0, 1.01], [float("nan"), 0]])
    def test_scores_out_of_range(self, scores, sentence):
        with pytest.raises(DataError) as error:
            estimate(*groups_of(scores, [0, 1]))
        sentence(error.value, "finite" if math.isnan(scores[0]) else "plugins.bnpo.reward_min")

    def test_rounding_is_not_out_of_range(self):
        assert estimate(*groups_of([1.0000001, 0], [0, 1.0000001])).tolist() == pytest.approx([0.5, -0.5, -0.5, 0.5])

    def test_rounding_is_measured_by_the_range(self):
        scores, bounds = [1.0000001, -1], {"reward_min": -1.0, "reward_max": 1.0}
        found = estimate(*groups_of(scores, scores[::-1]), **bounds).tolist()
        assert found == pytest.approx([0.5, -0.5, -0.5, 0.5])

    @pytest.mark.parametrize(
        ("options", "config", "names"),
        [
            ({"reward_min": 1.0}, {}, "plugins.bnpo.reward_max=1.0"),
            ({}, {"actor_rollout_ref": {"rollout": {"n": 1}}}, "actor_rollout_ref.rollout.n=1"),
            ({}, {"algorithm": {"use_kl_in_reward": True}}, "algorithm.use_kl_in_reward=true"),
        ],
    )
    def test_impossible_settings(self, options, config, names, sentence):
        with pytest.raises(CompositionError) as error:
            Bnpo(Bnpo.Config(**options)).check(OmegaConf.create(config))
        sentence(error.value, names)

    @pytest.mark.parametrize("enable", [True, False])
    def test_filtered_groups_are_warned_of(self, enable, caplog):
        caplog.set_level(logging.WARNING)
        Bnpo(Bnpo.Config()).check(OmegaConf.create({"algorithm": {"filter_groups": {"enable": enable}}}))
        assert ("algorithm.filter_groups" in caplog.text) == enable


def test_metrics():
    run = FakeRun()
    estimate(*groups_of([0, 0, 0, 1], [0, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]), run)
    # rates 1/4 3/4 1/2 1/2 1: mean 0.6, variance 0.08125, c = 0.24/0.08125 - 1
    concentration = 0.24 / 0.08125 - 1
    assert run.metrics["p_mean"] == pytest.approx(0.6)
    assert run.metrics["p_var"] == pytest.approx(0.08125)
    assert run.metrics["alpha"] == pytest.approx(1 + concentration * 0.6 / 3)
    assert run.metrics["beta"] == pytest.approx(1 + concentration * 0.4 / 3)
    assert (run.metrics["frac_p0"], run.metrics["frac_p1"]) == (0, pytest.approx(0.2))
    assert run.metrics["weight_min"] < run.metrics["weight_mean"] < run.metrics["weight_max"] < 1e3
    assert run.metrics["fallback"] == 0
    estimate(*groups_of([1, 0], [0, 1]), run)  # equal rates: advantages of a half and minus a half
    assert run.metrics["advantage_var"] == pytest.approx(0.25)


class TestRounding:
    """Sums of float32 are not exact: neither weights nor densities may see that."""

    @pytest.mark.parametrize(("apart", "fallback"), [(6e-8, True), (5e-7, True), (2e-6, False), (1e-3, False)])
    def test_rates_that_hardly_differ_are_one_rate(self, apart, fallback):
        found = fit(torch.tensor([0.5, 0.5 + apart, 0.5], dtype=torch.float64))
        assert found.fallback == fallback
        assert (found.alpha == found.beta == 1) == fallback

    def test_weights_do_not_explode_where_rates_hardly_differ(self):
        third = [1 / 3 + 6e-8, 1 / 3, 1 / 3 - 1e-7]
        found = estimate(*groups_of(third, [1 / 3] * 3, [0.0, 1 / 3, 2 / 3]))
        assert found.abs().max() <= 1 / 3 + 1e-6

    @pytest.mark.parametrize("beyond", [1e-7, 9e-7])
    def test_a_score_just_beyond_its_range_counts_as_its_end(self, beyond):
        rows = groups_of([1, 1, 0], [1, 1, 1], [0, 0, 0])
        moved = [1 + beyond if score == 1 else -beyond for score in rows[1]]
        found = estimate(rows[0], moved, fields={"dtype": torch.float64})
        assert torch.equal(found, estimate(*rows, fields={"dtype": torch.float64})) and torch.isfinite(found).all()
        wide = [3 * score + 2 for score in moved]  # as much beyond, in relation to the range
        moved = estimate(rows[0], wide, fields={"dtype": torch.float64}, reward_min=2.0, reward_max=5.0)
        torch.testing.assert_close(moved, found)

    @pytest.mark.parametrize("score", [1 + 1e-5, -1e-5, math.nan])
    def test_further_out_is_refused(self, score):
        with pytest.raises(DataError):
            estimate(*groups_of([score, 0.0, 1.0]))

    def test_metrics_of_solved_and_unsolved_prompts(self):
        run = FakeRun()
        estimate(*groups_of([0, 0], [0, 0], [1, 1], [1, 0], [0.5, 1]), run)
        found = run.metrics
        assert (found["frac_p0"], found["frac_p1"]) == pytest.approx((0.4, 0.2))
        density = inverse_density(torch.tensor([0.5, 0.75]), found["alpha"], found["beta"])
        assert found["weight_min"] == pytest.approx(float(density.min()))
        assert found["weight_max"] == pytest.approx(float(density.max()))
        assert found["weight_mean"] == pytest.approx(float(density.mean()))
        rates = torch.tensor([0.0, 0, 1, 0.5, 0.75])
        assert (found["p_mean"], found["p_var"]) == pytest.approx((float(rates.mean()), float(rates.var())))

    def test_two_prompts_are_enough_to_fit(self):
        assert not fit(torch.tensor([0.25, 0.75])).fallback

    @pytest.mark.parametrize(("n", "refused"), [(1, True), (2, False)])
    def test_two_responses_are_enough_to_compare(self, n, refused):
        config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"n": n}}})
        if not refused:
            return Bnpo(Bnpo.Config()).check(config)
        with pytest.raises(CompositionError, match="rollout.n=1"):
            Bnpo(Bnpo.Config()).check(config)
