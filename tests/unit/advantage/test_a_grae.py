"""A-GRAE: weights for right and wrong answers, easy and hard prompts, by the mean reward of the batch."""

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

from verl_plugins import CompositionError, DataError
from verl_plugins.advantage.a_grae import AGrae, attention_shift
from verl_plugins.commands import cli

FEW = settings(max_examples=50, deadline=None)
VARIANTS = st.sampled_from(["paper", "code"])


def estimate(uid, scores, run=None, fields=None, **options) -> torch.Tensor:
    batch = batch_of(uid, scores, **(fields or {}))
    return per_row(AGrae(AGrae.Config(**options)).estimate_advantage(run or FakeRun(), batch))


@st.composite
def rewards(draw) -> tuple[list[str], list[float]]:
    """Outcomes between 0 and 1."""
    uid, scores = draw(outcomes())
    return uid, [abs(score) for score in scores]


def groups_of(*groups: list[float]) -> tuple[list[str], list[float]]:
    """One prompt for each list of scores."""
    uid = [f"{number}-1-0" for number, scores in enumerate(groups) for _ in scores]
    return uid, [float(score) for scores in groups for score in scores]


class TestLaws:
    @FEW
    @given(rewards(), st.randoms(use_true_random=False), VARIANTS)
    def test_row_order_does_not_matter(self, rows, random, variant):
        uid, scores = rows
        order = random.sample(range(len(uid)), len(uid))
        found = estimate([uid[row] for row in order], [scores[row] for row in order], variant=variant)
        torch.testing.assert_close(estimate(uid, scores, variant=variant)[order], found)

    @FEW
    @given(rewards(), VARIANTS)
    def test_float32_suffices(self, rows, variant):
        double = estimate(*rows, variant=variant, fields={"dtype": torch.float64})
        torch.testing.assert_close(estimate(*rows, variant=variant), double, rtol=1e-4, atol=1e-5)

    @FEW
    @given(rewards(), VARIANTS)
    def test_signs_are_those_of_grpo(self, rows, variant):
        batch = batch_of(*rows)
        found = estimate(*rows, variant=variant)
        above = batch.scores - batch.groups.mean(batch.scores)
        several = batch.groups.count() > 1
        assert (found * above >= 0)[several].all()

    @pytest.mark.parametrize("variant", ["paper", "code"])
    @pytest.mark.parametrize("score", [0.0, 0.1, 1 / 3, 0.7, 1.0])
    @pytest.mark.parametrize("size", [2, 5, 12, 64])
    def test_equal_groups_are_exactly_zero(self, size, score, variant):
        found = estimate(*groups_of([score] * size, [0, 1, 0]), variant=variant)
        assert (found[:size] == 0).all()
        assert (found[size:] != 0).all()

    def test_padding_width(self):
        rows = groups_of([1, 0, 1], [0, 0, 1])
        assert torch.equal(estimate(*rows), estimate(*rows, fields={"tokens": 9}))


class TestSampleLevel:
    """Eq. 12."""

    @pytest.mark.parametrize("right", range(1, 8))
    def test_the_easy_term_weighs_prompts_by_their_root(self, right):
        # The identity the paper builds on, with the unbiased std: the sum of |A| is G sqrt(p) sqrt((G-1)/G).
        rows = groups_of([1] * right + [0] * (8 - right))
        found = estimate(*rows, sample_level="easy", group_level="none").abs().sum()
        assert found == pytest.approx(8 * math.sqrt(right / 8) * math.sqrt(7 / 8), rel=1e-4)

    @pytest.mark.parametrize("right", range(1, 8))
    def test_the_hard_term_by_that_of_failing(self, right):
        rows = groups_of([1] * right + [0] * (8 - right))
        found = estimate(*rows, sample_level="hard", group_level="none").abs().sum()
        assert found == pytest.approx(8 * math.sqrt(1 - right / 8) * math.sqrt(7 / 8), rel=1e-4)

    def test_proficiency_moves_weight_to_hard_prompts(self):
        rates = torch.tensor([1 / 8, 7 / 8])
        weak, strong = attention_shift(rates, 0.1), attention_shift(rates, 0.9)
        assert weak[1] > weak[0] and strong[0] > strong[1]

    def test_the_code_overweighs_easy_prompts(self):
        paper, code = (attention_shift(torch.tensor([7 / 8, 15 / 16]), 0.0, variant=v) for v in ("paper", "code"))
        assert (code / paper).tolist() == pytest.approx([5.47, 7.87], rel=1e-2)

    def test_solved_and_unsolved_prompts_are_left_alone(self):
        for variant in ("paper", "code"):
            assert attention_shift(torch.tensor([0.0, 1.0]), 0.3, variant=variant).tolist() == [1, 1]


class TestGroupLevel:
    """Eq. 13."""

    ROWS = groups_of([1, 0, 0, 0], [1, 1, 0, 0])

    @pytest.mark.parametrize(("alpha", "scale"), [(1.0, 3 / 8), (0.5, 3 / 4), (0.25, 1.0)])
    def test_right_answers_are_attenuated(self, alpha, scale):
        plain = estimate(*self.ROWS, group_level="none")
        found = estimate(*self.ROWS, alpha=alpha)
        torch.testing.assert_close(found, torch.where(plain > 0, scale * plain, plain))

    @pytest.mark.parametrize(("level", "factor"), [("positive", 10), ("negative", 0.1)])
    def test_controls(self, level, factor):
        plain = estimate(*self.ROWS, sample_level="none", group_level="none")
        found = estimate(*self.ROWS, sample_level="none", group_level=level)
        torch.testing.assert_close(found, torch.where(plain > 0, factor * plain, plain))

    def test_nothing_right_nothing_learnt(self):
        assert (estimate(*groups_of([0, 0, 0], [0, 0])) == 0).all()


class TestOmega:
    """Eq. 11: over responses, or in the code over prompts."""

    def omega(self, rows, **options) -> float:
        run = FakeRun()
        estimate(*rows, run, **options)
        return run.metrics["omega"]

    def test_over_responses(self):
        rows = groups_of([1, 1, 1, 1], [0, 0], [1])
        assert self.omega(rows) == pytest.approx(5 / 7)
        assert self.omega(rows, variant="code") == pytest.approx(1 / 3), "a response without siblings counts 0"

    def test_each_session_once(self):
        uid, scores = groups_of([0, 1, 0])
        fields = {"session": [0, 0, 1], "turn": [0, 1, 0]}
        assert self.omega((uid, scores), fields=fields) == 0.5

    def test_from_a_part_of_the_reward(self):
        uid, scores = groups_of([3.0, 0.5, -1.0], [0.5, 0.5, 3.0])
        parts = [{"reward_extra_info": {"acc": float(score == 3)}} for score in scores]
        fields = {"extra_fields": parts}
        assert self.omega((uid, scores), correctness_key="acc", fields=fields) == pytest.approx(1 / 3)
        found = estimate(uid, scores, correctness_key="acc", fields=fields, group_level="none")
        assert (found != 0).all()

    @pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("variant", ["paper", "code"])
    @pytest.mark.parametrize("scale", ["std", "none"])
    def test_a_lone_response_gets_nothing(self, score, variant, scale):
        for level in ("dynamic", "none"):
            found = estimate(*groups_of([score], [1, 0, 0]), variant=variant, scale=scale, group_level=level)
            assert found[0] == 0 and (found[1:] != 0).all()

    @pytest.mark.parametrize("score", [1 + 5e-7, 1 + 1e-7, -5e-7])
    @pytest.mark.parametrize("variant", ["paper", "code"])
    def test_a_score_just_beyond_its_range(self, score, variant):
        rows = groups_of([score, round(score)], [1, 0, 0])
        found = estimate(*rows, variant=variant, scale="none", fields={"dtype": torch.float64})
        assert torch.isfinite(found).all() and (found[:2].abs() < 1e-3).all()

    @pytest.mark.parametrize("score", [1 + 1e-5, -1e-5])
    def test_further_out_is_refused(self, score):
        with pytest.raises(DataError):
            estimate(*groups_of([score, 1, 0]))

    def test_shares_of_hard_and_easy_prompts(self):
        """A third is medium, two thirds are easy."""
        run, rows = FakeRun(), groups_of([1, 0, 0], [1, 1, 0], [0, 0, 0, 1], [1, 1, 1], [0, 0])
        found = estimate(*rows, run=run, scale="none")
        sizes = found.abs().split([3, 3, 4, 3, 2])
        easy, hard = torch.cat([sizes[1], sizes[3]]), torch.cat([sizes[2], sizes[4]])
        logged = {name: run.metrics[name] for name in ("weight_medium", "weight_easy", "weight_hard")}
        assert logged == pytest.approx(
            {
                "weight_medium": float(sizes[0].mean()),
                "weight_easy": float(easy.mean()),
                "weight_hard": float(hard.mean()),
            }
        )
        assert (run.metrics["frac_solved_all"], run.metrics["frac_solved_none"]) == pytest.approx((0.2, 0.2))
        right = float(found.clamp(min=0).sum())
        assert run.metrics["positive_weight"] == pytest.approx(right)
        assert run.metrics["negative_weight"] == pytest.approx(float(found.abs().sum()) - right)
        assert run.metrics["positive_share"] == pytest.approx(right / float(found.abs().sum()))

    def test_a_lone_response_counts_in_omega(self):
        assert self.omega(groups_of([1], [1, 0, 0])) == pytest.approx(0.5)
        assert self.omega(groups_of([1], [1, 0, 0]), variant="code") == pytest.approx(1 / 6)


class TestRefusals:
    @pytest.mark.parametrize("scores", [[-1, 1], [0, 2]])
    def test_scores_out_of_range(self, scores, sentence):
        with pytest.raises(DataError) as error:
            estimate(*groups_of(scores, [0, 1]))
        sentence(error.value, "[0, 1]", "plugins.a_grae.correctness_key")

    def test_part_that_is_no_number(self, sentence):
        fields = {"extra_fields": [{"reward_extra_info": {"pred": "7"}}] * 2}
        with pytest.raises(DataError) as error:
            estimate(*groups_of([0, 1]), correctness_key="pred", fields=fields)
        sentence(error.value, "plugins.a_grae.correctness_key='pred'")

    @pytest.mark.parametrize(
        ("config", "names"),
        [
            ({"actor_rollout_ref": {"rollout": {"n": 1}}}, "actor_rollout_ref.rollout.n=1"),
            ({"algorithm": {"norm_adv_by_std_in_grpo": False}}, "plugins.a_grae.scale=none"),
            ({"algorithm": {"use_kl_in_reward": True}}, "algorithm.use_kl_in_reward=true"),
        ],
    )
    def test_impossible_settings(self, config, names, sentence):
        with pytest.raises(CompositionError) as error:
            AGrae(AGrae.Config()).check(OmegaConf.create(config))
        sentence(error.value, names)

    def test_possible_settings(self):
        config = OmegaConf.create({"algorithm": {"norm_adv_by_std_in_grpo": False, "use_kl_in_reward": True}})
        AGrae(AGrae.Config(scale="none", correctness_key="acc")).check(config)

    def test_filtered_groups_are_warned_of(self, caplog):
        caplog.set_level(logging.WARNING)
        AGrae(AGrae.Config()).check(OmegaConf.create({"algorithm": {"filter_groups": {"enable": True}}}))
        assert "algorithm.filter_groups" in caplog.text

    def test_another_estimator_is_refused_by_both_names(self, capsys, monkeypatch, sentence):
        monkeypatch.setattr("sys.argv", ["verl-plugins", "run", "bnpo+a_grae", "--preset", "cpu", "--dry-run"])
        with pytest.raises(SystemExit) as error:
            cli.main()
        assert error.value.code == 2
        sentence(capsys.readouterr().err.strip(), "'bnpo'", "'a_grae'", "estimate_advantage")


def test_metrics():
    run = FakeRun()
    estimate(*groups_of([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]), run, sample_level="none")
    assert run.metrics["omega"] == run.metrics["pos_scale"] == pytest.approx(7 / 16)
    assert run.metrics["frac_solved_all"] == run.metrics["frac_solved_none"] == 0.25
    assert run.metrics["positive_weight"] == pytest.approx(7 / 16 * run.metrics["negative_weight"], rel=1e-5)
    assert run.metrics["positive_share"] == pytest.approx(7 / 23, rel=1e-5)
    assert run.metrics["weight_easy"] == 0 < run.metrics["weight_hard"] < run.metrics["weight_medium"]


def test_the_codes_epsilon_is_added():
    """Of a prompt that hardly anybody solves it decides the factor."""
    rare = torch.tensor([1e-12], dtype=torch.float64)
    found = attention_shift(rare, 1.0, variant="code")
    assert float(found) == pytest.approx(0.5 / (1e-6 + 1e-6), rel=1e-6)
    common = attention_shift(1 - rare, 0.0, variant="code")
    assert float(common) == pytest.approx(0.5 / (1e-6 + 5e-13), rel=1e-6)


def test_epsilon_is_added_to_the_std():
    plain = {"sample_level": "none", "group_level": "none"}
    found = estimate(*groups_of([1, 0]), epsilon=1.0, **plain).tolist()
    assert found == pytest.approx([0.5 / (0.5**0.5 + 1), -0.5 / (0.5**0.5 + 1)])


def test_shares_of_solved_and_unsolved_prompts_and_of_little_weight():
    run = FakeRun()
    estimate(*groups_of([1, 1], [1, 1], [0, 0], [1, 0]), run, sample_level="none", group_level="none", scale="none")
    assert (run.metrics["frac_solved_all"], run.metrics["frac_solved_none"]) == (0.5, 0.25)
    assert (run.metrics["positive_weight"], run.metrics["positive_share"]) == (0.5, 0.5)
